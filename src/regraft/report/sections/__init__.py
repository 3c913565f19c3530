"""One file a subject; each gives sections, and none where there is nothing to show."""

from regraft.report.sections.assemble import build_page

__all__ = ["build_page"]
