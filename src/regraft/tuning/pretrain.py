"""Continual pre-training, which upgrades a base on new text."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
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
    resumable_folder,
    shape_of,
    write_json,
    write_safetensors,
)
from regraft.errors import CheckpointError, OutcomeError, RecipeError
from regraft.model.device import device
from regraft.progress import Progress, quiet, silent
from regraft.recipe import NUM_SEEDS, check_trained
from regraft.tuning.corpus import Corpus, pack
from regraft.tuning.language import LEARNING_RATE, LanguageModelling, load_language_model
from regraft.upgrade import with_current_fingerprints

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from regraft.recipe import Recipe

MAX_EVALUATION_BLOCKS = 64
"""8,192 tokens in blocks of the default 128, and at most a twentieth of the text; more make evaluations slower."""
HEAD_STEPS_DIVISOR = 10
"""A fresh head is first trained alone for a tenth of the steps, which adds less than a tenth to the cost."""
HEAD_LEARNING_RATE = 1e-3
"""Ten times the rate of the body, which is trained already: the head starts from random values."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Text of earlier domains that is mixed into the training, against forgetting.

    Args:
        corpus: The text of the earlier domains.
        share: The share of training blocks that are replaced by blocks of this text.

    Raises:
        RecipeError: The share is out of its range.
    """

    corpus: Corpus
    share: float = 0.1  # higher forgets less, lower leaves more steps to the new text

    def __post_init__(self) -> None:
        """Check that the share is in its range."""
        if not 0 < self.share < 1:
            raise RecipeError(f"the share of replayed blocks must be above 0 and below 1, found {self.share}.")


def pretrain_chain(
    base: Base,
    domains: Sequence[Corpus],
    out: Path,
    recipe: Recipe,
    block: int = 128,
    progress: Progress = silent,
    *,
    replay: float = 0.0,
    keep_every: int | None = None,
) -> list[Base]:
    """Pre-train a base on domain after domain, which makes an upgrade chain.

    Args:
        base: The first base.
        domains: The corpus of each domain, in order.
        out: The folder of the upgraded bases: a folder per domain, named by its number and its first source.
        recipe: The recipe of each training.
        block: Tokens per block.
        progress: Called after each step.
        replay: The share of training blocks from earlier domains; 0 for none.
        keep_every: As in `pretrain`.

    Returns:
        The upgraded bases in order, without the first base.

    Raises:
        RegraftError: As `pretrain`.
    """
    bases = [base]
    for number, domain in enumerate(domains, start=1):
        name = f"{number}-{Path(domain.sources[0].partition(':')[0]).stem}"
        earlier = tuple(source for corpus in domains[: number - 1] for source in corpus.sources)
        bases.append(
            pretrain(
                bases[-1],
                domain,
                out / name,
                recipe,
                block,
                lambda stage, *figures, name=name: progress(f"{name}: {stage}", *figures),
                replay=Replay(Corpus(earlier, domain.column), replay) if replay and earlier else None,
                keep_every=keep_every,
            )
        )
    return bases[1:]


def pretrain(
    base: Base,
    corpus: Corpus,
    out: Path,
    recipe: Recipe,
    block: int = 128,
    progress: Progress = silent,
    *,
    replay: Replay | None = None,
    keep_every: int | None = None,
) -> Base:
    """Pre-train a base further, and write the upgraded base as a plain transformers folder.

    Encoders are trained by masked language modelling as in BERT (15 % of the tokens are predicted; of these 80 % are
    replaced by the mask token, 10 % by a random token), decoders by causal language modelling. An encoder without a
    language-modelling head gets a fresh one, which is first trained alone for a tenth of the steps: the gradients of
    a random head would damage the body. Tensors that language modelling does not use, such as a pooler's, are copied.

    Args:
        base: The base.
        corpus: The text.
        out: The folder to write. If it holds the result of the same inputs, nothing is trained.
        recipe: Steps, batch size (in blocks), learning rate, ….
        block: Tokens per block.
        progress: Called after each step.
        replay: Text of earlier domains to mix in.
        keep_every: Steps between the intermediate bases, which are written to a folder beside `out` whose name ends in
            `-steps`; None for no intermediate bases.

    Returns:
        The upgraded base.

    Raises:
        DataError: The text cannot be read or is too short.
        OutcomeError: `out`, or the folder of the intermediate bases, holds something else.
        RecipeError: The block is longer than the base's maximum input length.
    """
    from transformers import set_seed

    if block > base.max_input_length:
        raise RecipeError(
            f"--block {block} is more than the {base.max_input_length} tokens that {base.path} takes. Lower --block."
        )
    inputs = {
        "base": base.fingerprint,
        "corpus": corpus.digest(),
        "block": block,
        "recipe": dataclasses.asdict(recipe),
    }
    if replay:
        inputs["replay"] = {"corpus": replay.corpus.digest(), "share": replay.share}
    if keep_every:
        inputs["keep_every"] = keep_every
    if _is_complete(out, inputs, base):
        return Base.open(out)
    base.check_finite()
    steps_folder = out.with_name(f"{out.name}-steps")
    if keep_every:
        _check_intermediate_bases(steps_folder, inputs, base)
    with resumable_folder(out, inputs) as work:
        if _is_complete(out, inputs, base):  # by another process, before this one got the lock
            return Base.open(out)
        blocks = pack(corpus, base, block, work / "tokens.bin", progress)
        count = min(MAX_EVALUATION_BLOCKS, max(1, len(blocks) // 20))
        shuffled = _shuffle(len(blocks), recipe.seed)
        evaluation_blocks, training_blocks = shuffled[:count], shuffled[count:]
        resolved = recipe.resolve(len(training_blocks), LEARNING_RATE)
        steps = resolved.steps or 1
        set_seed(recipe.seed)  # for the initial values of a fresh head
        model, fresh = load_language_model(base)
        model.to(device())
        writer = _BaseWriter(base, corpus, inputs, resolved, block)
        training = LanguageModelling(base, blocks, training_blocks, evaluation_blocks, resolved)
        if any(not name.startswith(base.prefix + ".") for name in fresh) and steps >= HEAD_STEPS_DIVISOR:
            head_recipe = dataclasses.replace(
                resolved,
                steps=steps // HEAD_STEPS_DIVISOR,
                eval_every=steps // HEAD_STEPS_DIVISOR,
                learning_rate=HEAD_LEARNING_RATE,
                seed=(recipe.seed + 1) % NUM_SEEDS,
            )
            model.base_model.requires_grad_(False)
            dataclasses.replace(training, recipe=head_recipe).run(model, work / "head", progress, "pretrain head")
            model.base_model.requires_grad_(True)
        if replay:
            earlier = pack(replay.corpus, base, block, work / "replay.bin", progress)
            training = _with_replay(training, earlier, replay.share)

        def write_intermediate_base(step: int) -> None:
            folder = steps_folder / f"step-{step}"
            if keep_every and step % keep_every == 0 and not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                writer.write(model, work / "staging", folder, step, [])

        curve = training.run(model, work / "body", progress, "pretrain", write_intermediate_base)
        writer.write(model, work / "staging", out, steps, curve)
    return Base.open(out)


@dataclasses.dataclass(frozen=True)
class _BaseWriter:
    """Writes pre-trained bases with a record of their inputs.

    Args:
        base: The base before pre-training.
        corpus: The text.
        inputs: Everything that the result depends on, for the record.
        recipe: The resolved recipe.
        block: Tokens per block.
    """

    base: Base
    corpus: Corpus
    inputs: dict[str, Any]
    recipe: Recipe
    block: int

    def write(self, model: Any, staging: Path, out: Path, steps: int, curve: list[dict[str, float]]) -> None:
        """Write a model as a base, completely or not at all.

        Args:
            model: The language model.
            staging: A temporary folder on the same file system.
            out: The folder to write.
            steps: The number of completed steps.
            curve: The learning curve, for the record.
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
            "tokens": steps * self.recipe.batch_size * self.block,
            "curve": curve,
        }
        write_json(staging / PRETRAINING, record, indent=2)
        publish(staging, out)


