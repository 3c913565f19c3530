"""Convert a chart's SVG file to an element of a page, with colours that follow the page's theme."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

from regraft.report.charts.style import THEMED

if TYPE_CHECKING:
    from regraft.report.page import Chart

_SVG_URI = "http://www.w3.org/2000/svg"
_XLINK_URI = "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK_URI}}}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile("|".join(THEMED))
_FONT = re.compile(r"font-family: [^;\"]*;? ?")


def inline_svg(chart: Chart, svg_file: bytes) -> str:
    """Convert a chart's SVG file to an SVG element for a page with many charts.

    Args:
        chart: The chart, for its name and its label.
        svg_file: The bytes of the chart's SVG file.

    Returns:
        Markup with a label for screen readers, ids prefixed by the chart's name, and the page's fonts and colours.
    """
    root = ElementTree.fromstring(svg_file)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag == f"{{{_SVG_URI}}}style":
                parent.remove(child)
    referenced_ids = _referenced_ids(root)
    for element in root.iter():
        _adapt_attributes(element.attrib, chart.name, referenced_ids)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    width = float((root.get("viewBox") or "0 0 0 0").split()[2])
    root.attrib |= {"role": "img", "aria-label": chart.finding, "class": "chart", "style": f"--natural: {width:.0f}px"}
    ElementTree.register_namespace("", _SVG_URI)
    ElementTree.register_namespace("xlink", _XLINK_URI)
    return ElementTree.tostring(root, encoding="unicode")


def _referenced_ids(root: ElementTree.Element) -> set[str]:
    ids: set[str] = set()
    for element in root.iter():
        href = element.get(_HREF, "")
        if href.startswith("#"):
            ids.add(href[1:])
        for value in element.attrib.values():
            ids.update(_REFERENCE.findall(value))
    return ids


def _adapt_attributes(attributes: dict[str, str], prefix: str, referenced_ids: set[str]) -> None:
    """Prefix the ids that are referenced, drop the others, and use the page's colours and fonts."""
    if attributes.get("id") in referenced_ids:
        attributes["id"] = f"{prefix}-{attributes['id']}"
    else:
        attributes.pop("id", None)
    if attributes.get(_HREF, "").startswith("#"):
        attributes[_HREF] = f"#{prefix}-{attributes[_HREF][1:]}"
    for key, value in attributes.items():
        if "url(#" in value:
            attributes[key] = _REFERENCE.sub(rf"url(#{prefix}-\1)", value)
    if "style" in attributes:
        style = _COLOUR.sub(lambda match: f"var(--{THEMED[match.group()]})", attributes["style"])
        attributes["style"] = _FONT.sub("", style)
