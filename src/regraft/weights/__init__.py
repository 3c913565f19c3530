"""Arithmetic on named tensors, one at a time or whole checkpoints as they are written: no models."""

from regraft.weights.delta import delta, graft, interpolate
from regraft.weights.distance import Distance, distance, distances
from regraft.weights.names import align, kind_of, layer_of
from regraft.weights.whole import delta_all, graft_all, interpolate_all

__all__ = [
    "Distance",
    "align",
    "delta",
    "delta_all",
    "distance",
    "distances",
    "graft",
    "graft_all",
    "interpolate",
    "interpolate_all",
    "kind_of",
    "layer_of",
]
