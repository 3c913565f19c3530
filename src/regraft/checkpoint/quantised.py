"""Recognise quantised checkpoints: pair int8 and fp8 weights with their scales, and refuse all other formats."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.checkpoint.header import FLOATING, StoredTensor
from regraft.checkpoint.quantised_tensor import QuantisedTensor
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")  # transformers, older vLLM, MLX
"""The keys of a config.json under which a quantisation is declared."""
DEFAULT_BLOCK = (128, 128)  # as in DeepSeek-V3 and transformers' FineGrainedFP8Config
"""The rows and columns of a block of fp8 codes whose config does not set them."""
INT8_UNIT = 7.874015718698502e-3  # 1/127 as written in bitsandbytes' int8_vectorwise_dequant
"""The factor on the scales of int8 codes."""
FP8 = ("F8_E4M3", "F8_E5M2")
"""The dtypes of fp8 codes."""
EXPONENTS = ("U8", "F8_E8M0")
"""The dtypes of scales that are powers of two, stored as their exponent plus 127."""
# bitsandbytes stores the weights of Conv1D modules transposed. In these model types the named layers are Conv1D
# modules; in others (GPT-Neo, StarCoder) they are nn.Linear modules.
CONV1D = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)\.weight$")
"""Matches the names of the weights of Conv1D modules in models of `CONV1D_TYPES`."""
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
"""The model types with Conv1D modules."""
CODES = re.compile(r"(?:^|[._:])(?:weight|qweight|qzeros|packed|W_q|qdata|_data|blocks|codes|bitmask)$")
"""Matches the names under which integers are codes of weights; under other names they are masks and positions, except
int8 tensors of two or more dimensions, which are always codes."""
BNB_4BIT = re.compile(r"\.(?:absmax|quant_map|quant_state\.bitsandbytes__\w+)$")
"""Matches the names of the scales and code books of bitsandbytes' 4-bit weights."""
SCALE = re.compile(r"(?:_scale_inv|\.SCB)$")
"""Matches the names of the scales of eight-bit weights."""
RUNTIME_DATA = re.compile(r"(?:[._](?:activation|input)_scale(?:_inv)?|\.weight_format|\.[kv]_scale)$")
"""Matches the names of tensors that only inference in eight bits needs: static scales of activations and caches, and
the order of int8 codes."""


class UnsupportedFormat(NamedTuple):
    """A quantisation that is refused.

    Args:
        pattern: Matches the names of tensors that only this format has.
        name: The format's name.
        remedy: The advice on how to obtain a readable checkpoint.
    """

    pattern: re.Pattern[str]
    name: str
    remedy: str


UNSUPPORTED_FORMATS = (
    UnsupportedFormat(
        BNB_4BIT,
        "4-bit, by bitsandbytes",
        "Load it with transformers where bitsandbytes runs, call dequantize() of the model and save_pretrained; or "
        "give the model that it was quantised from (on the hub the name without -bnb-4bit).",
    ),
    UnsupportedFormat(
        re.compile(r"\.(?:qweight|qzeros)$"),
        "GPTQ or AWQ",
        "Use the model that it was quantised from (on the hub the name without -GPTQ or -AWQ).",
    ),
    UnsupportedFormat(
        re.compile(r"_blocks$"),
        "MXFP4",
        "Load it with transformers, quantization_config=Mxfp4Config(dequantize=True), and call save_pretrained; or "
        "give a copy in bf16.",
    ),
    UnsupportedFormat(
        re.compile(r"\.weight_(?:packed|scale)$"),
        "compressed-tensors or similar",
        "Use the model that it was quantised from; or, if compressed-tensors wrote it, load it with transformers, "
        "quantization_config=CompressedTensorsConfig(dequantize=True), and call save_pretrained.",
    ),
)
"""The formats that are refused, in the order in which they are tried."""


