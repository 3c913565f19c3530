"""The paper's findings and methods at the size of this machine, and at the paper's own.

    python experiments/reproduce.py [NAME …] [--size machine|paper] [--workers 2] [--write-only]

NAME is an experiment's folder in `experiments/paper`, or its number; all seven by default. Everything that is made
(bases, then tunings, then cells) is kept in `runs/experiments-paper`; interrupted, it goes on where it was, and a
second run builds only what is missing. Figures, pages and plots are written to `experiments/paper/NAME`, and an index
of the paper's claims to `experiments/paper/README.md`; `--write-only` writes pages and plots from the figures alone.

At the size of the machine (`experiments/paper/machine.yaml`) all seven took 6.8 core-hours, so
about 3.4 hours on two cores; in core-seconds:

    4 bases                               2,700
    168 tunings of 42                     7,100     shared by all experiments
    1 compatibility      21 cells of 34     700
    2 connectivity      135 cells of 19   2,600
    3 similarity         13 cells of 10     100
    4 initialisation     36 cells of 55   2,000
    5 distillation      162 cells of 25   4,100
    6 projection        120 cells of 19   2,300     60 of them, by distillation, 30 to 45 each
    7 chain               9 cells of 310  2,800

They need about 10 GB of disk. The size of the paper (`experiments/paper/paper.yaml`) is for a GPU:

    accelerate launch --num_processes 1 --mixed_precision bf16 experiments/reproduce.py --size paper --workers 0
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from findings.experiment import Experiment
    from findings.store import Store

HERE = Path(__file__).parent / "paper"
OUT = {"machine": Path("runs/experiments-paper"), "paper": Path("runs/experiments-paper-size")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be run.

    Args:
        store: Where, and at what size.
        chosen: The experiments, each with its config.
    """

    store: Store
    chosen: tuple[tuple[Experiment, Any], ...]


def experiments() -> tuple[Experiment, ...]:
    """Give all experiments in their order."""
    from findings import (
        chained,
        compatibility,
        connectivity,
        distillation,
        initialisation,
        projection,
        similarity,
    )

    rooms = (compatibility, connectivity, similarity, initialisation, distillation, projection, chained)
    return tuple(room.EXPERIMENT for room in rooms)


def prepare(size: Path, out: Path, names: Sequence[str] = (), configs: Path = HERE) -> Plan:
    """Read the size and the configs.

    Args:
        size: A YAML file as `machine.yaml`.
        out: The folder for everything that is made.
        names: Experiments, by their folder, its number or its word; none for all.
        configs: Where the folders with their `config.yaml` are.

    Returns:
        The plan.

    Raises:
        DataError: A file cannot be read, a key is of no use, or there is no such experiment.
    """
    from findings.settings import Size, load
    from findings.store import Store

    from regraft.errors import DataError
    from regraft.task.yaml_file import did_you_mean

    known = {experiment.name: experiment for experiment in experiments()}
    chosen = []
    for name in names or known:
        found = next((full for full in known if name in (full, *full.split("-", 1))), None)
        if found is None:
            raise DataError(
                f"there is no experiment {name!r} among {', '.join(known)}.{did_you_mean(name, list(known))}"
            )
        chosen.append((known[found], load(known[found].config, configs / found / "config.yaml")))
    return Plan(Store(out, load(Size, size)), tuple(chosen))


def build(plan: Plan, workers: int, say: Callable[[str], None] = print) -> list[str]:
    """Make what is missing: texts, tasks and bases; tunings; cells.

    Args:
        plan: What.
        workers: Processes of one thread each; 0 to stay in this one.
        say: Told of each part that is done.

    Returns:
        What failed, a line each; the next run tries it again.

    Raises:
        OutcomeError: What is there was made at another size.
    """
    from findings.experiment import make_cell
    from findings.store import check_size, make_bases, make_tuning, write_data
    from runner import run_jobs

    store = plan.store
    check_size(store)
    write_data(store)
    bases = len(store.size.domains) + 1
    wanted = {t for experiment, config in plan.chosen for t in experiment.tunings(config, store.size.seeds, bases)}
    absent = sorted(t for t in wanted if not store.has(t.task, t.kind, t.base, t.seed))
    first = [] if all(Path(store.base(n)).is_dir() for n in range(1, bases)) else [("bases", make_bases, (store,))]
    for on_first in (True, False):  # the first base need not wait for the others
        now = [(f"{t.task} {t.kind}, M_{t.base}, seed {t.seed}", make_tuning, (store, t))
               for t in absent if (t.base == 0) == on_first]  # fmt: skip
        if failed := run_jobs([*(first if on_first else []), *now], workers, say):
            return failed
    todo = [
        (f"{experiment.name} {cell.name}", make_cell, (store, cell, experiment.file(store, cell)))
        for experiment, config in plan.chosen for cell in experiment.missing(store, config)
    ]  # fmt: skip
    return run_jobs(todo, workers, say)


def write(plan: Plan, folder: Path) -> None:
    """Write results, pages, plots and the index of what has been run.

    Args:
        plan: What.
        folder: Where the experiments' folders go.

    Raises:
        OutcomeError: One has the results of more cells.
    """
    from findings.pages import write_experiment, write_index

    for experiment, config in plan.chosen:
        write_experiment(plan.store, experiment, config, folder / experiment.name)
    write_index(experiments(), folder)


def write_pages(plan: Plan, folder: Path) -> None:
    """Write pages, plots and the index from the results of a folder alone.

    Args:
        plan: What.
        folder: Where the experiments' folders are.
    """
    from findings.pages import write_index, write_page

    for experiment, _ in plan.chosen:
        write_page(experiment, folder / experiment.name)
    write_index(experiments(), folder)


def main() -> None:
    """Build what is missing, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, by folder or number; all by default")
    parser.add_argument("--size", choices=tuple(OUT), default="machine", help="the machine's or the paper's")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this one, as it is")
    parser.add_argument("--write-only", action="store_true", help="write the pages of what has been measured")
    given = parser.parse_args()
    if given.size == "machine":  # before torch and the hub's client are loaded
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    elif given.workers:
        sys.exit("--size paper downloads from the hub and computes on a GPU: run it with --workers 0")
    from regraft.errors import RegraftError

    out = OUT[given.size]
    pages = HERE if given.size == "machine" else out / "pages"
    try:
        plan = prepare(HERE / f"{given.size}.yaml", out, given.names)
        if given.write_only:
            write_pages(plan, pages)
            return
        failed = build(plan, given.workers)
        write(plan, pages)
    except RegraftError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{len(failed)} failed; run again to try them again:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
