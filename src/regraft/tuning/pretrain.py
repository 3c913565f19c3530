"""Continual pre-training: a base becomes its own upgrade on new text."""

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
    to_json,
    write_atomic,
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

HELD_OUT_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class Replay:
    """Text of earlier domains that is trained on again, so that they are not forgotten.

    Args:
        corpus: The text.
        share: The share of blocks that are of it.

    Raises:
        RecipeError: The share is out of its range.
    """

    corpus: Corpus
    share: float = 0.1

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 < self.share < 1:
            raise RecipeError(f"the share of replayed blocks is above 0 and below 1, found {self.share}.")


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
    """Pre-train a base on one domain after the other: an upgrade chain.

    Args:
        base: The base.
        domains: The text of each, in order.
        out: A folder for the bases, one a domain, named by its number and its first source.
        recipe: How each is trained.
        block: Tokens a block.
        progress: Told of each step.
        replay: The share of blocks that are of the domains before; 0 for none.
        keep_every: As `pretrain` takes it.

    Returns:
        The upgraded bases in order, without the first.

    Raises:
        RegraftError: As `pretrain`.
    """
    bases = [base]
    for number, domain in enumerate(domains):
        name = f"{number + 1}-{Path(domain.sources[0].partition(':')[0]).stem}"
        earlier = tuple(source for corpus in domains[:number] for source in corpus.sources)
        again = Replay(Corpus(earlier, domain.column), replay) if replay and earlier else None
        bases.append(
            pretrain(
                bases[-1], domain, out / name, recipe, block,
                lambda stage, *rest, name=name: progress(f"{name}: {stage}", *rest),
                replay=again, keep_every=keep_every,
            )
        )  # fmt: skip
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

    Masked language modelling for encoders (15 % of the tokens; of these 80 % become the mask, 10 % a random token,
    10 % stay), causal for decoders. An encoder without a language-modelling head gets a fresh one, which is first
    trained alone for a tenth of the steps so that its noise does not reach the body. Tensors that pre-training does
    not use, such as a pooler, are carried over unchanged.

    Args:
        base: The base.
        corpus: The text.
        out: Where the upgraded base is written. If it is there, made from the same, nothing is done.
        recipe: Steps, batch size (in blocks), learning rate, ….
        block: Tokens a block.
        progress: Told of each step.
        replay: Text of earlier domains to train on again.
        keep_every: Steps between bases that are kept on the way, in a folder beside `out` whose name ends in `-steps`.

    Returns:
        The upgraded base.

    Raises:
        DataError: The text cannot be read or is too little.
        OutcomeError: Something else is at `out`, or bases of another run are where those on the way are kept.
        RecipeError: The block is longer than the base takes.
    """
    from transformers import set_seed

    if block > base.max_input_length:
        raise RecipeError(f"--block {block} is more than the {base.max_input_length} tokens that {base.path} takes.")
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
    if _is_done(out, inputs, base):
        return Base.open(out)
    base.check_finite()
    steps_folder = out.with_name(f"{out.name}-steps")
    if keep_every:
        _check_kept(steps_folder, inputs, base)
    with resumable_folder(out, inputs) as work:
        if _is_done(out, inputs, base):  # another process has made it since
            return Base.open(out)
        blocks = pack(corpus, base, block, work / "tokens.bin", progress)
        held_out = min(HELD_OUT_BLOCKS, max(1, len(blocks) // 20))
        shuffled = _shuffle(len(blocks), recipe.seed)
        resolved = recipe.resolve(len(blocks) - held_out, LEARNING_RATE)
        set_seed(recipe.seed)  # a fresh head is drawn from it
        model, fresh = load_language_model(base)
        model.to(device())
        made = _Made(base, corpus, inputs, resolved, block)
        run = LanguageModelling(base, blocks, shuffled[held_out:], shuffled[:held_out], resolved)
        if any(not name.startswith(base.prefix + ".") for name in fresh) and (resolved.steps or 0) >= 10:
            head_steps = (resolved.steps or 0) // 10
            model.base_model.requires_grad_(False)
            head_recipe = dataclasses.replace(
                resolved,
                steps=head_steps,
                eval_every=head_steps,
                learning_rate=1e-3,
                seed=(recipe.seed + 1) % NUM_SEEDS,
            )
            LanguageModelling(base, blocks, shuffled[held_out:], shuffled[:held_out], head_recipe).run(
                model, work / "head", progress, "pretrain head"
            )
            model.base_model.requires_grad_(True)
        if replay:
            run = _with_replay(run, pack(replay.corpus, base, block, work / "replay.bin", progress), replay.share)

        def keep(step: int) -> None:
            kept = steps_folder / f"step-{step}"
            if keep_every and step % keep_every == 0 and not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                made.publish(model, work / "kept", kept, step, [])

        curve = run.run(model, work / "body", progress, "pretrain", keep)
        made.publish(model, work / "whole", out, resolved.steps or 0, curve)
    return Base.open(out)


@dataclasses.dataclass(frozen=True)
class _Made:
    """Writes a base that came of pre-training, with what it was made from."""

    base: Base
    corpus: Corpus
    inputs: dict[str, Any]
    recipe: Recipe
    block: int

    def publish(self, model: Any, staging: Path, out: Path, steps: int, curve: list[dict[str, float]]) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        with quiet():
            model.save_pretrained(staging)
        _carry_over(self.base, staging)
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
        write_atomic(staging / PRETRAINING, to_json(record, PRETRAINING, indent=2) + "\n")
        publish(staging, out)


def _with_replay(run: LanguageModelling, earlier: np.ndarray[Any, Any], share: float) -> LanguageModelling:
    """Put blocks of earlier domains, drawn at random, beside those of a run."""
    import numpy as np

    total = (run.recipe.steps or 1) * run.recipe.batch_size
    random = np.random.default_rng((run.recipe.seed, len(earlier)))
    passes = [random.permutation(len(earlier)) for _ in range(-(-total // len(earlier)))]
    drawn = np.concatenate(passes)[: round(share * total)]
    count = len(run.blocks)
    return dataclasses.replace(
        run, blocks=np.concatenate([run.blocks, earlier[np.sort(drawn)]]), replayed=range(count, count + len(drawn))
    )


def _shuffle(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    import numpy as np

    return np.random.default_rng((seed, count)).permutation(count)


def _carry_over(base: Base, folder: Path) -> None:
    """Add to a saved model what its base has and pre-training left out."""
    saved = Checkpoint.open(folder)
    prefix = base.prefix + "."
    unused = {prefix + inner: name for inner, name in base.body.items() if prefix + inner not in saved}
    if not unused:
        return
    if len(saved.files) > 1:
        raise OutcomeError(f"{folder}: {', '.join(unused)} cannot be carried over into a sharded checkpoint.")
    sources = {name: (saved, name) for name in saved} | {name: (base.checkpoint, old) for name, old in unused.items()}
    write_safetensors(
        saved.files[0],
        DerivedTensors(
            {name: TensorSpec(dtype_of(*source), shape_of(*source), (source,)) for name, source in sources.items()}
        ),
    )


def _check_kept(folder: Path, inputs: dict[str, Any], base: Base) -> None:
    """Refuse to mix bases on the way with those that another run has kept in the same folder."""
    for kept in sorted(folder.glob("step-*")):
        found = with_current_fingerprints(_recorded(kept) or {}, [base])
        if {**found, "keep_every": None} != {**inputs, "keep_every": None}:
            raise OutcomeError(
                f"{kept}: is a base on the way of another run. Remove {folder}, or choose another --out: bases on the "
                "way are kept beside it."
            )


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Read what a base was pre-trained from; None if that is not recorded."""
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        inputs: dict[str, Any] = dict(read_json(folder / PRETRAINING)["inputs"])
        return inputs
    return None


def _is_done(out: Path, inputs: dict[str, Any], base: Base) -> bool:
    check_output_path(out)
    if not out.exists():
        return False
    if with_current_fingerprints(_recorded(out) or {}, [base]) == inputs:
        return True
    raise OutcomeError(f"{out}: exists and was made from something else. Choose another --out or remove it.")