def pair_with_scales(
    path: Path, stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of a checkpoint, where int8 codes with `SCB` and fp8 codes with `_scale_inv` become float32.

    Args:
        path: The checkpoint, for error messages.
        stored: The stored tensors by name.
        config: The content of its config.json; empty if there is none.

    Returns:
        The weights by name, in the order of `stored`, without scales.

    Raises:
        CheckpointError: The checkpoint has another quantisation, its config.json declares one that its tensors do not
            have, its scales do not match its codes, or the order of its codes is unknown.
    """
    quantisation = _quantisation_of(config)
    quantised: dict[str, QuantisedTensor] = {}
    for name, tensor in stored.items():
        scale = _scale_of(tensor, stored)
        if scale is None:
            continue
        if tensor.dtype in FP8:
            quantised[name] = _fp8_weight(path, tensor, scale, quantisation)
        else:
            quantised[name] = _int8_weight(path, tensor, scale, stored.get(f"{name}_format"), config)
    has_quantised_tensors = bool(quantised) or any(map(_is_quantised_part, stored.values()))
    if quantisation and not has_quantised_tensors:
        raise _undetected_error(path, stored, quantisation)
    scale_names = {tensor.scale.name for tensor in quantised.values()}
    weights: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name in quantised:
            weights[name] = quantised[name]
        elif name in scale_names or (quantised and RUNTIME_DATA.search(name)):
            continue
        elif _is_quantised_part(tensor):
            raise _unsupported_error(path, tensor, stored, quantisation)
        else:
            weights[name] = tensor
    return weights


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without its quantisation settings, also in configs of submodels.

    Args:
        config: The content of the config.json.
    """
    return {
        key: without_quantisation(value) if isinstance(value, dict) and key.endswith("config") else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, *_submodel_configs(config)):
        for key in CONFIG_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                quantisation: Mapping[str, Any] = part[key]
                return quantisation
    return {}


def _submodel_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [value for key, value in config.items() if key.endswith("config") and isinstance(value, dict)]


def _is_quantised_part(tensor: StoredTensor) -> bool:
    """Return whether a tensor has codes or scales of a quantised weight, rather than weights or masks."""
    if BNB_4BIT.search(tensor.name) or SCALE.search(tensor.name) or tensor.dtype.startswith("F8"):
        return True
    if tensor.dtype == "I8" and len(tensor.shape) > 1:
        return True
    return tensor.dtype not in (*FLOATING, "BOOL") and CODES.search(tensor.name) is not None


def _scale_of(tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    if tensor.dtype in FP8:
        return stored.get(f"{tensor.name}_scale_inv")
    if tensor.dtype == "I8" and tensor.name.endswith("weight"):
        return stored.get(tensor.name.removesuffix("weight") + "SCB")
    return None


def _int8_weight(
    path: Path, codes: StoredTensor, scale: StoredTensor, order: StoredTensor | None, config: Mapping[str, Any]
) -> QuantisedTensor:
    """Pair int8 codes of bitsandbytes with their scales, one per row."""
    transposed = _is_transposed(path, codes, order, config)
    if len(codes.shape) != 2 or math.prod(scale.shape) != codes.shape[0] or scale.dtype not in FLOATING:
        raise _scale_error(path, codes, scale, "one for each row")
    rows, columns = codes.shape
    shape = (columns, rows) if transposed else (rows, columns)
    weight = dataclasses.replace(codes, dtype="F32", shape=shape)
    return QuantisedTensor(
        **vars(weight),
        codes=codes,
        scale=scale,
        grid=(rows, 1),
        block=(1, columns),
        unit=INT8_UNIT,
        transposed=transposed,
    )


def _fp8_weight(
    path: Path, codes: StoredTensor, scale: StoredTensor, quantisation: Mapping[str, Any]
) -> QuantisedTensor:
    """Pair fp8 codes with their scales: one per block of each matrix, or one for all."""
    shape = codes.shape
    rows, columns = (1, 1, *shape)[-2:]
    block = _block(path, (rows, columns), scale.shape, quantisation)
    grid = -(-rows // block[0]), -(-columns // block[1])
    expected = f"one for each block of {block[0]} × {block[1]} (weight_block_size in config.json)"
    is_single = math.prod(scale.shape) == 1
    is_matching_shape = len(shape) > 1 and (is_single or scale.shape == (*shape[:-2], *grid))
    if not (is_matching_shape and scale.dtype in (*FLOATING, *EXPONENTS)):
        raise _scale_error(path, codes, scale, expected)
    if is_single:
        grid = (1, 1)
        block = (math.prod(shape[:-1]), columns)
    weight = dataclasses.replace(codes, dtype="F32")
    return QuantisedTensor(**vars(weight), codes=codes, scale=scale, grid=grid, block=block, unit=1.0)


def _block(
    path: Path, shape: tuple[int, int], scale_shape: tuple[int, ...], quantisation: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the rows and columns of a block, from the config or else from the number of scales."""
    sizes = quantisation.get("weight_block_size")
    if sizes is None:
        block_rows, block_columns = scale_shape[-2:] if len(scale_shape) > 1 else (1, 1)
        return _edge(shape[0], block_rows, DEFAULT_BLOCK[0]), _edge(shape[1], block_columns, DEFAULT_BLOCK[1])
    if not (isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes)):
        raise CheckpointError(f"{path}/config.json: weight_block_size is {sizes!r:.80}, not two whole numbers above 0.")
    return sizes[0], sizes[1]


def _edge(length: int, num_blocks: int, default: int) -> int:
    """Return the edge of a block along a dimension: the default, or else length / number of blocks.

    The quotient is used only for a single block, or if it is a power of two. Other edges are ambiguous: the blocks
    could be larger, with the last one cut off.
    """
    if num_blocks == -(-length // default) or not length:
        return default
    if num_blocks == 1:
        return length
    edge = length // num_blocks if num_blocks else 0
    return edge if edge * num_blocks == length and edge.bit_count() == 1 else default


def _is_transposed(path: Path, codes: StoredTensor, order: StoredTensor | None, config: Mapping[str, Any]) -> bool:
    """Return whether int8 codes are of the transposed weight; raise an error if their order is unknown."""
    parts = (config, *_submodel_configs(config))
    types = {str(part["model_type"]) for part in parts if part.get("model_type")}
    may_be_conv1d = CONV1D.search(codes.name) is not None
    if order and not _is_zero(order):
        raise CheckpointError(
            f"{path}: tensor {codes.name!r:.200} is stored in the order of a GPU's tiles ({order.name!r:.200}). Load "
            "it with the transformers and bitsandbytes that wrote it, call dequantize() of the model and "
            "save_pretrained."
        )
    if may_be_conv1d and not types:
        raise CheckpointError(
            f"{path}: tensor {codes.name!r:.200} is stored transposed in some models (GPT-2) and not in others "
            "(StarCoder), and there is no config.json. Use the folder that save_pretrained wrote."
        )
    return may_be_conv1d and not types.isdisjoint(CONV1D_TYPES)


def _is_zero(tensor: StoredTensor) -> bool:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return not any(stream.read(min(tensor.end - tensor.start, 8)))  # the order is a single number


def _scale_error(path: Path, codes: StoredTensor, scale: StoredTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {codes.name!r:.200} of shape {codes.shape} has scales {scale.name!r:.200} of shape "
        f"{scale.shape} and dtype {scale.dtype}, expected {expected}. Use files that were saved together."
    )


def _undetected_error(
    path: Path, stored: Mapping[str, StoredTensor], quantisation: Mapping[str, Any]
) -> CheckpointError:
    """Return the error for a config that declares a quantisation of which no tensor shows a sign."""
    for tensor in stored.values():
        if tensor.dtype not in (*FLOATING, "BOOL", "I64"):  # any checkpoint may have masks, positions and counters
            return _unsupported_error(path, tensor, stored, quantisation)
    return CheckpointError(
        f"{path}: its config.json declares quantisation ({quantisation.get('quant_method')!r:.80}), but no tensor "
        "is quantised. If these are its weights, remove quantization_config from config.json."
    )


def _unsupported_error(
    path: Path, tensor: StoredTensor, stored: Mapping[str, StoredTensor], quantisation: Mapping[str, Any]
) -> CheckpointError:
    """Return the error for a tensor of an unsupported quantisation, with the format's name and remedy if known."""
    matches = (entry for entry in UNSUPPORTED_FORMATS if any(entry.pattern.search(name) for name in stored))
    detected = next(matches, None)
    method = quantisation.get("quant_method")
    if detected:
        description = f" ({detected.name})"
    elif method:
        description = f" (quant_method {method!r:.80})"
    else:
        description = ""
    remedy = detected.remedy if detected else "Use the model in full precision that it was quantised from."
    is_unused_scale = SCALE.search(tensor.name) and tensor.dtype in FLOATING
    problem = "is a scale without an eight-bit weight" if is_unused_scale else f"({tensor.dtype}) is not a weight"
    return CheckpointError(
        f"{path}: is quantised{description} in an unsupported way: tensor {tensor.name!r:.200} {problem}. {remedy}"
    )
