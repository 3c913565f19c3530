"""Distillation of the map of `project`, as in Qin et al., 2023 (arXiv:2305.08702): from old adaptations only."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    from regraft.adaptation.vector import Vector
    from regraft.methods.job import Job
    from regraft.methods.projection import Projection
    from regraft.task.types import Examples, Likelihood
    from regraft.tuning import Distillation
    from regraft.tuning.distill import TeacherOutputs

SUPPORTED_KINDS = ("lora", "bottleneck")
"""The kinds that are small enough for W1 and W2, and whose tensors are differentiable parameters of the student."""
MAX_SIZE = 4_000_000  # parameters of an adaptation; at rank 16, W1 and W2 take 2 GB with gradients and Adam's moments
INITIAL_STD = 0.02  # of the map's entries, as in the paper
MIN_NORM = 1e-12  # so that weights that are all zero cause no division by 0
SEAL = "sealed.json"


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """A task to learn the map from.

    Args:
        vector: The old weights, flattened.
        student: The new base with the old weights grafted, frozen; it runs with mapped weights in place of the old.
        precision: `bf16` or `fp32`, as the student computes in evaluations.
        examples: The training examples, encoded for the new base.
        teacher_outputs: The old model's outputs on the training examples.
        order: The indices of the examples in the order of training.
        likelihood: The distribution over targets that the outputs parametrise.
    """

    vector: torch.Tensor
    student: nn.Module
    precision: str
    examples: Examples
    teacher_outputs: TeacherOutputs
    order: list[int]
    likelihood: Likelihood


def distil_map(job: Job, options: Projection) -> dict[str, torch.Tensor]:
    """Learn P(v) = v·W1·W2 + b from the outputs of old models on their tasks, and map the job's vector v.

    The mapped vector is P(v), or v + P(v) in a residual map. The entries of W1 [|v|, d] start at random numbers of mean
    0 and standard deviation `INITIAL_STD`. So do those of W2 [d, |v|] and b, except in a residual map, where they start
    at 0, so that the map starts at `direct`.

    Args:
        job: The job, with the adaptation to map.
        options: The tasks, the rank and the options of the training.

    Returns:
        The mapped tensors by stored name.

    Raises:
        CheckpointError: A folder of a pair has no adaptation.
        DataError: A task's data cannot be used.
        KindError: The kind is not supported, or the adaptation is too large or has no weights to map.
        MismatchError: An adaptation was tuned on a different base, or its weights differ in kind, shapes or settings.
        RecipeError: A pair is not written OLD=TASK, or the loss became infinite or NaN.
    """
    import torch

    from regraft.model import device
    from regraft.tuning import Distillation

    vector = job.adaptation.family.vector(job.adaptation, job.upgrade.old)
    size = sum(math.prod(shape) for shape in vector.shapes.values())
    if job.adaptation.exact_kind not in SUPPORTED_KINDS:
        raise KindError(
            f"{job.adaptation.path}: the map can be learned by distillation for {', '.join(SUPPORTED_KINDS)}, not for "
            f"{job.adaptation.exact_kind}. Use fit=regression."
        )
    if size > MAX_SIZE:
        raise KindError(
            f"{job.adaptation.path}: has {size:,} parameters, and the map can be learned by distillation for up to "
            f"{MAX_SIZE:,}. Use fit=regression."
        )
    loss_options = Distillation().for_task(job.data.task)
    steps_per_task = math.ceil(options.steps / len(options.pairs))
    tasks = [
        _prepare(job, pair, index, vector, loss_options, steps_per_task) for index, pair in enumerate(options.pairs)
    ]
    generator = torch.Generator().manual_seed(job.recipe.seed)
    shapes = ((size, options.rank), (options.rank, size), (size,))
    initial = [INITIAL_STD * torch.randn(shape, generator=generator) for shape in shapes]
    if options.residual:
        initial[1:] = [torch.zeros_like(tensor) for tensor in initial[1:]]
    w1, w2, b = parameters = [tensor.to(device()).requires_grad_() for tensor in initial]

    def apply_map(v: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = v @ w1 @ w2 + b
        return v + mapped if options.residual else mapped

    losses = list(_train(job, options, tasks, vector, parameters, apply_map, loss_options))
    first_round = losses[: len(tasks)]
    last_round = losses[-len(tasks) :]
    mean_losses = [sum(round_losses) / len(round_losses) for round_losses in (first_round, last_round)]
    job.notes.update(pairs=len(tasks), fit_loss=[round(mean, 4) for mean in mean_losses], fit_steps=options.steps)
    with torch.no_grad():
        mapped = apply_map(_flatten(vector).to(device())).cpu()
    return _unflatten(mapped, vector)


def _train(
    job: Job,
    options: Projection,
    tasks: list[_Task],
    vector: Vector,
    parameters: list[torch.Tensor],
    apply_map: Callable[[torch.Tensor], torch.Tensor],
    loss_options: Distillation,
) -> Iterator[float]:
    """Train on a batch of each task in turn, and yield the loss of each step; an interrupted run is resumed."""
    import torch

    from regraft.model import device
    from regraft.model.device import autocast
    from regraft.model.outputs import forward
    from regraft.tuning import distillation_loss

    rates = _learning_rates([task.vector for task in tasks], options)
    optimiser = torch.optim.Adam([{"params": [tensor]} for tensor in parameters])
    losses = _load_state(job, parameters, optimiser)
    yield from losses
    for step in range(len(losses), options.steps):
        task = tasks[step % len(tasks)]
        start = step // len(tasks) * job.recipe.batch_size
        example_indices = task.order[start : start + job.recipe.batch_size]
        batch = {name: tensor.to(device()) for name, tensor in task.examples.batch(example_indices).items()}
        parameter_names = job.adaptation.family.parameter_names(task.student)
        mapped = _unflatten(apply_map(task.vector.to(device())), vector)
        mapped_parameters = {parameter_names[stored_name]: tensor for stored_name, tensor in mapped.items()}
        with autocast(task.precision, device()):
            output = forward(task.student, batch, hidden=True, parameters=mapped_parameters)
        loss: Any = distillation_loss(output, batch, task.teacher_outputs, loss_options, task.likelihood)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / options.steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RecipeError(
                f"the map's loss became {losses[-1]} at step {step + 1}. Lower its learning_rate "
                f"({options.learning_rate:g}), or train in fp32 (--precision)."
            )
        if (step + 1) % job.recipe.save_every == 0:
            _save_state(job, parameters, optimiser, losses)
        job.progress("map", step + 1, options.steps, {"loss": losses[-1]})
        yield losses[-1]


def _save_state(
    job: Job, parameters: list[torch.Tensor], optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Save the state of the map's training, and remove the previous state once the new one is complete."""
    import torch

    from regraft.checkpoint import replace_atomically, seal

    folder = job.work_folder / "map" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{len(losses)}.pt"
    state = {
        "parameters": [parameter.detach() for parameter in parameters],
        "optimiser": optimiser.state_dict(),
        "losses": losses,
    }
    with replace_atomically(file) as temporary:
        torch.save(state, temporary)
    seal(folder / SEAL, [file], {"file": file.name})
    for earlier in folder.glob("step-*.pt"):
        if earlier != file:
            earlier.unlink()


