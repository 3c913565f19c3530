"""Loading models with transformers, such that every tensor is accounted for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from regraft.architecture import BUFFER, COMPILED
from regraft.checkpoint import Checkpoint
from regraft.errors import MAX_LISTED, CheckpointError
from regraft.progress import quiet
from regraft.transformers_folder import check_model
from regraft.weights import is_optional

if TYPE_CHECKING:
    from pathlib import Path


def load_strictly(auto_class: Any, path: Path, prefix: str | None, **options: Any) -> tuple[Any, list[str]]:
    """Load a model, and check that its tensors are those that are stored, apart from an untrained head or pooler.

    Args:
        auto_class: A transformers auto class.
        path: The folder.
        prefix: The prefix of the body, if heads and poolers may be untrained; None if all tensors must be stored.
        options: Options of `from_pretrained`.

    Returns:
        The model in evaluation mode, and the names of the tensors that the folder lacks, which are untrained.

    Raises:
        CheckpointError: transformers cannot load the model, or a tensor is missing, unexpected or of the wrong shape.
    """
    check_model(auto_class, Checkpoint.open(path))
    with quiet():
        try:
            model, report = auto_class.from_pretrained(
                path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                key_mapping={re.escape(COMPILED): ""},
                trust_remote_code=False,
                **options,
            )
        except Exception as error:  # transformers raises many types of errors
            raise CheckpointError(f"{path}: transformers cannot load it ({error}).") from error

    def is_required(name: str) -> bool:
        """Return whether a tensor must be stored and loaded."""
        if prefix is None:
            return True
        inner = name.removeprefix(prefix + ".")
        return (name != inner or name in body) and not is_optional(inner)

    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):  # it saves memory, but restricts the lengths of batches
            module.chunk_size_feed_forward = 0
    model.config.return_dict = True  # outputs are read by name
    model.config.output_attentions = model.config.output_hidden_states = False  # they are requested where needed
    # transformers records how it converted the names of a file, and would save the model under those names; without the
    # record it saves canonical names (`save_original_format` has no value for that)
    model._weight_conversions = None
    body = set(model.base_model.state_dict())
    problems = {
        "missing": sorted(filter(is_required, report["missing_keys"])),
        "unexpected": sorted(
            name for name in report["unexpected_keys"] if is_required(name) and not BUFFER.search(name)
        ),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"] if is_required(entry[0])),
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {problem}: {', '.join(names[:MAX_LISTED])}" for problem, names in problems.items() if names
        )
        raise CheckpointError(f"{path}: its tensors do not fit a {type(model).__name__}: {lists}. Save it again.")
    return model, sorted(report["missing_keys"])
