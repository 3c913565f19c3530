"""Continual pre-training of a base on new text, which makes an upgrade."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.base import Base
from regraft.checkpoint import resumable_folder
from regraft.errors import RecipeError
from regraft.model.corpus import Corpus, pack
from regraft.model.device import device
from regraft.progress import Progress, silent
from regraft.recipe import NUM_SEEDS
from regraft.tuning.base_folder import BaseWriter, check_intermediate_bases, is_complete
from regraft.tuning.language import LEARNING_RATE, LanguageModelling, load_language_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import nn

    from regraft.recipe import Recipe
    from regraft.task.split import Integers

DEFAULT_BLOCK_SIZE = 128
"""Tokens per block. Longer blocks train on longer contexts, and take more memory."""
MAX_EVALUATION_BLOCKS = 64
"""The most evaluation blocks, 8,192 tokens at the default block size; more make evaluations slower."""
EVALUATION_DIVISOR = 20
"""Of a short text, only a twentieth (at least a block) is held out for evaluation, so that most of it is trained on."""
HEAD_STEPS_DIVISOR = 10
"""A fresh head is first trained alone for a tenth of the steps, which adds less than a tenth to the cost."""
HEAD_LEARNING_RATE = 10 * LEARNING_RATE
"""Higher than the default rate of the body, which is trained already: the head starts from random values."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Text of earlier domains that is mixed into the training, against forgetting.

    Args:
        corpus: The text of the earlier domains.
        share: The share of training blocks that are replaced by blocks of this text, above 0 and below 1.

    Raises:
        RecipeError: The share is not between 0 and 1.
    """

    corpus: Corpus
    share: float = 0.1  # higher forgets less, lower leaves more steps to the new text

    def __post_init__(self) -> None:
        """Refuse a share that is not between 0 and 1."""
        if not 0 < self.share < 1:
            raise RecipeError(f"the share of replayed blocks must be above 0 and below 1, found {self.share}.")


def pretrain_chain(
    base: Base,
    domains: Sequence[Corpus],
    out: Path,
    recipe: Recipe,
    block_size: int = DEFAULT_BLOCK_SIZE,
    progress: Progress = silent,
    *,
    replay: float = 0.0,
    keep_every: int | None = None,
) -> list[Base]:
    """Pre-train a base on domain after domain, which makes an upgrade chain.

    Args:
        base: The first base.
        domains: The corpus of each domain, in order.
        out: The folder of the upgraded bases. Each gets a subfolder named by its domain's number and first source.
        recipe: The recipe of each training.
        block_size: Tokens per block.
        progress: Called after each step.
        replay: The share of training blocks that are replaced by blocks of the earlier domains, from the second domain
            on; 0 for none.
        keep_every: The number of steps between intermediate bases, as in `pretrain`.

    Returns:
        The upgraded bases in order, without the first base.

    Raises:
        RegraftError: A domain cannot be trained on; see `pretrain`.
    """
    bases = [base]
    for index, domain in enumerate(domains):
        name = f"{index + 1}-{Path(domain.sources[0].partition(':')[0]).stem}"
        earlier_sources = tuple(source for corpus in domains[:index] for source in corpus.sources)
        upgraded = pretrain(
            bases[-1],
            domain,
            out / name,
            recipe,
            block_size,
            _with_domain_name(progress, name),
            replay=Replay(Corpus(earlier_sources, domain.column), replay) if replay and earlier_sources else None,
            keep_every=keep_every,
        )
        bases.append(upgraded)
    return bases[1:]


def _with_domain_name(progress: Progress, name: str) -> Progress:
    def report(stage: str, step: int, steps: int, figures: Any) -> None:
        progress(f"{name}: {stage}", step, steps, figures)

    return report


def pretrain(
    base: Base,
    corpus: Corpus,
    out: Path,
    recipe: Recipe,
    block_size: int = DEFAULT_BLOCK_SIZE,
    progress: Progress = silent,
    *,
    replay: Replay | None = None,
    keep_every: int | None = None,
) -> Base:
    """Pre-train a base further, and write the upgraded base as a plain transformers folder.

    Encoders are trained by masked language modelling with BERT's shares of masked tokens, decoders by causal language
    modelling. A base without a language-modelling head gets a fresh head, which is first trained alone for a tenth of
    the steps: the gradients of a random head would damage the body. Tensors that language modelling does not use, such
    as a pooler's, are copied.

    Args:
        base: A decoder, or an encoder whose tokenizer has a mask token.
        corpus: The text, enough for a block to train on and a block to evaluate on.
        out: The folder to write. If it holds the result of the same inputs, nothing is trained.
        recipe: Steps, batch size (in blocks), learning rate and so on; resolved for the number of training blocks.
        block_size: Tokens per block, at most the base's maximum input length.
        progress: Called after each step, and after each batch of tokenised documents.
        replay: Text of earlier domains to mix in.
        keep_every: The number of steps between intermediate bases, which are written to a folder beside `out` whose
            name ends in `-steps`; None for no intermediate bases.

    Returns:
        The upgraded base.

    Raises:
        CheckpointError: A tensor of the base is missing or has infinite or NaN values, or a token has no embedding.
        DataError: The text cannot be read or is too short.
        OutcomeError: `out`, or the folder of the intermediate bases, holds something else; another process is writing
            `out`, or it cannot be created; or a tensor that language modelling does not use cannot be copied.
        RecipeError: A block is longer than the base's maximum input length, an encoder's tokenizer has no mask token,
            a tracker does not exist or is not installed, steps × batch size is above `MAX_EXAMPLES`, or the training
            diverged.
    """
    if block_size > base.max_input_length:
        raise RecipeError(
            f"--block {block_size} is more than the {base.max_input_length} tokens that {base.path} takes. Lower "
            "--block."
        )
    inputs = {
        "base": base.fingerprint,
        "corpus": corpus.digest(),
        "block": block_size,
        "recipe": recipe.record(),
    }
    if replay:
        inputs["replay"] = {"corpus": replay.corpus.digest(), "share": replay.share}
    if keep_every:
        inputs["keep_every"] = keep_every
    if is_complete(out, inputs, base):
        return Base.open(out)
    base.check_finite()
    steps_folder = out.with_name(f"{out.name}-steps")
    if keep_every:
        check_intermediate_bases(steps_folder, inputs, base)
    with resumable_folder(out, inputs) as work_folder:
        if is_complete(out, inputs, base):  # another process was faster, before this process got the lock
            return Base.open(out)
        blocks = pack(corpus, base, block_size, work_folder / "tokens.bin", progress)
        training = _plan_training(base, blocks, recipe)
        model = _load_with_trained_head(training, work_folder / "head", progress)
        if replay:
            earlier_blocks = pack(replay.corpus, base, block_size, work_folder / "replay.bin", progress)
            training = _with_replay(training, earlier_blocks, replay.share)
        writer = BaseWriter(base, corpus, inputs, training.recipe, block_size)
        staging = work_folder / "staging"

        def write_intermediate_base(step: int) -> None:
            folder = steps_folder / f"step-{step}"
            if keep_every and step % keep_every == 0 and not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                writer.write(model, staging, folder, step, [])

        curve = training.run(model, work_folder / "body", progress, "pretrain", write_intermediate_base)
        writer.write(model, staging, out, training.recipe.num_steps, curve)
    return Base.open(out)


def _plan_training(base: Base, blocks: np.ndarray[Any, np.dtype[np.uint32]], recipe: Recipe) -> LanguageModelling:
    """Divide blocks at random into blocks to train on and blocks to evaluate on, and resolve the recipe."""
    num_evaluation_blocks = min(MAX_EVALUATION_BLOCKS, max(1, len(blocks) // EVALUATION_DIVISOR))
    shuffled = _shuffle(len(blocks), recipe.seed)
    training_blocks = shuffled[num_evaluation_blocks:]
    return LanguageModelling(
        base,
        blocks,
        training_blocks,
        evaluation_blocks=shuffled[:num_evaluation_blocks],
        recipe=recipe.resolve(len(training_blocks), LEARNING_RATE),
    )


def _load_with_trained_head(training: LanguageModelling, work_folder: Path, progress: Progress) -> nn.Module:
    """Load a training's base as a language model on the device; if the base has no head, train a fresh head alone."""
    from transformers import set_seed

    base = training.base
    recipe = training.recipe
    set_seed(recipe.seed)  # for the initial values of a fresh head
    model, fresh_names = load_language_model(base)
    model.to(device())
    has_fresh_head = any(not name.startswith(base.prefix + ".") for name in fresh_names)
    head_steps = recipe.num_steps // HEAD_STEPS_DIVISOR
    if has_fresh_head and head_steps:
        head_recipe = dataclasses.replace(
            recipe,
            steps=head_steps,
            eval_every=head_steps,
            learning_rate=HEAD_LEARNING_RATE,
            seed=(recipe.seed + 1) % NUM_SEEDS,
        )
        model.base_model.requires_grad_(False)
        dataclasses.replace(training, recipe=head_recipe).run(model, work_folder, progress, "pretrain head")
        model.base_model.requires_grad_(True)
    trained_model: nn.Module = model
    return trained_model


def _with_replay(
    training: LanguageModelling, earlier_blocks: np.ndarray[Any, np.dtype[np.uint32]], share: float
) -> LanguageModelling:
    """Return a training in whose order randomly drawn blocks of earlier domains replace a share of the blocks."""
    import numpy as np

    total = training.recipe.num_steps * training.recipe.batch_size
    rng = np.random.default_rng((training.recipe.seed, len(earlier_blocks)))
    num_passes = math.ceil(total / len(earlier_blocks))
    passes = [rng.permutation(len(earlier_blocks)) for _ in range(num_passes)]
    drawn_indices = np.concatenate(passes)[: round(share * total)]
    num_blocks = len(training.blocks)
    return dataclasses.replace(
        training,
        blocks=np.concatenate([training.blocks, earlier_blocks[np.sort(drawn_indices)]]),
        replayed_blocks=range(num_blocks, num_blocks + len(drawn_indices)),
    )


def _shuffle(num_blocks: int, seed: int) -> Integers:
    import numpy as np

    return np.random.default_rng((seed, num_blocks)).permutation(num_blocks)
