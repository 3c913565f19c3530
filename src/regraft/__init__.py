"""Carry fine-tunes and adapters over to an upgraded base model.

Source: Qin et al., Recyclable Tuning for Continual Pre-training, Findings of ACL 2023 (arXiv:2305.08702).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.adaptation import Adaptation, Outcome, load_adaptation, load_outcome
    from regraft.adaptation.bottleneck_config import BottleneckConfig
    from regraft.base import Base
    from regraft.diagnosis import Check, Diagnosis, Questions, check, diagnose
    from regraft.errors import RegraftError
    from regraft.methods import Comparison, Conversion, compare, convert, recycle, tune
    from regraft.recipe import Recipe
    from regraft.task import (
        MultiLabelClassification,
        Task,
        TextClassification,
        TextGeneration,
        TextRegression,
        TokenClassification,
    )
    from regraft.tuning import Corpus, Distillation, pretrain
    from regraft.upgrade import Upgrade

# The modules that define the public names, which are imported on first use.
_NAMES_BY_MODULE = {
    "adaptation": ("Adaptation", "Outcome", "load_adaptation", "load_outcome"),
    "adaptation.bottleneck_config": ("BottleneckConfig",),
    "base": ("Base",),
    "diagnosis": ("Check", "Diagnosis", "Questions", "check", "diagnose"),
    "errors": ("RegraftError",),
    "methods": ("Comparison", "Conversion", "compare", "convert", "recycle", "tune"),
    "recipe": ("Recipe",),
    "task": (
        "MultiLabelClassification",
        "Task",
        "TextClassification",
        "TextGeneration",
        "TextRegression",
        "TokenClassification",
    ),
    "tuning": ("Corpus", "Distillation", "pretrain"),
    "upgrade": ("Upgrade",),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Adaptation",
    "Base",
    "BottleneckConfig",
    "Check",
    "Comparison",
    "Conversion",
    "Corpus",
    "Diagnosis",
    "Distillation",
    "MultiLabelClassification",
    "Outcome",
    "Questions",
    "Recipe",
    "RegraftError",
    "Task",
    "TextClassification",
    "TextGeneration",
    "TextRegression",
    "TokenClassification",
    "Upgrade",
    "check",
    "compare",
    "convert",
    "diagnose",
    "load_adaptation",
    "load_outcome",
    "pretrain",
    "recycle",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing regraft loads neither torch nor transformers."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"regraft.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
