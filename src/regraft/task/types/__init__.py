"""Task types: the inputs and targets of models, their likelihoods, metrics and views."""

from regraft.task.types.dense import Signal
from regraft.task.types.examples import ROW_TENSORS, Examples
from regraft.task.types.head import Head
from regraft.task.types.likelihood import Likelihood
from regraft.task.types.multi_label_classification import MultiLabelClassification
from regraft.task.types.text_classification import TextClassification
from regraft.task.types.text_generation import TextGeneration
from regraft.task.types.text_regression import TextRegression
from regraft.task.types.token_classification import TokenClassification
from regraft.task.types.type import DEFAULT_TYPE, Task, task_types
from regraft.task.types.view import AnswerPair, Answers, MarkedText, ModelPredictions, Scatter, Span, Table, View

__all__ = [
    "DEFAULT_TYPE",
    "ROW_TENSORS",
    "AnswerPair",
    "Answers",
    "Examples",
    "Head",
    "Likelihood",
    "MarkedText",
    "ModelPredictions",
    "MultiLabelClassification",
    "Scatter",
    "Signal",
    "Span",
    "Table",
    "Task",
    "TextClassification",
    "TextGeneration",
    "TextRegression",
    "TokenClassification",
    "View",
    "task_types",
]
