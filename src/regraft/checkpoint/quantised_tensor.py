"""Weights stored in eight bits, which are dequantised slice by slice as they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint.header import StoredTensor
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch

    Reader = Callable[[StoredTensor, int, int], torch.Tensor]

CHUNK_ELEMENTS = 1 << 18
"""The most elements that are dequantised at once if the codes are not transposed, 1 MiB in float32."""


@dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """A weight that is stored in eight bits, with the dtype of the dequantised weight and the position of the codes.

    Args:
        codes: The stored codes, in int8 or fp8.
        scale: The stored scales, one per block.
        grid: The numbers of rows and columns of blocks in a matrix.
        block: The numbers of rows and columns of a block.
        unit: The factor on all scales.
        transposed: Whether the codes are of the transposed weight, whose rows are the blocks.
    """

    codes: StoredTensor
    scale: StoredTensor
    grid: tuple[int, int]
    block: tuple[int, int]
    unit: float
    transposed: bool = False

    def dequantise(self, read: Reader, start: int, count: int) -> torch.Tensor:
        """Compute a slice of the flattened weight: code · scale of its block · unit.

        Args:
            read: Reads a slice of a stored tensor, given the index of its first element and the number of elements.
            start: The index of the first element.
            count: The number of elements.

        Returns:
            [count], in float32.
        """
        import torch

        if self.transposed:
            return self._dequantise_transposed(read, start, count)
        weights = torch.empty(count, dtype=torch.float32)
        for row, num_rows, column, num_columns in self._rectangles(start, count):
            offset = row * self.shape[-1] + column
            size = num_rows * num_columns
            rectangle = weights[offset - start : offset - start + size].view(num_rows, num_columns)
            rectangle.copy_(read(self.codes, offset, size).view(num_rows, num_columns))
            rectangle.mul_(self._scales(read, row, num_rows, column, num_columns))
        return weights if self.unit == 1 else weights.mul_(self.unit)

    def _dequantise_transposed(self, read: Reader, start: int, count: int) -> torch.Tensor:
        """Read all codes and dequantise the rows of the weight that the slice overlaps: columns of the codes."""
        width = self.shape[1]
        first_row = start // width
        end_row = -(-(start + count) // width)
        codes = read(self.codes, 0, math.prod(self.shape)).view(self.codes.shape)[:, first_row:end_row]
        weights = codes.float() * read(self.scale, 0, width).float()[:, None] * self.unit
        return weights.T.reshape(-1)[start - first_row * width :][:count].clone()

    def _rectangles(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Divide a slice into rectangles of at most `CHUNK_ELEMENTS`: first row, rows, first column, columns."""
        width = self.shape[-1]
        position = start
        end = start + count
        while position < end:
            row, column = divmod(position, width)
            if column or end - position < width or width > CHUNK_ELEMENTS:
                num_rows = 1
                num_columns = min(width - column, end - position, CHUNK_ELEMENTS)
            else:
                num_rows = min(end - position, CHUNK_ELEMENTS) // width
                num_columns = width
            yield row, num_rows, column, num_columns
            position += num_rows * num_columns

    def _scales(self, read: Reader, row: int, num_rows: int, column: int, num_columns: int) -> torch.Tensor:
        """Return the scales of a rectangle: [rows, columns], or [rows, 1] if a block has the matrix's width."""
        import torch

        height = self.shape[-2] if math.prod(self.scale.shape) > 1 else math.prod(self.shape[:-1])
        rows = torch.arange(row, row + num_rows)
        block_rows = rows // height * self.grid[0] + rows % height // self.block[0]
        first_block_row = int(block_rows[0])
        num_block_rows = int(block_rows[-1]) - first_block_row + 1
        stored = read(self.scale, first_block_row * self.grid[1], num_block_rows * self.grid[1])
        if self.scale.dtype == "U8":
            stored = stored.view(torch.float8_e8m0fnu)
        scales = stored.float().view(-1, self.grid[1])[block_rows - first_block_row]
        if self.grid[1] == 1:
            return scales
        return scales[:, torch.arange(column, column + num_columns) // self.block[1]]


def stored_parts(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    """Return the stored tensors that a tensor is computed from: itself, or a quantised weight's codes and scales.

    Args:
        tensor: A tensor of a `Checkpoint`.
    """
    return (tensor.codes, tensor.scale) if isinstance(tensor, QuantisedTensor) else (tensor,)


def check_unquantised(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a quantised checkpoint, before a model is built from it.

    Args:
        path: The checkpoint, for the error message.
        tensors: Its weights by name.

    Raises:
        CheckpointError: A weight is quantised; the message names the command that writes the checkpoint dequantised.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantisedTensor):
            raise CheckpointError(
                f"{path}: is quantised (tensor {name!r:.200} has scales), but models are run in full precision. "
                f"Write it in bf16 first: regraft weights interpolate --first {path} --second {path} --t 0 "
                "--out FOLDER."
            )
