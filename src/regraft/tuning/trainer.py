"""transformers' Trainer with a fixed order of data, any objective, and an exact resumption after an interruption."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from regraft.adaptation.outcome import versions
from regraft.checkpoint import is_sealed, replace_atomically, seal
from regraft.errors import RecipeError
from regraft.model.device import device
from regraft.progress import quiet
from regraft.recipe import best_step
from regraft.tuning.tracking import run_name, trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from regraft.progress import Progress
    from regraft.recipe import Recipe

    Objective = Callable[[Any, dict[str, torch.Tensor], int], torch.Tensor]
    """The loss as a function of the model, a batch and the number of completed steps."""

SEAL = "sealed.json"
LOGGING_STEPS = 10
"""Steps between logged losses; each reads the loss from the device, which waits for the computation."""


def train(
    model: Any,
    data: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    objective: Objective,
    evaluate: Callable[[Any], dict[str, float]],
    recipe: Recipe,
    work: Path,
    progress: Progress,
    *,
    stage: str,
    merit: Callable[[float], float] = float,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train a model in place; it ends with its best weights.

    An interrupted run resumes from its last checkpoint in `work`, with the result of an uninterrupted run. A damaged
    checkpoint is discarded.

    Args:
        model: The model to train.
        data: The items in the order of the training, steps × batch_size.
        collate: Makes a batch from a list of items.
        objective: The loss as a function of the model, a batch and the number of completed steps.
        evaluate: Computes the figures of the model, among them `score`.
        recipe: A resolved recipe.
        work: A folder for checkpoints.
        progress: Called after each step.
        stage: The name of the training in progress messages.
        merit: Maps a score to a number that is higher for a better score.
        after_step: Called after each step with its number.

    Returns:
        The learning curve, an entry per evaluation from step 0 on: `step`, `seconds` of training so far, and the
        figures. If the averaged weights are the best, a last entry has their figures, and in `averaged` the number of
        evaluations that they are averaged over.

    Raises:
        RecipeError: A loss or a score became infinite or not a number, or a tracker does not exist.
    """
    checkpoints = work / "checkpoints"
    last = _last_undamaged_checkpoint(checkpoints)
    name = run_name(work)
    report_to, callbacks = trackers(name)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps or 1,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate or 0.0,
        warmup_steps=recipe.warmup,  # below 1, a fraction of the steps
        weight_decay=recipe.weight_decay,
        bf16=recipe.precision == "bf16",
        use_cpu=device().type == "cpu",
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        eval_on_start=last is None,
        save_steps=recipe.save_every,
        save_total_limit=None,  # the callback below removes older checkpoints once a newer one is sealed
        logging_steps=min(LOGGING_STEPS, recipe.eval_every or LOGGING_STEPS),
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=report_to or "none",
        run_name=name,
        project="regraft",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    average_after = recipe.average * (recipe.steps or 1) if recipe.average else math.inf
    best = _BestWeights(work / "best", average_after, merit)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        objective=objective,
        compute_figures=evaluate,
        best=best,
        callbacks=callbacks,
    )
    trainer.add_callback(_CheckpointCallback(trainer, progress, stage, after_step))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    curve = trainer.curve
    if (count := best.count(curve)) > 1:
        best.restore_average(model, curve)
        figures = evaluate(model)
        if merit(figures["score"]) > max(merit(point["score"]) for point in curve):
            return [*curve, {**curve[-1], **figures, "averaged": count}]
    best.restore(model, curve)
    return curve


