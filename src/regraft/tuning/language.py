"""Language modelling on packed blocks of tokens: masking, the loss, training and evaluation."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.device import autocast
from regraft.model.outputs import unwrap_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.recipe import Recipe
    from regraft.task.split import Integers

LEARNING_RATE = 1e-4
"""The peak rate of BERT's pre-training (Devlin et al. 2019, appendix A.2)."""
MASK_PROBABILITY = 0.15
"""The probability that a token is predicted if it is not special, as in BERT (Devlin et al. 2019, section 3.1)."""
MASK_TOKEN_SHARE = 0.8
"""The share of predicted tokens that the mask token replaces, as in BERT."""
RANDOM_TOKEN_SHARE = 0.1
"""The share of predicted tokens that a random token replaces, as in BERT; the remaining tenth is unchanged."""
IGNORED_LABEL = -100
"""The label of tokens that are not predicted, which PyTorch's cross-entropy ignores by default."""
EVALUATION_SEED = 0
"""The seed of the masks of evaluations, which are the same for all trainings."""


def load_language_model(base: Base) -> tuple[Any, list[str]]:
    """Load a base as a language model.

    Args:
        base: A decoder, or an encoder whose tokenizer has a mask token.

    Returns:
        The model in float32 on the CPU, and the names of its randomly initialised tensors, which the base's folder
        lacks.

    Raises:
        CheckpointError: A tensor of the body is missing or unexpected.
        RecipeError: An encoder's tokenizer has no mask token.
    """
    from regraft.adaptation import load_strictly

    return load_strictly(auto_model_class(base), base.path, base.prefix, dtype="float32")


