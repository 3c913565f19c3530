"""Types of task, a file each: what a model reads and predicts, and how that is scored."""

from regraft.task.types.examples import ROWS, Examples
from regraft.task.types.likelihood import Likelihood, Signal
from regraft.task.types.text_classification import TextClassification
from regraft.task.types.type import Head, Task, task_types
from regraft.task.types.view import Predicted, Scatter, Table, View

__all__ = [
    "ROWS",
    "Examples",
    "Head",
    "Likelihood",
    "Predicted",
    "Scatter",
    "Signal",
    "Table",
    "Task",
    "TextClassification",
    "View",
    "task_types",
]
