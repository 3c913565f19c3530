"""Run a chain: carry adaptations along its bases, and build only missing outcomes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation import load_adaptation
from regraft.adaptation.outcome_record import BaseRecord
from regraft.adaptation.template import with_adaptation_texts
from regraft.adaptation.tokens import with_adaptation_tokens
from regraft.base import Base
from regraft.chain.file import folder_name
from regraft.chain.record import RECORD, ChainRecord, ChainRow
from regraft.checkpoint import check_output_path, write_json
from regraft.errors import CheckpointError, DataError, DiskFullError, MismatchError, RecipeError
from regraft.methods import recycle, tune
from regraft.methods.references import measure_bare_base
from regraft.progress import Progress, silent
from regraft.recipe import Recipe
from regraft.task import count_flips, load_data
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.adaptation import Outcome
    from regraft.chain.file import Chain, Route
    from regraft.errors import RegraftError
    from regraft.task import Task

REFUSALS = (RecipeError, MismatchError, CheckpointError, DataError)
"""Errors of one adaptation, task or method, which a chain records and skips; a full disk and other errors end it."""


def run_chain(chain: Chain, out: str | Path, progress: Progress = silent) -> list[ChainRow]:
    """Tune on the first base, and recycle to each later base by every method and route.

    Outcomes that exist are reused: bases, methods and seeds can be added to a chain, and an interrupted chain resumes.

    Args:
        chain: The chain, with absolute paths as from `Chain.load`.
        out: The folder for all outcomes and `chain.json`.
        progress: The callback for the progress of each hop.

    Returns:
        The result of each hop.

    Raises:
        RegraftError: A base or a task file cannot be read, or an outcome cannot be written; earlier outcomes stay. If a
            single hop raises an error of `REFUSALS` and the disk is not full, the hop is recorded as refused, and the
            chain continues.
    """
    check_output_path(Path(out))
    run = _ChainRun([Base.open(name) for name in chain.bases], chain, Path(out), progress)
    run.out.mkdir(parents=True, exist_ok=True)
    for seed in chain.seeds:
        for task in chain.load_tasks():
            for kind in chain.kinds:
                run.carry(_Series(task, kind, seed))
    return run.rows


@dataclasses.dataclass(frozen=True)
class _Series:
    """The adaptations of one task, kind and seed on all bases."""

    task: Task
    kind: str
    seed: int

    @property
    def folder(self) -> str:
        return folder_name(f"{self.task.name}-{self.kind}-seed{self.seed}")


@dataclasses.dataclass(frozen=True)
class _Hop:
    """A run from one base to a later base, both as indices; tuning on the first base is a hop from 0 to 0."""

    old_base: int
    new_base: int
    method: str
    route: Route | None = None

    @property
    def folder(self) -> str:
        words = [str(self.new_base), self.method.replace("+", "-")]
        if self.route:
            words.append(self.route.replace(" ", "-"))
        return "-".join(words)


@dataclasses.dataclass
class _ChainRun:
    """The state of a running chain: its open bases, and the results so far, which `chain.json` mirrors."""

    bases: list[Base]
    chain: Chain
    out: Path
    progress: Progress
    rows: list[ChainRow] = dataclasses.field(default_factory=list)

    def carry(self, series: _Series) -> None:
        """Tune on the first base, and recycle along the chain."""
        first_outcome = self._tune(series)
        if first_outcome is None:
            return
        later_bases = range(1, len(self.bases))
        for new_base in later_bases:  # of the first outcome, scratch takes only kind, settings and labels
            self._recycle(series, _Hop(0, new_base, "scratch"), first_outcome, first_outcome)
        for method in self.chain.methods:
            # on the second base, both routes are the same
            last_outcome = self._recycle(series, _Hop(0, 1, method), first_outcome, first_outcome)
            for new_base in later_bases[1:]:
                if last_outcome is not None and "hop by hop" in self.chain.routes:
                    hop = _Hop(new_base - 1, new_base, method, "hop by hop")
                    last_outcome = self._recycle(series, hop, last_outcome, first_outcome)
                if "at once" in self.chain.routes:
                    self._recycle(series, _Hop(0, new_base, method, "at once"), first_outcome, first_outcome)

    def _tune(self, series: _Series) -> Outcome | None:
        """Tune on the first base; return None if that is refused."""
        hop = _Hop(0, 0, "tune")
        try:
            outcome = tune(
                self.bases[0],
                series.task,
                self.out / series.folder / hop.folder,
                kind=series.kind,
                recipe=self.chain.tuning.recipe(series.kind, series.seed, self.chain.precision),
                progress=self._prefixed_progress(f"{series.folder} tune"),
            )
        except REFUSALS as error:
            self._add_refusal(series, hop, error)
            return None
        self._add_outcome(series, hop, outcome, outcome)
        return outcome

    def _recycle(self, series: _Series, hop: _Hop, source: Outcome, first_outcome: Outcome) -> Outcome | None:
        """Recycle the outcome `source` over one hop; return None if that is refused."""
        try:
            outcome = recycle(
                Upgrade(self.bases[hop.old_base], self.bases[hop.new_base]),
                source.path,
                series.task.with_shots(self.chain.shots),
                hop.method,
                self.out / series.folder / hop.folder,
                recipe=self.chain.recycling.recipe(series.kind, series.seed, self.chain.precision),
                progress=self._prefixed_progress(f"{series.folder} {hop.folder}"),
            )
        except REFUSALS as error:
            self._add_refusal(series, hop, error)
            return None
        self._add_outcome(series, hop, outcome, first_outcome)
        return outcome

    def _add_outcome(self, series: _Series, hop: _Hop, outcome: Outcome, first_outcome: Outcome) -> None:
        """Record an outcome, with its negative flips since the outcome on the first base."""
        scores = outcome.record.scores
        cost = outcome.record.cost
        split = "dev" if scores.test is None else "test"
        old_right, new_right = first_outcome.right(split), outcome.right(split)
        are_comparable = len(old_right) == len(new_right) and None not in (*old_right, *new_right)
        self._add(
            dataclasses.replace(
                _empty_row(series, hop),
                score=scores.of(split),
                start=scores.dev_at_start,
                majority=self._chance_score(series, hop, outcome, scores.majority(split)),
                negative_flips=count_flips(old_right, new_right).negative_rate if are_comparable else None,
                steps=cost.steps,
                labels=cost.labels,
                outcome=str(outcome.path.relative_to(self.out)),
            )
        )

    def _chance_score(self, series: _Series, hop: _Hop, outcome: Outcome, majority: float | None) -> float | None:
        """Return the chance score on a hop's new base: the bare base's if it answers in place of guessing."""
        if majority is not None or not series.task.head_in_base:
            return majority
        task = series.task if hop.method == "tune" else series.task.with_shots(self.chain.shots)
        data = load_data(task, series.seed)
        if not data.labelled:
            return None
        base = self.bases[hop.new_base]
        adaptation = load_adaptation(outcome.path)
        base = with_adaptation_texts(adaptation, with_adaptation_tokens(adaptation, Upgrade(base, base)).old)
        precision = Recipe(precision=self.chain.precision).resolve_precision()
        name = f"base-{hop.new_base}"
        return measure_bare_base(base, data, precision, self.out, name, self.progress).score

    def _add_refusal(self, series: _Series, hop: _Hop, error: RegraftError) -> None:
        """Record the error that refused a hop; raise the error if the disk is full."""
        if isinstance(error, DiskFullError):
            raise error
        self._add(dataclasses.replace(_empty_row(series, hop), refused=str(error)))

    def _add(self, row: ChainRow) -> None:
        """Add a result, and write all results so far, so that `read_chain` can show an unfinished chain."""
        self.rows.append(row)
        bases = tuple(BaseRecord(base.name, base.fingerprint) for base in self.bases)
        record = ChainRecord(bases, self.chain.model_dump(mode="json"), tuple(self.rows))
        write_json(self.out / RECORD, dataclasses.asdict(record), indent=1)

    def _prefixed_progress(self, prefix: str) -> Progress:
        """Return a callback that reports stages under names with a prefix."""

        def report(stage: str, step: int, total: int, figures: Mapping[str, float]) -> None:
            self.progress(f"{prefix}: {stage}", step, total, figures)

        return report


def _empty_row(series: _Series, hop: _Hop) -> ChainRow:
    """Return the row of a hop without figures."""
    return ChainRow(
        task=series.task.name,
        kind=series.kind,
        seed=series.seed,
        base=hop.new_base,
        method=hop.method,
        route=hop.route,
        score=None,
        start=None,
        majority=None,
        negative_flips=None,
        steps=0,
        labels=0,
        outcome="",
        metric=series.task.metric,
        type=series.task.type,
    )
