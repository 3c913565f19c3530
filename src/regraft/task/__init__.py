"""Tasks: their declaration, examples, labels, few-shot samples, metrics and scores."""

from regraft.task.bootstrap import Interval, paired_difference
from regraft.task.data import TaskData
from regraft.task.metric import MIN_HEADROOM, Flips, Metric, count_flips, deviation, recovery
from regraft.task.read import load_data, read_task
from regraft.task.score import agreement, chance_score, find_metric, flips, score
from regraft.task.source import HubSplit
from regraft.task.split import Split
from regraft.task.summary import SplitSummary, data_warnings, summarise, weakness
from regraft.task.types import (
    Head,
    MultiLabelClassification,
    Task,
    TextClassification,
    TextGeneration,
    TextRegression,
    TokenClassification,
)

__all__ = [
    "MIN_HEADROOM",
    "Flips",
    "Head",
    "HubSplit",
    "Interval",
    "Metric",
    "MultiLabelClassification",
    "Split",
    "SplitSummary",
    "Task",
    "TaskData",
    "TextClassification",
    "TextGeneration",
    "TextRegression",
    "TokenClassification",
    "agreement",
    "chance_score",
    "count_flips",
    "data_warnings",
    "deviation",
    "find_metric",
    "flips",
    "load_data",
    "paired_difference",
    "read_task",
    "recovery",
    "score",
    "summarise",
    "weakness",
]
