"""The task types that a model of transformers may belong to, by its class and its `problem_type`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError
from regraft.task.types import task_types

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from regraft.task import Task


def matching_types(config: Mapping[str, Any]) -> list[type[Task]]:
    """Return the task types with a model's transformers class and its `problem_type`.

    Args:
        config: The content of its `config.json`.
    """
    problem_type = _problem_type(config)
    return [task_type for task_type in _types_of_class(config) if problem_type in task_type.problem_types]


def check_model_class(folder: Path, config: dict[str, Any]) -> None:
    """Check that a model belongs to a task type.

    Args:
        folder: The model's folder, for error messages.
        config: The content of its `config.json`.

    Raises:
        CheckpointError: No task type has its class and its `problem_type`, or it is a cross-encoder whose scores are a
            function of its outputs that transformers does not compute.
    """
    _check_activation(folder, config)
    if matching_types(config):
        return
    if _types_of_class(config):
        problem_types = {
            problem_type for task_type in task_types().values() for problem_type in task_type.problem_types
        }
        supported = {str(problem_type) for problem_type in problem_types if problem_type}
        raise CheckpointError(
            f"{folder}: was tuned for {_problem_type(config)!r:.100}; supported are {' or '.join(sorted(supported))}. "
            "Tune it again for one of them."
        )
    raise CheckpointError(
        f"{folder}: is neither a classifier nor a decoder (its config.json names {config.get('architectures')}). Use "
        "the folder of a tuned model."
    )


def _types_of_class(config: Mapping[str, Any]) -> list[type[Task]]:
    """Return the task types whose transformers class a config names, whatever its `problem_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return []
    language_models = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # such as GPT2LMHeadModel

    def is_class_of(name: str, task_type: type[Task]) -> bool:
        is_language_model = task_type.head_in_base and name in language_models
        return is_language_model or task_type.auto_class.removeprefix("AutoModelFor") in name

    return [
        task_type for task_type in task_types().values() if all(is_class_of(str(name), task_type) for name in names)
    ]


def _problem_type(config: Mapping[str, Any]) -> Any:
    """Return the `problem_type` of a config; of a sequence classifier with one output, transformers' default."""
    problem_type = config.get("problem_type")
    names = config.get("architectures")
    is_sequence_classifier = isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)
    if problem_type is None and is_sequence_classifier and _has_one_output(config):
        return "regression"  # as in transformers' loss of sequence classifiers
    return problem_type


def _has_one_output(config: Mapping[str, Any]) -> bool:
    names = config.get("id2label")
    return names.keys() == {"0"} if isinstance(names, dict) else config.get("num_labels") == 1


def _check_activation(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a cross-encoder of sentence-transformers that applies a function to its one output."""
    settings = config.get("sentence_transformers")
    activation = settings.get("activation_fn") if isinstance(settings, dict) else None
    activation = str(activation or config.get("sbert_ce_default_activation_function") or "Identity").rpartition(".")[2]
    if activation != "Identity" and _has_one_output(config):
        raise CheckpointError(
            f"{folder}: is a cross-encoder of sentence-transformers whose score is the {activation} of its output, but "
            "transformers, and so regraft, has the output itself as the prediction. Use a cross-encoder trained with "
            "activation_fn=torch.nn.Identity(), or a classifier with two outputs."
        )
