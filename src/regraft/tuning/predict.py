"""A model's outputs on examples, batches being of similar length."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from regraft.progress import Progress
    from regraft.tuning.examples import Examples

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Output:
    """What a classifier gives for a batch.

    Args:
        logits: batch × classes.
        hidden: Of the embeddings and each layer, batch × tokens × width; virtual tokens come first.
    """

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()


def device() -> torch.device:
    """Tell where models run.

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
    """Run a classifier of any kind on a batch that is padded on the right.

    Two things PEFT leaves undone are done here: hidden states under a prefix, and, for a prompt before a decoder, that
    the head reads the last token rather than padding.

    Args:
        model: A classifier, with or without an adapter.
        batch: Its inputs, `attention_mask` among them.
        hidden: Whether hidden states are wanted.
        parameters: By name, what to compute with in place of the model's own; gradients flow through them.

    Returns:
        Its output.
    """
    classifier = getattr(model, "module", model)
    if hasattr(classifier, "get_base_model"):
        classifier = classifier.get_base_model()
    kept: dict[str, Any] = {}
    mask = batch["attention_mask"]

    def ask(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(_: Any, args: Any, output: Any) -> Any:
        kept["hidden"] = output.hidden_states
        return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})

    def append_last(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        import torch

        rows, last = last_tokens(logits, mask)
        return torch.cat([logits, logits[rows, last][:, None]], dim=1)

    handles = []
    if hidden:
        body = classifier.base_model
        handles = [body.register_forward_pre_hook(ask, with_kwargs=True), body.register_forward_hook(keep)]
    if hasattr(classifier, "score") and _is_prompted(model):  # it reads the last place where it is given embeddings
        handles.append(classifier.score.register_forward_hook(append_last))
    try:
        if parameters is None:
            logits = model(**batch).logits
        else:
            from torch.func import functional_call

            logits = functional_call(model, dict(parameters), (), dict(batch)).logits
    finally:
        for handle in handles:
            handle.remove()
    return Output(logits, kept.get("hidden", ()))


def last_tokens(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the last token of each text.

    Args:
        states: batch × tokens × width; virtual tokens come first.
        mask: The attention mask without virtual tokens, batch × tokens, padded on the right.

    Returns:
        Two indices of `states`: the rows and the places.
    """
    import torch

    virtual = states.shape[1] - mask.shape[1]
    return torch.arange(len(mask), device=mask.device), virtual + mask.sum(dim=1) - 1


def _is_prompted(model: Any) -> bool:
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    return bool(config and config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING")


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
        hidden: Whether the output shall have hidden states.
    """
    import torch

    on = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: -len(examples.columns["input_ids"][i]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, on):
            for start in range(0, len(order), BATCH):
                indices = order[start : start + BATCH]
                batch = {name: tensor.to(on) for name, tensor in examples.batch(indices).items()}
                inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
                use(forward(model, inputs, hidden=hidden), batch, indices)
                progress(stage, start + len(indices), len(order), {})
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
