"""What a LoRA does to one parameter of its model: a class for each way."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.adaptation.lora import PARTS
from regraft.weights import dora_weight, lora_delta, merge_experts, subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """A tensor of the adapter takes the place of the base's, and nothing else is done.

    Args:
        operands: The adapter's tensors that the rest is done with.
        weight: The adapter's tensor that takes the place of the base's, and of what is tied to that, before the rest.
        scale: The factor on what is added.
        turned: Whether the weight is B·A transposed, as that of a Conv1D or of embeddings.
        rows: Which rows are replaced.
    """

    operands: tuple[str, ...] = ()
    weight: str | None = None
    scale: float = 1.0
    transposed: bool = False
    rows: tuple[int, ...] = ()

    @property
    def copied(self) -> str | None:
        """The adapter's tensor that is taken in place of the base's."""
        return self.weight

    @property
    def applied(self) -> tuple[str, ...]:
        """The adapter's tensors that are worked into that."""
        return ()

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, is_folded: bool) -> torch.Tensor:
        """Compute what the parameter becomes.

        Args:
            weight: What it is before, or what takes its place.
            operands: The tensors `applied`, and then their starts where these are subtracted.
            is_folded: Whether they are.

        Returns:
            The parameter.
        """
        return weight

    def accepts_start(self, start: Mapping[str, torch.Tensor]) -> bool:
        """Return whether a start can be subtracted from it."""
        return True

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes that its tensors must have where PEFT's model does not say it.

        Args:
            parameter: The shape of what is updated.
            expected: Those of the tensors as PEFT's model has them.

        Returns:
            The shapes by stored name.
        """
        return {self.copied: parameter} if self.copied else {}


@dataclasses.dataclass(frozen=True)
class ReplacedModule(Update):
    """The module has a copy of its own, tuned and stored whole."""

    @property
    def copied(self) -> str:
        """The copy, whatever is tied to the base's."""
        return self.operands[0]

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the parameter's own, for the copy and for what takes the place of the base's."""
        return dict.fromkeys((name for name in (self.weight, *self.operands) if name), parameter)


@dataclasses.dataclass(frozen=True)
class Rows(Update):
    """Some rows are replaced."""

    @property
    def applied(self) -> tuple[str, ...]:
        """The rows."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, is_folded: bool) -> torch.Tensor:
        """Copy the rows into their places."""
        import torch

        return weight.index_copy(0, torch.tensor(self.rows), operands[0].to(weight))

    def accepts_start(self, start: Mapping[str, torch.Tensor]) -> bool:
        """Return False: rows have no start."""
        return False


@dataclasses.dataclass(frozen=True)
class Bias(Update):
    """A bias is added."""

    @property
    def applied(self) -> tuple[str, ...]:
        """The bias."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, is_folded: bool) -> torch.Tensor:
        """Add the scaled bias, in float64."""
        return weight.double() + self.scale * operands[0].double()

    def accepts_start(self, start: Mapping[str, torch.Tensor]) -> bool:
        """Return False: a bias has no start."""
        return False


@dataclasses.dataclass(frozen=True)
class Factors(Update):
    """B·A is added, and of a DoRA the sum brought to its magnitude; the operands are B, A and the magnitude."""

    @property
    def applied(self) -> tuple[str, ...]:
        """B, A and the magnitude."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, is_folded: bool) -> torch.Tensor:
        """Add scale·B·A, in float64."""
        b, a, *more = operands
        plain = weight.T if self.transposed else weight
        if is_folded:
            b, a = subtract_factors((b.double(), a.double()), (more[0].double(), more[1].double()))
        if more and not is_folded:
            merged = dora_weight(plain, b, a, self.scale, more[0])
        else:
            merged = plain.double() + lora_delta(b, a, self.scale)
        return merged.T if self.transposed else merged

    def accepts_start(self, start: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the start has B and A, and there is no magnitude."""
        factors = [name for name in self.operands if name.endswith(PARTS[:2])]
        return len(self.operands) == 2 and all(name in start for name in factors)

    def count(self, parameter: torch.Tensor) -> int:
        """Return how many products there are for a parameter."""
        return 1


@dataclasses.dataclass(frozen=True)
class Experts(Factors):
    """B·A is added for each expert of a mixture, of which all are one parameter."""

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, is_folded: bool) -> torch.Tensor:
        """Add scale·B·A expert by expert."""
        return merge_experts(weight, operands[0], operands[1], self.scale, self.transposed)

    def accepts_start(self, start: Mapping[str, torch.Tensor]) -> bool:
        """Return False: experts take no start out of their base."""
        return False

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return those of all experts' factors, which differ by the version of PEFT."""
        _, *sizes = parameter
        out, inner = reversed(sizes) if self.transposed else sizes
        ranks = expected[self.operands[1]][0]
        replaced = super().shapes(parameter, expected)
        return {**replaced, self.operands[0]: (out, ranks), self.operands[1]: (ranks, inner)}

    def count(self, parameter: torch.Tensor) -> int:
        """Return the number of experts."""
        return len(parameter)
