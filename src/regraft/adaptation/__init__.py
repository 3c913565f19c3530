"""Adaptations: what tuning left behind, on disk and as models, and the outcome folder that records one."""

from regraft.adaptation.adaptation import Adaptation, load_adaptation
from regraft.adaptation.graft import check_fit, write_graft
from regraft.adaptation.lora import (
    ExtractedLora,
    extract_lora,
    lora_settings,
    merge_lora,
    merged_config,
    write_lora,
)
from regraft.adaptation.model import attach_lora, fresh_model, load_model, load_strictly, lora_config, save_model
from regraft.adaptation.outcome import Outcome, find_outcome, load_outcome, write_outcome
from regraft.adaptation.vocabulary import match_vocabularies

__all__ = [
    "Adaptation",
    "ExtractedLora",
    "Outcome",
    "attach_lora",
    "check_fit",
    "extract_lora",
    "find_outcome",
    "fresh_model",
    "load_adaptation",
    "load_model",
    "load_outcome",
    "load_strictly",
    "lora_config",
    "lora_settings",
    "match_vocabularies",
    "merge_lora",
    "merged_config",
    "save_model",
    "write_graft",
    "write_lora",
    "write_outcome",
]
