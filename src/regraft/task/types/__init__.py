"""Types of task, a file each: what a model reads and predicts, and how that is scored."""

from regraft.task.types.examples import ROWS, Examples
from regraft.task.types.head import Head
from regraft.task.types.likelihood import Likelihood, Signal
from regraft.task.types.text_classification import TextClassification
from regraft.task.types.type import DEFAULT_TYPE, Task, task_types
from regraft.task.types.view import MarkedText, ModelPredictions, Scatter, Span, Table, View

__all__ = [
    "DEFAULT_TYPE",
    "ROWS",
    "Examples",
    "Head",
    "Likelihood",
    "MarkedText",
    "ModelPredictions",
    "Scatter",
    "Signal",
    "Span",
    "Table",
    "Task",
    "TextClassification",
    "View",
    "task_types",
]
