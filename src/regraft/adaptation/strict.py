"""Models of transformers, loaded with every tensor accounted for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from regraft.architecture import BUFFER, COMPILED
from regraft.checkpoint import Checkpoint
from regraft.errors import CheckpointError
from regraft.progress import quiet
from regraft.transformers_folder import check_model
from regraft.weights import is_optional

if TYPE_CHECKING:
    from pathlib import Path


def load_strictly(architecture: Any, path: Path, prefix: str | None, **options: Any) -> tuple[Any, list[str]]:
    """Load a model so that every stored tensor of its body lands and every one it has is filled.

    Args:
        architecture: A transformers auto class.
        path: The folder.
        prefix: Only tensors under this name must match, heads and poolers may be fresh; None if all must match.
        options: Passed to `from_pretrained`.

    Returns:
        The model in evaluation mode, and the names of what is fresh in it.

    Raises:
        CheckpointError: Something is missing, left over or misshapen; the message lists it.
    """
    check_model(architecture, Checkpoint.open(path))
    with quiet():
        try:
            model, report = architecture.from_pretrained(
                path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                key_mapping={re.escape(COMPILED): ""},
                trust_remote_code=False,
                **options,
            )
        except Exception as error:  # what a config says is met all over transformers, and so is what it raises
            raise CheckpointError(f"{path}: transformers cannot load it ({error}).") from error

    def matters(name: str) -> bool:
        if prefix is None:
            return True
        inner = name.removeprefix(prefix + ".")
        return (name != inner or name in body) and not is_optional(inner)

    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):  # saves memory, and asks for batches that it divides
            module.chunk_size_feed_forward = 0
    model.config.return_dict = True  # outputs are read by name, whatever the file says
    model.config.output_attentions = model.config.output_hidden_states = False  # where wanted, they are asked for
    # transformers' own mark of how the names in a file were read; without it, a model is saved under those that its
    # class writes, whatever this file had (`save_original_format` has no value for that)
    model._weight_conversions = None
    body = set(model.base_model.state_dict())
    problems = {
        "missing": sorted(filter(matters, report["missing_keys"])),
        "without a place": sorted(n for n in report["unexpected_keys"] if matters(n) and not BUFFER.search(n)),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"] if matters(entry[0])),
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in problems.items() if names)
        raise CheckpointError(f"{path}: its tensors do not fit a {type(model).__name__}: {lists}.")
    return model, sorted(report["missing_keys"])
