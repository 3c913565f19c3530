"""Similarity of two models' attention, hidden states and outputs, summed over batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError
from regraft.task.types.dense import DenseLikelihood

if TYPE_CHECKING:
    import torch

    from regraft.model.attention import Activations
    from regraft.task.types import Likelihood


def head_divergences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence between the attention of each pair of heads, summed over rows.

    JSD(p, q) = H((p + q)/2) − (H(p) + H(q))/2. It is computed in float64 where the device has it, because nearly equal
    heads differ only in the last digits of float32. The heads of the first model are taken one at a time, so that the
    memory grows with the number of heads, not with the number of pairs.

    Source: Lin, 1991.

    Args:
        first: Attention of the first model, heads × rows × keys, each row summing to 1.
        second: Attention of the second model on the same rows and keys; the number of heads may differ.

    Returns:
        The sums in bits, from 0 to 1 per row: heads of the first × heads of the second, float64 on the CPU.
    """
    import torch

    dtype = torch.float32 if first.device.type == "mps" else torch.float64
    first, second = first.to(dtype), second.to(dtype)
    first_entropy, second_entropy = _entropy(first), _entropy(second)
    sums = []
    for head, head_entropy in zip(first, first_entropy, strict=True):
        divergence = _entropy((head + second) / 2) - (head_entropy + second_entropy) / 2
        sums.append(divergence.clamp_min(0).sum(dim=1).cpu().double())  # rounding may take a row below 0
    return torch.stack(sums) / math.log(2)


class Moments:
    """Running sums of two sets of features, from which linear CKA is computed.

    CKA = ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, with centred columns. The sums take three matrices of
    width × width, regardless of the number of rows.

    Source: Kornblith et al., 2019 (arXiv:1905.00414).
    """

    def __init__(self) -> None:
        self._num_rows = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch of rows.

        Args:
            x: Features of the first model, rows × width.
            y: Features of the second model for the same rows, rows × width.
        """
        if not self._num_rows:  # sums about the first batch's mean lose no digits to a mean that is far from 0
            self._shift = [x.mean(dim=0), y.mean(dim=0)]
            self._sums = [features.new_zeros(features.shape[1]) for features in (x, y)]
            self._products = [a.new_zeros(a.shape[1], b.shape[1]) for a, b in _factor_pairs(x, y)]
        self._num_rows += len(x)
        shifted_x, shifted_y = x - self._shift[0], y - self._shift[1]
        for total, features in zip(self._sums, (shifted_x, shifted_y), strict=True):
            total += features.sum(dim=0)
        for total, (a, b) in zip(self._products, _factor_pairs(shifted_x, shifted_y), strict=True):
            total.addmm_(a.T, b)

    def cka(self) -> float:
        """Return the linear CKA of all rows added so far.

        Returns:
            From 0 to 1. Features that never vary have no CKA: 1 if this is so in both models, 0 if in only one.
        """
        x_sum, y_sum = (total.cpu().double() for total in self._sums)
        x_norm, y_norm, cross_norm = (
            float((product.cpu().double() - a.outer(b) / self._num_rows).norm())
            for product, (a, b) in zip(self._products, _factor_pairs(x_sum, y_sum), strict=True)
        )
        if not x_norm or not y_norm:
            return float(x_norm == y_norm)
        return min(1.0, cross_norm**2 / (x_norm * y_norm))


def _factor_pairs(x: torch.Tensor, y: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return the factors of XᵀX, YᵀY and XᵀY."""
    return (x, x), (y, y), (x, y)


