"""Training by transformers' Trainer with a fixed order of data, any objective, and exact resumption."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from regraft.adaptation.outcome import versions
from regraft.checkpoint import is_sealed, seal
from regraft.errors import RecipeError
from regraft.model.device import device
from regraft.model.outputs import unwrap_model, unwrap_parallel
from regraft.progress import quiet
from regraft.tuning.best_weights import BestWeights
from regraft.tuning.tracking import run_name, trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.tuning.best_weights import Curve

    Objective = Callable[[nn.Module, dict[str, torch.Tensor], int], torch.Tensor]
    """The loss as a function of the model, a batch and the number of completed steps."""

SEAL = "sealed.json"
"""The file of a checkpoint's folder that records the hashes of the files that a run resumes from."""
LOGGING_STEPS = 10
"""The most steps between logged losses: reading a loss from the device waits for its computations."""


def train(
    model: nn.Module,
    data: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    objective: Objective,
    evaluate: Callable[[nn.Module], dict[str, float]],
    recipe: Recipe,
    work_folder: Path,
    progress: Progress,
    *,
    stage: str,
    merit: Callable[[float], float] = float,
    after_step: Callable[[int], None] | None = None,
    score_name: str = "score",
) -> Curve:
    """Train a model in place; it ends with its best weights.

    An interrupted run resumes from its last checkpoint in `work_folder`, with the result of an uninterrupted run. A
    damaged checkpoint is discarded.

    Args:
        model: The model; its parameters that require gradients are trained.
        data: The items in the order of the training, steps × batch size.
        collate: Makes a batch from a list of items.
        objective: The loss as a function of the model, a batch and the number of completed steps.
        evaluate: Computes the figures of the model: `score`, by which the best weights are chosen, and any others.
        recipe: A resolved recipe.
        work_folder: The folder of the checkpoints and of the best weights so far.
        progress: Called after each step.
        stage: The name of the training in progress messages.
        merit: Maps a score to a number that is higher for a better score.
        after_step: Called after each step with the number of completed steps.
        score_name: The name of the score in progress messages.

    Returns:
        The learning curve, an entry per evaluation from step 0 on: `step`, `seconds` of training so far, and the
        figures. If the averaged weights are the best, a last entry has their figures, and in `averaged` the number of
        evaluations that they are averaged over.

    Raises:
        RecipeError: A loss or a figure became infinite or NaN, or a tracker does not exist or is not installed.
    """
    checkpoints = work_folder / "checkpoints"
    checkpoint = _last_undamaged_checkpoint(checkpoints)
    name = run_name(work_folder)
    report_to, callbacks = trackers(name)
    steps = recipe.num_steps
    assert recipe.learning_rate is not None and recipe.eval_every is not None  # the recipe is resolved
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=recipe.num_micro_batch_examples,
        gradient_accumulation_steps=recipe.batch_size // recipe.num_micro_batch_examples,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,  # the Trainer reads a number below 1 as a fraction of the steps
        weight_decay=recipe.weight_decay,
        bf16=recipe.precision == "bf16",
        use_cpu=device().type == "cpu",
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        eval_on_start=checkpoint is None,
        save_steps=recipe.save_every,
        save_total_limit=None,  # the callback below removes older checkpoints once a newer one is sealed
        logging_steps=min(LOGGING_STEPS, recipe.eval_every),
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
    average_after = recipe.average * steps if recipe.average else math.inf
    best = BestWeights(work_folder / "best", average_after, merit)
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
    trainer.add_callback(_CheckpointCallback(trainer, progress, stage, after_step, score_name))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with quiet(), _activation_checkpointing(model, recipe.activation_checkpointing):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = trainer.curve
    num_averaged = best.num_averaged(curve)
    if num_averaged > 1:
        best.restore_average(model, curve)
        figures = evaluate(model)
        if merit(figures["score"]) > max(merit(point["score"]) for point in curve):
            return [*curve, {**curve[-1], **figures, "averaged": num_averaged}]
    best.restore(model, curve)
    return curve


