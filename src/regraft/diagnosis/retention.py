"""Does a recycled model keep what continual pre-training taught its base?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import temporary_folder
from regraft.diagnosis.question import Question
from regraft.errors import MismatchError
from regraft.model.device import device
from regraft.model.outputs import unwrap_model
from regraft.tuning.corpus import Corpus, pack
from regraft.tuning.language import language_loss, load_language_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from regraft.diagnosis.pair import DeploymentPair
    from regraft.diagnosis.question import QuestionContext, SummaryLines

BLOCK_TOKENS, MAX_BLOCKS = 64, 128  # 8,192 tokens: seconds on a CPU, and every small base takes blocks of 64


@dataclasses.dataclass(frozen=True)
class Retention:
    """How well bases and deployments model a text.

    Args:
        text: The text that was measured.
        loss: The language-modelling loss in nats a token, of `old base`, `new base`, `old deployment` and
            `new deployment`; a deployment is its body under the language-modelling head of its base.
        share: The gain of the new deployment over the old one, divided by that of the new base over the old one; None
            if the base gained nothing.
    """

    text: str
    loss: dict[str, float]
    share: float | None


def retention(pair: DeploymentPair, text: Sequence[str] = ()) -> Retention:
    """Measure how much of the gain of continual pre-training survives in the recycled model.

    Args:
        pair: The two deployments.
        text: Files or data sets of unlabelled text, as `Corpus` takes them; the task's own training texts if empty.

    Returns:
        The losses, on at most 128 blocks of 64 tokens.

    Raises:
        DataError: The text cannot be read or is too short.
        MismatchError: A base has no language-modelling head, or the adaptation works outside the body.
    """
    if pair.adaptation.virtual_tokens:
        raise MismatchError("virtual tokens are no part of the body: it cannot be measured as a language model.")
    blocks = _token_blocks(pair, text)
    losses: dict[str, float] = {}
    for name, base, deployed in (
        ("old", pair.upgrade.old, pair.old.model),
        ("new", pair.upgrade.new, pair.new.model),
    ):
        model, fresh_names = load_language_model(base)
        if missing := [parameter for parameter in fresh_names if not parameter.startswith(base.prefix + ".")]:
            raise MismatchError(f"{base.path}: holds no language-modelling head ({', '.join(missing[:3])}).")
        model.to(device())
        losses[f"{name} base"] = language_loss(model, base, blocks, pair.precision)
        setattr(model, base.prefix, getattr(unwrap_model(deployed), base.prefix))
        losses[f"{name} deployment"] = language_loss(model, base, blocks, pair.precision)
    base_gain = losses["old base"] - losses["new base"]
    deployment_gain = losses["old deployment"] - losses["new deployment"]
    return Retention(
        text=", ".join(text) or f"the training texts of {pair.data.name}",
        loss=losses,
        share=deployment_gain / base_gain if base_gain > 0 else None,
    )


def _token_blocks(pair: DeploymentPair, text: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    import numpy as np

    base = pair.upgrade.new
    with temporary_folder() as folder:
        sources = tuple(text)
        if not sources:
            file = folder / "texts.jsonl"
            lines = (json.dumps({"text": part}) + "\n" for part in itertools.chain(*pair.data.train.texts))
            file.write_text("".join(lines), encoding="utf-8")
            sources = (str(file),)
        blocks = pack(
            Corpus(sources), base, min(BLOCK_TOKENS, base.max_input_length), folder / "tokens.bin", pair.progress
        )
        return np.array(blocks[:MAX_BLOCKS])


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


QUESTION = Question("kept", 70, Retention, _answer, describe=_describe, section="retention")
