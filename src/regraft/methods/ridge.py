"""`ridge`: the old delta, made to have on the new base's activations the effect it had on the old one's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import Expert, is_experts, lora_wrappers, projection_names
from regraft.errors import KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.changes import Change
    from regraft.methods.job import Job
    from regraft.model.blockwise import BlockwiseForward


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


def refit(job: Job, options: Ridge) -> Any:
    """Go through the layers in order, and fit each one's delta to what the new model feeds it.

    In every layer that was tuned and multiplies by a matrix, the old model added D·x_o to what its base gives. In the
    new model, grafted and already refitted below, the same token brings x_n, and D' is the ridge regression of D·x_o on
    x_n that is drawn to D. Of a LoRA only A changes, of bottleneck adapters the first layer: rank and cost of serving
    stay.

    Layers are refitted that multiply by a matrix: linear ones, Conv1D, routers and experts, each expert on the tokens
    that the new model routes to it; where these are fewer than its width, its delta stays. A layer that runs more than
    once is refitted once, on all that it is fed. What is passed over is named in the outcome's notes.

    Args:
        job: What and where.
        options: How.

    Returns:
        The model, ready to be tuned further.

    Raises:
        KindError: The adaptation is of another kind, or nothing of it can be refitted.
    """
    from regraft.adaptation import load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS, linear_changes, passed_over
    from regraft.adaptation.transform import check_transformable
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    new = job.grafted()
    tuned = load_model(job.adaptation, job.upgrade.old, job.data.head)
    changes = linear_changes(new, tuned, job.adaptation, job.upgrade.old)
    fit = _Fit(options.ridge, passed_over(new, tuned, job.adaptation, job.upgrade.old, changes))
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    old_examples, new_examples = encode_aligned(job.upgrade, job.data, texts)
    above, below = (
        BlockwiseForward(new, new_examples, job.recipe.precision),
        BlockwiseForward(tuned, old_examples, job.recipe.precision),
    )
    layers: dict[str, list[Change]] = {}
    for change in changes:
        if options.head or not change.is_head:
            layers.setdefault(above.names[change.module], []).append(change)
    modules = [tuned.get_submodule(name) for name in layers]
    around = lora_wrappers(tuned), lora_wrappers(new)
    for part in range(above.parts):
        fed = _inputs(below, modules)
        for stage in _stages(fed, layers):
            first = layers[stage[0]][0]
            if is_experts(first.module):
                sides = tuned.get_submodule(stage[0]), first.module
                wrappers = [wrapped.get(side, {}) for wrapped, side in zip(around, sides, strict=True)]
                fit.experts(layers[stage[0]], sides, wrappers, fed[stage[0]], above)
            else:
                fit.layers([change for name in stage for change in layers[name]], fed[stage[0]], above)
        above.run(advance=True)
        job.progress("ridge", part + 1, above.parts, {})
    fit.finish(changes if options.head else [change for change in changes if not change.is_head])
    if all(change.is_head for change in fit.moved):
        raise KindError(
            f"{job.adaptation.path}: ridge can refit none of the layers that were tuned: {fit.describe()}. Take direct "
            "or init."
        )
    job.notes["moved"] = round(fit.mean(), 4)
    if fit.passed_over:
        job.notes["passed_over"] = fit.passed_over
    return new


def _inputs(walk: BlockwiseForward, modules: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Run a part of the old model and keep what each layer in it is fed, by batch, in the order they are used."""
    import torch

    fed: dict[str, list[torch.Tensor]] = {}
    last: torch.Tensor | None = None

    def keep(name: str, _: int, rows: torch.Tensor, __: torch.Tensor) -> None:
        nonlocal last
        narrow = rows.float()  # all there is to them: models run in float32 at most
        last = last if last is not None and torch.equal(last, narrow) else narrow  # once for all that read the same
        fed.setdefault(name, []).append(last)

    walk.run(modules, keep, advance=True)
    return fed


def _stages(fed: dict[str, list[torch.Tensor]], layers: dict[str, list[Change]]) -> list[list[str]]:
    """Put layers together that read the same, as queries, keys and values do; experts are by themselves."""
    import torch

    stages: list[list[str]] = []
    alone = True
    for name, rows in fed.items():
        is_alone = is_experts(layers[name][0].module)
        if stages and not alone and not is_alone and torch.equal(fed[stages[-1][0]][0], rows[0]):
            stages[-1].append(name)
        else:
            stages.append([name])
        alone = is_alone
    return stages


