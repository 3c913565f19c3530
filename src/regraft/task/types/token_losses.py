"""Losses over a vocabulary: the cross-entropy, and divergences of a student from a teacher.

Teacher's p and student's q are softened by the same temperature, after scale and soft-cap. The teacher's p is
restricted to the tokens that both vocabularies have, and renormalised. In the forward KL, q is over the student's
whole vocabulary; in the reverse KL and the Jensen-Shannon divergence it is restricted like p, which is 0 elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regraft.errors import MismatchError, RecipeError
from regraft.task.types.token_chunks import Loss, check_rows, map_chunks, weighted_sum
from regraft.task.types.token_logits import CHUNK_ROWS, StateSignal, TokenLogits, TopKSignal, shared_columns

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.task.types.token_chunks import LossChunk
    from regraft.task.types.token_logits import Columns

    Teacher = Callable[[slice, torch.Tensor], torch.Tensor]
    TokenSignal = TopKSignal | StateSignal

KINDS = ("forward", "reverse", "js")
"""The divergences: KL(p ‖ q), KL(q ‖ p), and the generalised Jensen-Shannon divergence."""
TAIL_ROUNDING = 8
"""The least tail mass of a top-k signal, in units of the precision of its log-probabilities (float32: 1e-6); less is
their rounding, and would make the loss infinite where the student excludes the tail."""


def cross_entropy(logits: TokenLogits, targets: torch.Tensor) -> Loss:
    """Return the loss −log q(target).

    Args:
        logits: The model's logits.
        targets: The id of the target of each row.

    Raises:
        MismatchError: There is not one target per row, or a target is not in the vocabulary.
    """
    check_rows(logits, targets, "targets")
    _check_ids(logits, targets, "targets")

    def chunk(z: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        columns = targets[rows, None].to(z.device, torch.int64)
        target_z = _shift_(z).gather(1, columns)
        q = z.exp_()
        total = q.sum(1, keepdim=True)
        losses = (total.log() - target_z).squeeze(1)
        return losses, q.div_(total).scatter_add_(1, columns, -torch.ones_like(target_z))

    return Loss(chunk)


def divergence(
    logits: TokenLogits, signal: TokenSignal, temperature: float = 1.0, kind: str = "forward", mixture: float = 0.5
) -> Loss:
    """Return a divergence of the student from the teacher.

    The generalised Jensen-Shannon divergence is β·KL(p ‖ m) + (1 − β)·KL(q ‖ m) with m = β·p + (1 − β)·q and the
    mixture β, as in Agarwal et al., 2023 (arXiv:2306.13649) and in TRL's `GKDTrainer`. TRL replaces it by the forward
    KL at β = 0 and the reverse KL at β = 1; here these have names of their own.

    A top-k signal allows the forward KL alone: Σ p·(log p − log q) over its tokens, and the same term for the tail.

    Args:
        logits: The student's logits.
        signal: The teacher's signal for the same rows.
        temperature: The divisor of both models' logits.
        kind: `forward`, `reverse` or `js`.
        mixture: β, between 0 and 1.

    Raises:
        RecipeError: The kind is unknown, or the temperature or the mixture is out of its range.
        MismatchError: Rows, vocabularies, kind or temperature do not fit the signal.
    """
    if kind not in KINDS:
        raise RecipeError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}.")
    if not 0 < temperature < float("inf"):
        raise RecipeError(f"temperature must be a finite number above 0, found {temperature}.")
    if kind == "js" and not 0 < mixture < 1:
        raise RecipeError(f"mixture must be between 0 and 1, found {mixture}; the limits are `forward` and `reverse`.")
    check_rows(logits, signal, "the teacher's signal")
    if isinstance(signal, TopKSignal):
        if kind != "forward":
            raise MismatchError(f"The divergence {kind!r} needs the teacher's whole distributions (a StateSignal).")
        return Loss(_top_k_chunk(logits, signal, temperature), temperature)
    teacher, columns = _teacher_chunk(logits, signal, temperature)

    def chunk(z: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "forward":
            return _forward(z, teacher(rows, z), columns)
        log_q = _log_softmax_(z[:, columns])
        log_p = _log_softmax_(teacher(rows, z))
        losses, gradient = _reverse(log_q, log_p) if kind == "reverse" else _jensen_shannon(log_q, log_p, mixture)
        if gradient.shape == z.shape and isinstance(columns, slice):
            return losses, gradient
        whole = torch.zeros_like(z)
        whole[:, columns] = gradient
        return losses, whole

    return Loss(chunk, temperature)


def _forward(z: torch.Tensor, teacher_z: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    # Normalising after the exponential saves two passes over the logits and two copies.
    _shift_(z)
    p = _shift_(teacher_z).exp()
    log_ratio = teacher_z.sub_(z[:, columns])
    q = z.exp_()
    total_p, total_q = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
    p.div_(total_p)
    losses = log_ratio.mul_(p).sum(1) + (total_q / total_p).log_().squeeze(1)
    q.div_(total_q)
    if isinstance(columns, slice):
        q[:, columns].sub_(p)
    else:
        q.index_add_(1, columns, p, alpha=-1)
    return losses, q


def _reverse(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(q ‖ p) and its gradient with respect to the logits of q; overwrites both inputs."""
    q = log_q.exp()
    difference = log_q.sub_(log_p)
    losses = torch.mul(q, difference, out=log_p).sum(1)
    return losses, difference.sub_(losses[:, None]).mul_(q)


