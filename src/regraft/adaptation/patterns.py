"""Checking the regular expressions of an adapter's config in a process that can be stopped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from regraft.errors import MAX_LISTED, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

TIMEOUT_SECONDS = 5  # sensible patterns take milliseconds
MAX_ENTRIES = 4096  # arbitrary: PEFT compares each entry of a list with every module
PATTERN_SETTINGS = ("layers_pattern", "after_attention", "after_feed_forward")
"""The settings with a regular expression, beside those with `module` in their names."""
LITERAL_NAME = re.compile(r"[\w.-]*")
"""Matches the patterns that cannot take long, because they repeat nothing."""
# PEFT matches in these forms: tuners_utils.check_target_module_exists, utils.other.get_pattern_key, _set_trainable
MATCH_SCRIPT = r"""
import json, re, sys
FORMS = "%s", r"(.*\.)?(%s)$", r"(^|.*\.)%s($|\..*)", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        forms = [re.compile(form % pattern) for form in FORMS]
    except Exception as error:
        sys.exit(f"{pattern!r:.200} is not a regular expression ({error})")
    for name in names:
        forms[0].search(name)
        for form in forms:
            form.match(name), form.fullmatch(name)
"""
"""Compiles patterns in PEFT's forms and matches them with names, both from the standard input."""


def check_patterns(config: Mapping[str, Any], names: Collection[str], source: str) -> None:
    """Check that the patterns of an adapter's config are valid, and that matching them does not take too long.

    A match cannot be interrupted, so patterns that are not plain names are first matched in a separate process.

    Args:
        config: The content of `adapter_config.json`.
        names: The names of the modules that they will be matched with.
        source: The path of the file, for error messages.

    Raises:
        CheckpointError: A pattern is invalid, a setting has more than `MAX_ENTRIES` entries and more than there are
            names, or matching takes more than `TIMEOUT_SECONDS`.
    """
    max_entries = max(MAX_ENTRIES, len(names))
    for name, value in config.items():
        if isinstance(value, list | dict) and ("module" in name or "pattern" in name) and len(value) > max_entries:
            raise CheckpointError(
                f"{source}: {name} has {len(value):,} entries, but the base has {len(names):,} modules. Correct it."
            )
    patterns = sorted({pattern for pattern in _expressions(config) if not LITERAL_NAME.fullmatch(pattern)})
    if not patterns:
        return
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", MATCH_SCRIPT],
            input=json.dumps([patterns, sorted(names)]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        first = ", ".join(f"{pattern!r:.80}" for pattern in patterns[:MAX_LISTED])
        raise CheckpointError(
            f"{source}: matching its patterns ({first}) takes more than {TIMEOUT_SECONDS} seconds. Write them "
            "without repeats inside repeats, or list the layers."
        ) from None
    if process.returncode:
        raise CheckpointError(f"{source}: {(process.stderr.strip().splitlines() or ['its patterns fail'])[-1]:.400}.")


def _expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that are used as regular expressions; those in lists are names, apart from two settings."""
    for name, value in config.items():
        if isinstance(value, str) and ("module" in name or name in PATTERN_SETTINGS):
            yield value
        elif isinstance(value, dict) and name.endswith("pattern"):
            yield from value
        elif isinstance(value, list) and name in ("layers_pattern", "modules_to_save"):
            yield from (entry for entry in value if isinstance(entry, str))
