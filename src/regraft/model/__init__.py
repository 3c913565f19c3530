"""Running models: their outputs on examples, deployments, blockwise forward passes, second moments."""

from regraft.model.batches import predict
from regraft.model.deployment import Deployment, match_labels, measure_effect
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.model.moments import input_moments

__all__ = ["Deployment", "measure_effect", "device", "encode", "input_moments", "match_labels", "predict"]