class _Trainer(Trainer):
    """A Trainer with an objective and an evaluation of the caller's.

    Args:
        objective: The loss as a function of the model, a batch and the number of completed steps.
        compute_figures: Computes the figures of a model, among them `score`.
        best: The best weights so far.
        arguments: The arguments of `transformers.Trainer`.
    """

    def __init__(self, *, objective: Any, compute_figures: Any, best: _BestWeights, **arguments: Any):
        super().__init__(**arguments)
        self.objective: Any = objective
        self.compute_figures: Any = compute_figures
        self.best = best
        self.model_accepts_loss_kwargs = False  # the objective's loss is a mean over the batch
        self.seconds = 0.0

    @property
    def curve(self) -> list[dict[str, float]]:
        """The learning curve so far, from the Trainer's log, which is part of its checkpoints."""
        return [
            {"step": entry["step"], "seconds": entry["seconds"]}
            | {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            for entry in self.state.log_history
            if "eval_score" in entry
        ]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch."""
        return self.objective(model, inputs, self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the figures, and store the weights if they are the best so far."""
        metrics = {f"eval_{name}": value for name, value in self.compute_figures(self.model).items()}
        for name, value in metrics.items():
            self._check_finite(name.removeprefix("eval_"), value, "held-out ")
        self.log(metrics)
        self.best.update(self.model, self.curve)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures with the seconds of training so far."""
        super().log({**logs, "seconds": self.seconds}, start_time)
        if "loss" in logs:
            self._check_finite("loss", logs["loss"])

    def _check_finite(self, name: str, value: float, prefix: str = "") -> None:
        if not math.isfinite(value):
            raise RecipeError(
                f"the {prefix}{name} became {value} at step {self.state.global_step}. Lower the learning rate "
                f"({self.args.learning_rate}), or train in fp32."
            )


class _CheckpointCallback(TrainerCallback):
    """Seals each checkpoint together with the best weights so far, removes older ones, and reports timed progress.

    Args:
        trainer: The trainer.
        progress: Called after each step.
        stage: The name of the training in progress messages.
        after_step: Called after each step with its number.
    """

    def __init__(self, trainer: _Trainer, progress: Progress, stage: str, after_step: Callable[[int], None] | None):
        self.trainer, self.progress, self.stage, self.after_step = trainer, progress, stage, after_step
        self.step_start = 0.0
        self.figures = dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.curve:
            self.trainer.seconds = state.log_history[-1]["seconds"]
            self.trainer.best.pin(self.trainer.curve)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = self.trainer.best
        checkpoints = Path(args.output_dir)
        folder = checkpoints / f"checkpoint-{state.global_step}"
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != SEAL]
        seal(folder / SEAL, [*files, *best.files(self.trainer.curve)], versions())
        best.pin(self.trainer.curve)
        for checkpoint in checkpoints.iterdir():
            if checkpoint != folder:
                shutil.rmtree(checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.seconds += time.perf_counter() - self.step_start
        self.figures["steps/s"] = state.global_step / self.trainer.seconds
        self.progress(self.stage, state.global_step, state.max_steps, self.figures)
        if self.after_step:
            self.after_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        labels = {"loss": "loss", "eval_score": "score"}
        self.figures |= {labels[name]: value for name, value in (logs or {}).items() if name in labels}


class _BestWeights:
    """Files of the trained parameters at the best evaluation so far, and of their average over the late evaluations.

    The files that the last checkpoint refers to are pinned: an interrupted run resumes from them.

    Args:
        folder: The folder of the files.
        average_after: The average is over the evaluations after this step.
        merit: Maps a score to a number that is higher for a better score.
    """

    def __init__(self, folder: Path, average_after: float, merit: Callable[[float], float]):
        self.folder, self.average_after, self.merit = folder, average_after, merit
        self.pinned: tuple[Path, ...] = ()

    def count(self, curve: list[dict[str, float]]) -> int:
        """Return the number of evaluations that the average is over."""
        return sum(point["step"] > self.average_after for point in curve)

    def update(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Write the weights if the last point of the curve is the best, and add them to the average if it is late."""
        weights = {name: p.detach().contiguous() for name, p in _trained_parameters(model)}
        if best_step(curve, self.merit) == int(curve[-1]["step"]):
            self._write(self._best_file(curve), weights)
        if curve[-1]["step"] > self.average_after:
            if (count := self.count(curve)) > 1:
                average = self._read(self._average_file(count - 1))
                weights = {n: average[n].to(p.device).lerp(p, 1 / count) for n, p in weights.items()}
            self._write(self._average_file(count), weights)
        self._remove_unused(curve)

    def files(self, curve: list[dict[str, float]]) -> list[Path]:
        """Return the files that a run resumes from: the best weights, and the average if there is one."""
        return [self._best_file(curve), *([self._average_file(count)] if (count := self.count(curve)) else [])]

    def pin(self, curve: list[dict[str, float]]) -> None:
        """Protect the current files from removal until the next call."""
        self.pinned = tuple(self.files(curve))
        self._remove_unused(curve)

    def restore(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Load the best weights into the model."""
        self._load(model, self._best_file(curve))

    def restore_average(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Load the average of the late weights into the model."""
        self._load(model, self._average_file(self.count(curve)))

    def _load(self, model: Any, file: Path) -> None:
        stored = self._read(file)
        with torch.no_grad():
            for name, parameter in _trained_parameters(model):
                parameter.copy_(stored[name])

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(file)

    def _write(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(file, synced=False) as temporary:
            save_file(weights, temporary)

    def _remove_unused(self, curve: list[dict[str, float]]) -> None:
        used = (*self.files(curve), *self.pinned)
        for file in [*self.folder.glob("step-*"), *self.folder.glob("mean-*")]:
            if file not in used:
                file.unlink()

    def _best_file(self, curve: list[dict[str, float]]) -> Path:
        return self.folder / f"step-{best_step(curve, self.merit)}.safetensors"

    def _average_file(self, count: int) -> Path:
        return self.folder / f"mean-{count}.safetensors"


def _trained_parameters(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _last_undamaged_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose files all match its seal, and remove damaged ones."""
    undamaged: dict[int, Path] = {}
    for entry in checkpoints.glob("*"):
        step = entry.name.removeprefix("checkpoint-")
        if step.isdecimal() and is_sealed(entry / SEAL, versions()):
            undamaged[int(step)] = entry
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return undamaged[max(undamaged)] if undamaged else None
