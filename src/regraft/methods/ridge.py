"""`ridge`: the old delta, made to have on the new base's activations the effect it had on the old one's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.methods.method import Job, Method

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.changes import Change
    from regraft.tuning.walk import Walk


@dataclasses.dataclass(frozen=True)
class Ridge:
    """How the effect is matched.

    Args:
        ridge: λ, in units of the mean square of each layer's inputs: how strongly the factor is held to what it was.
        texts: How many of the task's training texts, without labels, the activations are measured on.
        head: Whether the head is matched too, so that it gives on the new features what it gave on the old.

    Raises:
        RecipeError: A number is out of its range.
    """

    ridge: float = 0.3
    texts: int = 256
    head: bool = True

    def __post_init__(self) -> None:
        """Check every number."""
        if not self.ridge > 0 or self.texts < 1:
            raise RecipeError(f"ridge must be above 0 (found {self.ridge}), texts at least 1 ({self.texts}).")


def run(job: Job, options: Ridge) -> list[dict[str, float]]:
    """Refit the old delta and write it.

    Args:
        job: What and where.
        options: How.

    Returns:
        No learning curve: nothing is trained.
    """
    from regraft.adaptation import save_model

    save_model(refitted(job, options).cpu(), job.upgrade.new, job.data.labels, job.into)
    return []


def refitted(job: Job, options: Ridge) -> Any:
    """Go through the layers in order, and fit each one's delta to what the new model feeds it.

    In every linear layer that was tuned, the old model added D·x_o to what its base gives. In the new model, grafted
    and already refitted below, the same token brings x_n, and D' is the ridge regression of D·x_o on x_n that is
    drawn to D. Of a LoRA only A changes, of bottleneck adapters the first layer: rank and cost of serving stay.

    Args:
        job: What and where.
        options: How.

    Returns:
        The model, ready to be tuned further.
    """
    from regraft.adaptation import load_model
    from regraft.adaptation.changes import KINDS, linear_changes
    from regraft.adaptation.rework import check_reworkable
    from regraft.tuning.examples import encode_alike
    from regraft.tuning.walk import Walk

    check_reworkable(job.adaptation, KINDS)
    new = job.grafted()
    tuned = load_model(job.adaptation, job.upgrade.old, job.data.labels)
    changes = {
        c.name: c for c in linear_changes(new, tuned, job.adaptation, job.upgrade.old) if options.head or not c.is_head
    }
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    old_examples, new_examples = encode_alike(job.upgrade, texts, job.data.max_length)
    above, below = Walk(new, new_examples, job.recipe.precision), Walk(tuned, old_examples, job.recipe.precision)
    modules = [tuned.get_submodule(name) for name in changes]
    moved: list[float] = []
    for part in range(above.parts):
        fed = _inputs(below, modules)
        for stage in _stages(fed):
            moved += _refit([changes[name] for name in stage], fed[stage[0]], above, options.ridge)
        above.run(go_on=True)
        job.progress("ridge", part + 1, above.parts, {})
    job.notes["moved"] = round(sum(moved) / len(moved), 4)  # mean of ‖D' − D‖ / ‖D‖
    return new


def _inputs(walk: Walk, modules: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Run a part of the old model and keep what each layer in it is fed, by batch, in the order they are used."""
    fed: dict[str, list[torch.Tensor]] = {}
    walk.run(modules, lambda name, _, rows, __: fed.setdefault(name, []).append(rows), go_on=True)
    return fed


def _stages(fed: dict[str, list[torch.Tensor]]) -> list[list[str]]:
    """Put layers together that read the same, as queries, keys and values do."""
    import torch

    stages: list[list[str]] = []
    for name, rows in fed.items():
        if stages and torch.equal(fed[stages[-1][0]][0], rows[0]):
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages


def _refit(changes: list[Change], old_inputs: list[torch.Tensor], walk: Walk, ridge: float) -> list[float]:
    import torch

    from regraft.weights import match_effect

    width = changes[0].factor.shape[1]
    cross, second = (torch.zeros(width, width, dtype=torch.float64, device=old_inputs[0].device) for _ in range(2))

    def add(_: str, number: int, rows: torch.Tensor, __: torch.Tensor) -> None:
        cross.add_(old_inputs[number].T @ rows)
        second.add_(rows.T @ rows)

    walk.run([changes[0].module], add)
    moved = []
    for change in changes:
        matched = match_effect(change.factor, cross, second, ridge)
        moved.append(float((matched - change.factor).norm() / change.factor.norm().clamp(min=1e-12)))
        change.become(matched)
    return moved


METHOD = Method("ridge", "match the old delta's effect on the new base's own activations", ("text",), run, Ridge)
