"""Adaptations as models in memory: wholly loaded, or an error that lists what did not fit."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import BASE_CHANGING_INITS
from regraft.adaptation.fit import check_beside_body, check_body, check_computing, check_settings
from regraft.adaptation.kinds import check_start, read_config
from regraft.adaptation.layout import as_loaded, named_twice
from regraft.adaptation.lora import ADAPTER, START
from regraft.adaptation.strict import load_strictly
from regraft.checkpoint import FLOATING, dtype_of, shape_of
from regraft.errors import CheckpointError, KindError, MismatchError, RecipeError
from regraft.progress import quiet
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.adaptation.kinds import Config
    from regraft.base import Base
    from regraft.errors import RegraftError


def fresh_model(base: Base, labels: Sequence[str], seed: int) -> Any:
    """Load a base with an untrained classification head.

    A decoder is given the tokenizer's padding token, for plain transformers to read batches right once it is saved.

    Args:
        base: The base.
        labels: The label names, in the order of the head's outputs.
        seed: What the head is drawn from.

    Returns:
        The model, in float32 on the CPU; every tensor of the body comes from the base.

    Raises:
        CheckpointError: A tensor of the body is missing, has another shape, or has no place in the model.
    """
    model = _fresh(base, labels, seed)[0]
    if base.is_decoder:
        model.config.pad_token_id = base.pad_id
    return model


def load_model(adaptation: Adaptation, base: Base, labels: Sequence[str], *, trainable: bool = False) -> Any:
    """Load an adaptation as a model: wholly, or not at all.

    Args:
        adaptation: The tuned weights.
        base: The base an adapter is put on, or that a full fine-tune came from.
        labels: The label names, in the order of the head's outputs.
        trainable: Whether an adapter can be tuned further, rather than being frozen.

    Returns:
        The model in float32 on the CPU. Every stored tensor is in it, and nothing in it is left as it was drawn.

    Raises:
        CheckpointError: A tensor of the adaptation is missing or has no place in the model.
        MismatchError: The adaptation's head or matrices have other sizes, or its settings are for another base.
    """
    from transformers import AutoModelForSequenceClassification

    if adaptation.kind == "full":
        check_computing(adaptation, base)
        model, _ = load_strictly(AutoModelForSequenceClassification, adaptation.path, None, dtype="float32")
        check_body(adaptation, base)
        check_beside_body(adaptation, base)
        _check_tokens(adaptation, model, base)
        if model.config.num_labels != len(labels):
            raise MismatchError(_wrong_labels(adaptation, model.config.num_labels, labels))
        return model
    check_start(adaptation)
    check_settings(adaptation, base)
    model, fresh = _fresh(base, labels, seed=0)
    if adaptation.kind == "bottleneck":
        adapted, landed = _load_bottleneck(adaptation, model)
    else:
        adapted, landed = _load_peft(adaptation, model, labels, trainable)
    stored = as_loaded(adaptation.checkpoint, adapted) if adaptation.kind == "lora" else adaptation.checkpoint
    _account(adaptation, base, labels, fresh, landed, stored)
    if adaptation.kind == "bottleneck" and not trainable:
        adapted.requires_grad_(False)
    return adapted


def _check_tokens(adaptation: Adaptation, model: Any, base: Base) -> None:
    """Refuse a fine-tune whose embeddings have no row for a token that texts are read with."""
    if base.architecture.embeddings is None:  # as CANINE, which hashes characters
        return
    rows = model.get_input_embeddings().weight.shape[0]
    # tokens beyond the base's own rows are refused where texts hold them
    token, highest = max(
        ((token, i) for token, i in base.tokenizer.get_vocab().items() if i < base.rows), key=lambda item: item[1]
    )
    if highest >= rows:
        raise MismatchError(
            f"{adaptation.path}: its embeddings have {rows:,} rows, and its texts are read with tokens up to {token!r} "
            f"({highest:,}). Was it tuned on {base.path}? If tokens were taken out, copy its tokenizer into it."
        )


def attach(model: Any, base: Base, config: Config, seed: int) -> Any:
    """Put a fresh adapter on a model that has a fresh head.

    Args:
        model: From `fresh_model`.
        base: The base it came from.
        config: What kind of adapter; the heads, and a pooler that the base lacks, are added to what it tunes.
        seed: What the adapter is drawn from.

    Returns:
        The model with the adapter: that and the head are trained, its body is frozen.

    Raises:
        KindError: The architecture cannot take that kind.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from regraft.adaptation.bottleneck import BottleneckConfig, attach_bottlenecks

    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix and name != "dropout"]
    whole = sorted({*(getattr(config, "modules_to_save", None) or ()), *heads, *_fresh_poolers(base)})
    set_seed(seed)
    model.config.pad_token_id = base.config.pad_token_id  # an adapter's folder names none of its own
    if isinstance(config, BottleneckConfig):
        present = tuple(name for name in whole if name in heads or name == "pooler")
        return attach_bottlenecks(model, dataclasses.replace(config, modules_to_save=present))
    untyped: Any = copy.deepcopy(config)
    untyped.task_type, untyped.inference_mode = "SEQ_CLS", False
    untyped.modules_to_save, untyped.base_model_name_or_path = whole, base.name
    with quiet():
        try:
            adapted: Any = get_peft_model(model, untyped, adapter_name=ADAPTER)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KindError(f"{base.path}: PEFT cannot put {config.peft_type} on it ({error}).") from error
        if str(getattr(config, "init_lora_weights", True)).lower().startswith(BASE_CHANGING_INITS):
            adapted.regraft_start = {name: t.clone() for name, t in peft_state(adapted).items() if ".lora_" in name}
            _check_ranks(adapted, base)
    return adapted


