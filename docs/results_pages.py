"""MkDocs hook that adds the experiments' pages, which lie outside `docs/`, to the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the experiments, with their pictures.

    Args:
        files: MkDocs's collection of source files.
        config: MkDocs's configuration.

    Returns:
        The collection, with each `experiments/…/README.md` and its pictures.
    """
    from mkdocs.structure.files import File, InclusionLevel

    for page in sorted(EXPERIMENTS.rglob("README.md")):
        for file in (page, *sorted(page.parent.glob("*.svg"))):
            name = f"experiments/{file.relative_to(EXPERIMENTS).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(file), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links to the experiments' pages, which in the repository lead out of `docs/`.

    Args:
        markdown: The text of a page.
        page: Not used.
        config: Not used.
        files: Not used.

    Returns:
        The text with links inside the site.
    """
    return markdown.replace("](../experiments/", "](experiments/")
