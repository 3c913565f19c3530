"""Puts a figure into a page: an inline SVG whose colours follow the page's theme."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

from regraft.report.charts.style import THEMED

if TYPE_CHECKING:
    from regraft.report.page import Chart

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile("|".join(THEMED))
_FONT = re.compile(r"font-family: [^;\"]*;? ?")


def inline_svg(chart: Chart, drawn: bytes) -> str:
    """Return a chart as an SVG element for a page that holds many.

    Args:
        chart: The chart.
        drawn: Its figure as an SVG file.

    Returns:
        Markup with a label for those who cannot see it, ids no other chart has, and the page's fonts and colours.
    """
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag == f"{_SVG}style":
                parent.remove(child)
    used = set()
    for element in root.iter():
        used |= {link[1:] for link in [element.get(_LINK, "")] if link.startswith("#")}
        used |= {mark for value in element.attrib.values() for mark in _REFERENCE.findall(value)}
    for element in root.iter():
        _adapt(element, chart.name, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    width = float((root.get("viewBox") or "0 0 0 0").split()[2])
    root.attrib |= {"role": "img", "aria-label": chart.finding, "class": "chart", "style": f"--natural: {width:.0f}px"}
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str, used: set[str]) -> None:
    found = element.attrib
    if found.get("id") in used:
        found["id"] = f"{name}-{found['id']}"
    else:
        found.pop("id", None)
    if found.get(_LINK, "").startswith("#"):
        found[_LINK] = f"#{name}-{found[_LINK][1:]}"
    for key, value in found.items():
        if "url(#" in value:
            found[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if "style" in found:
        style = _COLOUR.sub(lambda match: f"var(--{THEMED[match.group()]})", found["style"])
        found["style"] = _FONT.sub("", style)