def _check_ranks(adapted: Any, base: Base) -> None:
    """Refuse a start taken out of matrices that have fewer directions than its rank: PEFT could not load what it is."""
    for name, module in adapted.named_modules():
        rank, factor = getattr(module, "r", {}), getattr(module, "lora_A", {})
        if ADAPTER in factor and factor[ADAPTER].weight.shape[0] < rank[ADAPTER]:
            raise RecipeError(
                f"{base.path}: rank {rank[ADAPTER]} is more than {name.removeprefix(START)} has directions "
                f"({factor[ADAPTER].weight.shape[0]}), and this LoRA takes its start out of them. Choose at most that."
            )


def peft_state(model: Any, *, embeddings: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a PEFT model as they are stored.

    Args:
        model: A PEFT model.
        embeddings: Whether the base's embeddings are among them, which PEFT stores under a LoRA on them by default.

    Returns:
        The tensors by stored name.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=embeddings
    )
    return state


def _fresh(base: Base, labels: Sequence[str], seed: int) -> tuple[Any, list[str]]:
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(seed)
    model, fresh = load_strictly(AutoModelForSequenceClassification, base.path, base.prefix, **_head_config(labels))
    if base.own_rows:
        model.resize_token_embeddings(base.own_rows, mean_resizing=False)
    heads = {n: t for n, t in model.state_dict().items() if not n.startswith(base.prefix + ".")}
    if not heads.keys() & set(fresh):  # the base is a classifier itself: its head is for labels of its own
        set_seed(seed)
        drawn = AutoModelForSequenceClassification.from_config(model.config).state_dict()  # type: ignore[no-untyped-call]
        for name, tensor in heads.items():
            tensor.copy_(drawn[name])
        fresh = sorted({*fresh, *heads})
    return model, fresh


