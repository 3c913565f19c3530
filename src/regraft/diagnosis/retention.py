"""Retention of continual pre-training's gain in language modelling by the new deployment."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING, Any

from regraft.adaptation import fresh_model
from regraft.checkpoint import temporary_folder
from regraft.diagnosis.question import Question
from regraft.errors import MAX_LISTED, MismatchError
from regraft.model.corpus import Corpus, pack
from regraft.model.deployment import HEAD_SEED
from regraft.model.device import device
from regraft.model.keep import loss_on_blocks
from regraft.model.outputs import unwrap_model
from regraft.tuning.language import language_loss, load_language_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.task import TaskData

    TokenBlocks = np.ndarray[Any, np.dtype[np.uint32]]

# 8,192 tokens: seconds on a CPU, and every small base takes blocks of 64.
BLOCK_TOKENS = 64
MAX_BLOCKS = 128


@dataclasses.dataclass(frozen=True)
class Retention:
    """The language-modelling losses of bases and deployments on a text.

    Args:
        text: The name of the text that was measured.
        loss: The loss in nats per predicted token of `old base`, `new base`, `old deployment` and `new deployment`; a
            deployment is measured as its body under the language-modelling head of its base, unless it is a language
            model itself.
        share: The loss decrease from the old to the new deployment, divided by the decrease from the old to the new
            base; None if the loss of the bases does not decrease.
    """

    text: str
    loss: dict[str, float]
    share: float | None


def retention(pair: DeploymentPair, text: Sequence[str] = ()) -> Retention:
    """Measure how much of continual pre-training's gain survives in the new deployment.

    Args:
        pair: The two deployments.
        text: Files or data sets of unlabelled text, as `Corpus` takes them; the task's own training texts if empty.

    Returns:
        The losses on at most `MAX_BLOCKS` blocks of `BLOCK_TOKENS` tokens, or of the new base's input length if that
        is shorter, and the share of the gain.

    Raises:
        DataError: The text cannot be read or is too short.
        MismatchError: A base has no language-modelling head, or the adaptation of another task than text generation
            adds virtual tokens.
        RecipeError: The bases are encoders whose tokenizer has no mask token.
    """
    is_language_model = pair.data.task.head_in_base
    if pair.adaptation.num_virtual_tokens and not is_language_model:
        raise MismatchError("virtual tokens are no part of the body: it cannot be measured as a language model.")
    blocks = _token_blocks(pair, text)
    losses = _decoder_losses(pair, blocks) if is_language_model else _body_losses(pair, blocks)
    base_gain = losses["old base"] - losses["new base"]
    deployment_gain = losses["old deployment"] - losses["new deployment"]
    return Retention(
        text=", ".join(text) or f"the training texts of {pair.data.name}",
        loss=losses,
        share=deployment_gain / base_gain if base_gain > 0 else None,
    )


def _decoder_losses(pair: DeploymentPair, blocks: TokenBlocks) -> dict[str, float]:
    """Return the losses of bases and deployments that are language models."""
    losses = {}
    for age, deployment in (("old", pair.old), ("new", pair.new)):
        base_model = fresh_model(deployment.base, pair.data.head, HEAD_SEED, frozen=True)
        for name, model in (("base", base_model), ("deployment", deployment.model)):
            losses[f"{age} {name}"] = loss_on_blocks(model, deployment.base, blocks, pair.precision, pair.progress)
    return losses


def _body_losses(pair: DeploymentPair, blocks: TokenBlocks) -> dict[str, float]:
    """Return the losses of bases, and of the bodies of deployments under the heads of their bases."""
    losses: dict[str, float] = {}
    for age, base, deployed in (
        ("old", pair.upgrade.old, pair.old.model),
        ("new", pair.upgrade.new, pair.new.model),
    ):
        model, fresh_names = load_language_model(base)
        missing = [parameter for parameter in fresh_names if not parameter.startswith(base.prefix + ".")]
        if missing:
            raise MismatchError(f"{base.path}: holds no language-modelling head ({', '.join(missing[:MAX_LISTED])}).")
        model.to(device())
        losses[f"{age} base"] = language_loss(model, base, blocks, pair.precision)
        setattr(model, base.prefix, getattr(unwrap_model(deployed), base.prefix))  # keeps the base's head
        losses[f"{age} deployment"] = language_loss(model, base, blocks, pair.precision)
    return losses


def _token_blocks(pair: DeploymentPair, text: Sequence[str]) -> TokenBlocks:
    """Return the token ids of the text, or of the task's training texts if there is none: blocks × tokens."""
    import numpy as np

    base = pair.upgrade.new
    block_tokens = min(BLOCK_TOKENS, base.max_input_length)
    with temporary_folder() as folder:
        sources = tuple(text)
        if not sources:
            file = folder / "texts.jsonl"
            texts = _training_texts(pair.data)
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            sources = (str(file),)
        blocks = pack(Corpus(sources), base, block_tokens, folder / "tokens.bin", pair.progress)
        return np.array(blocks[:MAX_BLOCKS])  # copied, because the file of `blocks` is deleted with the folder


def _training_texts(data: TaskData) -> Iterable[str]:
    """Return the training texts of a task, of text generation with the answers."""
    train = data.train
    if not data.task.head_in_base:
        return itertools.chain(*train.texts)
    answers = (data.task.describe(target, data.labels) for target in train.targets.tolist())
    return (
        f"{data.task.as_text(inputs)} {answer}".strip() for inputs, answer in zip(train.inputs, answers, strict=True)
    )


def _answer(context: QuestionContext) -> Retention:
    context.require_same_tokens()
    return retention(context.pair, context.options.text)


def _describe(retention: Retention, _metric: str) -> SummaryLines:
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in retention.loss.items())
    lines = [("loss as language models", losses)]
    if retention.share is not None:
        gain = f"the deployments gain {100 * retention.share:.0f} % of what the bases do"
        lines.append(("  the upgrade's gain", gain))
    return lines


QUESTION = Question("kept", order=70, record=Retention, answer=_answer, describe=_describe, section="retention")
