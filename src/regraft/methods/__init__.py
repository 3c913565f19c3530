"""Recycling methods, their parts and options, and the functions that run them."""

from regraft.methods.compare import compare
from regraft.methods.comparison import Comparison, Row, read_comparison
from regraft.methods.convert import Conversion, convert
from regraft.methods.job import Job
from regraft.methods.method import Method, Objective, Part, Start
from regraft.methods.options import describe_methods, parse_options
from regraft.methods.recycle import recycle
from regraft.methods.registry import find_method, methods, parts
from regraft.methods.tune import tune

__all__ = [
    "Comparison",
    "Conversion",
    "Job",
    "Method",
    "Objective",
    "Part",
    "Row",
    "Start",
    "compare",
    "convert",
    "describe_methods",
    "find_method",
    "methods",
    "parse_options",
    "parts",
    "read_comparison",
    "recycle",
    "tune",
]
