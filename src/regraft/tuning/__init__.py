"""Training: tuning on a task, distillation, and continual pre-training, all on transformers' Trainer."""

from regraft.model.corpus import Corpus
from regraft.recipe import Recipe
from regraft.tuning.anchor import Anchoring
from regraft.tuning.distill import Distillation, distillation_loss
from regraft.tuning.interpolate import Interpolation
from regraft.tuning.on_policy import OnPolicy
from regraft.tuning.order import plan_order
from regraft.tuning.pretrain import Replay, pretrain, pretrain_chain
from regraft.tuning.tracking import tracking
from regraft.tuning.tune import LEARNING_RATES, Teacher, learning_rate, tune_model
from regraft.tuning.units import fresh_scaled_model

__all__ = [
    "LEARNING_RATES",
    "Anchoring",
    "Corpus",
    "Distillation",
    "Interpolation",
    "OnPolicy",
    "Recipe",
    "Replay",
    "Teacher",
    "distillation_loss",
    "fresh_scaled_model",
    "learning_rate",
    "plan_order",
    "pretrain",
    "pretrain_chain",
    "tracking",
    "tune_model",
]
