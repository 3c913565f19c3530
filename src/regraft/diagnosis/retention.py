"""Does a recycled model keep what the upgrade taught its base?"""

from __future__ import annotations

import dataclasses
import itertools
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

    from regraft.diagnosis.pair import Pair
    from regraft.diagnosis.question import Asked, Lines

BLOCK, MOST_BLOCKS = 64, 128


@dataclasses.dataclass(frozen=True)
class Kept:
    """How well bases and deployments model a text.

    Args:
        text: What was measured on.
        loss: The language-modelling loss in nats a token, of `old base`, `new base`, `old deployment` and
            `new deployment`; each deployment's body under its base's own head.
        share: What the new deployment has gained over the old one as a share of what the new base has gained over the
            old; None where the base gained nothing.
    """

    text: str
    loss: dict[str, float]
    share: float | None


def kept(pair: Pair, text: Sequence[str] = ()) -> Kept:
    """Measure whether the gain of continual pre-training survives in the recycled model.

    Args:
        pair: The deployments.
        text: Files or data sets of unlabelled text, as `Corpus` takes them; none for the task's own training texts.

    Returns:
        The losses, on at most 128 blocks of 64 tokens.

    Raises:
        DataError: The text cannot be read or is too little.
        MismatchError: The bases have no language-modelling head, or the adaptation works outside the body.
    """
    if pair.adaptation.virtual_tokens:
        raise MismatchError("virtual tokens are no part of the body: it cannot be measured as a language model.")
    old, new = pair.upgrade.old, pair.upgrade.new
    blocks = _blocks(pair, text)
    losses: dict[str, float] = {}
    for name, base, deployed in (("old", old, pair.old.model), ("new", new, pair.new.model)):
        model, fresh = load_language_model(base)
        if missing := [n for n in fresh if not n.startswith(base.prefix + ".")]:
            raise MismatchError(f"{base.path}: holds no language-modelling head ({', '.join(missing[:3])}).")
        model.to(device())
        losses[f"{name} base"] = language_loss(model, base, blocks, pair.precision)
        setattr(model, base.prefix, getattr(unwrap_model(deployed), base.prefix))
        losses[f"{name} deployment"] = language_loss(model, base, blocks, pair.precision)
    gained = losses["old base"] - losses["new base"]
    share = (losses["old deployment"] - losses["new deployment"]) / gained if gained > 0 else None
    return Kept(", ".join(text) or f"the training texts of {pair.data.name}", losses, share)


def _blocks(pair: Pair, text: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    import json

    import numpy as np

    base = pair.upgrade.new
    block = min(BLOCK, base.longest)
    with temporary_folder() as folder:
        sources = tuple(text)
        if not sources:
            file = folder / "texts.jsonl"
            lines = (json.dumps({"text": part}) + "\n" for part in itertools.chain(*pair.data.train.texts))
            file.write_text("".join(lines), encoding="utf-8")
            sources = (str(file),)
        packed = pack(Corpus(sources), base, block, folder / "tokens.bin", pair.progress)
        return np.array(packed[:MOST_BLOCKS])


def _ask(asked: Asked) -> Kept:
    asked.require_same_tokens()
    return kept(asked.pair, asked.options.text)


def _describe(answer: Kept, _: str) -> Lines:
    lines = [("loss as language models", ", ".join(f"{name} {loss:.3f}" for name, loss in answer.loss.items()))]
    if answer.share is not None:
        lines.append(("  the upgrade's gain", f"the deployments gain {100 * answer.share:.0f} % of what the bases do"))
    return lines


QUESTION = Question("kept", 70, Kept, _ask, describe=_describe)
