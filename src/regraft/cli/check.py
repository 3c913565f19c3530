"""`regraft check`: measure whether the old weights still work on the new base."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import regraft
from regraft.cli import options
from regraft.errors import RecipeError


def check(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.Adaptation,
    task: options.Task,
    out: Annotated[
        Path | None, typer.Option(help="With --deep: folder for diagnosis.json, which `regraft report` reads.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Examine connectivity, attention heads, distances, flips and more.")
    ] = False,
    counterpart: Annotated[
        list[str] | None,
        typer.Option(help="With --deep: outcome on the new base to compare with; repeat for other seeds."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="With --deep: base between the old and the new one; repeat in order."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="With --deep: unlabelled text of the new base's domain; by default the task's own."),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(help="With --deep: points on the segment between the two deployments; by default 11.", min=3),
    ] = None,
    plane: Annotated[int, typer.Option(help="With --deep: points per side of the loss plane; 0 for none.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    precision: Annotated[str, typer.Option(help="bf16, fp32, or auto: bf16 where the device computes in it.")] = "auto",
    force: options.Force = False,
) -> None:
    """Put the old weights on the new base unchanged, and measure what the upgrade did to them."""
    from regraft.cli.terminal import show_progress

    upgrade = regraft.Upgrade(old_base, new_base)
    recipe = regraft.Recipe(precision=precision)
    if deep:
        questions = regraft.Questions(
            points=regraft.Questions.points if points is None else points,
            counterparts=tuple(counterpart or ()),
            checkpoints=tuple(checkpoint or ()),
            text=tuple(text or ()),
            plane=plane,
        )
        with show_progress() as progress:
            diagnosis = regraft.diagnose(
                upgrade,
                adaptation,
                task,
                out,
                questions=questions,
                recipe=recipe,
                force=force,
                progress=progress,
            )
        if as_json:
            _print_json(diagnosis)
        else:
            print_diagnosis(diagnosis, out)
        return
    if out or counterpart or checkpoint or text or points or plane:
        raise RecipeError("--out, --counterpart, --checkpoint, --text, --points and --plane need --deep.")
    with show_progress() as progress:
        result = regraft.check(upgrade, adaptation, task, recipe=recipe, force=force, progress=progress)
    if as_json:
        _print_json(result)
    else:
        print_check(result)


def _print_json(result: "regraft.Check | regraft.Diagnosis") -> None:
    print(json.dumps(dataclasses.asdict(result), indent=2))


def print_check(check: "regraft.Check") -> None:
    """Print the figures of a check, one per line, then its verdict.

    Args:
        check: The result of `regraft.check`.
    """
    from regraft.cli.terminal import print_pairs, print_text
    from regraft.diagnosis.check import describe

    print_pairs(describe(check))
    print_text(check.verdict, style="bold")


def print_diagnosis(diagnosis: "regraft.Diagnosis", out: Path | None) -> None:
    """Print the figures of a diagnosis, one per line, then its verdict.

    Args:
        diagnosis: The result of `regraft.diagnose`.
        out: The folder that its record was written to; None if it was not written.
    """
    from regraft.cli.terminal import print_line, print_pairs, print_text
    from regraft.diagnosis import all_questions

    answers = diagnosis.answers
    groups = [
        question.describe(answers[question.name], diagnosis.metric)
        for question in all_questions()
        if question.name in answers
    ]
    if diagnosis.compared != "direct":
        # the figures of the check, which come first, are those of direct
        groups.insert(1, [("compared below", f"the old deployment with {diagnosis.compared}")])
    groups.append([(f"no {name}", reason) for name, reason in diagnosis.left_out.items()])
    print_pairs([pair for group in groups for pair in group])
    verdict = diagnosis.verdict
    certainty = "" if verdict.predicted is None else f" ({verdict.sure:.0%} sure)"
    print_text(f"{verdict.choice}{certainty}: {verdict.advice}", style="bold")
    if out is not None:
        print_line(f"regraft report {out} --out report.html shows it all")
