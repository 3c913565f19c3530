"""The updates that a LoRA makes to a parameter of its model, a class for each form."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from regraft.adaptation.lora import A_SUFFIX, B_SUFFIX
from regraft.weights import dora_weight, lora_delta, merge_experts, subtract_factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """A tensor of the adapter may replace the base's; subclasses make further changes.

    Args:
        operands: The names of the adapter's tensors for further changes.
        weight: The name of the adapter's tensor that replaces the base's, and those tied to it, before further changes.
        scale: The factor on the added delta.
        transposed: Whether the weight has the shape of (B·A)ᵀ, as in a Conv1D or embeddings.
        rows: The rows that are replaced.
    """

    operands: tuple[str, ...] = ()
    weight: str | None = None
    scale: float = 1.0
    transposed: bool = False
    rows: tuple[int, ...] = ()

    @property
    def copied_tensor(self) -> str | None:
        """The name of the adapter's tensor that replaces the base's; None if there is none."""
        return self.weight

    @property
    def applied_tensors(self) -> tuple[str, ...]:
        """The names of the adapter's tensors for `apply`."""
        return ()

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, subtract_initial: bool) -> torch.Tensor:
        """Return the updated parameter.

        Args:
            weight: The base's parameter, or the tensor that replaces it.
            operands: The tensors of `applied_tensors`, followed by their initial values if these are subtracted.
            subtract_initial: Whether the initial values are subtracted.
        """
        return weight

    def accepts_initial_factors(self, initial_factors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether an initial adapter has the factors to subtract, if any."""
        return True

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes that the adapter's tensors must have, which override those of PEFT's model.

        Args:
            parameter: The shape of the updated parameter.
            expected: The shapes of PEFT's model, by stored name.

        Returns:
            The shapes by stored name.
        """
        return {self.copied_tensor: parameter} if self.copied_tensor else {}


@dataclasses.dataclass(frozen=True)
class ReplacedModule(Update):
    """The parameter belongs to a module that is fully tuned and stored."""

    @property
    def copied_tensor(self) -> str:
        """The name of the stored tensor, which is not tied to others."""
        return self.operands[0]

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the parameter's shape for the stored tensors."""
        return dict.fromkeys((name for name in (self.weight, *self.operands) if name), parameter)


@dataclasses.dataclass(frozen=True)
class Rows(Update):
    """Rows of the parameter are replaced."""

    @property
    def applied_tensors(self) -> tuple[str, ...]:
        """The rows."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, subtract_initial: bool) -> torch.Tensor:
        """Copy the rows."""
        import torch

        return weight.index_copy(0, torch.tensor(self.rows), operands[0].to(weight))

    def accepts_initial_factors(self, initial_factors: Mapping[str, torch.Tensor]) -> bool:
        """Return False: rows have no initial factors."""
        return False


@dataclasses.dataclass(frozen=True)
class Bias(Update):
    """A bias is added."""

    @property
    def applied_tensors(self) -> tuple[str, ...]:
        """The bias."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, subtract_initial: bool) -> torch.Tensor:
        """Add the scaled bias, in float64."""
        return weight.double() + self.scale * operands[0].double()

    def accepts_initial_factors(self, initial_factors: Mapping[str, torch.Tensor]) -> bool:
        """Return False: a bias has no initial factors."""
        return False


@dataclasses.dataclass(frozen=True)
class Factors(Update):
    """scale·B·A is added; a DoRA then scales the rows to their magnitudes.

    The operands are B, A and, for a DoRA, the magnitude.
    """

    @property
    def applied_tensors(self) -> tuple[str, ...]:
        """B, A and, for a DoRA, the magnitude."""
        return self.operands

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, subtract_initial: bool) -> torch.Tensor:
        """Add scale·B·A, in float64, and scale the rows of a DoRA to their magnitudes."""
        b, a, *extra_operands = operands  # the magnitude, or the initial factors
        plain = weight.T if self.transposed else weight
        if subtract_initial:
            b, a = subtract_factors((b.double(), a.double()), (extra_operands[0].double(), extra_operands[1].double()))
        if extra_operands and not subtract_initial:
            merged = dora_weight(plain, b, a, self.scale, extra_operands[0])
        else:
            merged = plain.double() + lora_delta(b, a, self.scale)
        return merged.T if self.transposed else merged

    def accepts_initial_factors(self, initial_factors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the initial adapter has B and A, and there is no magnitude."""
        factors = [name for name in self.operands if name.endswith((A_SUFFIX, B_SUFFIX))]
        return len(self.operands) == 2 and all(name in initial_factors for name in factors)

    def num_products(self, parameter: torch.Tensor) -> int:
        """Return the number of products B·A for a parameter."""
        return 1


@dataclasses.dataclass(frozen=True)
class Experts(Factors):
    """scale·B·A is added for each expert of a fused parameter."""

    def apply(self, weight: torch.Tensor, *operands: torch.Tensor, subtract_initial: bool) -> torch.Tensor:
        """Add scale·B·A to each expert."""
        return merge_experts(weight, operands[0], operands[1], self.scale, self.transposed)

    def accepts_initial_factors(self, initial_factors: Mapping[str, torch.Tensor]) -> bool:
        """Return False: PEFT does not initialise LoRAs of experts from the base."""
        return False

    def shapes(self, parameter: Shape, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the experts' factors, which depend on the version of PEFT."""
        _, *sizes = parameter
        out, inner = reversed(sizes) if self.transposed else sizes
        ranks = expected[self.operands[1]][0]
        replaced = super().shapes(parameter, expected)
        return {**replaced, self.operands[0]: (out, ranks), self.operands[1]: (ranks, inner)}

    def num_products(self, parameter: torch.Tensor) -> int:
        """Return the number of experts."""
        return len(parameter)