class _Trainer(Trainer):
    """A Trainer that gets its loss and its evaluation from the caller.

    Args:
        objective: The loss as a function of the model, a batch and the number of completed steps.
        compute_figures: Computes the figures of a model, among them `score`.
        best: The files of the best weights so far.
        arguments: The arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        compute_figures: Callable[[nn.Module], dict[str, float]],
        best: BestWeights,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.objective: Objective = objective
        self.compute_figures = compute_figures
        self.best = best
        self.model_accepts_loss_kwargs = False  # the objective's loss is a mean over the batch
        self.seconds = 0.0
        self.num_accumulated_rows = 0  # of the batches whose gradients are summed to one step's

    @property
    def curve(self) -> Curve:
        """The learning curve so far, from the Trainer's log, which is part of its checkpoints."""
        curve = []
        for entry in self.state.log_history:
            if "eval_score" in entry:
                figures = {name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")}
                curve.append({"step": entry["step"], "seconds": entry["seconds"], **figures})
        return curve

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch, whose weight in an accumulated batch is its share of the rows."""
        loss = self.objective(model, inputs, self.state.global_step)
        if self.args.gradient_accumulation_steps == 1:
            return loss
        # the Trainer divides by the number of accumulated batches
        return loss * (self.current_gradient_accumulation_steps * _num_rows(inputs) / self.num_accumulated_rows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step, and count their rows."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.num_accumulated_rows = sum(map(_num_rows, batches))
        return batches, num_items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute and log the figures, and update the files of the best and the averaged weights."""
        model: Any = self.model
        figures = self.compute_figures(model)
        for name, value in figures.items():
            self._check_finite(f"held-out {name}", value)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.best.update(model, self.curve)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures with the seconds of training so far, and refuse a loss that is infinite or NaN."""
        super().log({**logs, "seconds": self.seconds}, start_time)
        if "loss" in logs:
            self._check_finite("loss", logs["loss"])

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise RecipeError(
                f"the {name} became {value} at step {self.state.global_step}. Lower the learning rate "
                f"({self.args.learning_rate}), or train in fp32."
            )


class _CheckpointCallback(TrainerCallback):
    """Seals each checkpoint together with the best weights so far, removes older checkpoints, and reports progress.

    Args:
        trainer: The trainer that calls this, for its curve and its best weights.
        progress: Called after each step.
        stage: The name of the training in progress messages.
        after_step: Called after each step with the number of completed steps.
        score_name: The name of the score in progress messages.
    """

    def __init__(
        self,
        trainer: _Trainer,
        progress: Progress,
        stage: str,
        after_step: Callable[[int], None] | None,
        score_name: str,
    ):
        self.trainer = trainer
        self.progress = progress
        self.stage = stage
        self.after_step = after_step
        self.score_name = score_name
        self.step_start = 0.0
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the timer and the pinned files of a run that resumes from a checkpoint."""
        if self.trainer.curve:
            self.trainer.seconds = state.log_history[-1]["seconds"]
            self.trainer.best.pin(self.trainer.curve)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the new checkpoint, then remove the older checkpoints."""
        best = self.trainer.best
        checkpoints = Path(args.output_dir)
        folder = checkpoints / f"checkpoint-{state.global_step}"
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != SEAL]
        seal(folder / SEAL, [*files, *best.files(self.trainer.curve)], versions())
        best.pin(self.trainer.curve)
        for checkpoint in checkpoints.iterdir():
            if checkpoint != folder:
                shutil.rmtree(checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the timer of a step: evaluations and checkpoints do not count as training."""
        self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress with the mean speed so far, and call `after_step`."""
        self.trainer.seconds += time.perf_counter() - self.step_start
        self.figures["steps/s"] = state.global_step / self.trainer.seconds
        self.progress(self.stage, state.global_step, state.max_steps, self.figures)
        if self.after_step:
            self.after_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Store the latest loss and score for the next progress message."""
        shown_names = {"loss": "loss", "eval_score": self.score_name}
        self.figures |= {shown_names[name]: value for name, value in (logs or {}).items() if name in shown_names}


def _num_rows(batch: dict[str, torch.Tensor]) -> int:
    """Return the number of rows that a batch's loss is a mean over, at least 1."""
    return max(1, len(batch["targets"] if "targets" in batch else next(iter(batch.values()))))


@contextlib.contextmanager
def _activation_checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Make a transformers model recompute its activations in the backward pass inside the context, if enabled."""
    if not enabled:
        yield
        return
    inner = unwrap_model(model)
    prompt_config = getattr(unwrap_parallel(model), "active_peft_config", None)
    if prompt_config is not None and prompt_config.peft_type == "PREFIX_TUNING":
        raise RecipeError(
            "activation_checkpointing cannot be used with a prefix, which is stored in the cache that the second "
            "computation would read. Leave it out, and set a smaller micro_batch_size to save memory."
        )
    use_cache = inner.config.use_cache
    # the older name is the only one before transformers 5.20
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    disable = getattr(inner, "activation_checkpointing_disable", None) or inner.gradient_checkpointing_disable
    enable()
    inner.config.use_cache = False  # a cache would be filled by the first computation, and used by the second
    try:
        yield
    finally:
        disable()
        inner.config.use_cache = use_cache


def _last_undamaged_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose files all match its seal, and remove all that is not such a checkpoint."""
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
