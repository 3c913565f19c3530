"""Sample logs of lm-evaluation-harness, `samples_….jsonl`: where they are, what they hold, how they add up."""

from __future__ import annotations

import glob
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.checkpoint import read_json_lines
from regraft.errors import DataError
from regraft.task.metric import Metric, sum_metric

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from regraft.task.metric import Floats, Targets

WEIGHTED_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""The metrics whose value of an example is a pair: its log-likelihood, and its number of words or bytes."""
LOWER_IS_BETTER = frozenset({*WEIGHTED_METRICS, "perplexity", "brier_score", "ter", "wer", "cer", "loss"})
"""The metrics of which lower is better; the logs do not record it."""
IDENTIFIERS = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
"""The fields of a sample that are numbers or texts but no metrics, for logs without the field `metrics`."""

_LOG_NAME = re.compile(r"samples_(.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")


class SampleKey(NamedTuple):
    """What two samples of the same example have in common.

    Args:
        filter: The name of the filter that extracted the answer.
        doc_id: The index of the document in the task's data.
        doc_hash: The hash of the document.
    """

    filter: str
    doc_id: int
    doc_hash: str


class Sample(NamedTuple):
    """A line of a log.

    Args:
        line: The line number, from 1.
        prompt_hash: The hash of the prompt; "" if the log has none.
        values: The value of each metric.
    """

    line: int
    prompt_hash: str
    values: dict[str, Any]


def find_logs(source: str | Path) -> dict[str, Path]:
    """Find the sample logs of a file, folder or glob pattern.

    Args:
        source: A log of any name, a folder that is searched recursively for `samples_*.jsonl`, or a glob pattern.

    Returns:
        The log by the name of its task, which is part of the file's name.

    Raises:
        DataError: There is no log, or there are several of a task.
    """
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(path.rglob("samples_*.jsonl"))
    else:
        files = sorted(file for file in map(Path, glob.glob(str(source), recursive=True)) if file.is_file())
    if not files:
        raise DataError(f"{source}: there is no samples_*.jsonl. Run lm_eval with --log_samples and --output_path.")
    logs: dict[str, Path] = {}
    for file in files:
        match = _LOG_NAME.fullmatch(file.name)
        task = match[1] if match else file.stem
        if task in logs:
            raise DataError(f"{source}: has several logs of {task}: {logs[task]} and {file}. Name one of them.")
        logs[task] = file
    return logs


def read_log(file: Path) -> dict[SampleKey, Sample]:
    """Read a sample log.

    Args:
        file: A file `samples_….jsonl` of lm-evaluation-harness 0.4.3 or later.

    Returns:
        The samples in the order of the file.

    Raises:
        CheckpointError: The file cannot be read, or a line is not a JSON object.
        DataError: A line is no sample of the harness, or a sample is repeated.
    """
    samples: dict[SampleKey, Sample] = {}
    for line, row in enumerate(read_json_lines(file), start=1):
        key = SampleKey(row.get("filter", "none"), row.get("doc_id"), row.get("doc_hash"))  # type: ignore[arg-type]
        if type(key.doc_id) is not int or not isinstance(key.doc_hash, str) or not isinstance(key.filter, str):
            raise DataError(
                f"{file}, line {line}: expected a sample with a whole number doc_id and texts doc_hash and filter, "
                f"found {key.doc_id!r:.40}, {key.doc_hash!r:.40} and {key.filter!r:.40}. Use a log of "
                "lm-evaluation-harness 0.4.3 or later."
            )
        if key in samples:
            raise DataError(
                f"{file}, line {line}: repeats document {key.doc_id} with filter {key.filter!r} of line "
                f"{samples[key].line}. Use the log of a single run."
            )
        names = row.get("metrics")
        if not isinstance(names, list):
            names = [name for name in row if name not in IDENTIFIERS and isinstance(row[name], int | float)]
        prompt_hash = row.get("prompt_hash")
        values = {name: row.get(name) for name in names if isinstance(name, str)}
        samples[key] = Sample(line, prompt_hash if isinstance(prompt_hash, str) else "", values)
    if not samples:
        raise DataError(f"{file}: has no samples. Use a log that lm-evaluation-harness wrote.")
    return samples


def harness_metric(name: str) -> Metric:
    """Return a metric that aggregates the values of examples as the harness does.

    Args:
        name: The name of the harness's metric.

    Returns:
        A metric whose predictions are values and weights, examples × 2, and which ignores targets.
    """
    import numpy as np
    import scipy.sparse

    def as_rows(_targets: Targets, predictions: Targets) -> csr_array:
        matrix: csr_array = scipy.sparse.csr_array(predictions)
        return matrix

    def score_sums(sums: Floats) -> Floats:
        means = sums[:, 0] / sums[:, 1]
        if name.endswith("perplexity"):
            with np.errstate(over="ignore"):  # infinite is what it is
                return np.exp(-means)
        return -means / math.log(2) if name == "bits_per_byte" else means

    return sum_metric(
        name,
        as_rows,
        score_sums,
        higher_is_better=name not in LOWER_IS_BETTER,
        is_bounded=False,
    )
