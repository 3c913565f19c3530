"""Sums over batches of how alike two models work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from regraft.errors import MismatchError

if TYPE_CHECKING:
    import torch

    from regraft.model.attention import Activations
    from regraft.task.types import Likelihood


def head_divergences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of each head's rows of attention from each other head's.

    JSD(p, q) = H((p + q)/2) − (H(p) + H(q))/2 (Lin, 1991), in float64 where the device has it: heads that are nearly
    alike differ in the last digits of float32. A head of the first is taken at a time, so that no more memory is used
    than for a layer's maps.

    Args:
        first: heads × rows × keys, each row summing to 1.
        second: The same; it may have other heads.

    Returns:
        heads of the first × heads of the second: the sum over rows in bits, each row from 0 to 1, on the CPU.
    """
    import torch

    wide = torch.float32 if first.device.type == "mps" else torch.float64
    first, second = first.to(wide), second.to(wide)
    entropy, other = _entropy(first), _entropy(second)
    rows = [_entropy((p + second) / 2) - (h + other) / 2 for p, h in zip(first, entropy, strict=True)]
    return torch.stack([row.clamp_min(0).sum(dim=1).cpu().double() for row in rows]) / math.log(2)


class Moments:
    """What linear CKA needs of two sets of features, summed over batches.

    CKA = ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) in Frobenius norms, columns centred (Kornblith et al., 2019, arXiv:1905.00414). It
    needs width × width numbers however many rows there are.
    """

    def __init__(self) -> None:
        self.rows = 0

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Add rows.

        Args:
            first: rows × features.
            second: The same rows × its features.
        """
        sides = (first, second)
        if not self.rows:  # sums about the first batch's mean lose no digits to a mean that is far from 0
            self._shift = [side.mean(dim=0) for side in sides]
            self._sums = [side.new_zeros(side.shape[1]) for side in sides]
            self._products = [
                a.new_zeros(a.shape[1], b.shape[1]) for a, b in ((first, first), (second, second), (first, second))
            ]
        x, y = (side - shift for side, shift in zip(sides, self._shift, strict=True))
        for total, side in zip(self._sums, (x, y), strict=True):
            total += side.sum(dim=0)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True):
            total.addmm_(a.T, b)
        self.rows += len(first)

    def cka(self) -> float:
        """Return the linear CKA of all rows so far.

        Returns:
            From 0 to 1; where features never vary, 1 if neither side's do and 0 if one side's do.
        """
        x, y = (total.cpu().double() for total in self._sums)
        norms = [
            float((product.cpu().double() - a.outer(b) / self.rows).norm())
            for product, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True)
        ]
        if not norms[0] or not norms[1]:
            return float(norms[0] == norms[1])
        return min(1.0, norms[2] ** 2 / (norms[0] * norms[1]))


class Comparison:
    """How alike two models work, summed over batches.

    Args:
        likelihood: What the models' outputs are distributions over.
        every_head: Whether each head is held against all of its layer, or against the corresponding one only.

    Attributes:
        outputs: How many there are of each model: one or more a text, as the type of task has it.
        kl: The sum over outputs of KL(first ‖ second), in nats.
        agreed: Of how many outputs both predict the same.
    """

    def __init__(self, likelihood: Likelihood, *, every_head: bool) -> None:
        self._likelihood = likelihood
        self.kl, self.agreed, self.outputs = 0.0, 0, 0
        self._every_head, self._rows = every_head, 0
        self._moments: dict[int, Moments] = {}
        self._cka: list[float] = []

    def add(self, first: Activations, second: Activations, real: torch.Tensor) -> None:
        """Add a batch.

        Args:
            first: What the first model did.
            second: What the second did on the same texts.
            real: Which tokens are no padding, batch × tokens.

        Raises:
            MismatchError: They have other layers, heads, keys, widths or classes.
        """
        import torch

        _check_alike(first, second)
        if not self._rows:
            layers, heads = len(first.attention), first.attention[0].shape[1]
            shape = (layers, heads, heads) if self._every_head else (layers, heads)
            self._divergence = torch.zeros(shape, dtype=torch.float64)
            self._products = torch.zeros(3, layers, heads, dtype=torch.float64)
        for layer, (one, other) in enumerate(zip(first.attention, second.attention, strict=True)):
            p, q = (maps.transpose(0, 1)[:, real] for maps in (one, other))
            if self._every_head:
                self._divergence[layer] += head_divergences(p, q)
            else:
                apart = [head_divergences(a[None], b[None])[0, 0] for a, b in zip(p, q, strict=True)]
                self._divergence[layer] += torch.stack(apart)
            for total, (a, b) in zip(self._products, ((p, q), (p, p), (q, q)), strict=True):
                total[layer] += (a * b).sum(dim=(1, 2)).cpu().double()
        likelihood, (one, other) = self._likelihood, (seen.outputs.cpu().double() for seen in (first, second))
        self.kl += max(0.0, float(likelihood.divergence_terms(other, likelihood.signal(one)).sum()))
        self.agreed += int((likelihood.predict(one) == likelihood.predict(other)).sum())
        self.outputs += len(one)
        self._rows += int(real.sum())

    def add_hidden(self, first: Activations, second: Activations, real: torch.Tensor, layers: range) -> None:
        """Add some layers' hidden states of a batch.

        Args:
            first: What the first model did.
            second: What the second did on the same texts.
            real: Which tokens are no padding, batch × tokens.
            layers: Which hidden states, the embeddings' being 0; those that there are not are passed over.
        """
        for layer in range(layers.start, min(layers.stop, len(first.hidden))):
            moments = self._moments.setdefault(layer, Moments())
            moments.add(first.hidden[layer][real], second.hidden[layer][real])

    def finish_layers(self) -> None:
        """Work out the CKA of the layers that were added, and free what it took: width² numbers, thrice a layer."""
        self._cka += [self._moments.pop(layer).cka() for layer in sorted(self._moments)]

    @property
    def divergences(self) -> torch.Tensor:
        """The mean divergence of rows in bits: layers × heads (× heads of the second, if every head is compared)."""
        mean: torch.Tensor = self._divergence / self._rows
        return mean

    @property
    def cosines(self) -> torch.Tensor:
        """The cosine of corresponding heads' maps, layers × heads."""
        both, one, other = self._products
        cosines: torch.Tensor = (both / (one * other).sqrt()).clamp(max=1)
        return cosines

    @property
    def cka(self) -> tuple[float, ...]:
        """Linear CKA of the embeddings, then of each layer, of those that are finished."""
        return tuple(self._cka)


def _entropy(rows: torch.Tensor) -> torch.Tensor:
    import torch

    entropy: torch.Tensor = torch.special.entr(rows).sum(dim=-1)
    return entropy


def _check_alike(first: Activations, second: Activations) -> None:
    shapes = [
        [tuple(maps.shape[1:]) for maps in seen.attention]
        + [(seen.hidden[0].shape[-1], len(seen.hidden), seen.outputs.shape[1])]
        for seen in (first, second)
    ]
    if len(shapes[0]) != len(shapes[1]):
        raise MismatchError(
            f"one model has {len(shapes[0]) - 1} layers that attend, the other {len(shapes[1]) - 1}: give two of one "
            "architecture."
        )
    for layer, (one, other) in enumerate(zip(*shapes, strict=True)):
        if one != other:
            what = "heads, queries and keys"
            if layer == len(shapes[0]) - 1:
                layer, what = -1, "width, hidden states and labels"
            where = "the models" if layer < 0 else f"layer {layer}"
            raise MismatchError(
                f"{where}: {what} are {one} in the one model and {other} in the other. Give two of one architecture, "
                "with the same labels and as many virtual tokens."
            )