class _Fit:
    """Fits changes to what the new model feeds them, and keeps account of them.

    Args:
        ridge: λ.
        passed_over: Why what cannot be fitted is passed over, by name.
    """

    def __init__(self, ridge: float, passed_over: dict[str, str]):
        self.ridge, self.passed_over = ridge, dict(passed_over)
        self.moved: dict[Change, list[float]] = {}  # ‖D' − D‖ / ‖D‖

    def layers(self, changes: list[Change], old_inputs: list[torch.Tensor], walk: BlockwiseForward) -> None:
        """Fit layers that read the same.

        Args:
            changes: Theirs.
            old_inputs: What the old model feeds them, by batch.
            walk: Through the new model.
        """
        import torch

        width = changes[0].factor.shape[-1]
        cross, second = (torch.zeros(width, width, dtype=torch.float64, device=old_inputs[0].device) for _ in range(2))
        paired = True

        def add(_: str, number: int, rows: torch.Tensor, __: torch.Tensor) -> None:
            nonlocal paired
            paired = paired and rows.shape == old_inputs[number].shape
            if paired:
                cross.add_(old_inputs[number].to(rows).T @ rows)
                second.add_(rows.T @ rows)

        walk.run([changes[0].module], add)
        for change in changes:
            if not paired:
                self.passed_over[change.name] = "fed other tokens in the two models"
                continue
            matched = self._match(change, change.factor, cross, second)
            change.set_factor(matched)

    def experts(
        self,
        changes: list[Change],
        sides: tuple[Any, Any],
        wrappers: list[dict[str, Any]],
        old_hidden: list[torch.Tensor],
        walk: BlockwiseForward,
    ) -> None:
        """Fit each of a block's experts on the tokens that the new model routes to it.

        The old model's expert is asked for the same tokens, whether or not that routes them there.

        Args:
            changes: What is changed of the experts' projections.
            sides: The old and the new model's experts.
            wrappers: PEFT's wrappers of their parameters.
            old_hidden: What the old model feeds its experts, by batch.
            walk: Through the new model.
        """
        import torch

        runs: list[tuple[torch.Tensor, torch.Tensor]] = []
        walk.run([sides[1]], lambda _, __, rows, routed: runs.append((rows, routed)))
        hidden, routed = (torch.cat(side) for side in zip(*runs, strict=True))
        old = torch.cat(old_hidden).to(hidden)
        for position, part in enumerate(projection_names(sides[1])):
            change = next((change for change in changes if change.name.endswith(f".{part}")), None)
            if change is None:
                continue
            matched, width = change.factor.clone(), change.factor.shape[-1]
            few = []
            for number in range(len(matched)):
                reached = (routed == number).any(dim=1)
                rows = [side[reached] for side in (old, hidden)]
                if len(rows[0]) < width:  # as many unknowns for each output: fewer tell nothing of some directions
                    few.append(number)
                    continue
                if position:
                    pairs = zip(sides, wrappers, rows, strict=True)
                    rows = [Expert(side, number, own).inner(x) for side, own, x in pairs]
                cross, second = rows[0].T @ rows[1], rows[1].T @ rows[1]
                matched[number] = self._match(change, matched[number], cross, second)
            change.set_factor(matched)
            if few:
                experts = f"experts {', '.join(map(str, few))}" if len(few) < len(matched) else "all experts"
                self.passed_over[change.name] = f"{experts}: reached by fewer tokens than their width of {width}"

    def finish(self, changes: list[Change]) -> None:
        """Name what no text has shown.

        Args:
            changes: All that were to be fitted.
        """
        for change in changes:
            if change not in self.moved:
                self.passed_over.setdefault(change.name, "not run by itself")

    def mean(self) -> float:
        """Return the mean of ‖D' − D‖ / ‖D‖."""
        moved = [number for numbers in self.moved.values() for number in numbers]
        return sum(moved) / len(moved)

    def describe(self) -> str:
        """Say why layers were passed over, by the first of them."""
        named = [f"{name} ({why})" for name, why in self.passed_over.items()]
        return "; ".join(named[:3]) + (" …" if len(named) > 3 else "") or "the adaptation changes no matrix"

    def _match(self, change: Change, factor: torch.Tensor, cross: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        from regraft.weights import match_effect

        before = factor.to(second.device)
        matched = match_effect(before, cross, second, self.ridge)
        self.moved.setdefault(change, []).append(float((matched - before).norm() / before.norm().clamp(min=1e-12)))
        return matched


RIDGE = Start(
    "ridge", refit, Ridge, summary="match the old delta's effect on the new base's own activations", needs=("text",)
)