def _load_peft(
    adaptation: Adaptation, model: Any, labels: Sequence[str], trainable: bool
) -> tuple[Any, dict[str, torch.Tensor]]:
    import torch
    from peft import PeftModel

    config: Any = read_config(adaptation)
    can_be_tuned = trainable and not adaptation.virtual_tokens
    with quiet():
        try:
            adapted = PeftModel.from_pretrained(
                model,
                str(adaptation.path),
                adapter_name=ADAPTER,
                config=config,
                is_trainable=can_be_tuned,
                ignore_mismatched_sizes=True,
            )
            if trainable and not can_be_tuned:  # PEFT tunes stored virtual tokens no further of its own accord
                config.inference_mode = False
                encoder: Any = adapted.prompt_encoder[ADAPTER]
                if adaptation.kind == "prefix":  # what projected them was not saved: they are tuned themselves
                    encoder.prefix_projection = config.prefix_projection = False
                elif adaptation.kind == "p-tuning":
                    encoder.encoder_type, encoder.mlp_head = "MLP", torch.nn.Identity()
                for name, parameter in adapted.named_parameters():
                    parameter.requires_grad_("prompt_encoder." in name or ".modules_to_save." in name)
            state = peft_state(adapted)
            if others := adaptation.checkpoint.tensors.keys() - state.keys():
                # embeddings under a LoRA, or with rows more
                every = peft_state(adapted, embeddings=True)
                state |= {name: every[name] for name in others if name in every}
            return adapted, state
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OSError, ImportError) as error:
            raise MismatchError(
                f"{adaptation.path}: PEFT cannot load it on {model.config.name_or_path} with {len(labels)} labels "
                f"({', '.join(labels[:8])}): {str(error).strip()[:400]}"
            ) from error


def _load_bottleneck(adaptation: Adaptation, model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    from regraft.adaptation.bottleneck import attach_bottlenecks, bottleneck_state, set_bottleneck_state

    config: Any = read_config(adaptation)
    try:
        attach_bottlenecks(model, config)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path}: {error}") from error
    expected = bottleneck_state(model)
    stored = {name.removeprefix(START): name for name in adaptation.checkpoint}
    infos = adaptation.checkpoint.tensors
    if {name: tuple(t.shape) for name, t in expected.items()} == {n: infos[s].shape for n, s in stored.items()}:
        set_bottleneck_state(model, {name: adaptation.checkpoint[stored[name]] for name in expected})
    return model, {START + name: tensor for name, tensor in bottleneck_state(model).items()}


def _account(
    adaptation: Adaptation,
    base: Base,
    labels: Sequence[str],
    fresh: Sequence[str],
    landed: dict[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> None:
    """Hold what is in the model against what is stored: the same names, shapes and values, and no fresh head left."""
    import torch

    unfilled = [name for name in fresh if not {START + name, START.replace("model.", "", 1) + name} & landed.keys()]
    shared = sorted(landed.keys() & stored.keys())
    misshapen = [name for name in shared if tuple(landed[name].shape) != shape_of(stored, name)]
    quantised = [name for name in shared if landed[name].is_floating_point() and dtype_of(stored, name) not in FLOATING]
    lists = {
        "missing": sorted(landed.keys() - stored.keys()),
        "without a place": sorted(stored.keys() - landed.keys()),
        "of another shape": [f"{n} {shape_of(stored, n)}, expected {tuple(landed[n].shape)}" for n in misshapen],
        "stored as no floating-point numbers": [f"{name} ({dtype_of(stored, name)})" for name in quantised],
        "in the model that neither the base nor the adaptation fills": unfilled,
    }
    if any(lists.values()):
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in lists.items() if names)
        refusal: type[RegraftError] = MismatchError if misshapen else CheckpointError
        raise refusal(
            f"{adaptation.path}: does not fit {base.path} with {len(labels)} labels ({', '.join(labels[:8])}). "
            f"Tensors {told}.{named_twice(stored.keys() - landed.keys())}"
        )
    for name in shared:
        value = landed[name].cpu()
        if not torch.equal(value.nan_to_num(), stored[name].to(value.dtype).nan_to_num()):
            raise CheckpointError(
                f"{adaptation.path}: tensor {name!r} did not land in the model as it is stored: a {adaptation.kind} "
                "set up like this cannot be loaded exactly (or not be tuned further)."
            )


def _head_config(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": None,  # a base's own may be regression, and what is tuned here is a classifier
        "dtype": "float32",
    }


def _fresh_poolers(base: Base) -> list[str]:
    return [] if any(is_optional(name) for name in base.body) else ["pooler"] * base.has_pooler


def _wrong_labels(adaptation: Adaptation, found: int, labels: Sequence[str]) -> str:
    return (
        f"{adaptation.path}: its head has {found} labels"
        f"{' (' + ', '.join(adaptation.labels) + ')' if adaptation.labels else ''}, the task has {len(labels)} "
        f"({', '.join(labels)}). Give the task it was tuned on."
    )
