"""The overlap of the leading directions of two matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DIRECTIONS = 8  # the rank of a usual LoRA
MAX_EXACT_SIZE = 1024  # the SVD of larger matrices takes seconds


def subspace_overlap(first: torch.Tensor, second: torch.Tensor, directions: int = DIRECTIONS) -> float:
    """Return the overlap of the leading output directions of two matrices.

    Source: the normalised subspace similarity of Hu et al., 2022 (arXiv:2106.09685), section 7.2.

    Args:
        first: [out, in].
        second: [out, in].
        directions: The number of leading left singular vectors to compare, at most the ranks.

    Returns:
        The mean squared cosine of the principal angles: 1 for the same subspace, 0 for orthogonal ones, about
        directions / out for unrelated ones; 0 if a matrix is zero.
    """
    a, b = _leading(first, directions), _leading(second, directions)
    count = min(a.shape[1], b.shape[1])
    if not count:
        return 0.0
    return float((a[:, :count].T @ b[:, :count]).square().sum() / count)


def _leading(matrix: torch.Tensor, directions: int) -> torch.Tensor:
    """Return the leading left singular vectors; of large matrices, by a randomised method (Halko et al., 2011)."""
    import torch

    if min(matrix.shape) > MAX_EXACT_SIZE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(matrix.float(), q=2 * directions, niter=4)
    else:
        vectors, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((values > values[0] * 1e-5).sum()) if values[0] > 0 else 0  # smaller values are rounding errors
    return vectors[:, : min(rank, directions)].double()
