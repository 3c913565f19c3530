"""Folders of pre-trained bases: writing them, and recognising the results of earlier runs."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

from regraft.adaptation import write_tokenizer
from regraft.base import PRETRAINING, Base
from regraft.checkpoint import (
    Checkpoint,
    DerivedTensors,
    TensorSpec,
    check_output_path,
    dtype_of,
    publish,
    read_json,
    shape_of,
    write_json,
    write_safetensors,
)
from regraft.errors import CheckpointError, OutcomeError
from regraft.progress import quiet
from regraft.recipe import check_trained
from regraft.upgrade import with_current_fingerprints

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.model.corpus import Corpus
    from regraft.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class BaseWriter:
    """Writes pre-trained bases with a record of their inputs.

    Args:
        base: The base before pre-training.
        corpus: The text, whose sources are recorded.
        inputs: Everything that the result depends on, by which a second run recognises it.
        recipe: The resolved recipe.
        block_size: Tokens per block.
    """

    base: Base
    corpus: Corpus
    inputs: dict[str, Any]
    recipe: Recipe
    block_size: int

    def write(self, model: Any, staging: Path, out: Path, steps: int, curve: list[dict[str, float]]) -> None:
        """Write a model as a base, completely or not at all.

        Args:
            model: The language model.
            staging: A temporary folder on the file system of `out`.
            out: The folder to write.
            steps: The number of completed steps.
            curve: The learning curve to record; empty for an intermediate base.

        Raises:
            OutcomeError: `out` exists or cannot be created, or a tensor of the base that language modelling does not
                use cannot be copied.
            RecipeError: A weight is infinite or NaN.
        """
        shutil.rmtree(staging, ignore_errors=True)
        with quiet():
            model.save_pretrained(staging)
        _restore_unused_tensors(self.base, staging)
        check_trained(Checkpoint.open(staging), self.recipe)
        write_tokenizer(self.base, staging)
        record = {
            "base": {"name": self.base.name, "fingerprint": self.base.fingerprint},
            "inputs": self.inputs,
            "corpus": list(self.corpus.sources),
            "steps": steps,
            "tokens": steps * self.recipe.batch_size * self.block_size,
            "curve": curve,
        }
        write_json(staging / PRETRAINING, record, indent=2)
        publish(staging, out)


def is_complete(out: Path, inputs: dict[str, Any], base: Base) -> bool:
    """Return whether a folder exists, and check that it then holds the result of a pre-training with given inputs.

    Args:
        out: The folder, which need not exist.
        inputs: The inputs of the pre-training, to be compared with the recorded inputs.
        base: The base before pre-training, whose fingerprint may be recorded in an earlier form.

    Raises:
        OutcomeError: The folder holds something else, or cannot be created.
    """
    check_output_path(out)
    if not out.exists():
        return False
    if with_current_fingerprints(_recorded_inputs(out) or {}, [base]) == inputs:
        return True
    raise OutcomeError(f"{out}: exists, but is not the result of the same inputs. Choose another --out or remove it.")


def check_intermediate_bases(folder: Path, inputs: dict[str, Any], base: Base) -> None:
    """Check that a folder has no intermediate bases of a pre-training with different inputs.

    Args:
        folder: The folder of the intermediate bases, which need not exist.
        inputs: The inputs of the pre-training; `keep_every` may differ.
        base: The base before pre-training, whose fingerprint may be recorded in an earlier form.

    Raises:
        OutcomeError: The folder has such an intermediate base.
    """
    for intermediate in sorted(folder.glob("step-*")):
        recorded = with_current_fingerprints(_recorded_inputs(intermediate) or {}, [base])
        if {**recorded, "keep_every": None} != {**inputs, "keep_every": None}:
            raise OutcomeError(
                f"{intermediate}: is not an intermediate base of the same inputs. Remove {folder}, or choose another "
                "--out: intermediate bases are written beside it."
            )


def _restore_unused_tensors(base: Base, folder: Path) -> None:
    """Add the base's tensors that the language model lacks, such as a pooler's, to a saved model."""
    saved = Checkpoint.open(folder)
    full_names = {f"{base.prefix}.{body_name}": stored_name for body_name, stored_name in base.body.items()}
    unused = {name: stored_name for name, stored_name in full_names.items() if name not in saved}
    if not unused:
        return
    if len(saved.files) > 1:
        raise OutcomeError(
            f"{base.path}: {', '.join(unused)} cannot be copied to the upgraded base, which is saved in "
            f"{len(saved.files)} files. Remove these tensors from the base."
        )
    sources = {name: (saved, name) for name in saved}
    sources |= {name: (base.checkpoint, stored_name) for name, stored_name in unused.items()}
    specs = {name: TensorSpec(dtype_of(*source), shape_of(*source), (source,)) for name, source in sources.items()}
    write_safetensors(saved.files[0], DerivedTensors(specs))


def _recorded_inputs(folder: Path) -> dict[str, Any] | None:
    """Read the recorded inputs of a pre-trained base; None without a valid record."""
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        inputs: dict[str, Any] = dict(read_json(folder / PRETRAINING)["inputs"])
        return inputs
    return None
