"""Adaptations, the results of tuning a base: as files, as models in memory, and as outcome folders."""

from regraft.adaptation.adaptation import Adaptation
from regraft.adaptation.adapter_folder import set_served_base, write_adapter
from regraft.adaptation.compatibility import differing_settings
from regraft.adaptation.extract import ExtractedLora, extract_lora, write_lora
from regraft.adaptation.fresh import fresh_model
from regraft.adaptation.graft import write_graft
from regraft.adaptation.head import HEAD_POLICIES, HeadPolicy, change_head
from regraft.adaptation.kinds import KINDS, json_settings, kind_of_config, new_config
from regraft.adaptation.labels import check_task_type, label_tensor_names, stored_head
from regraft.adaptation.load import load_adaptation
from regraft.adaptation.merge import MergedLora, merge_lora, read_lora_config
from regraft.adaptation.model import (
    initial_factors,
    keeps_base,
    load_model,
    load_old_model,
    prepare_for_tuning,
    save_model,
)
from regraft.adaptation.outcome import Outcome, find_outcome, is_right, load_outcome, write_outcome
from regraft.adaptation.record import write_lineage
from regraft.adaptation.servable import SERVERS, Server, ServingProblem, check_servable, servers_named
from regraft.adaptation.strict import load_strictly
from regraft.adaptation.tokenizer import write_tokenizer
from regraft.adaptation.uniform import uniform_lora, write_uniform

__all__ = [
    "HEAD_POLICIES",
    "KINDS",
    "SERVERS",
    "Adaptation",
    "ExtractedLora",
    "HeadPolicy",
    "MergedLora",
    "Outcome",
    "Server",
    "ServingProblem",
    "change_head",
    "check_servable",
    "check_task_type",
    "differing_settings",
    "extract_lora",
    "find_outcome",
    "fresh_model",
    "initial_factors",
    "is_right",
    "json_settings",
    "keeps_base",
    "kind_of_config",
    "label_tensor_names",
    "load_adaptation",
    "load_model",
    "load_old_model",
    "load_outcome",
    "load_strictly",
    "merge_lora",
    "new_config",
    "prepare_for_tuning",
    "read_lora_config",
    "save_model",
    "servers_named",
    "set_served_base",
    "stored_head",
    "uniform_lora",
    "write_adapter",
    "write_graft",
    "write_lineage",
    "write_lora",
    "write_outcome",
    "write_tokenizer",
    "write_uniform",
]
