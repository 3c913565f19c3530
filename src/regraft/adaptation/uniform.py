"""Writing a LoRA with one rank and one scale, as servers compute it, which ignore patterns and rsLoRA."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_adapter
from regraft.adaptation.lora import (
    A_SUFFIX,
    B_SUFFIX,
    PEFT_DEFAULT_ALPHA,
    PEFT_DEFAULT_RANK,
    PEFT_PREFIX,
    is_initialised_from_base,
)
from regraft.adaptation.merge import UNMERGEABLE_SETTINGS
from regraft.adaptation.patterns import check_patterns
from regraft.checkpoint import Checkpoint, read_json
from regraft.weights import scaling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from regraft.checkpoint.derived import Tensors

FACTOR_SUFFIXES = ((A_SUFFIX, (B_SUFFIX, ".lora_B.bias")), (".lora_embedding_A", (".lora_embedding_B",)))
"""The endings of the stored names of A [r, in], each with those of the tensors that the scale multiplies: B [out, r],
and B's bias."""


def write_uniform(folder: Path) -> bool:
    """Rewrite an adapter's folder with one rank and one scale, if it is a LoRA that has several.

    Args:
        folder: The folder of an adaptation of any kind.

    Returns:
        Whether the files changed.

    Raises:
        CheckpointError: A file is malformed, or a pattern is invalid or takes too long to match.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    stored, config = Checkpoint.open(folder / ADAPTER_WEIGHTS), read_json(folder / ADAPTER_CONFIG)
    tensors, uniform_config = uniform_lora(stored, config)
    if uniform_config == config:
        return False
    write_adapter(folder, {name: tensors[name] for name in tensors}, uniform_config)
    return True


def uniform_lora(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, Mapping[str, Any]]:
    """Return a LoRA with the same deltas, one rank and one scale: rsLoRA and patterns are folded into B.

    The scale that most modules have becomes the common one, lora_alpha / r, and the smaller ranks are padded with
    zeros. A DoRA is folded too: its magnitudes renormalise W + scaling·B·A, which stays the same. A regular expression
    for the targets becomes the list of the modules that it matched.

    Args:
        tensors: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.

    Returns:
        The tensors and the config; those that were passed if there is nothing to change. They are unchanged also where
        folding would change the outputs: for other kinds, a LoRA whose initialisation PEFT repeats with its rank and
        scale, settings in `UNMERGEABLE_SETTINGS`, and patterns beside fused experts (`target_parameters`).

    Raises:
        CheckpointError: A pattern is invalid or takes too long to match.
    """
    has_patterns = bool(config.get("rank_pattern") or config.get("alpha_pattern"))
    has_regular_expression = isinstance(config.get("target_modules"), str)
    if not (has_patterns or has_regular_expression or config.get("use_rslora")) or not _can_fold(config):
        return tensors, config
    modules = {
        name.removesuffix(a_suffix): (name, [name.removesuffix(a_suffix) + suffix for suffix in scaled_suffixes])
        for a_suffix, scaled_suffixes in FACTOR_SUFFIXES
        for name in tensors
        if name.endswith(a_suffix)
    }
    if not modules:
        return tensors, config
    paths = {module: module.removeprefix(PEFT_PREFIX) for module in modules}
    check_patterns(config, paths.values(), ADAPTER_CONFIG)
    ranks, scales = _ranks_and_scales(config, paths)
    rank = max(ranks.values())
    alpha, common_scale = _common_alpha(scales, rank)
    result = dict.fromkeys(tensors)
    for module, (a_name, scaled_names) in modules.items():
        present = [name for name in scaled_names if name in tensors]
        scaled = {name: _multiply(tensors[name], scales[module] / common_scale) for name in present}
        result |= scaled
        if ranks[module] < rank:
            b_name = scaled_names[0]
            result[a_name] = _pad(tensors[a_name], 0, rank)
            result[b_name] = _pad(scaled[b_name], 1, rank)
    settings = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if has_regular_expression and not config.get("target_parameters"):
        settings["target_modules"] = sorted(paths.values())
    complete = {name: tensors[name] if tensor is None else tensor for name, tensor in result.items()}
    return complete, {**config, **settings}


def _can_fold(config: Mapping[str, Any]) -> bool:
    """Return whether the outputs depend on the rank and the scale of a module only by scaling·B·A."""
    if config.get("peft_type") != "LORA" or is_initialised_from_base(config.get("init_lora_weights", True)):
        return False
    # the names of fused experts' factors do not tell which pattern they match
    has_ambiguous_patterns = config.get("target_parameters") and (
        config.get("rank_pattern") or config.get("alpha_pattern")
    )
    return not has_ambiguous_patterns and not any(config.get(key) for key in UNMERGEABLE_SETTINGS)


def _ranks_and_scales(config: Mapping[str, Any], paths: Mapping[str, str]) -> tuple[dict[str, int], dict[str, float]]:
    """Return each module's rank and scale as PEFT computes them from its path in the model."""
    from peft.utils.other import get_pattern_key

    def value(pattern: str, default: Any, path: str) -> Any:
        values = config.get(pattern) or {}
        return values.get(get_pattern_key(list(values), path), default)

    rank, alpha = config.get("r", PEFT_DEFAULT_RANK), config.get("lora_alpha", PEFT_DEFAULT_ALPHA)
    ranks = {module: value("rank_pattern", rank, path) for module, path in paths.items()}
    scales = {
        module: scaling(ranks[module], value("alpha_pattern", alpha, path), bool(config.get("use_rslora")))
        for module, path in paths.items()
    }
    return ranks, scales


def _common_alpha(scales: Mapping[str, float], rank: int) -> tuple[int, float]:
    """Return `lora_alpha` and the scale that it means: the most frequent one if that alpha is whole, and otherwise 1.

    An alpha that is not whole would be read by PEFT, but not by every other tool.
    """
    scale, _ = Counter(scales.values()).most_common(1)[0]
    alpha = round(scale * rank)
    if alpha < 1 or not math.isclose(alpha, scale * rank, rel_tol=1e-12):
        alpha = rank
    return alpha, alpha / rank


def _multiply(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a tensor, in float32 if its dtype has fewer digits and the factor is no power of two."""
    import torch

    if math.isclose(factor, 1, rel_tol=1e-12):
        return tensor
    is_exact = tensor.dtype in (torch.float32, torch.float64) or math.frexp(factor)[0] == 0.5
    return (tensor.double() * factor).to(tensor.dtype if is_exact else torch.float32)


def _pad(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Append zeros to a dimension until it has a size."""
    import torch

    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dimension)
