"""Reproduce the paper's findings and methods, at the size of a machine with two cores or at the paper's size.

    python experiments/reproduce.py [NAME …] [--size machine|paper] [--workers 2] [--write-only]

NAME is an experiment's folder in `experiments/paper`, its number or its word; all seven by default. Bases, tunings and
cells are stored in `runs/experiments-paper`: an interrupted run continues where it stopped, and a second run makes only
missing ones. Figures, pages and plots are written to the experiment's folder in `experiments/paper`, and an index of
the paper's claims to `experiments/paper/README.md`; `--write-only` writes pages and plots from the figures alone. With
`--size paper`, these folders are `runs/experiments-paper-size` and its subfolder `pages`.

At the size of the machine (`experiments/paper/machine.yaml`) all seven took 6.8 core-hours, about 3.4 hours on two
cores. The numbers of bases, tunings and cells, with their core-seconds:

                        number   each  in all
    bases                    4          2,700
    tunings                168     42   7,100   shared by all experiments
    1 compatibility         21     34     700
    2 connectivity         135     19   2,600
    3 similarity            13     10     100
    4 initialisation        36     55   2,000
    5 distillation         162     25   4,100
    6 projection           120     19   2,300   60 cells, by distillation, take 30 to 45 each
    7 chain                  9    310   2,800

The experiments need about 10 GB of disk. The size of the paper (`experiments/paper/paper.yaml`) is for a GPU:

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

PUBLISHED = Path(__file__).parent / "paper"
OUT_BY_SIZE = {"machine": Path("runs/experiments-paper"), "paper": Path("runs/experiments-paper-size")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The experiments to run, and their size.

    Args:
        store: The folder for bases, tunings and cells, with their size.
        selected: The experiments, each with its config.
    """

    store: Store
    selected: tuple[tuple[Experiment, Any], ...]


def list_experiments() -> tuple[Experiment, ...]:
    """Return all experiments in their order."""
    from findings import chain, compatibility, connectivity, distillation, initialisation, projection, similarity

    modules = (compatibility, connectivity, similarity, initialisation, distillation, projection, chain)
    return tuple(module.EXPERIMENT for module in modules)


def make_plan(size_file: Path, out: Path, names: Sequence[str] = (), configs: Path = PUBLISHED) -> Plan:
    """Read the size and the configs.

    Args:
        size_file: A YAML file such as `machine.yaml`.
        out: The folder for bases, tunings and cells.
        names: Experiments by their folder (`3-similarity`), its number or its word; empty for all.
        configs: The folder of the experiments' folders, each of which has a `config.yaml`.

    Returns:
        The plan.

    Raises:
        DataError: A file cannot be read, a key or a value is not allowed, or an experiment does not exist.
    """
    from findings.settings import Size, load_yaml
    from findings.store import Store

    from regraft.errors import DataError
    from regraft.task.yaml_file import did_you_mean

    experiments = {experiment.name: experiment for experiment in list_experiments()}
    selected = []
    for name in names or experiments:
        full_name = next((folder for folder in experiments if name in (folder, *folder.split("-", 1))), None)
        if full_name is None:
            suggestion = did_you_mean(name, list(experiments))
            raise DataError(f"there is no experiment {name!r} among {', '.join(experiments)}.{suggestion}")
        experiment = experiments[full_name]
        selected.append((experiment, load_yaml(experiment.config, configs / full_name / "config.yaml")))
    return Plan(Store(out, load_yaml(Size, size_file)), tuple(selected))


def build_missing(plan: Plan, workers: int, report: Callable[[str], None] = print) -> list[str]:
    """Make missing texts, tasks and bases, then missing tunings, then missing cells.

    Args:
        plan: The experiments and their size.
        workers: The number of processes of one thread each; 0 to run in this one.
        report: Called with a text per finished job: a line, or the traceback of a failure.

    Returns:
        One text per failed job, with its traceback; the next run tries it again.

    Raises:
        DataError: A source cannot be read or has no text.
        OutcomeError: The store was made at a different size.
    """
    from findings.experiment import measure_cell
    from findings.store import check_size, make_tuning, pretrain_bases, write_inputs
    from runner import Job, run_jobs

    store = plan.store
    check_size(store)
    write_inputs(store)
    tunings = {
        tuning
        for experiment, config in plan.selected
        for tuning in experiment.list_tunings(config, store.size.seeds, store.num_bases)
    }
    first_base_jobs, later_base_jobs = [], []
    if not all(Path(store.base_name(base)).is_dir() for base in range(1, store.num_bases)):
        first_base_jobs.append(Job("bases", pretrain_bases, (store,)))
    for tuning in sorted(tunings):
        if not store.has_tuning(tuning.task, tuning.kind, tuning.base, tuning.seed):
            name = f"{tuning.task} {tuning.kind}, M_{tuning.base}, seed {tuning.seed}"
            jobs = later_base_jobs if tuning.base else first_base_jobs  # Tunings on M_0 do not need the later bases.
            jobs.append(Job(name, make_tuning, (store, tuning)))
    for jobs in (first_base_jobs, later_base_jobs):
        failures = run_jobs(jobs, workers, report)
        if failures:
            return failures
    cell_jobs = [
        Job(f"{experiment.name} {cell.name}", measure_cell, (store, cell, experiment.cell_file(store, cell)))
        for experiment, config in plan.selected
        for cell in experiment.missing_cells(store, config)
    ]
    return run_jobs(cell_jobs, workers, report)


def write_measured(plan: Plan, folder: Path) -> None:
    """Write results, pages, plots and the index of the cells that have been measured so far.

    Args:
        plan: The experiments to write.
        folder: The folder of the experiments' published folders.

    Raises:
        OutcomeError: A published folder has the results of more cells.
    """
    from findings import pages

    for experiment, config in plan.selected:
        pages.write_measured(plan.store, experiment, config, folder / experiment.name)
    pages.write_index(list_experiments(), folder)


def write_pages(plan: Plan, folder: Path) -> None:
    """Write pages, plots and the index from published results alone.

    Args:
        plan: The experiments to write.
        folder: The folder of the experiments' published folders.
    """
    from findings import pages

    for experiment, _ in plan.selected:
        pages.write_page(experiment, folder / experiment.name)
    pages.write_index(list_experiments(), folder)


def main() -> None:
    """Make missing cells and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, by folder, number or word; default: all")
    parser.add_argument("--size", choices=tuple(OUT_BY_SIZE), default="machine", help="the machine's or the paper's")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this process")
    parser.add_argument("--write-only", action="store_true", help="write the pages from the published figures alone")
    arguments = parser.parse_args()
    if arguments.size == "machine":  # These variables must be set before torch and the hub's client are imported.
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    elif arguments.workers:
        sys.exit("--size paper downloads from the hub and computes on a GPU: run it with --workers 0")
    from regraft.errors import RegraftError

    out = OUT_BY_SIZE[arguments.size]
    published = PUBLISHED if arguments.size == "machine" else out / "pages"
    try:
        plan = make_plan(PUBLISHED / f"{arguments.size}.yaml", out, arguments.names)
        if arguments.write_only:
            write_pages(plan, published)
            return
        failures = build_missing(plan, arguments.workers)
        write_measured(plan, published)
    except RegraftError as error:
        sys.exit(str(error))
    if failures:
        sys.exit(f"{len(failures)} failed; run again to try them again:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
