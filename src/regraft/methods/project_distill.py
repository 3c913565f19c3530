"""The map of `project` learned by distillation, as the paper has it: from tasks tuned on the old base only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from regraft.adaptation.vector import Vector
    from regraft.methods.job import Job
    from regraft.methods.projection import Projection
    from regraft.task.types import Examples, Likelihood
    from regraft.tuning import Distillation
    from regraft.tuning.distill import TeacherOutputs

KINDS = ("lora", "bottleneck")
MOST = 4_000_000
SPREAD = 0.02
SMALLEST = 1e-12
SEAL = "sealed.json"


@dataclasses.dataclass(frozen=True, eq=False)
class _Lesson:
    """One task: its old weights, the student that is given mapped ones, and what the teacher says of its texts."""

    vector: torch.Tensor
    student: Any
    examples: Examples
    taught: TeacherOutputs
    order: list[int]
    likelihood: Likelihood


def distil_map(job: Job, options: Projection) -> dict[str, torch.Tensor]:
    """Learn P(v) = v·W1·W2 + b from the old tuned models' outputs on their own tasks, and apply it to the job's v.

    All of W1 [|v|, d], W2 [d, |v|] and b are drawn from N(0, 0.02) at first; with a residual, W2 and b are 0, so that
    it begins at `direct`.

    Args:
        job: What is mapped.
        options: The tasks, the rank and the training.

    Returns:
        The mapped tensors by stored name.

    Raises:
        MismatchError: A task was tuned on another base, or its weights are of another kind or shape.
        KindError: The kind is none that can be mapped so, or it has too many numbers.
        RecipeError: The loss became infinite or not a number.
    """
    import torch

    from regraft.model import device
    from regraft.tuning import Distillation

    vector = job.adaptation.family.vector(job.adaptation, job.upgrade.old)
    size = sum(math.prod(shape) for shape in vector.shapes.values())
    if job.adaptation.variant not in KINDS:
        raise KindError(
            f"{job.adaptation.path}: by distillation the kinds {', '.join(KINDS)} are mapped, not a "
            f"{job.adaptation.variant}: take fit=regression."
        )
    if size > MOST:
        raise KindError(
            f"{job.adaptation.path}: has {size:,} numbers, and a map of up to {MOST:,} is learned by distillation: "
            "take fit=regression."
        )
    loss = Distillation()
    each = math.ceil(options.steps / len(options.pairs))
    lessons = [_prepare(job, pair, i, vector, loss, each) for i, pair in enumerate(options.pairs)]
    drawn = torch.Generator().manual_seed(job.recipe.seed)
    shapes = ((size, options.rank), (options.rank, size), (size,))
    first = [SPREAD * torch.randn(shape, generator=drawn) for shape in shapes]
    if options.residual:
        first[1:] = [torch.zeros_like(tensor) for tensor in first[1:]]
    w1, w2, b = parameters = [tensor.to(device()).requires_grad_() for tensor in first]

    def apply(v: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = v @ w1 @ w2 + b
        return v + mapped if options.residual else mapped

    losses = list(_train(job, options, lessons, vector, parameters, apply, loss))
    ends = [sum(part) / len(part) for part in (losses[: len(lessons)], losses[-len(lessons) :])]
    job.notes.update(pairs=len(lessons), fit_loss=[round(end, 4) for end in ends], fit_steps=options.steps)
    with torch.no_grad():
        mapped = apply(_flatten(vector).to(device())).cpu()
    return _parts(mapped, vector)


def _train(
    job: Job, options: Projection, lessons: list[_Lesson], vector: Vector, parameters: list[torch.Tensor],
    apply: Any, loss: Distillation,
) -> Iterator[float]:  # fmt: skip
    """Go from task to task, a batch of each, and yield the loss of each step; what a killed run did is gone on from."""
    import torch

    from regraft.model import device
    from regraft.model.device import autocast
    from regraft.model.outputs import forward
    from regraft.tuning import distillation_loss

    rates = _rates([lesson.vector for lesson in lessons], options)
    optimiser = torch.optim.Adam([{"params": [tensor]} for tensor in parameters])
    losses = _resume(job, parameters, optimiser)
    yield from losses
    for step in range(len(losses), options.steps):
        lesson = lessons[step % len(lessons)]
        start = step // len(lessons) * job.recipe.batch_size
        rows = lesson.order[start : start + job.recipe.batch_size]
        batch = {name: tensor.to(device()) for name, tensor in lesson.examples.batch(rows).items()}
        names = job.adaptation.family.parameter_names(lesson.student)
        mapped = {names[stored]: part for stored, part in _parts(apply(lesson.vector.to(device())), vector).items()}
        with autocast(job.recipe.precision, device()):
            output = forward(lesson.student, batch, hidden=True, parameters=mapped)
        value: Any = distillation_loss(output, batch, lesson.taught, loss, lesson.likelihood)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / options.steps)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise RecipeError(
                f"the map's loss became {losses[-1]} at step {step + 1}. Lower its learning rate "
                f"({options.learning_rate:g}), or train in fp32."
            )
        if (step + 1) % job.recipe.save_every == 0:
            _save(job, parameters, optimiser, losses)
        job.progress("map", step + 1, options.steps, {"loss": losses[-1]})
        yield losses[-1]


def _save(job: Job, parameters: list[torch.Tensor], optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write the state of the map's training, beside the one before, which goes once it is sealed."""
    import torch

    from regraft.checkpoint import replace_atomically, seal

    folder = job.work / "map" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{len(losses)}.pt"
    state = {"parameters": [p.detach() for p in parameters], "optimiser": optimiser.state_dict(), "losses": losses}
    with replace_atomically(file) as beside:
        torch.save(state, beside)
    seal(folder / SEAL, [file], {"file": file.name})
    for other in folder.glob("step-*.pt"):
        if other != file:
            other.unlink()


