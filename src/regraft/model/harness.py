"""Tasks of lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, RecipeError, did_you_mean
from regraft.progress import quiet, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from regraft.progress import Progress

BATCH_SIZE = 8
"""The number of requests in a batch: of a few hundred tokens each, they occupy a processor and fit beside a model."""


def run_lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    out_folder: Path,
    limit: int | None = None,
    *,
    apply_chat_template: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Evaluate a causal language model by tasks of lm-evaluation-harness.

    The results and the sample logs, which `compare_samples` reads, are written as by the harness's own command. Neither
    the model and the tokenizer nor the states of random generators are changed.

    Args:
        model: A model of transformers or PEFT, on its device.
        tokenizer: The model's tokenizer.
        tasks: The harness's names of tasks, groups or tags, or paths of YAML files. Relative paths of data in these
            start from the working directory.
        out_folder: The folder to write to, in a subfolder that is named after the model; it may have other logs.
        limit: The number of examples per task; None for all.
        apply_chat_template: Present prompts as conversations, by the tokenizer's chat template.
        batch_size: The number of requests in a batch.
        progress: The callback for the progress of the requests.

    Returns:
        For each task and group, its scores by metric, as in `acc`, or `exact_match,strict` for a filter other than
        `none`.

    Raises:
        RecipeError: The extra `lm-eval` is not installed, or the harness has no such task.
        DataError: A task cannot be loaded or run.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            f"lm_eval tasks need lm-evaluation-harness ({error}): pip install 'regraft[lm-eval]'"
        ) from None

    out_folder.mkdir(parents=True, exist_ok=True)
    with _quiet_harness(progress), _restored(model):
        paths = [task for task in tasks if Path(task).suffix in (".yaml", ".yml")]
        # the index of the harness's own tasks takes seconds; a group's tasks are in files beside its own
        folders: list[str | Path] = sorted({Path(path).parent for path in paths if Path(path).is_file()})
        manager = TaskManager(include_path=folders, include_defaults=len(paths) < len(tasks))
        _check_tasks(tasks, paths, manager.all_tasks)
        specifications = [_registered_name(task, manager) if task in paths else task for task in tasks]
        tracker = EvaluationTracker(output_path=str(out_folder))
        harness_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            results = simple_evaluate(
                model=harness_model,
                model_args={"pretrained": _model_name(model)},
                tasks=specifications,
                limit=limit,
                bootstrap_iters=0,  # of standard errors; compare_samples resamples pairs instead
                apply_chat_template=apply_chat_template,
                evaluation_tracker=tracker,
                task_manager=manager,
            )
        except Exception as error:
            detail = f"{type(error).__name__}: {error!s:.600}"
            raise DataError(f"lm_eval tasks {', '.join(tasks)}: cannot be run ({detail}). Correct the task.") from error
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        if len(list(out_folder.rglob(f"samples_*_{tracker.date_id}.jsonl"))) < len(results["configs"]):
            raise DataError(f"{out_folder}: the sample logs cannot be written. Choose a folder that is writable.")
    return {task: _scores(figures) for task, figures in (results["results"] | results.get("groups", {})).items()}


def _check_tasks(tasks: Sequence[str], paths: Sequence[str], names: Sequence[str]) -> None:
    for task in tasks:
        if task in paths and not Path(task).is_file():
            raise RecipeError(f"lm_eval: {task}: there is no such file. Correct the path.")
        if task not in paths and task not in names:
            raise RecipeError(
                f"lm_eval: lm-evaluation-harness has no task {task!r}.{did_you_mean(task, names)} `lm-eval ls tasks` "
                "lists them; a file's path ends in .yaml."
            )


def _registered_name(path: str, manager: Any) -> str:
    """Return the name of the task or group in a file; the harness does not load a group by the file's path."""
    file = Path(path).resolve()
    for name, entry in manager.task_index.items():
        if entry.yaml_path and entry.yaml_path.name == file.name and entry.yaml_path.resolve() == file:
            return str(name)
    return path


def _model_name(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return Path(getattr(config, "_name_or_path", "") or "model").name


def _scores(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's figures, whose names have the form `metric,filter`."""
    scores = {}
    for name, value in figures.items():
        metric, comma, _ = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float) and math.isfinite(value):
            scores[name.removesuffix(",none")] = float(value)
    return scores


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of modules and the states of random generators, which the harness sets."""
    import numpy as np
    import torch

    training = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # the harness ties weights, which fails for an adapter with its own copy of a tied head
    model.__dict__["tie_weights"] = lambda: None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        del model.__dict__["tie_weights"]
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, is_training in training.items():
            module.training = is_training


@contextlib.contextmanager
def _quiet_harness(progress: Progress) -> Iterator[None]:
    """Silence the harness and `datasets`, and report the harness's progress bars to a callback instead."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    class Bar(_Bar):
        callback = staticmethod(progress)

    logger = logging.getLogger("lm_eval")
    level = logger.level
    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    bars = [module.tqdm for module in modules]
    find_commit = lm_eval.evaluator.get_git_commit_hash
    has_progress_bars = datasets.are_progress_bars_disabled() is False
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # git prints an error outside a repository
    for module in modules:
        module.tqdm = Bar
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)
        if has_progress_bars:
            datasets.enable_progress_bars()
        lm_eval.evaluator.get_git_commit_hash = find_commit
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


class _Bar:
    """The part of tqdm's interface that the harness uses, with a callback instead of a bar."""

    callback: Progress

    def __init__(self, iterable: Any = None, total: int | None = None, desc: str = "lm-eval", **_options: Any) -> None:
        self.iterable = iterable
        self.stage = desc
        self.total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 0
        self.processed = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, count: int = 1) -> None:
        """Report more processed items.

        Args:
            count: The number of items.
        """
        self.processed += count
        self.callback(self.stage, self.processed, self.total, {})

    def close(self) -> None:
        """Do nothing: the callback needs no end."""
