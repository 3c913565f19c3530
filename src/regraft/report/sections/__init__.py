"""The report's sections: a file for each question of a diagnosis, for the methods, and for the provenance."""

from regraft.report.sections.assemble import build_page

__all__ = ["build_page"]
