"""Writes a page as HTML that needs nothing else: styles, script and pictures are in it, and nothing else may be run."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.report.svg import inline_svg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.report.page import Chart, Page

_HERE = Path(__file__).parent


def to_html(page: Page, pictures: Mapping[str, bytes]) -> str:
    """Write a page as HTML.

    Args:
        page: The page.
        pictures: By chart its SVG.

    Returns:
        One document. Whatever comes from files is escaped, and its content security policy lets no script run but our
        own, and nothing be fetched.
    """
    import jinja2
    from markupsafe import Markup

    def svg(chart: Chart) -> Markup:
        return Markup(inline_svg(chart, pictures[chart.name]))  # serialised by an XML writer, which escapes

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        page=page,
        svg=svg,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )
