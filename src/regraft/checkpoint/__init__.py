"""Tensors on disk: a lazy reader, fingerprints, and folders that are whole or not there."""

from regraft.checkpoint.fingerprint import fingerprint
from regraft.checkpoint.folder import publish, resumable_folder, write_atomic
from regraft.checkpoint.header import TensorInfo, read_header
from regraft.checkpoint.reader import Checkpoint
from regraft.checkpoint.writer import write_safetensors

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "fingerprint",
    "publish",
    "read_header",
    "resumable_folder",
    "write_atomic",
    "write_safetensors",
]
