"""`regraft check`: will the old weights still work?"""

from typing import Annotated

import typer

from regraft.cli import options


def check(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.AdaptationFolder,
    task: options.TaskFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    precision: options.Precision = "auto",
    force: options.Force = False,
) -> None:
    """Put old weights on the new base as they are, and say what the upgrade did to them."""
    import dataclasses
    import json

    from regraft.cli import show
    from regraft.diagnosis import check as run
    from regraft.tuning import Recipe
    from regraft.upgrade import Upgrade

    with show.progress() as progress:
        result = run(
            Upgrade(old_base, new_base),
            adaptation,
            task,
            recipe=Recipe(precision=precision),
            force=force,
            progress=progress,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return
    show.check(result)
