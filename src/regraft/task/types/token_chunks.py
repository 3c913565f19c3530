"""Sums and rows of a loss over a vocabulary, and their gradients, computed chunk by chunk.

A loss is a function of a chunk's logits that returns the loss of each row and its gradient with respect to the logits.
One autograd function multiplies these gradients by the head in the forward pass, so that the backward pass only scales
them and no logits outlive their chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from regraft.errors import MismatchError
from regraft.task.types.token_logits import CHUNK_ROWS, TokenLogits

if TYPE_CHECKING:
    from collections.abc import Callable

    Chunk = Callable[[torch.Tensor, slice], torch.Tensor]
    LossChunk = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


class Loss(NamedTuple):
    """A loss of each row.

    Args:
        chunk: Returns the losses and their gradients with respect to the logits, rows × tokens; it is called with the
            logits, which it may overwrite, and their rows.
        temperature: The divisor of the logits.
    """

    chunk: LossChunk
    temperature: float = 1.0


def weighted_sum(
    logits: TokenLogits, loss: Loss, row_weights: torch.Tensor | None = None, *, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Sum a loss over rows; differentiable with respect to states, weight and bias, or the head's module.

    It is a sum so that the caller can divide by the labelled tokens of all the batches that a step accumulates.

    Args:
        logits: The model's logits.
        loss: The loss of each row.
        row_weights: w, a constant per row; None for 1.
        chunk_rows: Rows whose logits exist at a time.

    Returns:
        The sum, a scalar in float32, or float64 for float64 logits.
    """
    if row_weights is not None:
        check_rows(logits, row_weights, "row_weights")
    if logits.head.project is None and torch.is_grad_enabled():
        head = logits.head
        total: torch.Tensor = _WeightedSum.apply(  # type: ignore[no-untyped-call]
            logits.states, head.weight, head.bias, logits, loss, row_weights, chunk_rows
        )
        return total
    losses = row_losses(logits, loss, chunk_rows=chunk_rows)
    return (losses if row_weights is None else losses * row_weights.to(losses)).sum()


def row_losses(logits: TokenLogits, loss: Loss, *, chunk_rows: int = CHUNK_ROWS) -> torch.Tensor:
    """Compute the loss of each row; where gradients are enabled, the backward pass computes each chunk again.

    Args:
        logits: The model's logits.
        loss: The loss of each row.
        chunk_rows: Rows whose logits exist at a time.

    Returns:
        One value per row, on the device of the states.
    """
    if not torch.is_grad_enabled():
        return map_chunks(logits, lambda z, rows: loss.chunk(z, rows)[0], loss.temperature, chunk_rows=chunk_rows)

    def chunk_losses(states: torch.Tensor, rows: slice) -> torch.Tensor:
        z = logits.head.logits(states, loss.temperature)
        losses: torch.Tensor = _ChunkLosses.apply(z, loss.chunk, rows)  # type: ignore[no-untyped-call]
        return losses.to(states.device)

    chunks = [checkpoint(chunk_losses, logits.states[s], s, use_reentrant=False) for s in logits.slices(chunk_rows)]
    return torch.cat(chunks)


@torch.no_grad()
def map_chunks(
    logits: TokenLogits, chunk: Chunk, temperature: float = 1.0, *, chunk_rows: int = CHUNK_ROWS
) -> torch.Tensor:
    """Concatenate the values of a function of a chunk's logits, which it may overwrite, and its rows.

    Args:
        logits: The model's logits.
        chunk: The function; it returns values with rows as their first dimension.
        temperature: The divisor of the logits.
        chunk_rows: Rows whose logits exist at a time.

    Returns:
        The values, on the device of the states.
    """
    head = logits.head.cast(logits.head.compute_dtype(logits.states))
    values = []
    for rows in logits.slices(chunk_rows):
        z = head.logits(logits.states[rows], temperature)
        if head.project is not None:
            z = z.clone()  # a module may return its input
        values.append(chunk(z, rows).to(logits.device))
    return torch.cat(values)


class _WeightedSum(torch.autograd.Function):
    """Σ w·loss, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits: TokenLogits,
        loss: Loss,
        row_weights: torch.Tensor | None,
        chunk_rows: int,
    ) -> torch.Tensor:
        dtype = logits.head.compute_dtype(states)
        head = logits.head.cast(dtype)
        assert head.weight is not None  # heads with a module take the other path
        exact = torch.promote_types(dtype, torch.float32)
        with_states, with_weight, with_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=exact, device=weight.device)
        states_gradient = torch.empty_like(states) if with_states else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if with_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=exact) if bias is not None and with_bias else None
        for rows in logits.slices(chunk_rows):
            h = states[rows].to(weight.device, dtype)
            z = head.logits(h, loss.temperature)
            factor = head.slope(z, loss.temperature)
            losses, gradient = loss.chunk(z, rows)
            if row_weights is not None:
                w = row_weights[rows].to(losses)
                losses, factor = losses * w, factor * w[:, None]
            total += losses.sum()
            if isinstance(factor, torch.Tensor) or factor != 1:
                gradient.mul_(factor)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
            products = gradient.to(dtype)
            if states_gradient is not None:
                states_gradient[rows] = (products @ head.weight).to(states)
            if weight_gradient is not None:
                if dtype == exact:
                    weight_gradient.addmm_(products.T, h)
                else:
                    weight_gradient += products.T @ h
            del z, gradient, products  # before the next chunk is computed
        ctx.save_for_backward(states_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total.to(states.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * scale.to(gradient.device)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


class _ChunkLosses(torch.autograd.Function):
    """The losses of the rows of a chunk as a function of its logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, chunk: LossChunk, rows: slice) -> torch.Tensor:
        losses, gradient = chunk(logits.detach().clone(), rows)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scales: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scales[:, None], None, None


def check_rows(logits: TokenLogits, rows: Any, name: str) -> None:
    """Refuse a tensor or a signal that has not one entry per row of the logits."""
    if len(rows) != len(logits):
        raise MismatchError(f"The logits have {len(logits)} rows, but {name} has {len(rows)}; pass those of one batch.")
