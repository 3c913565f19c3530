"""The report: what came of an upgrade, on one page that needs nothing else."""

from regraft.report.write import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
