"""The report: the results of an upgrade on one self-contained page."""

from regraft.report.write import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
