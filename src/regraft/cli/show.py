"""How the command line shows progress and figures."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from regraft.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

    from regraft.adaptation import Adaptation, Outcome
    from regraft.base import Base
    from regraft.chain import ChainRow
    from regraft.checkpoint import Checkpoint, Plan
    from regraft.methods import Comparison
    from regraft.progress import Progress as Callback
    from regraft.weights import Distance


class _Terminal(Console):
    """A console that no text from a file can steer: what it writes itself, as colours, is apart from text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = _Terminal()
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress() -> Iterator[Callback]:
    """Show a live bar a stage on a terminal, and a line now and then elsewhere.

    Yields:
        The callback to hand down.
    """
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        stages: dict[str, int] = {}

        def show(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if stage not in stages:
                for other in stages.values():
                    bars.update(other, visible=False)  # type: ignore[arg-type]
                stages[stage] = bars.add_task(escape(stage), total=total, figures="")
            task = stages[stage]
            bars.update(task, completed=done, total=total or done, figures=_figures(figures), visible=True)  # type: ignore[arg-type]

        yield show


class _Lines:
    """Prints the state every few seconds, for logs and pipes."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            console.print(f"{escape(stage)} {done:,}/{total or '?'} {_figures(figures)}", highlight=False)


def outcome(result: Outcome) -> None:
    """Print what an outcome holds, in a few lines.

    Args:
        result: The outcome.
    """
    record = result.record
    scores, cost, notes = record.scores, record.cost, record.notes
    figures = [f"{name} {score:.4f}" for name in ("dev", "test") if (score := scores.of(name)) is not None]
    summary = f"{record.task.metric} {', '.join(figures)}" if figures else "no labels to score by"
    if scores.dev_at_start is not None:
        summary += f" (dev before the first step {scores.dev_at_start:.4f}, best at step {record.best_step})"
    console.print(f"[bold]{escape(record.method)}[/] ({record.kind}): {summary}", highlight=False)
    for name in ("why", "cannot_know"):
        if isinstance(note := notes.get(name), str):
            console.print(escape(note), highlight=False)
    left = notes.get("passed_over")
    if left and isinstance(left, dict):
        named = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3]) + "; …" * (len(left) > 3)
        console.print(escape(f"{len(left)} layers carry their old delta unchanged ({named})"), highlight=False)
    if grafted := notes.get("grafted_in_place_of_the_base"):
        named = ", ".join(grafted[:2]) + " …" * (len(grafted) > 2)
        console.print(
            escape(f"{len(grafted)} tensors that take the place of the base's carry their change alone ({named})"),
            highlight=False,
        )
    console.print(f"{cost.steps} steps, {cost.seconds:.0f} s, {cost.labels} labelled examples", highlight=False)
    console.print(f"outcome: {escape(str(result.path))}", highlight=False, soft_wrap=True)


def pretrained(base: Base) -> None:
    """Print what pre-training did.

    Args:
        base: The upgraded base.
    """
    import json

    from regraft.base import PRETRAINING

    record = json.loads((base.path / PRETRAINING).read_text(encoding="utf-8"))
    first, last = record["curve"][0], record["curve"][-1]
    console.print(
        f"held-out loss {first['loss']:.3f} → {last['loss']:.3f} in {last['step']:.0f} steps, "
        f"{record['tokens']:,} tokens, {record['tokens'] / last['seconds']:,.0f} tokens/s",
        highlight=False,
    )
    console.print(f"upgraded base: {base.path}", highlight=False, markup=False, soft_wrap=True)


def comparison(result: Comparison) -> None:
    """Print a comparison as one table.

    Args:
        result: The comparison.
    """
    seeds = result.rows[0].seeds
    table = Table(
        title=f"{escape(result.task)}: {result.metric} on {result.split}, seeds {', '.join(map(str, seeds))}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in (
        "dev at\nstep 0", "dev\nbest", result.split, "reco-\nvery", "to reach\nscratch", "negative\nflips", "labels",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        spread = "" if row.test_deviation is None else f" ±{row.test_deviation:.3f}"
        table.add_row(
            escape(row.method),
            f"{row.start:.3f}",
            f"{row.dev:.3f}",
            f"{row.test:.3f}{spread}",
            _percent(row.recovery),
            _or_dash(row.steps_to_scratch, ".0f", f" ({row.seconds_to_scratch or 0:.0f} s)"),
            f"{100 * row.negative_flips:.1f} %",
            f"{row.labels:.0f}",
        )
    console.print(table)
    console.print(
        f"old deployment (old weights, old base) {result.old:.3f}, guessing {result.majority:.3f}; "
        f"scratch: {result.rows[0].steps:.0f} steps, {result.rows[0].seconds:.0f} s of training. Recovery: 0 % is "
        "guessing, 100 % scratch. To reach scratch: steps (seconds) until dev is where scratch ends. Negative flips: "
        "right in the old deployment, wrong here.",
        highlight=False,
    )


def chain(bases: Sequence[str], rows: Sequence[ChainRow]) -> None:
    """Print how adaptations fare along a chain: a table a task and kind.

    Args:
        bases: The names of the bases.
        rows: Every hop.
    """
    from regraft.chain import summarise_routes
    from regraft.task import find_metric

    console.print(Text(" → ".join(f"{number} {base}" for number, base in enumerate(bases))))
    routes = summarise_routes(bases, rows)
    for task, kind in dict.fromkeys((route.task, route.kind) for route in routes):
        table = Table(title=escape(f"{task}, {kind}"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method")
        table.add_column("route", no_wrap=True)
        for number in range(len(bases)):
            table.add_column(f"base {number}", justify="right", no_wrap=True)
        for name in ("recovery,\nlast", "lost\na hop"):
            table.add_column(name, justify="right", no_wrap=True)
        for route in (route for route in routes if (route.task, route.kind) == (task, kind)):
            cells = [
                "–" if score is None else f"{score:.3f}" + ("" if spread is None else f" ±{spread:.3f}")
                for score, spread in zip(route.scores, route.deviations, strict=True)
            ]
            metric = find_metric(route.metric)
            decay = "–" if route.decay is None else f"{metric.describe(route.decay)}{metric.unit}"
            table.add_row(escape(route.method), route.route or "", *cells, _percent(route.recoveries[-1]), decay)
        console.print(table)
        for route in (route for route in routes if route.refused and (route.task, route.kind) == (task, kind)):
            console.print(f"{route.method}: {route.refused}", highlight=False, markup=False)
    console.print(
        "Scores on test (dev where there is none), mean over seeds. Recovery: 0 % is guessing, 100 % scratch "
        "on the same base. Lost a hop: the slope over the bases.",
        highlight=False,
    )


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3g}" for name, value in figures.items()
    )


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else format(value, form) + unit


def _percent(share: float | None) -> str:
    return _or_dash(None if share is None else 100 * share, ".0f", " %")


def distances(distances: Mapping[str, Mapping[str, Distance]]) -> None:
    """Print distances as one table.

    Args:
        distances: By `whole`, `layer` and `kind`, and by the name in each.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("L2", "of the norm", "cosine", "L2 a parameter", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    for by, several in distances.items():
        for name, far in several.items():
            table.add_row(
                name if by != "whole" else "[bold]all[/]", f"{far.l2:.4g}", f"{far.relative:.2%}", f"{far.cosine:.6f}",
                f"{far.per_parameter:.2e}", f"{far.parameters:,}", end_section=name == list(several)[-1],
            )  # fmt: skip
    console.print(table)


def adaptation(opened: Adaptation, base: str | None, lineage: str | None) -> None:
    """Print what an adaptation holds.

    Args:
        opened: The adaptation.
        base: The base it was compared with, if it was.
        lineage: What came of that.
    """
    infos = opened.checkpoint.tensors.values()
    table = Table(box=None, show_header=False, pad_edge=False)
    settings = ("r", "lora_alpha", "use_dora", "use_rslora", "init_lora_weights", "num_virtual_tokens", "inner_size",
             "placement", "activation", "tune_norms")  # fmt: skip
    rows = {
        "kind": opened.kind,
        "tensors": f"{len(opened.checkpoint):,}",
        "parameters": f"{sum(math.prod(info.shape) for info in infos):,}",
        "size": _bytes(sum(info.end - info.start for info in infos)),
        "set up": ", ".join(f"{name} {opened.config[name]}" for name in settings if opened.config.get(name)) or None,
        "labels": ", ".join(opened.labels) if opened.labels else "not named",
        "tuned on": opened.base or "not recorded: its lineage is unproven",
        "fingerprint": opened.fingerprint,
        "on the base": f"{base}: loads wholly, lineage {lineage}" if base else None,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    console.print(table)


def checkpoint(opened: Checkpoint, fingerprint: str) -> None:
    """Print what a checkpoint holds.

    Args:
        opened: The checkpoint.
        fingerprint: Its fingerprint.
    """
    from regraft.weights import kind_of

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("dtype")
    for name in ("tensors", "parameters", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, info in opened.tensors.items():
        groups.setdefault((kind_of(name), info.dtype), []).append((math.prod(info.shape), info.end - info.start))
    for (kind, dtype), sizes in [*sorted(groups.items()), (("all", ""), [s for g in groups.values() for s in g])]:
        table.add_row(kind, dtype, f"{len(sizes):,}", *(f"{sum(column):,}" for column in zip(*sizes, strict=True)))
    console.print(f"{opened.path}: {len(opened.files)} files, {fingerprint}", highlight=False, soft_wrap=True)
    console.print(table)


def plan(planned: Plan, out: object) -> None:
    """Print what writing a checkpoint takes.

    Args:
        planned: The plan.
        out: Where it would be written.
    """
    console.print(
        f"{out}: {planned.tensors:,} tensors in {planned.files} files\n"
        f"reads {_bytes(planned.read)}, writes {_bytes(planned.disk)} (the disk has {_bytes(planned.free)} left), "
        f"takes {_bytes(planned.memory)} of memory for tensors\nnothing was written (--dry-run)",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def line(text: str) -> None:
    """Print a line as it is.

    Args:
        text: The line.
    """
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
