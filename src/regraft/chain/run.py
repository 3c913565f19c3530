"""Carries adaptations along a chain of bases, and builds only what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.adaptation.outcome_record import BaseRecord
from regraft.base import Base
from regraft.chain.file import folder_name
from regraft.chain.record import RECORD, ChainRecord, ChainRow
from regraft.checkpoint import check_output_path, to_json, write_atomic
from regraft.errors import CheckpointError, DataError, DiskFullError, MismatchError, RecipeError
from regraft.methods import recycle, tune
from regraft.progress import Progress, silent
from regraft.task import count_flips
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from regraft.adaptation import Outcome
    from regraft.chain.file import Chain, Route
    from regraft.errors import RegraftError
    from regraft.task import Task

# what an adaptation, a task or a method is to blame for; a disk, a lock or a folder in the way ends the chain
REFUSALS = (RecipeError, MismatchError, CheckpointError, DataError)


def run_chain(chain: Chain, out: str | Path, progress: Progress = silent) -> list[ChainRow]:
    """Tune on the first base, and carry on to each of the others by every method and route.

    What is there already is kept: bases, methods and seeds can be added to a chain, and an interrupted one goes on.

    Args:
        chain: What to do.
        out: The folder for all outcomes and `chain.json`.
        progress: Told of each step.

    Returns:
        What came of each hop.

    Raises:
        RegraftError: A base or a task cannot be read, or an outcome cannot be written; what was done until then is
            kept. What one adaptation or method alone is to blame for is recorded as refused, and the rest is done.
    """
    check_output_path(Path(out))
    run = _Run([Base.open(name) for name in chain.bases], chain, Path(out), progress)
    run.out.mkdir(parents=True, exist_ok=True)
    for seed in chain.seeds:
        for task in chain.loaded_tasks():
            for kind in chain.kinds:
                run.carry(task, kind, seed)
    return run.rows


@dataclasses.dataclass
class _Run:
    bases: list[Base]
    chain: Chain
    out: Path
    progress: Progress
    rows: list[ChainRow] = dataclasses.field(default_factory=list)

    def carry(self, task: Task, kind: str, seed: int) -> None:
        """Carry one adaptation along the chain."""
        place = self.out / folder_name(f"{task.name}-{kind}-seed{seed}")
        recipe = self.chain.tuning.recipe(kind, seed, self.chain.precision)
        try:
            first = tune(
                self.bases[0], task, place / "0-tune", kind=kind, recipe=recipe, progress=self._told(place.name, "tune")
            )
        except REFUSALS as error:
            self._refuse(error, task, kind, seed, 0, "tune", None)
            return
        self._keep(first, first, task, kind, seed, 0, "tune", None)
        for number in range(1, len(self.bases)):
            self._hop(first, first, place, task, kind, seed, number - 1, number, "scratch", None)
        for method in self.chain.methods:
            last: Outcome | None = first
            for number in range(1, len(self.bases)):
                if number == 1 or "hop by hop" in self.chain.routes:
                    route: Route | None = None if number == 1 else "hop by hop"
                    last = last and self._hop(first, last, place, task, kind, seed, number - 1, number, method, route)
                if number > 1 and "at once" in self.chain.routes:
                    self._hop(first, first, place, task, kind, seed, 0, number, method, "at once")

    def _hop(
        self, first: Outcome, source: Outcome, place: Path, task: Task, kind: str, seed: int, old: int, new: int,
        method: str, route: Route | None,
    ) -> Outcome | None:  # fmt: skip
        name = "-".join([str(new), method.replace("+", "-"), *([route.replace(" ", "-")] if route else [])])
        if method == "scratch":
            old, source = 0, first  # it starts from nothing: what it is given is for the labels
        recipe = self.chain.recycling.recipe(kind, seed, self.chain.precision)
        try:
            done = recycle(
                Upgrade(self.bases[old], self.bases[new]), source.path, task.with_shots(self.chain.shots), method,
                place / name, recipe=recipe, progress=self._told(place.name, name),
            )  # fmt: skip
        except REFUSALS as error:
            self._refuse(error, task, kind, seed, new, method, route)
            return None
        self._keep(done, first, task, kind, seed, new, method, route)
        return done

    def _keep(
        self, done: Outcome, first: Outcome, task: Task, kind: str, seed: int, base: int, method: str,
        route: Route | None,
    ) -> None:  # fmt: skip
        scores, cost = done.record.scores, done.record.cost
        split = "dev" if scores.test is None else "test"
        before, after = first.right(split), done.right(split)
        is_known = len(before) == len(after) and None not in (*before, *after)
        lost = count_flips(before, after).negative_rate if is_known else None
        self._add(
            ChainRow(
                task.name, kind, seed, base, method, route, scores.of(split), scores.dev_at_start,
                scores.majority(split), lost, cost.steps, cost.labels, str(done.path.relative_to(self.out)),
                metric=task.metric,
            )
        )  # fmt: skip

    def _refuse(
        self, error: RegraftError, task: Task, kind: str, seed: int, base: int, method: str, route: Route | None
    ) -> None:
        if isinstance(error, DiskFullError):
            raise error
        self._add(
            ChainRow(
                task.name, kind, seed, base, method, route, None, None, None, None, 0, 0, "", str(error), task.metric
            )
        )

    def _add(self, row: ChainRow) -> None:
        self.rows.append(row)
        bases = tuple(BaseRecord(base.name, base.fingerprint) for base in self.bases)
        record = ChainRecord(bases, self.chain.model_dump(mode="json"), tuple(self.rows))
        write_atomic(self.out / RECORD, to_json(dataclasses.asdict(record), RECORD, indent=1) + "\n")

    def _told(self, place: str, name: str) -> Progress:
        return lambda stage, *rest: self.progress(f"{place} {name}: {stage}", *rest)
