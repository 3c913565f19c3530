"""transformers' Trainer with a fixed order of data, any objective, and an exact continuation after an interruption."""

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
    """The loss of a model on a batch after so many steps."""

SEAL = "sealed.json"


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
    each: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train a model in place, leave it with its best weights, and return its learning curve.

    What a killed run left in `work` is gone on from; the result is that of an uninterrupted run. A checkpoint that is
    damaged is discarded.

    Args:
        model: What to train.
        data: Its item n is what the training sees n-th: steps × batch_size items.
        collate: Makes a batch of such items.
        objective: Gives the loss of a batch, from the model, the batch and the steps done so far.
        evaluate: Gives figures of the model, among them `score`.
        recipe: Resolved.
        work: A folder for checkpoints.
        progress: Told of each step.
        stage: What to call this there.
        merit: Returns a number that is the larger the better a score is.
        each: Called after each step, with its number.

    Returns:
        One entry an evaluation, from step 0 on: `step`, `seconds` of training so far, and the figures. If the mean of
        weights is the best, its figures come last, with how many evaluations it is of as `averaged`.

    Raises:
        RecipeError: A loss or a score became infinite or not a number, or there is no such tracker.
    """
    checkpoints = work / "checkpoints"
    last, name = _last_whole(checkpoints), run_name(work)
    report_to, callbacks = trackers(name)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps or 1,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate or 0.0,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=recipe.precision == "bf16",
        use_cpu=device().type == "cpu",
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        eval_on_start=last is None,
        save_steps=recipe.save_every,
        save_total_limit=None,  # an older one is removed once the newer one is sealed
        logging_steps=min(10, recipe.eval_every or 10),
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
    best = _Best(work / "best", recipe.average * (recipe.steps or 1) if recipe.average else math.inf, merit)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        objective=objective,
        figures=evaluate,
        best=best,
        callbacks=callbacks,
    )
    trainer.add_callback(_Watch(trainer, progress, stage, each))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    curve = trainer.curve
    if (count := best.count(curve)) > 1:
        best.restore_mean(model, curve)
        figures = evaluate(model)
        if merit(figures["score"]) > max(merit(point["score"]) for point in curve):
            return [*curve, {**curve[-1], **figures, "averaged": count}]
    best.restore(model, curve)
    return curve


class _Trainer(Trainer):
    """A Trainer whose loss, evaluation and learning rates are given from outside."""

    def __init__(self, *, objective: Any, figures: Any, best: _Best, **given: Any):
        super().__init__(**given)
        self.objective: Any = objective
        self.figures: Any = figures
        self.best = best
        self.model_accepts_loss_kwargs = False  # the objective's loss is a mean over the batch
        self.seconds = 0.0

    @property
    def curve(self) -> list[dict[str, float]]:
        names = ("step", "seconds")
        return [
            {name: entry[name] for name in names} | {k[5:]: v for k, v in entry.items() if k.startswith("eval_")}
            for entry in self.state.log_history
            if "eval_score" in entry
        ]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self.objective(model, inputs, self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Take the figures and keep the weights if they are the best so far."""
        metrics = {f"eval_{name}": value for name, value in self.figures(self.model).items()}
        for name, value in metrics.items():
            self._check_finite(name.removeprefix("eval_"), value, "held-out ")
        self.log(metrics)
        self.best.offer(self.model, self.curve)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": self.seconds}, start_time)
        if "loss" in logs:
            self._check_finite("loss", logs["loss"])

    def _check_finite(self, name: str, value: float, where: str = "") -> None:
        if not math.isfinite(value):
            raise RecipeError(
                f"the {where}{name} became {value} at step {self.state.global_step}. Lower the learning rate "
                f"({self.args.learning_rate}), or train in fp32."
            )


