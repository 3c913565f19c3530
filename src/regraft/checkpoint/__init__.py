"""Tensors on disk: a lazy reader, fingerprints, and folders that exist only when they are complete."""

from regraft.checkpoint.derived import (
    DerivedTensors,
    GroupedTensors,
    TensorSpec,
    are_equal,
    dtype_of,
    flat_slice,
    output_dtype,
    shape_of,
)
from regraft.checkpoint.file import (
    disk_full_error,
    is_disk_full,
    is_sealed,
    replace_atomically,
    seal,
    to_json,
    write_atomic,
    write_json,
)
from regraft.checkpoint.fingerprint import fingerprint
from regraft.checkpoint.finite import check_finite
from regraft.checkpoint.folder import check_output_path, empty_folder, publish, resumable_folder, temporary_folder
from regraft.checkpoint.header import FLOATING, StoredTensor, dtype_name, read_header, torch_dtype
from regraft.checkpoint.hub import find_path
from regraft.checkpoint.json_file import parse_json, read_json, read_json_lines
from regraft.checkpoint.output import (
    TOKENIZER_FILES,
    WritePlan,
    copy_auxiliary_files,
    is_up_to_date,
    plan_checkpoint,
    read_results,
    write_folder,
    write_record,
)
from regraft.checkpoint.quantised_tensor import check_unquantised
from regraft.checkpoint.reader import Checkpoint, chunk_ranges
from regraft.checkpoint.writer import byte_size, plan_shards, write_checkpoint, write_safetensors

__all__ = [
    "FLOATING",
    "TOKENIZER_FILES",
    "Checkpoint",
    "DerivedTensors",
    "GroupedTensors",
    "StoredTensor",
    "TensorSpec",
    "WritePlan",
    "are_equal",
    "byte_size",
    "check_finite",
    "check_output_path",
    "check_unquantised",
    "chunk_ranges",
    "copy_auxiliary_files",
    "disk_full_error",
    "dtype_name",
    "dtype_of",
    "empty_folder",
    "find_path",
    "fingerprint",
    "flat_slice",
    "is_disk_full",
    "is_sealed",
    "is_up_to_date",
    "output_dtype",
    "parse_json",
    "plan_checkpoint",
    "plan_shards",
    "publish",
    "read_header",
    "read_json",
    "read_json_lines",
    "read_results",
    "replace_atomically",
    "resumable_folder",
    "seal",
    "shape_of",
    "temporary_folder",
    "to_json",
    "torch_dtype",
    "write_atomic",
    "write_checkpoint",
    "write_folder",
    "write_json",
    "write_record",
    "write_safetensors",
]