def _jensen_shannon(log_q: torch.Tensor, log_p: torch.Tensor, mixture: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight_p, weight_q = log_q.new_tensor(mixture), log_q.new_tensor(1 - mixture)
    log_m = torch.logaddexp(log_p + weight_p.log(), log_q + weight_q.log())
    p_losses = (log_p.exp() * log_p.sub(log_m)).sum(1)
    q_losses, gradient = _reverse(log_q, log_m)  # the terms of the gradient through m cancel
    return weight_p * p_losses + weight_q * q_losses, gradient.mul_(weight_q)


def _top_k_chunk(logits: TokenLogits, signal: TopKSignal, temperature: float) -> LossChunk:
    _check_temperature(signal, temperature)
    _check_ids(logits, signal.ids, "the teacher's signal")

    def chunk(z: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_p, ids, tail_p = _top_k_rows(signal, rows, z)
        p = log_p.exp()
        z_top = _shift_(z).gather(1, ids)
        z.exp_().scatter_(1, ids, 0)
        tail = z.sum(1).clamp_min_(torch.finfo(z.dtype).tiny)  # where exp rounds to 0
        total = tail + z_top.exp().sum(1)
        log_q = z_top - total.log()[:, None]
        tail_losses = torch.xlogy(tail_p, tail_p) - tail_p * (tail.log() - total.log())
        gradient = z.mul_((1 / total - tail_p / tail)[:, None])
        return (p * (log_p - log_q)).sum(1) + tail_losses, gradient.scatter_(1, ids, log_q.exp() - p)

    return chunk


def cross_entropy_sum(
    logits: TokenLogits,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Compute Σ w·(−log q(target)); see `cross_entropy` and `weighted_sum`."""
    return weighted_sum(logits, cross_entropy(logits, targets), row_weights, chunk_rows=chunk_rows)


def divergence_sum(
    logits: TokenLogits,
    signal: TokenSignal,
    temperature: float = 1.0,
    kind: str = "forward",
    mixture: float = 0.5,
    row_weights: torch.Tensor | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Compute Σ w·divergence; see `divergence` and `weighted_sum`."""
    loss = divergence(logits, signal, temperature, kind, mixture)
    return weighted_sum(logits, loss, row_weights, chunk_rows=chunk_rows)


def overlaps(logits: TokenLogits, signal: TokenSignal, *, chunk_rows: int = CHUNK_ROWS) -> torch.Tensor:
    """Compute 1 − the total variation distance of the student's q and the teacher's p at temperature 1.

    For a top-k signal the tail counts as one token, which makes the result an upper bound.

    Args:
        logits: The student's logits.
        signal: The teacher's signal for the same rows.
        chunk_rows: Rows whose logits exist at a time.

    Returns:
        One value per row, from 0 to 1.
    """
    check_rows(logits, signal, "the teacher's signal")
    if isinstance(signal, TopKSignal):
        _check_temperature(signal, 1.0)
        _check_ids(logits, signal.ids, "the teacher's signal")

        def chunk(z: torch.Tensor, rows: slice) -> torch.Tensor:
            log_p, ids, tail_p = _top_k_rows(signal, rows, z)
            q = _log_softmax_(z).exp_().gather(1, ids)
            tail_q = (1 - q.sum(1)).clamp_min(0)
            return log_p.exp().minimum(q).sum(1) + tail_p.minimum(tail_q)
    else:
        teacher, columns = _teacher_chunk(logits, signal, 1.0)

        def chunk(z: torch.Tensor, rows: slice) -> torch.Tensor:
            q = _log_softmax_(z).exp_()[:, columns]
            return _log_softmax_(teacher(rows, z)).exp_().minimum(q).sum(1)

    return map_chunks(logits, chunk, chunk_rows=chunk_rows)


def extract_top_k(
    logits: TokenLogits,
    k: int,
    temperature: float = 1.0,
    student_ids: torch.Tensor | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> TopKSignal:
    """Extract the most likely tokens of a teacher.

    Args:
        logits: The teacher's logits.
        k: The number of tokens per row; all shared tokens if there are fewer.
        temperature: The divisor of the teacher's logits.
        student_ids: The student's id of each token of the teacher, −1 for none; None if the vocabularies are equal.
        chunk_rows: Rows whose logits exist at a time.
    """
    if k < 1:
        raise RecipeError(f"k must be at least 1, found {k}.")
    signal = StateSignal(logits.states, logits.head, student_ids)
    columns, ids_of_columns = shared_columns(student_ids, logits.head.num_tokens)

    def chunk(z: torch.Tensor, rows: slice) -> torch.Tensor:
        log_p = _log_softmax_(z[:, columns])
        top = log_p.topk(min(k, log_p.shape[1]), dim=1)
        ids = top.indices
        if isinstance(ids_of_columns, torch.Tensor):
            ids = ids_of_columns.to(z.device)[ids]
        return torch.stack([top.values.double(), ids.double()], dim=1)  # float64 has every id

    values, ids = map_chunks(signal.logits, chunk, temperature, chunk_rows=chunk_rows).unbind(1)
    return TopKSignal(values.float(), ids.int(), temperature)


def _shift_(z: torch.Tensor) -> torch.Tensor:
    """Subtract the largest logit of each row, in place, so that no exponential overflows."""
    return z.sub_(z.amax(1, keepdim=True))


def _log_softmax_(z: torch.Tensor) -> torch.Tensor:
    """Replace logits by log-probabilities, without a copy."""
    return _shift_(z).sub_(z.exp().sum(1, keepdim=True).log_())


def _teacher_chunk(logits: TokenLogits, signal: StateSignal, temperature: float) -> tuple[Teacher, Columns]:
    """Return a function that computes the teacher's logits of the shared tokens, and the student's columns of these."""
    num_student, num_teacher = logits.head.num_tokens, signal.head.num_tokens
    if signal.student_ids is None and num_student != num_teacher:
        raise MismatchError(
            f"The student has {num_student} tokens and the teacher {num_teacher}; student_ids must map the teacher's "
            "tokens to the student's."
        )
    if signal.student_ids is not None:
        _check_ids(logits, signal.student_ids.clamp_min(0), "student_ids")
    teacher_columns, columns = shared_columns(signal.student_ids, num_teacher)
    device = logits.head.device_of(logits.states)
    if isinstance(columns, torch.Tensor):
        columns = columns.to(device)
    teacher_head = signal.head.cast(signal.head.compute_dtype(signal.states))

    @torch.no_grad()
    def shared_logits(rows: slice, z: torch.Tensor) -> torch.Tensor:
        teacher_z = teacher_head.logits(signal.states[rows], temperature)[:, teacher_columns]
        return teacher_z.to(z, copy=teacher_head.project is not None)  # a module may return its input

    return shared_logits, columns


def _top_k_rows(signal: TopKSignal, rows: slice, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, ids and the tail's mass of some rows."""
    log_p = signal.log_probabilities[rows].to(z)
    tail = 1 - log_p.exp().sum(1)
    smallest = TAIL_ROUNDING * torch.finfo(signal.log_probabilities.dtype).eps
    return log_p, signal.ids[rows].to(z.device, torch.int64), tail.where(tail > smallest, 0)


def _check_ids(logits: TokenLogits, ids: torch.Tensor, name: str) -> None:
    num_tokens = logits.head.num_tokens
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_tokens:
        raise MismatchError(
            f"{name}: ids must be from 0 to {num_tokens - 1}, found {int(ids.min())} to {int(ids.max())}; "
            "leave out masked tokens, and use the tokenizer of the model."
        )


def _check_temperature(signal: TopKSignal, temperature: float) -> None:
    if signal.temperature != temperature:
        raise MismatchError(
            f"The teacher's top-k signal was made at temperature {signal.temperature:g} and cannot be used at "
            f"{temperature:g}; extract it again."
        )
