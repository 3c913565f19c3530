"""Logits over a vocabulary as hidden states and a head, and the teacher signals that are made of them.

A batch of 2,048 tokens and a vocabulary of 128,000 has a gigabyte of logits. They are therefore never materialised as a
whole: hidden states are multiplied by the head chunk by chunk, where a loss or a prediction needs their logits.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

from regraft.errors import MismatchError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.task.split import Integers

    Rows = torch.Tensor | Integers | slice
    Columns = torch.Tensor | slice

CHUNK_ROWS = 256
"""Rows whose logits exist at a time: 256 × 49,152 float32 are 50 MB. Each chunk reads the whole weight of the head: a
KL step of 2,048 such rows took 7.4, 6.0, 5.7 and 5.6 s on a CPU in chunks of 64, 128, 256 and 512 rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyHead:
    """The last layer of a language model: soft_cap·tanh(scale·(W·h + b) / soft_cap).

    Args:
        weight: W, tokens × width; None if there is a `project`.
        bias: b, one value per token.
        scale: The factor of the logits; Granite divides them by `logits_scaling`, Cohere multiplies by `logit_scale`.
        soft_cap: The bound on the absolute logits (Gemma's `final_logit_softcapping`); None for none.
        project: A module that computes W·h + b if that takes more than a matrix, such as a LoRA on the head. It must
            have `out_features`.

    Raises:
        MismatchError: There is neither a weight nor a `project`, or there are both.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    project: nn.Module | None = None

    def __post_init__(self) -> None:
        """Refuse a head without a projection, and one with two."""
        if (self.weight is None) == (self.project is None):
            raise MismatchError("A VocabularyHead needs either a weight or a module that projects, and not both.")

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the vocabulary, padding included."""
        return int(self.project.out_features if self.weight is None else len(self.weight))  # type: ignore[union-attr,arg-type]

    def compute_dtype(self, states: torch.Tensor) -> torch.dtype:
        """Return the dtype of matrix products: autocast's where it is enabled, else that of states and weight."""
        import torch

        dtype = states.dtype if self.weight is None else torch.promote_types(states.dtype, self.weight.dtype)
        device_type = self.device_of(states).type
        if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return dtype

    def device_of(self, states: torch.Tensor) -> torch.device:
        """Return the device on which logits are computed: that of the weight or of the module's parameters."""
        if self.weight is not None:
            return self.weight.device
        parameter = self._first_parameter()
        return states.device if parameter is None else parameter.device

    def _first_parameter(self) -> torch.Tensor | None:
        """Return a tensor of the device and dtype of the module's inputs: a LoRA's first one is the base's weight."""
        return None if self.project is None else next(self.project.parameters(), None)

    def detach(self) -> VocabularyHead:
        """Return a head without gradients, whose tensors remain where they are when their model is moved."""
        if self.weight is None:
            return dataclasses.replace(self, project=copy.deepcopy(self.project))
        bias = None if self.bias is None else self.bias.detach()
        return dataclasses.replace(self, weight=self.weight.detach(), bias=bias)

    def cast(self, dtype: torch.dtype) -> VocabularyHead:
        """Convert weight and bias, so that chunks need not do so one by one."""
        if self.weight is None:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return dataclasses.replace(self, weight=self.weight.to(dtype), bias=bias)

    def logits(self, states: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Compute logits of a few rows, divided by a temperature after scale and soft-cap; differentiable.

        Args:
            states: The hidden states after the final norm, rows × width.
            temperature: The divisor of the logits.

        Returns:
            Rows × tokens on the head's device, in float32, or in float64 for float64 states or weight.
        """
        import torch

        if self.weight is None:
            assert self.project is not None
            parameter = self._first_parameter()
            products: torch.Tensor = self.project(states if parameter is None else states.to(parameter))
        else:
            dtype = self.compute_dtype(states)
            bias = None if self.bias is None else self.bias.to(dtype)
            states = states.to(self.weight.device, dtype)
            products = torch.nn.functional.linear(states, self.weight.to(dtype), bias)
        logits = products.to(torch.promote_types(products.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits if temperature == 1 else logits / temperature

    def slope(self, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor | float:
        """Return the derivative of the logits with respect to W·h + b.

        Args:
            logits: What `logits` returned.
            temperature: The divisor of the logits.
        """
        factor = self.scale / temperature
        if self.soft_cap is None:
            return factor
        return (logits * (temperature / self.soft_cap)).square_().neg_().add_(1).mul_(factor)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLogits:
    """The logits of rows over a vocabulary, as hidden states and a head.

    Indexing selects rows. Moving to a device moves the states alone: chunks of them go to the head's device.

    Args:
        states: The hidden states after the final norm, rows × width.
        head: The head of the model.
    """

    states: torch.Tensor
    head: VocabularyHead

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Rows) -> TokenLogits:
        return TokenLogits(self.states[rows], self.head)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and that of tokens."""
        return len(self.states), self.head.num_tokens

    @property
    def device(self) -> torch.device:
        """The device of the states."""
        return self.states.device

    def isfinite(self) -> torch.Tensor:
        """Return which numbers of the states are finite: logits that are not finite come from such states."""
        return self.states.isfinite()

    def double(self) -> TokenLogits:
        """Return the same logits: losses compute in float32, or in float64 for states and weights in float64."""
        return self

    def numel(self) -> int:
        """Return rows × tokens."""
        return len(self.states) * self.head.num_tokens

    def to(self, device: torch.device | str) -> TokenLogits:
        """Return the same logits with the states on a device."""
        return TokenLogits(self.states.to(device), self.head)

    def cpu(self) -> TokenLogits:
        """Return the same logits with the states on the CPU."""
        return self.to("cpu")

    def dense(self) -> torch.Tensor:
        """Return the logits as a tensor, rows × tokens; only for small inputs."""
        return self.head.logits(self.states)

    def slices(self, chunk_rows: int = CHUNK_ROWS) -> list[slice]:
        """Return the rows of each chunk; one empty chunk if there are no rows."""
        return [slice(start, start + chunk_rows) for start in range(0, max(len(self), 1), chunk_rows)]


def shared_columns(student_ids: torch.Tensor | None, num_teacher: int) -> tuple[Columns, Columns]:
    """Return the columns of the shared tokens in the teacher's and in the student's logits, in the same order.

    Columns that start at 0 and have no gaps are returned as a slice, which indexes without a copy.

    Args:
        student_ids: The student's id of each token of the teacher, −1 for none; None if the vocabularies are equal.
        num_teacher: The number of the teacher's tokens.

    Raises:
        MismatchError: There is not one id per token of the teacher, no token is shared, or two have the same id.
    """
    import torch

    if student_ids is None:
        return slice(num_teacher), slice(num_teacher)
    if len(student_ids) != num_teacher:
        raise MismatchError(
            f"student_ids has {len(student_ids)} entries, but the teacher has {num_teacher} tokens; it needs one per "
            "token, with −1 for a token that the student lacks."
        )
    teacher = (student_ids >= 0).nonzero().squeeze(1)
    student = student_ids[teacher].long()
    if not len(student):
        raise MismatchError("Teacher and student share no token; compare the strings of their vocabularies.")
    if len(torch.unique(student)) < len(student):
        raise MismatchError("Two tokens of the teacher have the same id in student_ids; leave one, and set −1.")
    return _as_slice(teacher), _as_slice(student)


def _as_slice(columns: torch.Tensor) -> Columns:
    import torch

    return slice(len(columns)) if columns.equal(torch.arange(len(columns), device=columns.device)) else columns


@dataclasses.dataclass(frozen=True, eq=False)
class TopKSignal:
    """The most likely tokens of a teacher, softened by a temperature; `extract_top_k` makes it.

    The temperature is part of the signal because the normaliser at another one needs all logits. The rest of the
    teacher's probability is in the tail.

    Args:
        log_probabilities: The log-probabilities of the tokens, rows × k.
        ids: The student's ids of the tokens, rows × k, int32.
        temperature: The divisor of the teacher's logits.
    """

    log_probabilities: torch.Tensor
    ids: torch.Tensor
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Rows, template: torch.Tensor | TokenLogits) -> TopKSignal:
        """Return the signal of some rows on the device of a template; see `Signal.take`."""
        log_probabilities, ids = self.log_probabilities[rows], self.ids[rows]
        return TopKSignal(log_probabilities.to(template.device), ids.to(template.device), self.temperature)


@dataclasses.dataclass(frozen=True, eq=False)
class StateSignal:
    """Whole distributions of a teacher, as its hidden states and head.

    Args:
        states: The teacher's hidden states after the final norm, rows × width.
        head: The teacher's head, which should be on the student's device.
        student_ids: The student's id of each token of the teacher, −1 for none; None if the vocabularies are equal.
    """

    states: torch.Tensor
    head: VocabularyHead
    student_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    @property
    def logits(self) -> TokenLogits:
        """The teacher's logits, in its own vocabulary."""
        return TokenLogits(self.states, self.head)

    def take(self, rows: Rows, template: torch.Tensor | TokenLogits) -> StateSignal:
        """Return the signal of some rows, its states on the device of a template; see `Signal.take`."""
        return dataclasses.replace(self, states=self.states[rows].to(template.device))
