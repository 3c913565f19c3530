"""The report's sections: a module per question that has one, and modules for methods, provenance and the card."""

from regraft.report.sections.assemble import build_page

__all__ = ["build_page"]
