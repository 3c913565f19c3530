"""`regraft check`: will the old weights still work?"""

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options


def check(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.AdaptationFolder,
    task: options.TaskFile,
    deep: Annotated[
        bool, typer.Option("--deep", help="Look at connectivity, attention heads, distances, flips, and more.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for diagnosis.json, which `regraft report` shows.")] = None,
    counterpart: Annotated[
        list[str] | None,
        typer.Option(help="An outcome of the same task on the new base to compare with; further ones of other seeds."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="A base on the way from the old to the new one; repeat it, in order.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Unlabelled text of the new base's domain; by default the task's own.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points of the segment between the deployments.", min=3)] = 11,
    plane: Annotated[int, typer.Option(help="Points a side of the loss plane; 0 for none.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    precision: options.Precision = "auto",
    force: options.Force = False,
) -> None:
    """Put old weights on the new base as they are, and say what the upgrade did to them."""
    import dataclasses
    import json

    from regraft.cli import findings, show
    from regraft.diagnosis import Check, Diagnosis, Questions, diagnose
    from regraft.diagnosis import check as run
    from regraft.errors import RecipeError
    from regraft.tuning import Recipe
    from regraft.upgrade import Upgrade

    if not deep and (out or counterpart or checkpoint or text or plane):
        raise RecipeError("--out, --counterpart, --checkpoint, --text and --plane go with --deep.")
    upgrade, recipe = Upgrade(old_base, new_base), Recipe(precision=precision)
    result: Check | Diagnosis
    with show.progress() as progress:
        if deep:
            asked = Questions(
                points=points, counterparts=tuple(counterpart or ()), checkpoints=tuple(checkpoint or ()),
                text=tuple(text or ()), plane=plane,
            )  # fmt: skip
            result = diagnose(
                upgrade, adaptation, task, out, questions=asked, recipe=recipe, force=force, progress=progress
            )
        else:
            result = run(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    elif isinstance(result, Diagnosis):
        findings.diagnosis(result, out)
    else:
        findings.check(result)
