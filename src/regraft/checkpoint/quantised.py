"""Quantised checkpoints: int8 and fp8 weights are computed from their scales when they are read, others are refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.header import FLOATING, StoredTensor
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch

    Read = Callable[[StoredTensor, int, int], torch.Tensor]

SETTINGS = ("quantization_config", "compression_config", "quantization")  # transformers, older vLLM, MLX
BLOCK = (128, 128)  # of DeepSeek-V3 and of transformers' FineGrainedFP8Config
INT8_UNIT = 7.874015718698502e-3  # 1/127 as bitsandbytes' int8_vectorwise_dequant has it
STEP = 1 << 18  # numbers that are computed at once
FP8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two, stored as their exponent plus 127
# layers that are Conv1D modules in these classes of transformers, whose weights bitsandbytes stores transposed, and
# nn.Linear modules in others (GPT-Neo, StarCoder)
CONV1D = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)\.weight$")
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
# integers under these names are codes of weights; those under other names are masks and positions
CODES = re.compile(r"(?:^|[._:])(?:weight|qweight|qzeros|packed|W_q|qdata|_data|blocks|codes|bitmask)$")
BNB_4BIT = re.compile(r"\.(?:absmax|quant_map|quant_state\.bitsandbytes__\w+)$")
SCALE = re.compile(r"(?:_scale_inv|\.SCB)$")
# what lies beside quantised weights and is for running them: static scales of activations and caches
COMPANION = re.compile(r"(?:[._](?:activation|input)_scale(?:_inv)?|\.weight_format|\.[kv]_scale)$")
FORMATS = (
    (
        BNB_4BIT,
        "4-bit, by bitsandbytes",
        "Load it with transformers where bitsandbytes runs, call dequantize() of the model and save_pretrained; or "
        "give the model that it was made from (on the hub the name without -bnb-4bit).",
    ),
    (
        re.compile(r"\.(?:qweight|qzeros)$"),
        "GPTQ or AWQ",
        "Give the model that it was made from (on the hub the name without -GPTQ or -AWQ).",
    ),
    (
        re.compile(r"_blocks$"),
        "MXFP4",
        "Load it with transformers, quantization_config=Mxfp4Config(dequantize=True), and call save_pretrained; or "
        "give a copy in bf16.",
    ),
    (
        re.compile(r"\.weight_(?:packed|scale)$"),
        "compressed-tensors or alike",
        "Give the model that it was made from; or, if compressed-tensors wrote it, load it with transformers, "
        "quantization_config=CompressedTensorsConfig(dequantize=True), and call save_pretrained.",
    ),
)


@dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """A weight that is stored in eight bits: its dtype is that of the computed numbers, its bytes are the stored ones.

    Args:
        codes: Where the stored numbers lie, and their dtype.
        scale: Where the scales lie: one for each block.
        grid: How many rows and columns of blocks a matrix has.
        block: The rows and columns of a block.
        unit: What the scales are multiplied by.
        transposed: Whether the stored numbers are those of the transposed weight, and blocks are its rows.
    """

    codes: StoredTensor
    scale: StoredTensor
    grid: tuple[int, int]
    block: tuple[int, int]
    unit: float
    transposed: bool = False

    def numbers(self, read: Read, start: int, count: int) -> torch.Tensor:
        """Compute some numbers of the weight, laid out flat: code · scale of its block · unit, in float32.

        Args:
            read: Reads stored numbers of a tensor, from one on, so many.
            start: The first number.
            count: How many.

        Returns:
            A tensor of shape [count].
        """
        import torch

        if self.transposed:
            return self._transposed(read, start, count)
        values = torch.empty(count, dtype=torch.float32)
        for row, rows, column, columns in self._rectangles(start, count):
            first = row * self.shape[-1] + column
            part = values[first - start : first - start + rows * columns].view(rows, columns)
            part.copy_(read(self.codes, first, rows * columns).view(rows, columns))
            part.mul_(self._scales(read, row, rows, column, columns))
        return values if self.unit == 1 else values.mul_(self.unit)

    def _transposed(self, read: Read, start: int, count: int) -> torch.Tensor:
        width = self.shape[1]
        first, last = start // width, -(-(start + count) // width)
        codes = read(self.codes, 0, math.prod(self.shape)).view(self.codes.shape)[:, first:last]
        values = codes.float() * read(self.scale, 0, width).float()[:, None] * self.unit
        return values.T.reshape(-1)[start - first * width :][:count].clone()

    def _rectangles(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Divide a range of flat numbers into rectangles: first row, rows, first column, columns."""
        width, position, end = self.shape[-1], start, start + count
        while position < end:
            row, column = divmod(position, width)
            if column or end - position < width or width > STEP:
                rows, columns = 1, min(width - column, end - position, STEP)
            else:
                rows, columns = min(end - position, STEP) // width, width
            yield row, rows, column, columns
            position += rows * columns

    def _scales(self, read: Read, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        import torch

        height = self.shape[-2] if math.prod(self.scale.shape) > 1 else math.prod(self.shape[:-1])
        index = torch.arange(row, row + rows)
        index = index // height * self.grid[0] + index % height // self.block[0]
        lowest, highest = int(index[0]), int(index[-1])
        stored = read(self.scale, lowest * self.grid[1], (highest - lowest + 1) * self.grid[1])
        if self.scale.dtype == "U8":
            stored = stored.view(torch.float8_e8m0fnu)
        scales = stored.float().view(-1, self.grid[1])[index - lowest]
        if self.grid[1] == 1:
            return scales
        return scales[:, torch.arange(column, column + columns) // self.block[1]]


def parts(info: StoredTensor) -> tuple[StoredTensor, ...]:
    """Return what of the files a tensor is computed from.

    Args:
        info: A tensor of a checkpoint.

    Returns:
        Itself, or a quantised weight's codes and scales.
    """
    return (info.codes, info.scale) if isinstance(info, QuantisedTensor) else (info,)


def dequantised(path: Path, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Present the tensors of a checkpoint as weights: int8 with `SCB` and fp8 with `weight_scale_inv` as float32.

    Args:
        path: The checkpoint, for messages.
        stored: Its tensors.
        settings: The content of the config.json beside it; nothing if there is none.

    Returns:
        The weights by name, without scales.

    Raises:
        CheckpointError: It is quantised in another way, or its scales do not fit.
    """
    quantisation = _quantisation_of(settings)
    weights: dict[str, StoredTensor] = {}
    for name, info in stored.items():
        scale = None
        if info.dtype in FP8:
            scale = stored.get(f"{name}_scale_inv")
        elif info.dtype == "I8" and name.endswith("weight"):
            scale = stored.get(name.removesuffix("weight") + "SCB")
        if scale:
            weights[name] = _quantised(path, stored, info, scale, settings)
    scales = {info.scale.name for info in weights.values() if isinstance(info, QuantisedTensor)}
    if not weights and quantisation and not any(_is_code(info) for info in stored.values()):
        for info in stored.values():
            if info.dtype not in (*FLOATING, "BOOL", "I64"):  # masks, positions and counters lie in any checkpoint
                raise _refusal(path, info, stored, quantisation)
        raise CheckpointError(
            f"{path}: its config.json says that it is quantised ({quantisation.get('quant_method')!r:.80}), and all "
            "its tensors are plain numbers. If these are its weights, remove quantization_config from config.json."
        )
    for name, info in stored.items():
        if name in weights or name in scales or (weights and COMPANION.search(name)):
            continue
        if _is_code(info):
            raise _refusal(path, info, stored, quantisation)
        weights[name] = info
    return {name: weights[name] for name in stored if name in weights}


def check_unquantised(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a quantised checkpoint where a model of it would be run.

    Args:
        path: The checkpoint.
        tensors: What it holds, as weights.

    Raises:
        CheckpointError: It is quantised; the message names the command that writes it dequantised.
    """
    if name := next((name for name, info in tensors.items() if isinstance(info, QuantisedTensor)), None):
        raise CheckpointError(
            f"{path}: is quantised (tensor {name!r:.200} has scales beside it), and models are run from full "
            f"precision. Write it in bf16 first: regraft weights interpolate --first {path} --second {path} --t 0 "
            "--out FOLDER."
        )


def without_quantisation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that no longer says its tensors are quantised.

    Args:
        settings: Its content.

    Returns:
        The rest of it, of models inside the model too.
    """
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("config") else value
        for key, value in settings.items()
        if key not in SETTINGS
    }


def _quantisation_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = (value for key, value in settings.items() if key.endswith("config") and isinstance(value, dict))
    for level in (settings, *inner):
        for key in SETTINGS:
            if isinstance(level.get(key), dict) and level[key]:
                quantisation: Mapping[str, Any] = level[key]
                return quantisation
    return {}


def _is_code(info: StoredTensor) -> bool:
    """Return whether a tensor that is not dequantised holds something else than weights, masks and positions."""
    if BNB_4BIT.search(info.name) or SCALE.search(info.name):
        return True
    if info.dtype == "I8" and len(info.shape) > 1:
        return True
    return info.dtype.startswith("F8") or (info.dtype not in (*FLOATING, "BOOL") and bool(CODES.search(info.name)))


def _quantised(
    path: Path,
    stored: Mapping[str, StoredTensor],
    codes: StoredTensor,
    scale: StoredTensor,
    settings: Mapping[str, Any],
) -> QuantisedTensor:
    shape, transposed, unit = codes.shape, False, 1.0
    if codes.dtype == "I8":
        transposed = _is_transposed(path, codes, stored.get(codes.name + "_format"), settings)
        expected, unit = "a number for each row", INT8_UNIT
        grid, block = (shape[0] if shape else 0, 1), (1, shape[-1] if shape else 0)
        fits = len(shape) == 2 and math.prod(scale.shape) == shape[0] and scale.dtype in FLOATING
    else:
        rows, columns = (1, 1, *shape)[-2:]
        block = _block(path, (rows, columns), scale.shape, _quantisation_of(settings))
        expected = f"one for each block of {block[0]} × {block[1]} (weight_block_size in config.json)"
        grid = -(-rows // block[0]), -(-columns // block[1])
        fits = len(shape) > 1 and scale.shape == (*shape[:-2], *grid)
        if math.prod(scale.shape) == 1:
            grid, block, fits = (1, 1), (math.prod(shape[:-1]), columns), len(shape) > 1
        fits = fits and scale.dtype in (*FLOATING, *EXPONENTS)
    if not fits:
        raise CheckpointError(
            f"{path}: tensor {codes.name!r:.200} of shape {shape} has scales {scale.name!r:.200} of shape "
            f"{scale.shape} and dtype {scale.dtype}, expected {expected}. Give the files that were saved together."
        )
    shape = shape[::-1] if transposed else shape
    return QuantisedTensor(
        codes.name, "F32", shape, codes.file, codes.start, codes.end, codes, scale, grid, block, unit, transposed
    )


def _block(
    path: Path, shape: tuple[int, int], scales: tuple[int, ...], quantisation: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the rows and columns of a block, from the number of scales where the config leaves them open."""
    size = quantisation.get("weight_block_size")
    if size is None:
        rows, columns = scales[-2:] if len(scales) > 1 else (1, 1)
        return _edge(shape[0], rows, BLOCK[0]), _edge(shape[1], columns, BLOCK[1])
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"{path}/config.json: weight_block_size is {size!r:.80}, not two whole numbers from 1.")
    return size[0], size[1]


def _edge(length: int, count: int, usual: int) -> int:
    """Divide a dimension by its number of scales where the usual edge does not fit, as transformers does.

    Only into powers of two: blocks of another size could be larger ones whose last is cut off.
    """
    if count == -(-length // usual) or not length:
        return usual
    if count == 1:
        return length
    edge = length // count if count else 0
    return edge if edge * count == length and edge.bit_count() == 1 else usual


def _is_transposed(path: Path, codes: StoredTensor, order: StoredTensor | None, settings: Mapping[str, Any]) -> bool:
    """Return whether int8 numbers are of the transposed weight, and refuse those in an order that is not known."""
    inner = (value for key, value in settings.items() if key.endswith("config") and isinstance(value, dict))
    types = {str(level["model_type"]) for level in (settings, *inner) if level.get("model_type")}
    problem = ""
    if order and not _is_zero(order):
        problem = (
            f"is stored in the order of a GPU's tiles ({order.name!r:.200}). Load it with the transformers and "
            "bitsandbytes that wrote it, call dequantize() of the model and save_pretrained."
        )
    elif CONV1D.search(codes.name) and not types:
        problem = (
            "is stored transposed in some models (GPT-2) and as it is in others (StarCoder), and no config.json says "
            "which this is. Give the folder that save_pretrained wrote."
        )
    if problem:
        raise CheckpointError(f"{path}: tensor {codes.name!r:.200} {problem}")
    return CONV1D.search(codes.name) is not None and not types.isdisjoint(CONV1D_TYPES)


def _is_zero(info: StoredTensor) -> bool:
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        return not any(stream.read(min(info.end - info.start, 8)))  # the format is one number


def _refusal(
    path: Path, info: StoredTensor, stored: Mapping[str, StoredTensor], quantisation: Mapping[str, Any]
) -> CheckpointError:
    kind, remedy = "", "Give it as it was before, in full precision."
    for pattern, format_name, how in FORMATS:
        if any(pattern.search(name) for name in stored):
            kind, remedy = f" ({format_name})", how
            break
    else:
        if method := quantisation.get("quant_method"):
            kind = f" (quant_method {method!r:.80})"
    stray = SCALE.search(info.name) and info.dtype in FLOATING
    what = "is the scale of no eight-bit weight" if stray else f"({info.dtype}) holds no weights"
    return CheckpointError(
        f"{path}: is quantised{kind} in a way that is not read: tensor {info.name!r:.200} {what}. {remedy}"
    )
