"""Make the missing outcomes of an experiment, by default in processes of one thread each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from grid import (
    OLD_SEED_OFFSET,
    cell_entry,
    cell_folder,
    cell_options,
    cell_recipe,
    cell_task,
    iterate_cells,
    needs_other_tasks,
    old_folder,
)

from regraft import Base, Task, Upgrade, load_adaptation, load_outcome, recycle, tune
from regraft.checkpoint import write_atomic
from regraft.errors import OutcomeError, RecipeError
from regraft.task import load_data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from grid import Cell, Grid

    from regraft import Recipe


class Job(NamedTuple):
    """A function to run in a worker.

    Args:
        name: The job's name in reports.
        function: Returns a line on its result; a module's function, so that it can be sent to a process.
        arguments: The function's positional arguments.
    """

    name: str
    function: Callable[..., str]
    arguments: tuple[Any, ...] = ()


class Attempt(NamedTuple):
    """The result of running a job.

    Args:
        succeeded: Whether the function returned.
        message: The returned line, or the traceback.
        seconds: The duration.
    """

    succeeded: bool
    message: str
    seconds: float


def run_missing(grid: Grid, workers: int = 2, report: Callable[[str], None] = print) -> list[str]:
    """Make all outcomes that are missing.

    Args:
        grid: The experiment; its bases must exist.
        workers: The number of processes; 0 to run in this one.
        report: Called with a text per finished job: a line, or the traceback of a failure.

    Returns:
        One text per failed job, with its traceback; the next run tries it again.

    Raises:
        OutcomeError: Existing outcomes were made by a different recipe or options.
    """
    check_recipes(grid)
    old_jobs = [
        Job(f"{task} {kind}, old base, seed {seed}", tune_old_base, (grid, task, kind, seed))
        for seed in grid.seeds
        for task in grid.tasks
        for kind in grid.old_recipes
        if not has_outcome(old_folder(grid, task, kind, seed))
    ]
    failures = run_jobs(old_jobs, workers, report)
    if failures:
        return failures
    for needs_tasks in (False, True):  # A method that learns from other tasks needs their outcomes first.
        cells = [cell for cell in missing_cells(grid) if needs_other_tasks(grid, cell) == needs_tasks]
        failures += run_jobs([Job(str(cell), recycle_cell, (grid, cell)) for cell in cells], workers, report)
    return failures


def has_outcome(folder: Path) -> bool:
    """Return whether a folder holds a finished outcome."""
    return (folder / "outcome.json").is_file()


def check_recipes(grid: Grid) -> None:
    """Refuse existing outcomes that were not made by the experiment's recipes and options.

    Args:
        grid: The experiment; outcomes that do not exist are passed over.

    Raises:
        OutcomeError: An outcome was made by a different recipe or options; the message names the first.
    """
    inputs_by_folder: dict[Path, tuple[Recipe, Any]] = {}
    for cell in iterate_cells(grid):
        inputs_by_folder[cell_folder(grid, cell)] = (cell_recipe(grid, cell), cell_options(grid, cell))
        folder = old_folder(grid, cell.task, cell.kind, cell.seed)
        inputs_by_folder[folder] = (_old_recipe(grid, cell.kind, cell.seed), None)
    differing_folders = [
        folder
        for folder, (recipe, options) in inputs_by_folder.items()
        if has_outcome(folder) and not _was_made_by(folder, recipe, options)
    ]
    if differing_folders:
        raise OutcomeError(
            f"{len(differing_folders)} outcomes were made by a different recipe or options from the experiment's, such "
            f"as {differing_folders[0]}. Remove them and run again."
        )


def _old_recipe(grid: Grid, kind: str, seed: int) -> Recipe:
    return dataclasses.replace(grid.old_recipes[kind], seed=seed + OLD_SEED_OFFSET)


def _was_made_by(folder: Path, recipe: Recipe, options: Any) -> bool:
    """Return whether an outcome records this recipe and these options, which are None for a tuning."""
    inputs = load_outcome(folder).record.inputs
    recorded = inputs.get("options") or {}
    fields = dataclasses.fields(options) if options is not None else ()
    # defaults that depend on the task type are None here, and options that earlier versions lacked may not be recorded
    expected = {
        field.name: value
        for field in fields
        if (value := getattr(options, field.name)) is not None and (field.name in recorded or value != field.default)
    }
    unset = {field.name for field in fields if getattr(options, field.name) is None}
    set_options = {name: value for name, value in recorded.items() if name not in unset}
    expected_inputs = json.loads(json.dumps([recipe.record(), expected]))
    return [inputs["recipe"], set_options] == expected_inputs


def missing_cells(grid: Grid) -> list[Cell]:
    """Return the cells that have neither an outcome nor a refusal."""
    return [
        cell
        for cell in iterate_cells(grid)
        if not has_outcome(cell_folder(grid, cell)) and not refusal_file(grid, cell).is_file()
    ]


def refusal_file(grid: Grid, cell: Cell) -> Path:
    """Return the file with the reason why a method refused a cell."""
    folder = cell_folder(grid, cell)
    return folder.with_name(f"{folder.name}.refused.txt")


def tune_old_base(grid: Grid, task: str, kind: str, seed: int) -> str:
    """Tune the old base on a task.

    Args:
        grid: The experiment.
        task: The name of the task.
        kind: The kind of adaptation.
        seed: The seed of the runs that use the tuning; the tuning's own is `OLD_SEED_OFFSET` higher.

    Returns:
        A line on the score.
    """
    folder = old_folder(grid, task, kind, seed)
    outcome = tune(_load_base(grid.old_base), grid.tasks[task], folder, kind=kind, recipe=_old_recipe(grid, kind, seed))
    return f"test {outcome.scores['test']:.3f}"


def recycle_cell(grid: Grid, cell: Cell) -> str:
    """Recycle an old adaptation by a cell's method, and return a line on its score or its refusal.

    Only the weights of the reference are preserved, because other tasks learn from them: all weights would take 50 GB.
    """
    folder = cell_folder(grid, cell)
    adaptation_folder = load_outcome(old_folder(grid, cell.task, cell.kind, cell.seed)).path
    method = cell_entry(grid, cell).method
    try:
        outcome = recycle(
            _load_upgrade(grid.old_base, grid.upgrades[cell.upgrade]),
            _load_adaptation(adaptation_folder),
            _load_data(cell_task(grid, cell).model_dump_json(), cell.seed),
            method,
            folder,
            recipe=cell_recipe(grid, cell),
            options=cell_options(grid, cell),
        )
    except RecipeError as error:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(refusal_file(grid, cell), f"{error}\n")
        return f"refused: {error}"
    if method != "scratch" or cell.regime != grid.regimes[0].name:
        shutil.rmtree(folder / "adaptation", ignore_errors=True)
    return f"test {outcome.scores['test']:.3f}"


# The sizes of the caches are arbitrary; they bound the memory.
@functools.lru_cache(maxsize=4)
def _load_upgrade(old: Path, new: Path) -> Upgrade:
    return Upgrade(_load_base(old), _load_base(new))


@functools.lru_cache(maxsize=4)
def _load_base(folder: Path) -> Base:
    return Base.open(folder)


@functools.lru_cache(maxsize=8)
def _load_adaptation(folder: Path) -> Any:
    return load_adaptation(folder)


@functools.lru_cache(maxsize=8)
def _load_data(task_json: str, seed: int) -> Any:
    return load_data(Task.from_mapping(json.loads(task_json), "the task"), seed)


def run_jobs(jobs: Sequence[Job], workers: int, report: Callable[[str], None]) -> list[str]:
    """Run jobs and continue past those that fail.

    Args:
        jobs: The jobs, started in this order as processes become free.
        workers: The number of processes; 0 to run in this one.
        report: Called with a text per finished job: a line, or the traceback of a failure.

    Returns:
        One text per failed job, with its traceback.
    """
    if not jobs:
        return []
    failures: list[str] = []
    if workers == 0:
        for job in jobs:
            failures += _report_attempt(job.name, _attempt(job.function, job.arguments), report)
        return failures
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        names = {pool.submit(_attempt, job.function, job.arguments): job.name for job in jobs}
        try:
            for num_finished, future in enumerate(concurrent.futures.as_completed(names), start=1):
                elapsed = time.monotonic() - started
                remaining = elapsed / num_finished * (len(jobs) - num_finished)
                progress = f"[{num_finished}/{len(jobs)}, {elapsed / 60:.0f} min, about {remaining / 60:.0f} left]"
                failures += _report_attempt(f"{progress} {names[future]}", future.result(), report)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _report_attempt(name: str, attempt: Attempt, report: Callable[[str], None]) -> list[str]:
    """Report a finished job, and return a list of its failure, empty if it succeeded."""
    report(f"{name}: {attempt.message} ({attempt.seconds:.0f} s)")
    return [] if attempt.succeeded else [f"{name}: {attempt.message}"]


def _attempt(function: Callable[..., str], arguments: tuple[Any, ...]) -> Attempt:
    started = time.monotonic()
    try:
        message = function(*arguments)
    except Exception:  # A fault of one method must not lose hours of results of the others.
        return Attempt(False, f"failed\n{traceback.format_exc()}", time.monotonic() - started)
    return Attempt(True, message, time.monotonic() - started)


def _start_worker() -> None:
    """Limit the process to one thread, and exit when the parent process ends, even if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
