"""A hook of MkDocs: takes the experiments' pages, which lie outside `docs/`, into the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def on_files(files: Any, config: Any) -> Any:
    """Add each page that an experiment wrote, with its pictures.

    Args:
        files: MkDocs's files.
        config: Its configuration.

    Returns:
        The files, with `experiments/…/README.md` and the pictures that it shows.
    """
    from mkdocs.structure.files import File, InclusionLevel

    for page in sorted(EXPERIMENTS.rglob("README.md")):
        for file in (page, *sorted(page.parent.glob("*.svg"))):
            name = f"experiments/{file.relative_to(EXPERIMENTS).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(file), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at those pages, which in the repository lead out of `docs/`.

    Args:
        markdown: The page's text.
        page: The page.
        config: MkDocs's configuration.
        files: All files.

    Returns:
        The text.
    """
    return markdown.replace("](../experiments/", "](experiments/")
