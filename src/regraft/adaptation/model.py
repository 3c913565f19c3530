"""Adaptations as models in memory: wholly loaded, or an error that lists what did not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError, MismatchError
from regraft.progress import quiet
from regraft.upgrade import is_optional

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from peft import LoraConfig

    from regraft.adaptation.adaptation import Adaptation
    from regraft.upgrade import Base

ADAPTER = "default"


def fresh_model(base: Base, labels: Sequence[str], seed: int) -> Any:
    """Load a base with an untrained classification head.

    Args:
        base: The base.
        labels: The label names, in the order of the head's outputs.
        seed: What the head is drawn from.

    Returns:
        The model, in float32 on the CPU; every tensor of the body comes from the base.

    Raises:
        CheckpointError: A tensor of the body is missing, has another shape, or has no place in the model.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(seed)
    model, _ = load_strictly(AutoModelForSequenceClassification, base.path, base.prefix, **_head_config(labels))
    model.config.pad_token_id = base.tokenizer.pad_token_id
    return model


def load_model(adaptation: Adaptation, base: Base, labels: Sequence[str], *, trainable: bool = False) -> Any:
    """Load an adaptation as a model, a LoRA on the base that is given.

    Args:
        adaptation: The tuned weights.
        base: The base a LoRA is put on; a full fine-tune takes its tokenizer only.
        labels: The label names, in the order of the head's outputs.
        trainable: Whether a LoRA shall be tuned further, rather than be frozen.

    Returns:
        The model in float32 on the CPU.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or has no place in the model.
        MismatchError: The adaptation's head or matrices have other sizes.
    """
    from transformers import AutoModelForSequenceClassification

    if adaptation.kind == "full":
        model, _ = load_strictly(AutoModelForSequenceClassification, adaptation.path, None, dtype="float32")
        if model.config.num_labels != len(labels):
            raise MismatchError(_wrong_labels(adaptation, model.config.num_labels, labels))
        return model
    return _load_lora(adaptation, fresh_model(base, labels, seed=0), labels, trainable)


def attach_lora(model: Any, base: Base, config: LoraConfig, seed: int) -> Any:
    """Put a fresh LoRA on a model that has a fresh head.

    Args:
        model: From `fresh_model`.
        base: The base it came from.
        config: Rank, targets and so on; the heads, and a pooler that the base lacks, are added to what it tunes.
        seed: What the LoRA is drawn from.

    Returns:
        The PEFT model: its LoRA and head are trained, its body is frozen.
    """
    from peft import get_peft_model
    from transformers import set_seed

    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix and name != "dropout"]
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads, *_fresh_poolers(base)})
    config.inference_mode = False
    config.base_model_name_or_path = base.name
    set_seed(seed)
    with quiet():
        return get_peft_model(model, config)


def lora_config(adaptation: Adaptation) -> LoraConfig:
    """Read how a LoRA was set up, to make a fresh one like it.

    Args:
        adaptation: A LoRA.

    Returns:
        Its PEFT config.
    """
    from peft import LoraConfig

    config: LoraConfig = LoraConfig.from_pretrained(str(adaptation.path))
    return config


def save_model(model: Any, base: Base, into: Path) -> None:
    """Write a tuned model as a plain transformers or PEFT folder.

    Args:
        model: From `fresh_model`, `attach_lora` or `load_model`.
        base: The base it lives on.
        into: The folder to fill.
    """
    from peft import PeftModel

    with quiet():
        if isinstance(model, PeftModel):
            model.peft_config[ADAPTER].base_model_name_or_path = base.name
            model.save_pretrained(str(into), save_embedding_layers=False)
            (into / "README.md").unlink(missing_ok=True)  # the outcome has a model card with figures in it
        else:
            model.save_pretrained(into)
    base.tokenizer.save_pretrained(into)


def load_strictly(architecture: Any, path: Path, prefix: str | None, **options: Any) -> tuple[Any, list[str]]:
    """Load a model so that every stored tensor of its body lands and every one it has is filled.

    Args:
        architecture: A transformers auto class.
        path: The folder.
        prefix: Only tensors under this name must match, heads and poolers may be fresh; None if all must match.
        options: Passed to `from_pretrained`.

    Returns:
        The model in evaluation mode, and the names of what is fresh in it.

    Raises:
        CheckpointError: Something is missing, left over or misshapen; the message lists it.
    """
    with quiet():
        try:
            model, report = architecture.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
            )
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: transformers cannot load it ({error}).") from error

    def matters(name: str) -> bool:
        if prefix is None:
            return True
        inner = name.removeprefix(prefix + ".")
        return (name != inner or name in body) and not is_optional(inner)

    body = set(model.base_model.state_dict())
    problems = {
        "missing": sorted(filter(matters, report["missing_keys"])),
        "without a place": sorted(filter(matters, report["unexpected_keys"])),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"] if matters(entry[0])),
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in problems.items() if names)
        raise CheckpointError(f"{path}: its tensors do not fit a {type(model).__name__}: {lists}.")
    return model, sorted(report["missing_keys"])


def _load_lora(adaptation: Adaptation, model: Any, labels: Sequence[str], trainable: bool) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    with quiet():
        try:
            adapted = PeftModel.from_pretrained(
                model, str(adaptation.path), adapter_name=ADAPTER, is_trainable=trainable
            )
        except (RuntimeError, ValueError, KeyError) as error:
            stored = adaptation.checkpoint.tensors
            heads = {n: i.shape for n, i in stored.items() if "lora_" not in n and n.endswith("weight")}
            raise MismatchError(
                f"{adaptation.path}: does not fit its base {model.config.name_or_path} with {len(labels)} labels "
                f"({', '.join(labels[:8])}). Its own head has the shapes {heads}. ({str(error).strip()[:400]})"
            ) from error
        expected = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    missing = sorted(expected.keys() - adaptation.checkpoint.keys())
    left_over = sorted(adaptation.checkpoint.keys() - expected.keys())
    if missing or left_over:
        raise CheckpointError(
            f"{adaptation.path}: {len(missing)} tensors missing ({', '.join(missing[:4])}), {len(left_over)} without a "
            f"place on {model.config.name_or_path} ({', '.join(left_over[:4])})."
        )
    return adapted


def _head_config(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": "float32",
    }


def _fresh_poolers(base: Base) -> list[str]:
    return [] if any(is_optional(name) for name in base.body) else ["pooler"] * _has_pooler(base)


def _has_pooler(base: Base) -> bool:
    import torch
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification
    with torch.device("meta"):
        body = auto.from_config(base.config).base_model
    return getattr(body, "pooler", None) is not None


def _wrong_labels(adaptation: Adaptation, found: int, labels: Sequence[str]) -> str:
    return (
        f"{adaptation.path}: its head has {found} labels"
        f"{' (' + ', '.join(adaptation.labels) + ')' if adaptation.labels else ''}, the task has {len(labels)} "
        f"({', '.join(labels)}). Give the task it was tuned on."
    )
