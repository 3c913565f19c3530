"""The overlap of the leading directions of two matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DIRECTIONS = 8  # the rank of a usual LoRA
"""The default number of singular vectors to compare."""
MAX_EXACT_SIZE = 1024  # the SVD of larger matrices takes seconds
"""The largest smaller dimension of a matrix whose SVD is computed exactly."""
POWER_ITERATIONS = 4  # more are slower and more accurate
"""The number of power iterations of the randomised SVD."""
RELATIVE_EPSILON = 1e-5  # smaller singular values are rounding errors
"""The smallest singular value that counts, relative to the largest."""


def subspace_overlap(first: torch.Tensor, second: torch.Tensor, directions: int = DIRECTIONS) -> float:
    """Return the overlap of the leading output directions of two matrices.

    Source: the normalised subspace similarity of Hu et al., 2021 (arXiv:2106.09685), section 7.2.

    Args:
        first: A matrix, [out, in].
        second: A matrix with the same number of rows, [out, in'].
        directions: The maximal number of leading left singular vectors to compare.

    Returns:
        The mean squared cosine of the principal angles: 1 for the same subspace, 0 for orthogonal ones, about
        directions / out for unrelated ones; 0 if a matrix is zero.
    """
    a, b = _leading(first, directions), _leading(second, directions)
    num_compared = min(a.shape[1], b.shape[1])
    if not num_compared:
        return 0.0
    return float((a[:, :num_compared].T @ b[:, :num_compared]).square().sum() / num_compared)


def _leading(matrix: torch.Tensor, directions: int) -> torch.Tensor:
    """Return the leading left singular vectors; of large matrices, by a randomised method (Halko et al., 2011)."""
    import torch

    if min(matrix.shape) > MAX_EXACT_SIZE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(matrix.float(), q=2 * directions, niter=POWER_ITERATIONS)
    else:
        vectors, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = int((values > values[0] * RELATIVE_EPSILON).sum()) if values[0] > 0 else 0
    return vectors[:, : min(rank, directions)].double()
