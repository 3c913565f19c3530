"""What a classifier does inside on a batch: where its heads attend, and its hidden states."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError
from regraft.model.device import autocast
from regraft.model.outputs import forward, unwrap_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from regraft.task.types import Examples

CELLS = 1 << 24  # of attention maps held at once, for each model


@dataclasses.dataclass(frozen=True)
class Activations:
    """What a model did on a batch of texts.

    Args:
        attention: Of each layer, batch × heads × tokens × keys; keys begin with virtual tokens, if there are any.
        hidden: Of the embeddings and each layer, batch × tokens × width.
        outputs: rows × outputs.
    """

    attention: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]
    outputs: torch.Tensor


def record_activations(model: Any, inputs: Mapping[str, torch.Tensor], precision: str) -> Activations:
    """Run a classifier of any kind on a batch and keep what it does; virtual tokens' own rows are left out.

    Args:
        model: A classifier, inside `attending`.
        inputs: Padded on the right, `attention_mask` among them.
        precision: `bf16` or `fp32`.

    Returns:
        Attention, hidden states and outputs, in float32 on the model's device.

    Raises:
        MismatchError: The architecture gives no attention maps.
    """
    import torch

    classifier = unwrap_model(model)
    body, kept = classifier.base_model, {}

    def ask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_attentions": True}

    def keep(_: Any, args: Any, output: Any) -> Any:
        kept["attention"] = output.get("attentions")
        return type(output)(**{name: value for name, value in output.items() if name != "attentions"})

    handles = [body.register_forward_hook(keep)]
    taken = inspect.signature(body.forward).parameters.values()
    if any(p.name == "output_attentions" or p.kind is p.VAR_KEYWORD for p in taken):
        handles.append(body.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        with torch.inference_mode(), autocast(precision, next(model.parameters()).device):
            output = forward(model, inputs, hidden=True)
    finally:
        for handle in handles:
            handle.remove()
    attention = kept.get("attention") or ()
    if not attention or any(not isinstance(map_, torch.Tensor) or map_.dim() != 4 for map_ in attention):
        raise MismatchError(
            f"a {type(classifier).__name__} gives no attention maps: heads cannot be compared. Compare what it "
            "predicts instead."
        )
    tokens = inputs["attention_mask"].shape[1]
    return Activations(
        tuple(maps[:, :, -tokens:].float() for maps in attention),
        tuple(states[:, -tokens:].float() for states in output.hidden),
        output.logits,
    )


@contextlib.contextmanager
def eager_attention(*models: Any) -> Iterator[None]:
    """Make models compute attention maps that can be looked at, in evaluation mode; both are restored afterwards.

    Args:
        models: Classifiers; the same one may be among them twice.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            classifier = unwrap_model(model)
            before = getattr(classifier.config, "_attn_implementation", None)
            if before not in (None, "eager"):  # others never form the maps
                stack.callback(classifier.set_attn_implementation, before)
                classifier.set_attn_implementation("eager")
            stack.callback(model.train, model.training)
            model.eval()
        yield


def attention_batches(examples: Examples, config: Any) -> Iterator[list[int]]:
    """Part examples into batches whose attention maps fit in bounded memory, the longest first.

    Args:
        examples: Texts.
        config: The model's, for its layers and heads.

    Yields:
        Indices of examples of similar length.
    """
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    while order:
        cells = config.num_hidden_layers * config.num_attention_heads * int(lengths[order[0]]) ** 2
        size = max(1, CELLS // cells)
        yield order[:size]
        order = order[size:]


def random_model(like: Any, seed: int) -> Any:
    """Make a classifier of another's architecture that never learnt anything.

    Virtual tokens are kept, for attention to have the same keys; other adapters are left out.

    Args:
        like: The other.
        seed: What its weights are drawn from.

    Returns:
        A model of the same config on the same device.
    """
    import torch

    classifier: Any = unwrap_model(like)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(classifier)(copy.deepcopy(classifier.config))
    adapter = getattr(like, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        drawn, fresh = dict(fresh.base_model.named_parameters()), copy.deepcopy(like)
        with torch.no_grad():
            for name, parameter in unwrap_model(fresh).base_model.named_parameters():
                if name in drawn:  # a pooler that PEFT saves whole goes by another name
                    parameter.copy_(drawn[name])
    return fresh.to(next(like.parameters()).device)
