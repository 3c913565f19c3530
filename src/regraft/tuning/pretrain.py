"""Continual pre-training: a base becomes its own upgrade on new text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import (
    Checkpoint,
    Derived,
    Entry,
    dtype_of,
    publish,
    resumable_folder,
    shape_of,
    write_atomic,
    write_safetensors,
)
from regraft.errors import OutcomeError, RecipeError
from regraft.progress import Progress, quiet, silent
from regraft.tuning.corpus import Corpus, pack
from regraft.tuning.predict import autocast, device
from regraft.upgrade import PRETRAINING, Base

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from regraft.tuning.recipe import Recipe

LEARNING_RATE = 1e-4
MASKED = 0.15
HELD_OUT_BLOCKS = 64


def pretrain(
    base: Base, corpus: Corpus, out: Path, recipe: Recipe, block: int = 128, progress: Progress = silent
) -> Base:
    """Pre-train a base further, and write the upgraded base as a plain transformers folder.

    Masked language modelling for encoders (15 % of the tokens; of these 80 % become the mask, 10 % a random token,
    10 % stay), causal for decoders. An encoder without a language-modelling head gets a fresh one, which is first
    trained alone for a tenth of the steps so that its noise does not reach the body. Tensors that pre-training does
    not use, such as a pooler, are carried over unchanged.

    Args:
        base: The base.
        corpus: The text.
        out: Where the upgraded base shall be. If it is there, made from the same, nothing is done.
        recipe: Steps, batch size (in blocks), learning rate, ….
        block: Tokens a block.
        progress: Told of each step.

    Returns:
        The upgraded base.

    Raises:
        DataError: The text cannot be read or is too little.
        OutcomeError: Something else is at `out`.
        RecipeError: The block is longer than the base takes.
    """
    from transformers import set_seed

    if block > base.longest:
        raise RecipeError(f"--block {block} is more than the {base.longest} tokens that {base.path} takes.")
    inputs = {
        "base": base.fingerprint,
        "corpus": corpus.digest(),
        "block": block,
        "recipe": dataclasses.asdict(recipe),
    }
    if _is_done(out, inputs):
        return Base.open(out)
    with resumable_folder(out, inputs) as work:
        blocks = pack(corpus, base, block, work / "tokens.bin", progress)
        held_out = min(HELD_OUT_BLOCKS, max(1, len(blocks) // 20))
        shuffled = _shuffle(len(blocks), recipe.seed)
        resolved = recipe.resolve(len(blocks) - held_out, LEARNING_RATE)
        set_seed(recipe.seed)  # a fresh head is drawn from it
        model, fresh = language_model(base)
        model.to(device())
        run = _Pretraining(base, blocks, shuffled[held_out:], shuffled[:held_out], resolved)
        if any(not name.startswith(base.prefix + ".") for name in fresh) and (resolved.steps or 0) >= 10:
            head_steps = (resolved.steps or 0) // 10
            model.base_model.requires_grad_(False)
            head_recipe = dataclasses.replace(
                resolved, steps=head_steps, eval_every=head_steps, learning_rate=1e-3, seed=recipe.seed + 1
            )
            _Pretraining(base, blocks, shuffled[held_out:], shuffled[:held_out], head_recipe).run(
                model, work / "head", progress, "pretrain head"
            )
            model.base_model.requires_grad_(True)
        curve = run.run(model, work / "body", progress, "pretrain")
        staging = work / "whole"
        shutil.rmtree(staging, ignore_errors=True)
        with quiet():
            model.to("cpu").save_pretrained(staging)
        _carry_over(base, staging)
        base.tokenizer.save_pretrained(staging)
        record = {
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "inputs": inputs,
            "corpus": list(corpus.sources),
            "tokens": (resolved.steps or 0) * resolved.batch_size * block,
            "curve": curve,
        }
        write_atomic(staging / PRETRAINING, json.dumps(record, indent=2) + "\n")
        publish(staging, out)
    return Base.open(out)


def language_model(base: Base) -> tuple[Any, list[str]]:
    """Load a base as a language model.

    Args:
        base: The base.

    Returns:
        The model in float32 on the CPU, and the names of what its folder does not hold, a fresh head's.

    Raises:
        CheckpointError: A tensor of the body is missing or has no place in the model.
        RecipeError: An encoder's tokenizer has no mask token.
    """
    from regraft.adaptation import load_strictly

    return load_strictly(_architecture(base), base.path, base.prefix, dtype="float32")


def language_loss(model: Any, base: Base, blocks: np.ndarray[Any, np.dtype[np.uint32]], precision: str) -> float:
    """Measure a language model on text.

    Args:
        model: Of the base's architecture.
        base: Whose tokenizer made the blocks.
        blocks: Blocks × tokens, from `pack`.
        precision: `bf16` or `fp32`.

    Returns:
        The mean cross-entropy in nats: of masked tokens for encoders, the masks being always the same, of each next
        token for decoders.
    """
    import numpy as np

    from regraft.tuning.recipe import Recipe

    recipe, nothing = Recipe(steps=1, precision=precision).resolve(len(blocks), LEARNING_RATE), np.arange(0)
    return _Pretraining(base, blocks, nothing, np.arange(len(blocks)), recipe).evaluate(model)["loss"]


@dataclasses.dataclass(frozen=True)
class _Pretraining:
    """One run over blocks: which of them at which step, and which tokens are masked there."""

    base: Base
    blocks: np.ndarray[Any, np.dtype[np.uint32]]
    training: np.ndarray[Any, np.dtype[np.int64]]
    held_out: np.ndarray[Any, np.dtype[np.int64]]
    recipe: Recipe

    def run(self, model: Any, work: Path, progress: Progress, stage: str) -> list[dict[str, float]]:
        import numpy as np

        from regraft.tuning.trainer import train

        recipe, random = self.recipe, np.random.default_rng(self.recipe.seed)
        total = (recipe.steps or 1) * recipe.batch_size
        passes = [random.permutation(self.training) for _ in range(-(-total // len(self.training)))]
        order = np.concatenate(passes)[:total]
        tokens = recipe.batch_size * self.blocks.shape[1]

        def report(stage: str, done: int, total: int, figures: Any) -> None:
            shown = {"loss": figures["loss"]} if "loss" in figures else {}
            if "steps/s" in figures:
                shown["tokens/s"] = figures["steps/s"] * tokens
            progress(stage, done, total, shown)

        return train(
            model,
            list(zip(order.tolist(), range(total), strict=True)),
            lambda items: self.batch(items, recipe.seed),
            lambda model, batch, _: self.loss(model, batch),
            self.evaluate,
            recipe,
            work,
            report,
            stage=stage,
        )

    def batch(self, items: list[tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
        """Make a batch of (block, its number in the training); the number fixes its mask."""
        import numpy as np
        import torch

        ids = torch.from_numpy(self.blocks[[block for block, _ in items]].astype(np.int64))
        if self.base.is_decoder:
            return {"input_ids": ids, "labels": ids}
        masked = [self._mask(row, seed, number) for row, (_, number) in zip(ids, items, strict=True)]
        return {"input_ids": torch.stack([m[0] for m in masked]), "labels": torch.stack([m[1] for m in masked])}

    def _mask(self, row: torch.Tensor, seed: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np
        import torch

        tokenizer, random = self.base.tokenizer, np.random.default_rng((seed, number))
        special = torch.isin(row, torch.tensor(tokenizer.all_special_ids))
        draws = torch.from_numpy(random.random((2, len(row))))
        chosen = (draws[0] < MASKED) & ~special
        if not chosen.any():
            places = torch.arange(len(row))[~special if not special.all() else special]
            chosen[places[random.integers(len(places))]] = True
        labels = torch.where(chosen, row, -100)
        replaced = row.clone()
        replaced[chosen & (draws[1] < 0.8)] = tokenizer.mask_token_id
        anything = chosen & (draws[1] >= 0.9)
        replaced[anything] = torch.from_numpy(random.integers(len(tokenizer), size=int(anything.sum())))
        return replaced, labels

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Give the mean cross-entropy; for masked models, logits are computed at the masked positions only."""
        from torch.nn import functional

        if self.base.is_decoder:
            loss: torch.Tensor = model(**batch).loss
            return loss
        chosen = batch["labels"] != -100

        def keep_masked(module: Any, arguments: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][chosen][None]
            return output

        inner = getattr(model, "module", model)  # the model itself where it is wrapped for many devices
        hook = inner.base_model.register_forward_hook(keep_masked)
        try:
            logits = model(input_ids=batch["input_ids"]).logits[0]
        finally:
            hook.remove()
        return functional.cross_entropy(logits.float(), batch["labels"][chosen])

    def evaluate(self, model: Any) -> dict[str, float]:
        """Give the loss on the held-out blocks, their masks being always the same."""
        import torch

        was_training, on = model.training, next(model.parameters()).device
        model.eval()
        losses = []
        with torch.inference_mode(), autocast(self.recipe.precision, on):
            for start in range(0, len(self.held_out), self.recipe.batch_size):
                part = self.held_out[start : start + self.recipe.batch_size]
                batch = self.batch([(int(block), start + i) for i, block in enumerate(part)], seed=0)
                batch = {name: tensor.to(on) for name, tensor in batch.items()}
                losses += [float(self.loss(model, batch))] * len(part)
        model.train(was_training)
        loss = sum(losses) / len(losses)
        return {"score": -loss, "loss": loss}


def _shuffle(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    import numpy as np

    return np.random.default_rng((seed, count)).permutation(count)


def _architecture(base: Base) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if not base.is_decoder and base.tokenizer.mask_token_id is None:
        raise RecipeError(f"{base.path}: its tokenizer has no mask token, so it cannot be pre-trained as an encoder.")
    return AutoModelForCausalLM if base.is_decoder else AutoModelForMaskedLM


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
        Derived(
            {
                name: Entry(dtype_of(*source), shape_of(*source), (source,), lambda tensor: tensor)
                for name, source in sources.items()
            }
        ),
    )


def _is_done(out: Path, inputs: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((out / PRETRAINING).read_text(encoding="utf-8"))["inputs"] == inputs:
            return True
    raise OutcomeError(f"{out}: exists and was made from something else. Choose another --out or remove it.")
