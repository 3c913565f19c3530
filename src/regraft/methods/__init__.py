"""Recycling methods, one file each, and what runs them."""

from regraft.methods.compare import Comparison, Row, compare
from regraft.methods.convert import Conversion, convert
from regraft.methods.method import Job, Method
from regraft.methods.recycle import recycle
from regraft.methods.registry import describe_methods, find_method, methods, parse_options
from regraft.methods.tune import tune

__all__ = [
    "Comparison",
    "Conversion",
    "Job",
    "Method",
    "Row",
    "compare",
    "convert",
    "describe_methods",
    "find_method",
    "methods",
    "parse_options",
    "recycle",
    "tune",
]
