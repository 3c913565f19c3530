"""A hook of MkDocs: takes the experiments' pages, which lie outside `docs/`, into the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def on_files(files: Any, config: Any) -> Any:
    """Add each page that an experiment wrote.

    Args:
        files: MkDocs's files.
        config: Its configuration.

    Returns:
        The files, with `experiments/NAME.md` for every `experiments/NAME/README.md`.
    """
    from mkdocs.structure.files import File, InclusionLevel

    for page in sorted(EXPERIMENTS.glob("*/README.md")):
        name, inside = f"experiments/{page.parent.name}.md", InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=page.read_text(encoding="utf-8"), inclusion=inside))
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
    return re.sub(r"\]\(\.\./experiments/(\w+)/README\.md\)", r"](experiments/\1.md)", markdown)
