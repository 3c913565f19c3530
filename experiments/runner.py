"""Runs an experiment's missing parts in processes of one thread each; what is there is left alone."""

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
from typing import TYPE_CHECKING, Any

from grid import OLD_SEED, cell_folder, cells, method_of, needs_tasks, old_folder, recipe_of, task_of

from regraft import Upgrade, load_adaptation, load_outcome, recycle, tune
from regraft.checkpoint import write_atomic
from regraft.errors import OutcomeError, RecipeError
from regraft.task import load_data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from grid import Cell, Grid

    from regraft import Recipe

    Job = tuple[str, Callable[..., str], tuple[Any, ...]]


def run(grid: Grid, workers: int = 2, say: Callable[[str], None] = print) -> list[str]:
    """Make all outcomes that are missing.

    Args:
        grid: The experiment; its bases must be there.
        workers: Processes of one thread each; 0 to stay in this one.
        say: Told of each part that is done.

    Returns:
        What failed, a line each; the next run tries it again.

    Raises:
        OutcomeError: What is there was made by another recipe or with other options.
    """
    check_recipes(grid)
    old = [
        (f"{task} {kind}, old base, seed {seed}", run_old, (grid, task, kind, seed))
        for seed in grid.seeds
        for task in grid.tasks
        for kind in grid.tuning
        if not (old_folder(grid, task, kind, seed) / "outcome.json").is_file()
    ]
    failed = run_jobs(old, workers, say)
    if failed:
        return failed
    for later in (False, True):  # what learns from other tasks waits for these
        todo = [cell for cell in missing(grid) if needs_tasks(cell, grid) == later]
        failed += run_jobs([(str(cell), run_cell, (grid, cell)) for cell in todo], workers, say)
    return failed


def check_recipes(grid: Grid) -> None:
    """Refuse to mix what was made by other recipes or options into a table.

    Args:
        grid: The experiment.

    Raises:
        OutcomeError: There are such outcomes; the message names them.
    """
    wanted: dict[Path, tuple[Recipe, Any]] = {}
    for cell in cells(grid):
        wanted[cell_folder(grid, cell)] = (recipe_of(grid, cell), method_of(grid, cell)[1])
        old = dataclasses.replace(grid.tuning[cell.kind], seed=cell.seed + OLD_SEED)
        wanted[old_folder(grid, cell.task, cell.kind, cell.seed)] = (old, None)
    others = [folder for folder, (recipe, options) in wanted.items() if _differs(folder, recipe, options)]
    if others:
        raise OutcomeError(
            f"{len(others)} outcomes were made by another recipe or with other options than the experiment's, such as "
            f"{others[0]}. Remove them and run again."
        )


def _differs(folder: Path, recipe: Recipe, options: Any) -> bool:
    if not (folder / "outcome.json").is_file():
        return False
    inputs = load_outcome(folder).record.inputs
    given = {} if options is None else dataclasses.asdict(options)
    found = {"recipe": inputs["recipe"], "options": inputs.get("options") or {}}
    return found != json.loads(json.dumps({"recipe": dataclasses.asdict(recipe), "options": given}))


def missing(grid: Grid) -> list[Cell]:
    """Give the cells that have neither an outcome nor a refusal."""
    return [
        cell
        for cell in cells(grid)
        if not (cell_folder(grid, cell) / "outcome.json").is_file() and not refusal(grid, cell).is_file()
    ]


def refusal(grid: Grid, cell: Cell) -> Path:
    """Give the file that says why a method does not take a kind of adaptation."""
    folder = cell_folder(grid, cell)
    return folder.with_name(f"{folder.name}.refused.txt")


def run_old(grid: Grid, task: str, kind: str, seed: int) -> str:
    """Tune the old base."""
    recipe = dataclasses.replace(grid.tuning[kind], seed=seed + OLD_SEED)
    out = old_folder(grid, task, kind, seed)
    done = tune(_upgrade(grid.old, next(iter(grid.upgrades.values()))).old, grid.tasks[task], out, kind=kind,
                recipe=recipe)  # fmt: skip
    return f"test {done.scores['test']:.3f}"


def run_cell(grid: Grid, cell: Cell) -> str:
    """Recycle by one method, and keep no weights but the reference's, which other tasks learn from: all are 50 GB."""
    method, options = method_of(grid, cell)
    out = cell_folder(grid, cell)
    old = load_outcome(old_folder(grid, cell.task, cell.kind, cell.seed)).path
    data = _data(task_of(grid, cell).model_dump_json(), cell.seed)
    try:
        done = recycle(
            _upgrade(grid.old, grid.upgrades[cell.upgrade]), _adaptation(old), data, method, out,
            recipe=recipe_of(grid, cell), options=options,
        )  # fmt: skip
    except RecipeError as error:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(refusal(grid, cell), f"{error}\n")
        return f"refused: {error}"
    if method != "scratch" or cell.regime != grid.regimes[0].name:
        shutil.rmtree(out / "adaptation", ignore_errors=True)
    return f"test {done.scores['test']:.3f}"


@functools.lru_cache(maxsize=4)
def _upgrade(old: Path, new: Path) -> Upgrade:
    return Upgrade(old, new)


@functools.lru_cache(maxsize=8)
def _adaptation(folder: Path) -> Any:
    return load_adaptation(folder)


@functools.lru_cache(maxsize=8)
def _data(task: str, seed: int) -> Any:
    from regraft import Task

    return load_data(Task.from_mapping(json.loads(task), "the task"), seed)


def run_jobs(jobs: Sequence[Job], workers: int, say: Callable[[str], None]) -> list[str]:
    """Run jobs, each a description, a function and its arguments, and go on past those that fail.

    Args:
        jobs: What to run, in this order as processes become free.
        workers: Processes of one thread each; 0 to stay in this one.
        say: Told of each job that is done.

    Returns:
        A line for each that failed.
    """
    if not jobs:
        return []
    if workers == 0:
        return [line for job in jobs for line in _report(job[0], _attempt(*job[1:]), say)]
    failed: list[str] = []
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        running = {pool.submit(_attempt, function, arguments): name for name, function, arguments in jobs}
        try:
            for count, future in enumerate(concurrent.futures.as_completed(running), start=1):
                elapsed = time.monotonic() - started
                left = elapsed / count * (len(jobs) - count) / 60
                prefix = f"[{count}/{len(jobs)}, {elapsed / 60:.0f} min, about {left:.0f} left] "
                failed += _report(prefix + running[future], future.result(), say)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _report(name: str, result: tuple[bool, str, float], say: Callable[[str], None]) -> list[str]:
    good, text, seconds = result
    say(f"{name}: {text} ({seconds:.0f} s)")
    return [] if good else [f"{name}: {text}"]


def _attempt(function: Callable[..., str], arguments: tuple[Any, ...]) -> tuple[bool, str, float]:
    started = time.monotonic()
    try:
        return True, function(*arguments), time.monotonic() - started
    except Exception:  # hours of other results are not lost for one method's fault
        return False, f"failed\n{traceback.format_exc()}", time.monotonic() - started


def _start_worker() -> None:
    """Compute in one thread, and end with the process that started this one, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