def _resume(job: Job, parameters: list[torch.Tensor], optimiser: torch.optim.Optimizer) -> list[float]:
    """Load the last state of the map's training; a damaged one is passed over. Return the losses so far."""
    import torch

    from regraft.checkpoint import is_sealed

    folder = job.work / "map" / "checkpoints"
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


def _rates(vectors: list[torch.Tensor], options: Projection) -> tuple[float, float, float]:
    """Return Adam's rates for W1, W2 and b with which a step of each moves a mapped weight about as far.

    One rate for all would move it ‖v‖₁ times as far by W1 as by b: away from anything that works, in a few steps.
    """
    l1, l2 = (max(sum(float(v.norm(p)) for v in vectors) / len(vectors), SMALLEST) for p in (1, 2))
    rate, share = options.learning_rate, options.rank * SPREAD
    return rate / (share * l1), rate / (share * l2), rate


def _prepare(job: Job, pair: str, number: int, like: Vector, loss: Distillation, steps: int) -> _Lesson:
    """Open a task, its old tuned model as the teacher, and a student with the old weights on the new base."""
    from regraft.adaptation import load_adaptation, load_model, write_graft
    from regraft.methods.pairs import open_alike, split_pair
    from regraft.model import Deployment, match_labels
    from regraft.task import load_data
    from regraft.tuning import plan_order
    from regraft.tuning.distill import compute_teacher_outputs

    folder, task = split_pair(pair)
    old, new = job.upgrade.old, job.upgrade.new
    adaptation, vector = open_alike(folder, old, like)
    data = match_labels(adaptation, load_data(task, job.recipe.seed))
    work = job.work / f"task-{number}"
    write_graft(adaptation, job.upgrade, work / "graft", job.progress)
    precision, likelihood = job.recipe.precision, data.likelihood
    student = Deployment(load_model(load_adaptation(work / "graft"), new, data.head), new, data, precision)
    student.model.eval().requires_grad_(False)
    examples = student.examples(data.train)
    order = plan_order(examples.lengths, job.recipe.batch_size, steps, job.recipe.seed)
    teacher = Deployment(load_model(adaptation, old, data.head), old, data, precision, job.progress)
    taught = compute_teacher_outputs(teacher, data.train, order, loss, work)
    return _Lesson(_flatten(vector), student.model, examples, taught, order.tolist(), likelihood)


def _flatten(vector: Vector) -> torch.Tensor:
    import torch

    shapes = vector.shapes
    return torch.cat([vector.flat_slice(name, 0, math.prod(shapes[name])).float() for name in shapes])


def _parts(flat: torch.Tensor, vector: Vector) -> dict[str, torch.Tensor]:
    shapes = vector.shapes
    sizes = [math.prod(shape) for shape in shapes.values()]
    cuts = itertools.accumulate(sizes, initial=0)
    parts = zip(shapes.items(), sizes, cuts, strict=False)
    return {name: flat[start : start + size].reshape(shape) for (name, shape), size, start in parts}
