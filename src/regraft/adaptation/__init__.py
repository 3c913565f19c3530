"""Adaptations: what tuning left behind, on disk and as models, and the outcome folder that records one."""

from regraft.adaptation.adaptation import Adaptation, load_adaptation, write_lineage
from regraft.adaptation.extract import ExtractedLora, extract_lora, write_lora
from regraft.adaptation.fit import differing_settings
from regraft.adaptation.graft import check_fit, plain_adapter, write_graft
from regraft.adaptation.head import HEADS, Head, change_head, stored_labels
from regraft.adaptation.kinds import KINDS, kind_of, new_config, read_config, settings
from regraft.adaptation.merge import MergedLora, lora_settings, merge_lora
from regraft.adaptation.model import attach, fresh_model, load_model
from regraft.adaptation.outcome import Outcome, find_outcome, is_right, load_outcome, write_outcome
from regraft.adaptation.save import save_model, write_adapter, write_tokenizer
from regraft.adaptation.strict import load_strictly

__all__ = [
    "HEADS",
    "KINDS",
    "Adaptation",
    "ExtractedLora",
    "Head",
    "MergedLora",
    "Outcome",
    "attach",
    "change_head",
    "check_fit",
    "differing_settings",
    "extract_lora",
    "find_outcome",
    "fresh_model",
    "is_right",
    "kind_of",
    "load_adaptation",
    "load_model",
    "load_outcome",
    "load_strictly",
    "lora_settings",
    "merge_lora",
    "new_config",
    "plain_adapter",
    "read_config",
    "save_model",
    "settings",
    "stored_labels",
    "write_adapter",
    "write_graft",
    "write_lineage",
    "write_lora",
    "write_outcome",
    "write_tokenizer",
]
