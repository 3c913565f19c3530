"""Language modelling on packed blocks of tokens: what is masked, the loss, and how good a model is at it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.device import autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.recipe import Recipe

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

LEARNING_RATE = 1e-4
MASKED = 0.15


def load_language_model(base: Base) -> tuple[Any, list[str]]:
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

    return load_strictly(architecture(base), base.path, base.prefix, dtype="float32")


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

    from regraft.recipe import Recipe

    recipe, nothing = Recipe(steps=1, precision=precision).resolve(len(blocks), LEARNING_RATE), np.arange(0)
    return LanguageModelling(base, blocks, nothing, np.arange(len(blocks)), recipe).evaluate(model)["loss"]


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """One run over blocks: which of them at which step, and which tokens are masked there.

    Args:
        base: Whose tokenizer made the blocks.
        blocks: Blocks × tokens.
        training: The numbers of those to train on, in passes.
        held_out: Of those to evaluate on.
        recipe: Resolved.
        replayed: Of those that take the places of others at random, once each.
    """

    base: Base
    blocks: np.ndarray[Any, np.dtype[np.uint32]]
    training: Numbers
    held_out: Numbers
    recipe: Recipe
    replayed: Sequence[int] = ()

    def order(self) -> Numbers:
        """Return the block of each place of the training, steps × batch size."""
        import numpy as np

        random = np.random.default_rng(self.recipe.seed)
        total = (self.recipe.steps or 1) * self.recipe.batch_size
        passes = [random.permutation(self.training) for _ in range(-(-total // len(self.training)))]
        order = np.concatenate(passes)[:total]
        if len(self.replayed):
            order[random.choice(total, len(self.replayed), replace=False)] = self.replayed
        return order

    def run(
        self, model: Any, work: Path, progress: Progress, stage: str, each: Callable[[int], None] | None = None
    ) -> list[dict[str, float]]:
        """Train a model in place, and leave it with its best weights.

        Args:
            model: The language model.
            work: A folder for checkpoints.
            progress: Told of each step.
            stage: What to call this there.
            each: Called after each step, with its number.

        Returns:
            The learning curve on the blocks held out.
        """
        from regraft.tuning.trainer import train

        recipe, order = self.recipe, self.order()
        tokens = recipe.batch_size * self.blocks.shape[1]

        def report(stage: str, done: int, total: int, figures: Any) -> None:
            shown = {"loss": figures["loss"]} if "loss" in figures else {}
            if "steps/s" in figures:
                shown["tokens/s"] = figures["steps/s"] * tokens
            progress(stage, done, total, shown)

        return train(
            model,
            range(len(order)),
            lambda places: self.batch([(int(order[place]), place) for place in places], recipe.seed),
            lambda model, batch, _: self.loss(model, batch),
            self.evaluate,
            recipe,
            work,
            report,
            stage=stage,
            each=each,
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
        """Return the mean cross-entropy; for masked models, logits are computed at the masked positions only."""
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
        """Return the loss on the held-out blocks, their masks being always the same."""
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


def architecture(base: Base) -> Any:
    """Choose how a base is loaded as a language model.

    Args:
        base: The base.

    Returns:
        transformers' auto class for masked models, or for causal ones.

    Raises:
        RecipeError: An encoder's tokenizer has no mask token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if not base.is_decoder and base.tokenizer.mask_token_id is None:
        raise RecipeError(f"{base.path}: its tokenizer has no mask token, so it cannot be pre-trained as an encoder.")
    return AutoModelForCausalLM if base.is_decoder else AutoModelForMaskedLM
