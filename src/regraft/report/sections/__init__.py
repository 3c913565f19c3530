"""The report's sections: one module per question of a diagnosis, one for methods, and one for provenance."""

from regraft.report.sections.assemble import build_page

__all__ = ["build_page"]
