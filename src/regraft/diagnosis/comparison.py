"""Measures of how alike two models work, summed over batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from regraft.errors import MismatchError

if TYPE_CHECKING:
    import torch

    from regraft.model.attention import Activations
    from regraft.task.types import Likelihood


def head_divergences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence between the attention of each pair of heads.

    JSD(p, q) = H((p + q)/2) − (H(p) + H(q))/2 (Lin, 1991). Computed in float64 where the device has it, because nearly
    equal heads differ only in the last digits of float32; and one head of the first model at a time, so that it needs
    no more memory than the attention maps of one layer.

    Args:
        first: heads × rows × keys, each row summing to 1.
        second: The same rows and keys of the other model, which may have another number of heads.

    Returns:
        heads of the first × heads of the second: the sum over rows in bits, each row from 0 to 1, on the CPU.
    """
    import torch

    dtype = torch.float32 if first.device.type == "mps" else torch.float64
    first, second = first.to(dtype), second.to(dtype)
    first_entropy, second_entropy = _entropy(first), _entropy(second)
    divergences = [
        _entropy((p + second) / 2) - (h + second_entropy) / 2 for p, h in zip(first, first_entropy, strict=True)
    ]
    return torch.stack([rows.clamp_min(0).sum(dim=1).cpu().double() for rows in divergences]) / math.log(2)


