"""`regraft recycle`: carry an adaptation over to the new base."""

from typing import Annotated

import typer

import regraft
from regraft.cli import options
from regraft.errors import MAX_LISTED


@options.recipe_flags()
def recycle(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.Adaptation,
    task: options.Task,
    out: options.Out,
    recipe: "regraft.Recipe",
    method: Annotated[
        str, typer.Option(help="Method: a name that `regraft methods` lists, or START+OBJECTIVE.")
    ] = "init+distill",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the method, as in -o alpha=0.9.")
    ] = None,
    head: Annotated[
        str,
        typer.Option(help="copy: keep the old head; resize: match labels by name; fresh: use a new head."),
    ] = "copy",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Copy, not graft, the embeddings, norms and biases that an adapter stores.",
        ),
    ] = False,
    served_base: options.ServedBase = None,
    shots: options.Shots = None,
    report_to: options.ReportTo = None,
    force: options.Force = False,
) -> None:
    """Carry an adaptation over to the new base by one method."""
    from regraft.cli.terminal import show_progress
    from regraft.methods import parse_options
    from regraft.tuning import tracking

    method_options = parse_options(method, option or ())
    with show_progress() as progress, tracking(report_to or (), options.log_folder(out)):
        outcome = regraft.recycle(
            regraft.Upgrade(old_base, new_base),
            adaptation,
            regraft.Task.load(task).with_shots(shots),
            method,
            out,
            recipe=recipe,
            options=method_options,
            head=head,  # type: ignore[arg-type]
            replace=replace,
            served_base=served_base,
            force=force,
            progress=progress,
        )
    print_outcome(outcome)


def print_outcome(outcome: "regraft.Outcome") -> None:
    """Print an outcome's scores, notes, cost and folder.

    Args:
        outcome: The outcome of a method or of a tuning.
    """
    from regraft.adaptation.outcome_record import ANSWER_LOSS
    from regraft.cli.terminal import print_line, print_text
    from regraft.task import find_metric

    record = outcome.record
    scores, notes = record.scores, record.notes
    metric, curve_metric = find_metric(record.task.metric), find_metric(record.task.curve_metric)
    figures = [
        f"{split} {metric.format_score(score, 4)}"
        for split in ("dev", "test")
        if (score := scores.of(split)) is not None
    ]
    summary = f"{record.task.metric} {', '.join(figures)}" if figures else "not scored: the task has no labels"
    if record.curve_is_agreement:
        reason = ANSWER_LOSS if notes.get("score") == ANSWER_LOSS else "agreement with the old model"
        summary += f" (best at step {record.best_step} by {reason})"
    elif scores.dev_at_start is not None and record.cost.steps:
        start = curve_metric.format_score(scores.dev_at_start, 4)
        dev = f"dev {record.task.selection}" if record.task.selection else "dev"
        summary += f" ({dev} before the first step {start}, best at step {record.best_step})"
    print_text(f"{record.method} ({record.kind}): {summary}")
    for name in ("why", "cannot_know"):
        if isinstance(note := notes.get(name), str):
            print_text(note)
    passed_over = notes.get("passed_over")
    if passed_over and isinstance(passed_over, dict):
        reasons = [f"{layer}: {reason}" for layer, reason in passed_over.items()]
        print_text(f"{len(reasons)} layers carry their old delta unchanged ({_list_some(reasons, '; ')})")
    if grafted := notes.get("grafted_in_place_of_the_base"):
        print_text(
            f"{len(grafted)} stored tensors that replace the base's were grafted: only their change was carried over "
            f"({_list_some(grafted, ', ')})"
        )
    print_text(f"{record.cost.steps} steps, {record.cost.seconds:.0f} s, {record.cost.labels} labelled examples")
    print_line(f"outcome: {outcome.path}")


def _list_some(items: list[str], separator: str) -> str:
    """Join the first items, with an ellipsis if there are more."""
    return separator.join([*items[:MAX_LISTED], *(["…"] if len(items) > MAX_LISTED else [])])
