"""Whether two changes of a matrix go in the same directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DIRECTIONS = 8
EXACT_UP_TO = 1024


def subspace_overlap(first: torch.Tensor, second: torch.Tensor, directions: int = DIRECTIONS) -> float:
    """Return how much of the leading output directions two matrices have in common.

    Source: the normalised subspace similarity of Hu et al., 2022 (arXiv:2106.09685), section 7.2.

    Args:
        first: [out, in].
        second: Of the same shape.
        directions: How many leading left singular vectors are compared; no more than the matrices' ranks.

    Returns:
        The mean squared cosine of the principal angles: 1 for the same subspace, 0 for orthogonal ones, about
        directions / out for unrelated ones; 0 where a matrix is zero.
    """
    one, other = (_leading(matrix, directions) for matrix in (first, second))
    count = min(one.shape[1], other.shape[1])
    if not count:
        return 0.0
    return float((one[:, :count].T @ other[:, :count]).square().sum() / count)


def _leading(matrix: torch.Tensor, directions: int) -> torch.Tensor:
    """Find the leading left singular vectors; of large matrices by a randomised method (Halko et al., 2011)."""
    import torch

    if min(matrix.shape) > EXACT_UP_TO:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(matrix.float(), q=2 * directions, niter=4)
    else:
        vectors, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = int((values > values[0] * 1e-5).sum()) if values[0] > 0 else 0
    return vectors[:, : min(kept, directions)].double()
