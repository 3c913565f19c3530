"""Write a page as one HTML document, which contains its styles, script and charts and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.report.svg import inline_svg
from regraft.report.wording import CHANGE_WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.report.page import Block, Chart, Page

_FOLDER = Path(__file__).parent


def to_html(page: Page, svg_files: Mapping[str, bytes]) -> str:
    """Write a page as HTML.

    Args:
        page: The page's content.
        svg_files: The bytes of each chart's SVG file, by the chart's name.

    Returns:
        One document. Everything from files is escaped. The document's content security policy allows only the script
        `page.js`, and no requests.
    """
    import jinja2
    from markupsafe import Markup

    def svg(chart: Chart) -> Markup:
        return Markup(inline_svg(chart, svg_files[chart.name]))  # serialised by an XML writer, which escapes

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["kind"] = _is_kind
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        page=page,
        svg=svg,
        change_words=CHANGE_WORDS,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )


def _is_kind(block: Block, class_name: str) -> bool:
    return type(block).__name__ == class_name
