"""Tasks: what users declare, its examples and labels, few-shot draws, scores."""

from regraft.task.bootstrap import Interval, paired_difference
from regraft.task.data import TaskData
from regraft.task.metrics import HEADROOM, Flips, count_flips, flips, majority_score, recovery, score
from regraft.task.read import load_data, read_task
from regraft.task.split import Split
from regraft.task.summary import SplitSummary, doubts, summarise, weakness
from regraft.task.task import HubSplit, Task

__all__ = [
    "HEADROOM",
    "Flips",
    "HubSplit",
    "Interval",
    "Split",
    "SplitSummary",
    "Task",
    "TaskData",
    "count_flips",
    "doubts",
    "flips",
    "load_data",
    "majority_score",
    "paired_difference",
    "read_task",
    "recovery",
    "score",
    "summarise",
    "weakness",
]
