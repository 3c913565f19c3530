"""Running models: their outputs on examples, deployments, blockwise forward passes, second moments."""

from regraft.model.batches import predict
from regraft.model.deployment import Deployment, check_effect, match_labels
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.model.moments import input_moments

__all__ = ["Deployment", "check_effect", "device", "encode", "input_moments", "match_labels", "predict"]
