"""Arithmetic on single tensors and on checkpoints, whose results are computed as they are written."""

from regraft.weights.checkpoints import Counterparts, apply_all, counterparts, delta_all, graft_all, interpolate_all
from regraft.weights.delta import delta, graft, interpolate
from regraft.weights.distance import Distance, distance, distances
from regraft.weights.effect import match_effect, rotation
from regraft.weights.lora import (
    add_factors,
    compress_factors,
    dora_weight,
    inner_product,
    lora_delta,
    merge_experts,
    scaling,
    subtract_factors,
)
from regraft.weights.low_rank import low_rank
from regraft.weights.names import NamedTensors, align, is_optional, kind_of, layer_of
from regraft.weights.project import leave_one_out_errors, project
from regraft.weights.shrink import drop, mask_conflicts, orthogonal_part, trim
from regraft.weights.subspace import subspace_overlap
from regraft.weights.vocabulary import RowMatch, graft_rows, has_vocabulary_rows, match_rows

__all__ = [
    "Counterparts",
    "Distance",
    "NamedTensors",
    "RowMatch",
    "add_factors",
    "align",
    "apply_all",
    "compress_factors",
    "counterparts",
    "delta",
    "delta_all",
    "distance",
    "distances",
    "dora_weight",
    "drop",
    "graft",
    "graft_all",
    "graft_rows",
    "has_vocabulary_rows",
    "inner_product",
    "interpolate",
    "interpolate_all",
    "is_optional",
    "kind_of",
    "layer_of",
    "leave_one_out_errors",
    "lora_delta",
    "low_rank",
    "mask_conflicts",
    "match_effect",
    "match_rows",
    "merge_experts",
    "orthogonal_part",
    "project",
    "rotation",
    "scaling",
    "subspace_overlap",
    "subtract_factors",
    "trim",
]