def _load_state(job: Job, parameters: list[torch.Tensor], optimiser: torch.optim.Optimizer) -> list[float]:
    """Load the last undamaged state of the map's training, and return the losses so far."""
    import torch

    from regraft.checkpoint import is_sealed

    folder = job.work_folder / "map" / "checkpoints"
    files = [file for file in folder.glob("step-*.pt") if is_sealed(folder / SEAL, {"file": file.name})]
    if not files:
        return []
    state = torch.load(files[0], weights_only=True)
    with torch.no_grad():
        for parameter, stored in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(stored)
    optimiser.load_state_dict(state["optimiser"])
    losses: list[float] = state["losses"]
    return losses


def _learning_rates(vectors: list[torch.Tensor], options: Projection) -> tuple[float, float, float]:
    """Return Adam's learning rates for W1, W2 and b, so that a step of each moves a mapped weight about equally far.

    With a single rate, a step of W1 would move a mapped weight about d·`INITIAL_STD`·‖v‖₁ times as far as a step of b,
    and training would diverge.
    """
    mean_l1, mean_l2 = (max(sum(float(vector.norm(p)) for vector in vectors) / len(vectors), MIN_NORM) for p in (1, 2))
    rate = options.learning_rate
    scale = options.rank * INITIAL_STD
    return rate / (scale * mean_l1), rate / (scale * mean_l2), rate


def _prepare(job: Job, pair: str, index: int, layout: Vector, loss_options: Distillation, steps: int) -> _Task:
    """Load a task, run its old model as the teacher, and graft its old weights onto the new base as the student."""
    from regraft.adaptation import load_adaptation, load_model, write_graft
    from regraft.methods.pairs import load_with_layout, split_pair
    from regraft.model import Deployment, match_labels
    from regraft.model.examples import check_rows
    from regraft.task import load_data
    from regraft.tuning import plan_order
    from regraft.tuning.distill import compute_teacher_outputs

    adaptation_folder, task_file = split_pair(pair)
    old, new = job.upgrade.old, job.upgrade.new
    adaptation, vector = load_with_layout(adaptation_folder, old, layout)
    data = match_labels(adaptation, load_data(task_file, job.recipe.seed))
    task_folder = job.work_folder / f"task-{index}"
    graft_folder = task_folder / "graft"
    write_graft(adaptation, job.upgrade, graft_folder, job.progress)
    precision = job.recipe.precision
    student = Deployment(load_model(load_adaptation(graft_folder), new, data.head), new, data, precision)
    student.model.eval().requires_grad_(False)
    examples = student.examples(data.train)
    order = plan_order(examples.lengths, job.recipe.batch_size, steps, job.recipe.seed)
    teacher = Deployment(load_model(adaptation, old, data.head), old, data, precision, job.progress)
    check_rows(teacher.examples(data.train), examples, data.train)
    teacher_outputs = compute_teacher_outputs(teacher, data.train, order, loss_options, task_folder)
    return _Task(
        _flatten(vector), student.model, student.precision, examples, teacher_outputs, order.tolist(), data.likelihood
    )


def _flatten(vector: Vector) -> torch.Tensor:
    """Concatenate a vector's tensors in float32."""
    import torch

    shapes = vector.shapes
    return torch.cat([vector.flat_slice(name, 0, math.prod(shapes[name])).float() for name in shapes])


def _unflatten(flat: torch.Tensor, vector: Vector) -> dict[str, torch.Tensor]:
    """Split concatenated tensors into the tensors of a vector, by name."""
    tensors = {}
    start = 0
    for name, shape in vector.shapes.items():
        end = start + math.prod(shape)
        tensors[name] = flat[start:end].reshape(shape)
        start = end
    return tensors
