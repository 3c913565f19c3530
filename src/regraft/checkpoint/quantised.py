"""Quantised checkpoints: int8 and fp8 weights are dequantised when they are read, other formats are refused."""

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

    Reader = Callable[[StoredTensor, int, int], torch.Tensor]

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")  # transformers, older vLLM, MLX
DEFAULT_BLOCK = (128, 128)  # of DeepSeek-V3 and of transformers' FineGrainedFP8Config
INT8_UNIT = 7.874015718698502e-3  # 1/127 as written in bitsandbytes' int8_vectorwise_dequant
CHUNK_ELEMENTS = 1 << 18  # 1 MiB in float32
FP8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two, stored as their exponent plus 127
# layers that are Conv1D modules in these classes, whose weights bitsandbytes stores transposed, and nn.Linear modules
# in others (GPT-Neo, StarCoder)
CONV1D = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)\.weight$")
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
# integers under these names are codes of weights; those under other names are masks and positions
CODES = re.compile(r"(?:^|[._:])(?:weight|qweight|qzeros|packed|W_q|qdata|_data|blocks|codes|bitmask)$")
BNB_4BIT = re.compile(r"\.(?:absmax|quant_map|quant_state\.bitsandbytes__\w+)$")
SCALE = re.compile(r"(?:_scale_inv|\.SCB)$")
# static scales of activations and caches, which are stored with quantised weights to run them
COMPANION = re.compile(r"(?:[._](?:activation|input)_scale(?:_inv)?|\.weight_format|\.[kv]_scale)$")
FORMATS = (
    (
        BNB_4BIT,
        "4-bit, by bitsandbytes",
        "Load it with transformers where bitsandbytes runs, call dequantize() of the model and save_pretrained; or "
        "give the model that it was quantised from (on the hub the name without -bnb-4bit).",
    ),
    (
        re.compile(r"\.(?:qweight|qzeros)$"),
        "GPTQ or AWQ",
        "Use the model that it was quantised from (on the hub the name without -GPTQ or -AWQ).",
    ),
    (
        re.compile(r"_blocks$"),
        "MXFP4",
        "Load it with transformers, quantization_config=Mxfp4Config(dequantize=True), and call save_pretrained; or "
        "give a copy in bf16.",
    ),
    (
        re.compile(r"\.weight_(?:packed|scale)$"),
        "compressed-tensors or similar",
        "Use the model that it was quantised from; or, if compressed-tensors wrote it, load it with transformers, "
        "quantization_config=CompressedTensorsConfig(dequantize=True), and call save_pretrained.",
    ),
)


@dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """A weight that is stored in eight bits, with the dtype of the dequantised weight and the position of the codes.

    Args:
        codes: The stored codes.
        scale: The stored scales, one for each block.
        grid: The numbers of rows and columns of blocks in a matrix.
        block: The numbers of rows and columns of a block.
        unit: The factor on the scales.
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
        values = torch.empty(count, dtype=torch.float32)
        for row, rows, column, columns in self._rectangles(start, count):
            first = row * self.shape[-1] + column
            part = values[first - start : first - start + rows * columns].view(rows, columns)
            part.copy_(read(self.codes, first, rows * columns).view(rows, columns))
            part.mul_(self._scales(read, row, rows, column, columns))
        return values if self.unit == 1 else values.mul_(self.unit)

    def _dequantise_transposed(self, read: Reader, start: int, count: int) -> torch.Tensor:
        width = self.shape[1]
        first = start // width
        last = -(-(start + count) // width)
        codes = read(self.codes, 0, math.prod(self.shape)).view(self.codes.shape)[:, first:last]
        values = codes.float() * read(self.scale, 0, width).float()[:, None] * self.unit
        return values.T.reshape(-1)[start - first * width :][:count].clone()

    def _rectangles(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Divide a slice of the flattened matrix into rectangles: first row, rows, first column, columns."""
        width = self.shape[-1]
        position = start
        end = start + count
        while position < end:
            row, column = divmod(position, width)
            if column or end - position < width or width > CHUNK_ELEMENTS:
                rows = 1
                columns = min(width - column, end - position, CHUNK_ELEMENTS)
            else:
                rows = min(end - position, CHUNK_ELEMENTS) // width
                columns = width
            yield row, rows, column, columns
            position += rows * columns

    def _scales(self, read: Reader, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
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


def stored_parts(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    """Return the stored tensors that a tensor is computed from: itself, or a quantised weight's codes and scales.

    Args:
        tensor: A tensor of a checkpoint.
    """
    return (tensor.codes, tensor.scale) if isinstance(tensor, QuantisedTensor) else (tensor,)


def dequantised(path: Path, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the weights of a checkpoint: int8 with `SCB` and fp8 with `weight_scale_inv` as float32.

    Args:
        path: The checkpoint, for error messages.
        stored: The stored tensors by name.
        settings: The content of its config.json; empty if there is none.

    Returns:
        The weights by name, without scales.

    Raises:
        CheckpointError: It is quantised in another way, or its scales do not match its codes.
    """
    quantisation = _quantisation_of(settings)
    weights: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        scale = None
        if tensor.dtype in FP8:
            scale = stored.get(f"{name}_scale_inv")
        elif tensor.dtype == "I8" and name.endswith("weight"):
            scale = stored.get(name.removesuffix("weight") + "SCB")
        if scale:
            weights[name] = _quantised(path, stored, tensor, scale, settings)
    scales = {tensor.scale.name for tensor in weights.values() if isinstance(tensor, QuantisedTensor)}
    if not weights and quantisation and not any(_is_code(tensor) for tensor in stored.values()):
        for tensor in stored.values():
            if tensor.dtype not in (*FLOATING, "BOOL", "I64"):  # any checkpoint may have masks, positions and counters
                raise _refusal(path, tensor, stored, quantisation)
        raise CheckpointError(
            f"{path}: its config.json declares quantisation ({quantisation.get('quant_method')!r:.80}), but no tensor "
            "is quantised. If these are its weights, remove quantization_config from config.json."
        )
    for name, tensor in stored.items():
        if name in weights or name in scales or (weights and COMPANION.search(name)):
            continue
        if _is_code(tensor):
            raise _refusal(path, tensor, stored, quantisation)
        weights[name] = tensor
    return {name: weights[name] for name in stored if name in weights}


def check_unquantised(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that a checkpoint is not quantised, before a model is made of it.

    Args:
        path: The checkpoint.
        tensors: Its weights by name.

    Raises:
        CheckpointError: It is quantised; the message names the command that writes it dequantised.
    """
    if name := next((name for name, tensor in tensors.items() if isinstance(tensor, QuantisedTensor)), None):
        raise CheckpointError(
            f"{path}: is quantised (tensor {name!r:.200} has scales), but models are run in full precision. "
            f"Write it in bf16 first: regraft weights interpolate --first {path} --second {path} --t 0 "
            "--out FOLDER."
        )


def without_quantisation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without its quantisation settings, also in configs of submodels.

    Args:
        settings: The content of the config.json.
    """
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("config") else value
        for key, value in settings.items()
        if key not in CONFIG_KEYS
    }


def _quantisation_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    for config in (settings, *_subconfigs(settings)):
        for key in CONFIG_KEYS:
            if isinstance(config.get(key), dict) and config[key]:
                quantisation: Mapping[str, Any] = config[key]
                return quantisation
    return {}


def _subconfigs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [value for key, value in settings.items() if key.endswith("config") and isinstance(value, dict)]


def _is_code(tensor: StoredTensor) -> bool:
    """Return whether a tensor belongs to an unsupported quantisation, rather than being weights or masks."""
    if BNB_4BIT.search(tensor.name) or SCALE.search(tensor.name):
        return True
    if tensor.dtype == "I8" and len(tensor.shape) > 1:
        return True
    return tensor.dtype.startswith("F8") or (
        tensor.dtype not in (*FLOATING, "BOOL") and bool(CODES.search(tensor.name))
    )


def _quantised(
    path: Path,
    stored: Mapping[str, StoredTensor],
    codes: StoredTensor,
    scale: StoredTensor,
    settings: Mapping[str, Any],
) -> QuantisedTensor:
    shape = codes.shape
    transposed = False
    unit = 1.0
    if codes.dtype == "I8":
        transposed = _is_transposed(path, codes, stored.get(codes.name + "_format"), settings)
        expected = "one for each row"
        unit = INT8_UNIT
        grid, block = (shape[0] if shape else 0, 1), (1, shape[-1] if shape else 0)
        fits = len(shape) == 2 and math.prod(scale.shape) == shape[0] and scale.dtype in FLOATING
    else:
        rows, columns = (1, 1, *shape)[-2:]
        block = _block(path, (rows, columns), scale.shape, _quantisation_of(settings))
        expected = f"one for each block of {block[0]} × {block[1]} (weight_block_size in config.json)"
        grid = -(-rows // block[0]), -(-columns // block[1])
        fits = len(shape) > 1 and scale.shape == (*shape[:-2], *grid)
        if math.prod(scale.shape) == 1:
            grid = (1, 1)
            block = (math.prod(shape[:-1]), columns)
            fits = len(shape) > 1
        fits = fits and scale.dtype in (*FLOATING, *EXPONENTS)
    if not fits:
        raise CheckpointError(
            f"{path}: tensor {codes.name!r:.200} of shape {shape} has scales {scale.name!r:.200} of shape "
            f"{scale.shape} and dtype {scale.dtype}, expected {expected}. Use files that were saved together."
        )
    shape = shape[::-1] if transposed else shape
    return QuantisedTensor(
        codes.name, "F32", shape, codes.file, codes.start, codes.end, codes, scale, grid, block, unit, transposed
    )


def _block(
    path: Path, shape: tuple[int, int], scales: tuple[int, ...], quantisation: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the rows and columns of a block, from the config or else from the number of scales."""
    size = quantisation.get("weight_block_size")
    if size is None:
        rows, columns = scales[-2:] if len(scales) > 1 else (1, 1)
        return _edge(shape[0], rows, DEFAULT_BLOCK[0]), _edge(shape[1], columns, DEFAULT_BLOCK[1])
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"{path}/config.json: weight_block_size is {size!r:.80}, not two whole numbers above 0.")
    return size[0], size[1]


def _edge(length: int, count: int, default: int) -> int:
    """Return the edge of a block along a dimension; if the default does not match the number of scales, length / count.

    Other edges than powers of two are ambiguous: the blocks could be larger, with the last one cut off.
    """
    if count == -(-length // default) or not length:
        return default
    if count == 1:
        return length
    edge = length // count if count else 0
    return edge if edge * count == length and edge.bit_count() == 1 else default


def _is_transposed(path: Path, codes: StoredTensor, order: StoredTensor | None, settings: Mapping[str, Any]) -> bool:
    """Return whether int8 codes are of the transposed weight; raise an error if their order is unknown."""
    configs = (settings, *_subconfigs(settings))
    types = {str(config["model_type"]) for config in configs if config.get("model_type")}
    problem = ""
    if order and not _is_zero(order):
        problem = (
            f"is stored in the order of a GPU's tiles ({order.name!r:.200}). Load it with the transformers and "
            "bitsandbytes that wrote it, call dequantize() of the model and save_pretrained."
        )
    elif CONV1D.search(codes.name) and not types:
        problem = (
            "is stored transposed in some models (GPT-2) and not in others (StarCoder), and there is no config.json. "
            "Use the folder that save_pretrained wrote."
        )
    if problem:
        raise CheckpointError(f"{path}: tensor {codes.name!r:.200} {problem}")
    return CONV1D.search(codes.name) is not None and not types.isdisjoint(CONV1D_TYPES)


def _is_zero(tensor: StoredTensor) -> bool:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return not any(stream.read(min(tensor.end - tensor.start, 8)))  # the order is a single number


def _refusal(
    path: Path, tensor: StoredTensor, stored: Mapping[str, StoredTensor], quantisation: Mapping[str, Any]
) -> CheckpointError:
    kind, remedy = "", "Use the model in full precision that it was quantised from."
    for pattern, format_name, format_remedy in FORMATS:
        if any(pattern.search(name) for name in stored):
            kind = f" ({format_name})"
            remedy = format_remedy
            break
    else:
        if method := quantisation.get("quant_method"):
            kind = f" (quant_method {method!r:.80})"
    is_unused_scale = SCALE.search(tensor.name) and tensor.dtype in FLOATING
    problem = "is the scale of no eight-bit weight" if is_unused_scale else f"({tensor.dtype}) is no weight"
    return CheckpointError(
        f"{path}: is quantised{kind} in an unsupported way: tensor {tensor.name!r:.200} {problem}. {remedy}"
    )