class _Watch(TrainerCallback):
    """Times the steps, tells how far the training is, and ties the best weights to the checkpoints."""

    def __init__(self, trainer: _Trainer, progress: Progress, stage: str, each: Callable[[int], None] | None):
        self.trainer, self.progress, self.stage, self.each = trainer, progress, stage, each
        self.started, self.figures = 0.0, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.curve:
            self.trainer.seconds = state.log_history[-1]["seconds"]
            self.trainer.best.secure(self.trainer.curve)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best, checkpoints = self.trainer.best, Path(args.output_dir)
        folder = checkpoints / f"checkpoint-{state.global_step}"
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != SEAL]
        seal(folder / SEAL, [*files, *best.files(self.trainer.curve)], versions())
        best.secure(self.trainer.curve)
        for other in checkpoints.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.seconds += time.perf_counter() - self.started
        self.figures["steps/s"] = state.global_step / self.trainer.seconds
        self.progress(self.stage, state.global_step, state.max_steps, self.figures)
        if self.each:
            self.each(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {"loss": "loss", "eval_score": "score"}
        self.figures |= {shown[name]: value for name, value in (logs or {}).items() if name in shown}


class _Best:
    """The trained parameters at the best evaluation so far, in a file, and their mean over the late evaluations.

    What they were as of the last checkpoint is kept beside: from there an interrupted run goes on.

    Args:
        folder: Where.
        after: The mean is of the evaluations after this step.
        merit: Returns a number that is the larger the better a score is.
    """

    def __init__(self, folder: Path, after: float, merit: Callable[[float], float]):
        self.folder, self.after, self.merit = folder, after, merit
        self.secured: tuple[Path, ...] = ()

    def count(self, curve: list[dict[str, float]]) -> int:
        """Return how many evaluations the mean is of."""
        return sum(point["step"] > self.after for point in curve)

    def offer(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Write the weights if the last point of the curve is the best, and take them into the mean if it is late."""
        weights = {name: p.detach().contiguous() for name, p in _trained(model)}
        if best_step(curve, self.merit) == int(curve[-1]["step"]):
            self._write(self._best(curve), weights)
        if curve[-1]["step"] > self.after:
            if (count := self.count(curve)) > 1:
                mean = self._read(self._mean(count - 1))
                weights = {n: mean[n].to(p.device).lerp(p, 1 / count) for n, p in weights.items()}
            self._write(self._mean(count), weights)
        self._clear(curve)

    def files(self, curve: list[dict[str, float]]) -> list[Path]:
        """Name the files that a run goes on from: the best weights, and the mean if there is one."""
        return [self._best(curve), *([self._mean(count)] if (count := self.count(curve)) else [])]

    def secure(self, curve: list[dict[str, float]]) -> None:
        """Keep what there is now until this is called again."""
        self.secured = tuple(self.files(curve))
        self._clear(curve)

    def restore(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Put the best weights back into the model."""
        self._fill(model, self._best(curve))

    def restore_mean(self, model: Any, curve: list[dict[str, float]]) -> None:
        """Put the mean of the late weights into the model."""
        self._fill(model, self._mean(self.count(curve)))

    def _fill(self, model: Any, file: Path) -> None:
        stored = self._read(file)
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(stored[name])

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(file)

    def _write(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(file, synced=False) as beside:
            save_file(weights, beside)

    def _clear(self, curve: list[dict[str, float]]) -> None:
        kept = (*self.files(curve), *self.secured)
        for file in [*self.folder.glob("step-*"), *self.folder.glob("mean-*")]:
            if file not in kept:
                file.unlink()

    def _best(self, curve: list[dict[str, float]]) -> Path:
        return self.folder / f"step-{best_step(curve, self.merit)}.safetensors"

    def _mean(self, count: int) -> Path:
        return self.folder / f"mean-{count}.safetensors"


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _last_whole(checkpoints: Path) -> Path | None:
    """Find the newest checkpoint whose every file is as it was written, and clear away all others."""
    whole: dict[int, Path] = {}
    for entry in checkpoints.glob("*"):
        step = entry.name.removeprefix("checkpoint-")
        if step.isdecimal() and is_sealed(entry / SEAL, versions()):
            whole[int(step)] = entry
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return whole[max(whole)] if whole else None