class Moments:
    """The sums that linear CKA needs of two sets of features.

    CKA = ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, with centred columns (Kornblith et al., 2019, arXiv:1905.00414).
    The memory is width × width numbers, regardless of the number of rows.
    """

    def __init__(self) -> None:
        self.rows = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch of rows.

        Args:
            x: rows × features of the first model.
            y: rows × features of the second model, for the same rows.
        """
        if not self.rows:  # sums about the first batch's mean lose no digits to a mean that is far from 0
            self._shift = [x.mean(dim=0), y.mean(dim=0)]
            self._sums = [features.new_zeros(features.shape[1]) for features in (x, y)]
            self._products = [a.new_zeros(a.shape[1], b.shape[1]) for a, b in ((x, x), (y, y), (x, y))]
        self.rows += len(x)
        x, y = x - self._shift[0], y - self._shift[1]
        for total, features in zip(self._sums, (x, y), strict=True):
            total += features.sum(dim=0)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True):
            total.addmm_(a.T, b)

    def cka(self) -> float:
        """Return the linear CKA of all rows added so far.

        Returns:
            From 0 to 1. Features that never vary have no CKA: 1 if this is so in both models, 0 if in one of them.
        """
        x, y = (total.cpu().double() for total in self._sums)
        norms = [
            float((product.cpu().double() - a.outer(b) / self.rows).norm())
            for product, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True)
        ]
        if not norms[0] or not norms[1]:
            return float(norms[0] == norms[1])
        return min(1.0, norms[2] ** 2 / (norms[0] * norms[1]))


class ModelComparison:
    """How alike two models attend, represent and predict, summed over batches.

    Args:
        likelihood: The distribution that the models' outputs are parameters of.
        all_head_pairs: Whether each head is compared with all heads of its layer, or with the corresponding one only.

    Attributes:
        outputs: The number of outputs of each model; a text has one or more, depending on the task type.
        kl: The sum over outputs of KL(first ‖ second), in nats.
        agreed: The number of outputs for which both models predict the same.
    """

    def __init__(self, likelihood: Likelihood, *, all_head_pairs: bool) -> None:
        self._likelihood = likelihood
        self.kl = 0.0
        self.agreed = 0
        self.outputs = 0
        self._all_head_pairs = all_head_pairs
        self._tokens = 0
        self._moments: dict[int, Moments] = {}
        self._cka: list[float] = []

    def add(self, first: Activations, second: Activations, token_mask: torch.Tensor) -> None:
        """Add the attention and outputs of a batch.

        Args:
            first: The first model's activations.
            second: The second model's activations on the same texts.
            token_mask: Which tokens are not padding, batch × tokens.

        Raises:
            MismatchError: The models differ in layers, heads, keys, width or classes.
        """
        import torch

        _check_same_shapes(first, second)
        if not self._tokens:
            layers = len(first.attention)
            heads = first.attention[0].shape[1]
            shape = (layers, heads, heads) if self._all_head_pairs else (layers, heads)
            self._divergence = torch.zeros(shape, dtype=torch.float64)
            self._products = torch.zeros(3, layers, heads, dtype=torch.float64)
        for layer, maps in enumerate(zip(first.attention, second.attention, strict=True)):
            p, q = (attention.transpose(0, 1)[:, token_mask] for attention in maps)
            if self._all_head_pairs:
                self._divergence[layer] += head_divergences(p, q)
            else:
                matched = [head_divergences(a[None], b[None])[0, 0] for a, b in zip(p, q, strict=True)]
                self._divergence[layer] += torch.stack(matched)
            for total, (a, b) in zip(self._products, ((p, q), (p, p), (q, q)), strict=True):
                total[layer] += (a * b).sum(dim=(1, 2)).cpu().double()
        likelihood = self._likelihood
        first_outputs, second_outputs = first.outputs.cpu().double(), second.outputs.cpu().double()
        divergence = likelihood.divergence_terms(second_outputs, likelihood.signal(first_outputs))
        self.kl += max(0.0, float(divergence.sum()))
        self.agreed += int((likelihood.predict(first_outputs) == likelihood.predict(second_outputs)).sum())
        self.outputs += len(first_outputs)
        self._tokens += int(token_mask.sum())

    def add_hidden(self, first: Activations, second: Activations, token_mask: torch.Tensor, layers: range) -> None:
        """Add the hidden states of a batch, of some layers.

        Args:
            first: The first model's activations.
            second: The second model's activations on the same texts.
            token_mask: Which tokens are not padding, batch × tokens.
            layers: The hidden states to add, 0 being the embeddings; those beyond the last layer are ignored.
        """
        for layer in range(layers.start, min(layers.stop, len(first.hidden))):
            moments = self._moments.setdefault(layer, Moments())
            moments.add(first.hidden[layer][token_mask], second.hidden[layer][token_mask])

    def finish_layers(self) -> None:
        """Compute the CKA of the layers added so far, and free their moments: 3 · width² numbers a layer."""
        self._cka += [self._moments.pop(layer).cka() for layer in sorted(self._moments)]

    @property
    def divergences(self) -> torch.Tensor:
        """The mean divergence of rows in bits: layers × heads (× heads of the second, if all pairs are compared)."""
        mean: torch.Tensor = self._divergence / self._tokens
        return mean

    @property
    def cosines(self) -> torch.Tensor:
        """The cosine of corresponding heads' maps, layers × heads."""
        cross, first, second = self._products
        cosines: torch.Tensor = (cross / (first * second).sqrt()).clamp(max=1)
        return cosines

    @property
    def cka(self) -> tuple[float, ...]:
        """Linear CKA of the embeddings, then of each layer, as far as they are finished."""
        return tuple(self._cka)


def _entropy(rows: torch.Tensor) -> torch.Tensor:
    import torch

    entropy: torch.Tensor = torch.special.entr(rows).sum(dim=-1)
    return entropy


def _check_same_shapes(first: Activations, second: Activations) -> None:
    remedy = "Compare two models of one architecture"
    if len(first.attention) != len(second.attention):
        raise MismatchError(
            f"one model has {len(first.attention)} attention layers, the other {len(second.attention)}. {remedy}."
        )
    for layer, maps in enumerate(zip(first.attention, second.attention, strict=True)):
        a, b = (tuple(attention.shape[1:]) for attention in maps)
        if a != b:
            raise MismatchError(
                f"layer {layer}: heads, queries and keys are {a} in one model and {b} in the other. {remedy}, with as "
                "many virtual tokens."
            )
    a, b = (
        (activations.hidden[0].shape[-1], len(activations.hidden), activations.outputs.shape[1])
        for activations in (first, second)
    )
    if a != b:
        raise MismatchError(
            f"width, hidden states and labels are {a} in one model and {b} in the other. {remedy}, with the same "
            "labels."
        )