def language_loss(model: nn.Module, base: Base, blocks: np.ndarray[Any, np.dtype[np.uint32]], precision: str) -> float:
    """Compute a language model's loss on text.

    Args:
        model: A language model of the base's architecture.
        base: The base, for its tokenizer.
        blocks: Token ids, blocks × tokens, from `pack`.
        precision: `bf16` or `fp32`.

    Returns:
        The mean cross-entropy in nats: for encoders, of the tokens to predict, with the same masks at each call; for
        decoders, of each next token.
    """
    import numpy as np

    from regraft.recipe import Recipe

    recipe = Recipe(steps=1, precision=precision).resolve(len(blocks), LEARNING_RATE)
    evaluation = LanguageModelling(
        base, blocks, training_blocks=np.arange(0), evaluation_blocks=np.arange(len(blocks)), recipe=recipe
    )
    return evaluation.evaluate(model)["loss"]


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """A training of a language model on blocks of tokens: the order, the masks, the loss and its evaluation.

    Args:
        base: The base, for its tokenizer.
        blocks: Token ids, blocks × tokens.
        training_blocks: Indices of the blocks to train on.
        evaluation_blocks: Indices of the blocks to evaluate on.
        recipe: A resolved recipe.
        replayed_blocks: Indices of further blocks, each of which replaces a training block at a random position of the
            order.
    """

    base: Base
    blocks: np.ndarray[Any, np.dtype[np.uint32]]
    training_blocks: Integers
    evaluation_blocks: Integers
    recipe: Recipe
    replayed_blocks: Sequence[int] = ()

    def order(self) -> Integers:
        """Draw the order of the training.

        Returns:
            Indices of blocks, of shape (steps × batch size,): successive passes over the training blocks, of which the
            last may be cut short, with the replayed blocks at random positions instead of training blocks.
        """
        import numpy as np

        rng = np.random.default_rng(self.recipe.seed)
        total = self.recipe.num_steps * self.recipe.batch_size
        num_passes = math.ceil(total / len(self.training_blocks))
        order = np.concatenate([rng.permutation(self.training_blocks) for _ in range(num_passes)])[:total]
        if len(self.replayed_blocks):
            order[rng.choice(total, len(self.replayed_blocks), replace=False)] = self.replayed_blocks
        return order

    def run(
        self,
        model: nn.Module,
        work_folder: Path,
        progress: Progress,
        stage: str,
        after_step: Callable[[int], None] | None = None,
    ) -> list[dict[str, float]]:
        """Train a model in place; it ends with its best weights on the evaluation blocks.

        Args:
            model: The language model; its parameters that require gradients are trained.
            work_folder: The folder of the checkpoints, from which an interrupted training resumes.
            progress: Called after each step.
            stage: The name of the training in progress messages.
            after_step: Called after each step with the number of completed steps.

        Returns:
            The learning curve on the evaluation blocks, with the figures of `evaluate`.

        Raises:
            RecipeError: A loss became infinite or NaN, or a tracker does not exist or is not installed.
        """
        from regraft.tuning.trainer import train

        recipe = self.recipe
        order = self.order()

        def collate(positions: list[int]) -> dict[str, torch.Tensor]:
            return self.batch([(int(order[position]), position) for position in positions], recipe.seed)

        def objective(trained_model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
            return self.loss(trained_model, batch)

        def report(stage: str, step: int, steps: int, figures: Any) -> None:
            shown = {"loss": figures["loss"]} if "loss" in figures else {}
            if "steps/s" in figures:
                shown["tokens/s"] = figures["steps/s"] * recipe.batch_size * self.blocks.shape[1]
            progress(stage, step, steps, shown)

        return train(
            model,
            range(len(order)),
            collate,
            objective,
            self.evaluate,
            recipe,
            work_folder,
            report,
            stage=stage,
            after_step=after_step,
        )

    def batch(self, items: list[tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
        """Collate blocks, and mask them for encoders.

        Args:
            items: For each block, its index, and its position in the order, which seeds its mask.
            seed: The seed of the masks.

        Returns:
            `input_ids` and `labels`, blocks × tokens. Tokens that an encoder does not predict have `IGNORED_LABEL`.
        """
        import numpy as np
        import torch

        ids = torch.from_numpy(self.blocks[[block for block, _ in items]].astype(np.int64))
        if self.base.is_decoder:
            return {"input_ids": ids, "labels": ids}
        masked = [self._mask(block, seed, position) for block, (_, position) in zip(ids, items, strict=True)]
        return {
            "input_ids": torch.stack([input_ids for input_ids, _ in masked]),
            "labels": torch.stack([labels for _, labels in masked]),
        }

    def _mask(self, block: torch.Tensor, seed: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the masks of a block; return the input ids and the labels, one per token."""
        import numpy as np
        import torch

        tokenizer = self.base.tokenizer
        rng = np.random.default_rng((seed, position))
        special = torch.isin(block, torch.tensor(tokenizer.all_special_ids))
        draws = torch.from_numpy(rng.random((2, len(block))))
        predicted = (draws[0] < MASK_PROBABILITY) & ~special
        if not predicted.any():  # the loss of a batch without any predicted token would be NaN
            is_candidate = special if special.all() else ~special
            candidates = torch.arange(len(block))[is_candidate]
            predicted[candidates[rng.integers(len(candidates))]] = True
        labels = torch.where(predicted, block, IGNORED_LABEL)
        masked = block.clone()
        masked[predicted & (draws[1] < MASK_TOKEN_SHARE)] = tokenizer.mask_token_id
        randomised = predicted & (draws[1] >= 1 - RANDOM_TOKEN_SHARE)
        masked[randomised] = torch.from_numpy(rng.integers(len(tokenizer), size=int(randomised.sum())))
        return masked, labels

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the mean cross-entropy; the head of an encoder is computed at the predicted tokens only.

        The vocabulary projection of BERT-base has 23.4 million weights, more than three of its layers (7.1 million
        each), but its logits are needed at 15 % of the tokens only.

        Args:
            model: The language model.
            batch: `input_ids` and `labels`, blocks × tokens, on the model's device.

        Returns:
            The loss in nats, a scalar.
        """
        from torch.nn import functional

        if self.base.is_decoder:
            loss: torch.Tensor = model(**batch).loss
            return loss
        predicted = batch["labels"] != IGNORED_LABEL

        def select_predicted(module: nn.Module, args: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][predicted][None]
            return output

        handle = unwrap_parallel(model).base_model.register_forward_hook(select_predicted)
        try:
            logits = model(input_ids=batch["input_ids"]).logits[0]
        finally:
            handle.remove()
        return functional.cross_entropy(logits.float(), batch["labels"][predicted])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Compute the loss on the evaluation blocks, with the same masks at each call.

        Args:
            model: The language model; its mode is restored.

        Returns:
            `loss`, the mean cross-entropy in nats, and `score`, its negative.
        """
        import torch

        was_training = model.training
        device = next(model.parameters()).device
        model.eval()
        losses = []
        with torch.inference_mode(), autocast(self.recipe.precision, device):
            for start in range(0, len(self.evaluation_blocks), self.recipe.batch_size):
                blocks = self.evaluation_blocks[start : start + self.recipe.batch_size]
                items = [(int(block), position) for position, block in enumerate(blocks, start)]
                batch = {name: tensor.to(device) for name, tensor in self.batch(items, EVALUATION_SEED).items()}
                losses += [float(self.loss(model, batch))] * len(blocks)  # weights a smaller last batch by its size
        model.train(was_training)
        loss = sum(losses) / len(losses)
        return {"score": -loss, "loss": loss}


def auto_model_class(base: Base) -> Any:
    """Return the auto class of transformers that loads a base as a language model.

    Args:
        base: A decoder, or an encoder whose tokenizer has a mask token.

    Returns:
        `AutoModelForCausalLM` for a decoder, `AutoModelForMaskedLM` for an encoder.

    Raises:
        RecipeError: An encoder's tokenizer has no mask token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if not base.is_decoder and base.tokenizer.mask_token_id is None:
        raise RecipeError(
            f"{base.path}: the tokenizer has no mask token, which pre-training an encoder needs. Choose a base whose "
            "tokenizer has one."
        )
    return AutoModelForCausalLM if base.is_decoder else AutoModelForMaskedLM
