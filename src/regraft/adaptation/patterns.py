"""The patterns in an adapter's settings, tried where they can be stopped before PEFT matches them here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

SECONDS = 5  # a pattern that is meant to name layers takes milliseconds
MOST = 4096  # entries of a list, each of which is held against every module
SINGLE = ("layers_pattern", "after_attention", "after_feed_forward")
PLAIN = re.compile(r"[\w.-]*")
# the forms in which PEFT matches: tuners_utils.check_target_module_exists, utils.other.get_pattern_key, _set_trainable
TRIAL = r"""
import json, re, sys
FORMS = "%s", r"(.*\.)?(%s)$", r"(^|.*\.)%s($|\..*)", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        forms = [re.compile(form % pattern) for form in FORMS]
    except Exception as error:
        sys.exit(f"{pattern!r:.200} is no regular expression ({error})")
    for name in names:
        forms[0].search(name)
        for form in forms:
            form.match(name), form.fullmatch(name)
"""


def check_patterns(config: Mapping[str, Any], names: Collection[str], where: str) -> None:
    """Refuse patterns of layers' names that are no regular expressions, or that take for ever to match.

    A match cannot be interrupted, so those with more than names in them are first tried in a process of their own.

    Args:
        config: The content of `adapter_config.json`.
        names: The modules that they will be held against.
        where: What to call the file.

    Raises:
        CheckpointError: A pattern is invalid, or matching takes more than 5 seconds.
    """
    most = max(MOST, len(names))
    for name, value in config.items():
        if isinstance(value, list | dict) and ("module" in name or "pattern" in name) and len(value) > most:
            raise CheckpointError(f"{where}: {name} has {len(value):,} entries, and the base {len(names):,} modules.")
    patterns = sorted({pattern for pattern in _expressions(config) if not PLAIN.fullmatch(pattern)})
    if not patterns:
        return
    try:
        trial = subprocess.run(
            [sys.executable, "-I", "-c", TRIAL],
            input=json.dumps([patterns, sorted(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        first = ", ".join(f"{pattern!r:.80}" for pattern in patterns[:4])
        raise CheckpointError(
            f"{where}: matching its patterns of layers' names ({first}) takes more than {SECONDS} seconds. Write them "
            "without repeats inside repeats, or list the layers."
        ) from None
    if trial.returncode:
        raise CheckpointError(f"{where}: {(trial.stderr.strip().splitlines() or ['its patterns fail'])[-1]:.400}.")


def _expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what PEFT takes for regular expressions: lists of modules are names, but for those that are saved."""
    for name, value in config.items():
        if isinstance(value, str) and ("module" in name or name in SINGLE):
            yield value
        elif isinstance(value, dict) and name.endswith("pattern"):
            yield from value
        elif isinstance(value, list) and name in ("layers_pattern", "modules_to_save"):
            yield from (entry for entry in value if isinstance(entry, str))
