"""`ariadne`: the old adaptation's effect on the residual stream, fitted by the last projection of each block.

For comparison with `ridge`: a published method of the same cost, which also needs texts only.

Source: ARIADNE of merge-and-rebase (Panariello et al., 2026, https://github.com/apanariello4/merge-and-rebase), with
its preset `ariadne` at strength 1. Q, the fit and λ are taken from its package `rebase/methods/ariadne`, and for a
projection without a bias that package's bias-free formulation (`missing_bias: skip`, `exact_form: false`). Blocks
correspond one to one here, since both bases have the same architecture, and the texts are the task's, with their
answers if there are any.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from regraft.methods.job import Job
    from regraft.model.blockwise import BlockwiseForward

MAX_ADDITION_ERROR = 0.05
"""The largest deviation from 1, root mean square, of the change of a block's output after 1 is added to its last
projection's output: a projection that is added to the residual stream has rounding errors only, and a norm or a factor
in between makes a far larger difference."""


@dataclasses.dataclass(frozen=True)
class Ariadne:
    """Options of `ariadne`.

    Args:
        texts: The number of the task's training texts, without labels, on which residual states are measured.

    Raises:
        RecipeError: `texts` is below 1.
    """

    texts: int = 256  # more measure better, and take longer

    def __post_init__(self) -> None:
        """Refuse fewer than one text."""
        if self.texts < 1:
            raise RecipeError(f"texts must be at least 1, found {self.texts}.")


def fit_effect(job: Job, options: Ariadne) -> nn.Module:
    """Fit the last projection of each block of the new base so that it adds the old adaptation's effect.

    After a block, the residual states of the same tokens are the rows of S_b in the old base, of S_f in the old model
    and of T_b in the new base. Q is the orthogonal polar factor of S_bᵀ·T_b, both centred, and D = (S_f − S_b)·Q is the
    effect to add. With the inputs H of the projection in the new base, the change ΔW of its weight minimises
    ‖H·ΔW − D‖² + λ·‖ΔW‖², where λ = tr(S)/(n − 1) for S = Hᵀ·H and n tokens. If the projection has a bias, H and D are
    centred, also in S, and the bias changes by the intercept; if it has none, they are not, and no bias is added.

    All blocks are fitted to the unchanged new base, independently of each other, although the effect after a block
    contains those of the blocks before. Nothing else of the old adaptation is carried over. The result is a full
    fine-tune, whatever the kind of the old adaptation.

    Args:
        job: The job, with the task's training texts.
        options: The number of texts.

    Returns:
        The new base with the changed projections, ready for tuning.

    Raises:
        KindError: The adaptation has virtual tokens or adds tokens, the blocks cannot be run one at a time, a block
            does not add the output of its last projection to the residual stream, or the two tokenizers divide too few
            of the texts into the same tokens.
    """
    from regraft.adaptation import fresh_model, load_model
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    adaptation, upgrade, head = job.adaptation, job.upgrade, job.data.head
    if adaptation.num_virtual_tokens:
        raise KindError(
            f"{adaptation.path}: a {adaptation.kind} has virtual tokens, which have no states in the bases to compare "
            "with. Use direct or init."
        )
    if upgrade.old.rows_override is not None:
        raise KindError(
            f"{adaptation.path}: has tokens that {upgrade.old.path} lacks, whose embeddings ariadne does not carry "
            "over. Use direct or init."
        )
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    old_examples, new_examples = encode_aligned(upgrade, job.data, texts)
    seed = job.recipe.seed
    forwards = [
        BlockwiseForward(model, examples, job.recipe.precision)
        for model, examples in (
            (fresh_model(upgrade.old, head, seed), old_examples),
            (load_model(adaptation, upgrade.old, head), old_examples),
            (fresh_model(upgrade.new, head, seed), new_examples),
        )
    ]
    new_forward = forwards[-1]
    if not all(forward.blocks for forward in forwards):
        raise KindError(
            f"{upgrade.new.path}: the blocks of a {upgrade.new.config.model_type} cannot be run one at a time. Use "
            "direct or init."
        )
    error = target = 0.0
    for part, block in enumerate(new_forward.blocks):
        projection = _last_projection(new_forward, block)
        statistics = _measure(forwards, projection)
        fit = statistics.fit(has_bias=projection.bias is not None)
        _add(projection, fit)
        error += fit.error
        target += fit.target
        job.progress("ariadne", part + 1, len(new_forward.blocks), {})
    if target:
        job.notes["explained"] = round(1 - error / target, 4)
    new_model: nn.Module = new_forward.model
    return new_model


@dataclasses.dataclass(frozen=True)
class Fit:
    """The change of a projection, and how well it fits.

    Args:
        weight: ΔW, [inputs, outputs].
        bias: The change of the bias, [outputs]; None for a projection without one.
        error: ‖H·ΔW − D‖², centred if the projection has a bias.
        target: ‖D‖², likewise.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    error: float
    target: float


