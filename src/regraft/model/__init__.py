"""Passes of models over examples: outputs, deployments, blockwise forward passes and second moments."""

from regraft.model.batches import predict
from regraft.model.deployment import Deployment, match_labels, measure_effect
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.model.moments import input_moments

__all__ = ["Deployment", "device", "encode", "input_moments", "match_labels", "measure_effect", "predict"]