class ModelComparison:
    """The similarity of two models' attention, hidden states and outputs, summed over batches.

    Args:
        likelihood: The distribution that the models' outputs are parameters of.
        all_head_pairs: Whether to compare each head with all heads of the other model's same layer; if not, with the
            corresponding head only.

    Attributes:
        num_predictions: The number of predictions of each model; a text has one or more, depending on the task type.
        kl: The sum over predictions of KL(first ‖ second), in nats.
        num_equal: The number of predictions of the second model that are right if those of the first model are: in
            classification, the same.
    """

    def __init__(self, likelihood: Likelihood, *, all_head_pairs: bool) -> None:
        self.kl = 0.0
        self.num_equal = 0
        self.num_predictions = 0
        self._likelihood = likelihood
        self._all_head_pairs = all_head_pairs
        self._num_tokens = 0
        self._moments: dict[int, Moments] = {}
        self._cka: list[float] = []

    def add(self, first: Activations, second: Activations, token_mask: torch.Tensor) -> None:
        """Add the attention and outputs of a batch.

        Args:
            first: The first model's activations.
            second: The second model's activations on the same texts.
            token_mask: True where a token is not padding, batch × tokens.

        Raises:
            MismatchError: The models differ in layers, heads, keys, width or outputs.
        """
        _check_same_shapes(first, second)
        self._add_attention(first, second, token_mask)
        likelihood = self._likelihood
        first_outputs, second_outputs = first.outputs.cpu().double(), second.outputs.cpu().double()
        self.kl += max(0.0, _divergence_sum(likelihood, second_outputs, likelihood.signal(first_outputs)))
        self.num_equal += int(likelihood.right(second_outputs, likelihood.predict(first_outputs)).sum())
        self.num_predictions += len(first_outputs)
        self._num_tokens += int(token_mask.sum())

    def _add_attention(self, first: Activations, second: Activations, token_mask: torch.Tensor) -> None:
        """Add the divergences and products of the attention of a batch, layer by layer."""
        import torch

        if not self._num_tokens:
            layers = len(first.attention)
            heads = first.attention[0].shape[1]
            shape = (layers, heads, heads) if self._all_head_pairs else (layers, heads)
            self._divergence = torch.zeros(shape, dtype=torch.float64)
            self._products = torch.zeros(3, layers, heads, dtype=torch.float64)
        for layer, maps in enumerate(zip(first.attention, second.attention, strict=True)):
            p, q = (attention.transpose(0, 1)[:, token_mask] for attention in maps)  # heads × rows × keys
            if self._all_head_pairs:
                self._divergence[layer] += head_divergences(p, q)
            else:
                matched = [head_divergences(a[None], b[None])[0, 0] for a, b in zip(p, q, strict=True)]
                self._divergence[layer] += torch.stack(matched)
            for total, (a, b) in zip(self._products, ((p, q), (p, p), (q, q)), strict=True):
                total[layer] += (a * b).sum(dim=(1, 2)).cpu().double()

    def add_hidden(self, first: Activations, second: Activations, token_mask: torch.Tensor, layers: range) -> None:
        """Add the hidden states of a batch in some layers.

        Args:
            first: The first model's activations.
            second: The second model's activations on the same texts.
            token_mask: True where a token is not padding, batch × tokens.
            layers: The indices of the hidden states, 0 being the embeddings; indices beyond the last layer are ignored.
        """
        for layer in range(layers.start, min(layers.stop, len(first.hidden))):
            moments = self._moments.setdefault(layer, Moments())
            moments.add(first.hidden[layer][token_mask], second.hidden[layer][token_mask])

    def finish_layers(self) -> None:
        """Compute the CKA of the layers added so far, and free their moments: 3 · width² numbers per layer."""
        self._cka += [self._moments.pop(layer).cka() for layer in sorted(self._moments)]

    @property
    def divergences(self) -> torch.Tensor:
        """The mean divergence per row in bits: layers × heads, or layers × heads × heads if all pairs are compared."""
        mean: torch.Tensor = self._divergence / self._num_tokens
        return mean

    @property
    def cosines(self) -> torch.Tensor:
        """The cosine of corresponding heads' attention maps, layers × heads."""
        cross, first, second = self._products
        cosines: torch.Tensor = (cross / (first * second).sqrt()).clamp(max=1)
        return cosines

    @property
    def cka(self) -> tuple[float, ...]:
        """Linear CKA of the embeddings, then of each layer that `finish_layers` has finished."""
        return tuple(self._cka)


def _divergence_sum(likelihood: Likelihood, outputs: Any, signal: Any) -> float:
    """Sum KL(teacher ‖ student) over rows; outputs over a vocabulary are divided into chunks by the likelihood."""
    if isinstance(likelihood, DenseLikelihood):
        return float(likelihood.divergence_terms(outputs, signal).sum())
    import torch

    with torch.no_grad():
        return len(outputs) * float(likelihood.mean_divergence(outputs, signal))


def _entropy(distributions: torch.Tensor) -> torch.Tensor:
    import torch

    entropy: torch.Tensor = torch.special.entr(distributions).sum(dim=-1)
    return entropy


def _check_same_shapes(first: Activations, second: Activations) -> None:
    """Check that two models have the same numbers of layers, heads, keys and outputs, and the same width."""
    remedy = "Compare two models of one architecture"
    if len(first.attention) != len(second.attention):
        raise MismatchError(
            f"one model has {len(first.attention)} attention layers, the other {len(second.attention)}. {remedy}."
        )
    for layer, maps in enumerate(zip(first.attention, second.attention, strict=True)):
        first_shape, second_shape = (tuple(attention.shape[1:]) for attention in maps)
        if first_shape != second_shape:
            raise MismatchError(
                f"layer {layer}: heads, queries and keys are {first_shape} in one model and {second_shape} in the "
                f"other. {remedy}, with as many virtual tokens."
            )
    first_sizes, second_sizes = (
        (activations.hidden[0].shape[-1], len(activations.hidden), activations.outputs.shape[1])
        for activations in (first, second)
    )
    if first_sizes != second_sizes:
        raise MismatchError(
            f"width, hidden states and labels are {first_sizes} in one model and {second_sizes} in the other. "
            f"{remedy}, with the same labels."
        )
