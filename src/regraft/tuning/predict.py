"""A model's outputs on examples, batches being of similar length."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from regraft.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from torch import nn

    from regraft.progress import Progress
    from regraft.tuning.examples import Examples

BATCH = 64
# architectures in which what fills up a batch reaches the texts past the attention mask: by convolutions over
# neighbouring tokens, pooling, Fourier transforms, or approximate attention over blocks and hashes
MIXING = {"canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "yoso"}


@dataclasses.dataclass(frozen=True)
class Output:
    """What a classifier gives for a batch.

    Args:
        logits: batch × classes.
        read: Which token the head reads of each text, batch; virtual tokens come first, as in `hidden`.
        hidden: Of the embeddings and each layer, batch × tokens × width.
    """

    logits: torch.Tensor
    read: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()


def device() -> torch.device:
    """Return where models run.

    Returns:
        The accelerator if there is one, else the CPU.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def autocast(precision: str, on: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in bfloat16 where that was asked for.

    Args:
        precision: `bf16` or `fp32`.
        on: The device.

    Returns:
        A context manager.
    """
    import torch

    return torch.autocast(on.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def forward(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    hidden: bool = False,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Output:
    """Run a classifier of any kind on a batch that is padded on the right; each text's output is what it has alone.

    Two things are done here that PEFT and transformers do not do: hidden states under a prefix are returned, and a
    decoder's head is fed the token that it reads of each text alone, whatever the batch is padded with.

    Args:
        model: A classifier, with or without an adapter.
        batch: Its inputs, `attention_mask` among them.
        hidden: Whether hidden states are wanted.
        parameters: By name, what to compute with in place of the model's own; gradients flow through them.

    Returns:
        Its output.
    """
    import torch

    classifier = _classifier(model)
    body, mask = classifier.base_model, batch["attention_mask"]
    rows, last = torch.arange(len(mask), device=mask.device), last_read(model, batch)
    read = torch.zeros_like(rows)
    layers: tuple[torch.Tensor, ...] = ()

    def ask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(_: Any, args: Any, output: Any) -> Any:
        nonlocal layers
        layers = output.hidden_states
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def spread(_: Any, args: Any, output: Any) -> Any:
        nonlocal read
        states = output.last_hidden_state
        read = last + states.shape[1] - mask.shape[1]  # virtual tokens come first
        return type(output)(**{**output, "last_hidden_state": states[rows, read][:, None].expand_as(states)})

    handles = []
    if hidden:
        handles = [body.register_forward_pre_hook(ask, with_kwargs=True), body.register_forward_hook(keep)]
    if last is not None:  # then it does not matter which token the class takes for the last one
        handles.append(body.register_forward_hook(spread))
    try:
        with _any_padding(classifier.config.get_text_config()) if last is not None else contextlib.nullcontext():
            if parameters is None:
                logits = model(**batch).logits
            else:
                from torch.func import functional_call

                logits = functional_call(model, dict(parameters), (), dict(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
    return Output(logits, read, layers)


def last_read(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Compute which token a decoder's head reads of each text alone, as its transformers class finds it.

    That is the last one that is not `config.pad_token_id`, or simply the last one where that is null, under a prompt
    (the class sees no token ids then), and in XLNet. A text of nothing but that id is read at its first token.

    Args:
        model: A classifier, with or without an adapter.
        batch: Its inputs, padded on the right.

    Returns:
        The index of a token for each text, virtual tokens not counted; None for a model that does not read the last.
    """
    import torch

    from regraft.base import is_causal

    classifier, mask = _classifier(model), batch["attention_mask"]
    summary = getattr(classifier, "sequence_summary", None)
    if not is_causal(classifier.config) or (summary is not None and summary.summary_type != "last"):
        return None
    padding = classifier.config.get_text_config().pad_token_id
    if padding is None or summary is not None or _is_prompted(model):
        return mask.sum(dim=1) - 1
    places: torch.Tensor = torch.arange(mask.shape[1], device=mask.device) * mask * (batch["input_ids"] != padding)
    return places.amax(dim=1)


@contextlib.contextmanager
def _any_padding(config: Any) -> Iterator[None]:
    """Make a config name some padding token for a while: without one, transformers refuses batches."""
    before = config.pad_token_id
    config.pad_token_id = before or 0
    try:
        yield
    finally:
        config.pad_token_id = before


def _classifier(model: Any) -> Any:
    """Return the transformers model inside what wraps it for many devices or for PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _is_prompted(model: Any) -> bool:
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING")


def plan_batches(model: nn.Module, examples: Examples, *, equal: bool = False) -> list[list[int]]:
    """Divide examples into batches of similar length, the longest first; of equal length for MIXING architectures.

    Args:
        model: A classifier.
        examples: What it is to be run on.
        equal: Whether the lengths are to be equal, whatever the architecture.

    Returns:
        The indices of each batch's examples.
    """
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    equal = equal or _classifier(model).config.model_type in MIXING
    groups = [list(group) for _, group in itertools.groupby(order, lambda index: lengths[index] if equal else 0)]
    return [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]


def for_each_batch(
    model: nn.Module,
    examples: Examples,
    precision: str,
    use: Callable[[Output, dict[str, torch.Tensor], list[int]], None],
    progress: Progress = silent,
    stage: str = "predict",
    *,
    hidden: bool = False,
) -> None:
    """Run a model over examples in evaluation mode, without gradients.

    Args:
        model: A classifier; its mode is restored afterwards.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        use: Called with the output, the batch and the indices of its examples.
        progress: Told of each batch.
        stage: What to call this there.
        hidden: Whether the output has hidden states.
    """
    import torch

    on = next(model.parameters()).device
    done = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, on):
            for indices in plan_batches(model, examples):
                batch = {name: tensor.to(on) for name, tensor in examples.batch(indices).items()}
                inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
                use(forward(model, inputs, hidden=hidden), batch, indices)
                done += len(indices)
                progress(stage, done, len(examples), {})
    finally:
        model.train(was_training)


def predict(model: nn.Module, examples: Examples, precision: str, progress: Progress = silent) -> torch.Tensor:
    """Compute a classifier's logits.

    Args:
        model: A classifier.
        examples: What to run it on.
        precision: `bf16` or `fp32`.
        progress: Told of each batch.

    Returns:
        Logits, examples × classes, in float32 on the CPU, in the order of the examples.
    """
    import torch

    rows: list[tuple[list[int], torch.Tensor]] = []

    def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        rows.append((indices, output.logits.float().cpu()))

    for_each_batch(model, examples, precision, keep, progress)
    logits = torch.empty(len(examples), rows[0][1].shape[1])
    for indices, part in rows:
        logits[indices] = part
    return logits