class BlockStatistics:
    """Sums over tokens, in float64, of which the fit of a block's projection is a function.

    They take width² and inputs² numbers, however many tokens there are.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, inputs: torch.Tensor, old: torch.Tensor, tuned: torch.Tensor, new: torch.Tensor) -> None:
        """Add the same tokens' rows of all models.

        Args:
            inputs: H, the inputs of the projection in the new base, [tokens, inputs].
            old: S_b, the old base's residual states after the block, [tokens, width].
            tuned: S_f, the old model's, [tokens, width].
            new: T_b, the new base's, [tokens, width].
        """
        h, s_b, s_f, t_b = (rows.double() for rows in (inputs, old, tuned, new))
        effect = s_f - s_b
        self.num_tokens += len(h)
        terms = {
            "h": h.sum(dim=0),
            "s_b": s_b.sum(dim=0),
            "t_b": t_b.sum(dim=0),
            "effect": effect.sum(dim=0),
            "h.h": h.T @ h,
            "h.effect": h.T @ effect,
            "s_b.t_b": s_b.T @ t_b,
            "squares": effect.square().sum(),
        }
        self._sums = {name: self._sums[name] + term if self._sums else term for name, term in terms.items()}

    def fit(self, *, has_bias: bool) -> Fit:
        """Return the change of the projection that fits the effect best, as in `fit_effect`.

        Args:
            has_bias: Whether the projection has a bias.
        """
        import torch

        from regraft.weights import rotation

        sums, n = self._sums, self.num_tokens
        q = rotation(self._centred("s_b", "t_b"), shrink=0)
        gram, cross, target = sums["h.h"], sums["h.effect"], sums["squares"]
        if has_bias:
            gram, cross = self._centred("h", "h"), self._centred("h", "effect")
            target = target - sums["effect"].square().sum() / n
        cross = cross @ q
        damping = gram.trace() / max(n - 1, 1)
        if damping > 0:
            damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            weight = torch.linalg.solve(damped, cross)
        else:  # the projection's inputs are constant
            weight = torch.zeros_like(cross)
        error = target - 2 * (weight * cross).sum() + (weight * (gram @ weight)).sum()
        bias = (sums["effect"] @ q - sums["h"] @ weight) / n if has_bias else None
        return Fit(weight, bias, float(error), float(target))

    def _centred(self, left: str, right: str) -> torch.Tensor:
        """Return the sum of the products of two centred quantities."""
        moment: torch.Tensor = self._sums[f"{left}.{right}"]
        return moment - self._sums[left].outer(self._sums[right]) / self.num_tokens


def _measure(forwards: Sequence[BlockwiseForward], projection: nn.Module) -> BlockStatistics:
    """Run the current block of the old base, the old model and the new base on all batches, and proceed to the next."""
    statistics = BlockStatistics()
    new_forward = forwards[-1]
    for batch_index in range(len(new_forward.batches)):
        states = []
        for forward in forwards:
            block = forward.blocks[forward.part]
            modules = [block, projection] if forward is new_forward else [block]
            calls = _run_batch(forward, batch_index, modules, keep_outputs=True)
            states.append(calls[block][1])
        statistics.add(calls[projection][0], *states)
    for forward in forwards:
        forward.part += 1
    return statistics


def _last_projection(forward: BlockwiseForward, block: nn.Module) -> Any:
    """Return the last linear layer of the current block, or refuse a block that does not add its output."""
    import torch

    from regraft.adaptation.changes import is_linear_map

    def add_one(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output.float() + 1 if torch.is_tensor(output) else output

    projection = [module for module in block.modules() if is_linear_map(module)][-1]
    states = _run_batch(forward, 0, [block])[block][1]
    handle = projection.register_forward_hook(add_one)
    try:
        change = _run_batch(forward, 0, [block])[block][1] - states
    finally:
        handle.remove()
    if not (change - 1).square().mean().sqrt() <= MAX_ADDITION_ERROR:
        raise KindError(
            f"{forward.names[block]}: does not add the output of its last linear layer, {forward.names[projection]}, "
            "unchanged to the residual stream, so ariadne cannot fit it. Use ridge or direct."
        )
    return projection


def _run_batch(
    forward: BlockwiseForward, batch_index: int, modules: Sequence[nn.Module], *, keep_outputs: bool = False
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Run the current block on a batch, and return the inputs and outputs of modules."""
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def store(name: str, _batch_index: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        calls[name] = inputs, outputs

    forward.run_batch(batch_index, modules, store, keep_outputs=keep_outputs)
    return {module: calls[forward.names[module]] for module in modules}


def _add(projection: Any, fit: Fit) -> None:
    """Add the change to a projection's parameters."""
    import torch

    from regraft.adaptation.changes import is_transposed

    with torch.no_grad():
        projection.weight.add_((fit.weight if is_transposed(projection) else fit.weight.T).to(projection.weight))
        if fit.bias is not None:
            projection.bias.add_(fit.bias.to(projection.bias))


ARIADNE = Start(
    "ariadne",
    fit_effect,
    Ariadne,
    summary="fit the old effect by the last projection of each block, for comparison",
    needs=("text",),
    generation_only=True,
    kind="full",
)
