"""Running a model, apart from training it: its outputs on examples, deployments, blockwise passes, second moments."""

from regraft.model.batches import predict
from regraft.model.device import device
from regraft.model.examples import Examples, encode
from regraft.model.moments import input_moments

__all__ = ["Examples", "device", "encode", "input_moments", "predict"]
