"""Pure arithmetic on named tensors: no files, no models."""

from regraft.weights.delta import graft
from regraft.weights.distance import Distance, distance

__all__ = ["Distance", "distance", "graft"]