def _with_replay(training: LanguageModelling, earlier: np.ndarray[Any, Any], share: float) -> LanguageModelling:
    """Append randomly drawn blocks of earlier domains to a training's blocks, to replace a share of them in its order.

    Args:
        training: The training.
        earlier: Token ids of the earlier domains, blocks × tokens.
        share: The share of the training's blocks to replace.
    """
    import numpy as np

    total = (training.recipe.steps or 1) * training.recipe.batch_size
    random = np.random.default_rng((training.recipe.seed, len(earlier)))
    passes = [random.permutation(len(earlier)) for _ in range(-(-total // len(earlier)))]
    drawn = np.concatenate(passes)[: round(share * total)]
    count = len(training.blocks)
    return dataclasses.replace(
        training,
        blocks=np.concatenate([training.blocks, earlier[np.sort(drawn)]]),
        replayed_blocks=range(count, count + len(drawn)),
    )


def _shuffle(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    import numpy as np

    return np.random.default_rng((seed, count)).permutation(count)


def _restore_unused_tensors(base: Base, folder: Path) -> None:
    """Add the base's tensors that the language model lacks, such as a pooler's, to a saved model."""
    saved = Checkpoint.open(folder)
    prefix = base.prefix + "."
    unused = {prefix + inner: name for inner, name in base.body.items() if prefix + inner not in saved}
    if not unused:
        return
    if len(saved.files) > 1:
        raise OutcomeError(
            f"{base.path}: {', '.join(unused)} cannot be copied to the upgraded base, which is saved in "
            f"{len(saved.files)} files. Remove these tensors from the base."
        )
    sources = {name: (saved, name) for name in saved} | {new: (base.checkpoint, old) for new, old in unused.items()}
    specs = {name: TensorSpec(dtype_of(*source), shape_of(*source), (source,)) for name, source in sources.items()}
    write_safetensors(saved.files[0], DerivedTensors(specs))


def _check_intermediate_bases(folder: Path, inputs: dict[str, Any], base: Base) -> None:
    """Check that a folder has no intermediate bases of another run."""
    for intermediate in sorted(folder.glob("step-*")):
        recorded = with_current_fingerprints(_recorded_inputs(intermediate) or {}, [base])
        if {**recorded, "keep_every": None} != {**inputs, "keep_every": None}:
            raise OutcomeError(
                f"{intermediate}: is an intermediate base of another run. Remove {folder}, or choose another --out: "
                "intermediate bases are written beside it."
            )


def _recorded_inputs(folder: Path) -> dict[str, Any] | None:
    """Read the inputs that a base was pre-trained from; None without a valid record."""
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        inputs: dict[str, Any] = dict(read_json(folder / PRETRAINING)["inputs"])
        return inputs
    return None


def _is_complete(out: Path, inputs: dict[str, Any], base: Base) -> bool:
    """Return whether the output folder holds the result of the inputs; raise if it holds something else."""
    check_output_path(out)
    if not out.exists():
        return False
    if with_current_fingerprints(_recorded_inputs(out) or {}, [base]) == inputs:
        return True
    raise OutcomeError(f"{out}: exists and was made from something else. Choose another --out or remove it.")
