"""Write the sections of a page on the runs themselves: what was refused, and how the others were made."""

from __future__ import annotations

import dataclasses
from typing import Any

from tables import distinct_keys

from regraft import Recipe

RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
"""The fields of recipes, by which the settings of a task tell how its recipes differ from those of the others."""


def refusals_section(results: dict[str, Any]) -> str:
    """List the methods that were refused, with the reasons; empty if there are none.

    Args:
        results: The content of `results.json`.
    """
    refusals = distinct_keys(results["refused"], "entry", "kind", "why")
    lines = [f"- `{entry}` on {kind}: {reason}" for entry, kind, reason in refusals]
    return "## What was refused\n\n" + "\n".join(lines) if lines else ""


def provenance_section(results: dict[str, Any]) -> str:
    """List the seeds, recipes and versions of the runs.

    Args:
        results: The content of `results.json`.
    """
    provenance = results["made"]
    recipes_by_stage = [("old tuning", provenance["old_tuning"])]
    recipes_by_stage += [(regime["name"], regime["recipes"]) for regime in provenance["regimes"]]
    lines = [f"- seeds {', '.join(map(str, provenance['seeds']))}"]
    for stage, recipes in recipes_by_stage:
        for kind, recipe in recipes.items():
            lines.append(
                f"- {stage}, {kind}: {recipe['steps']} steps of {recipe['batch_size']}, rate {recipe['learning_rate']}"
            )
    for task, settings in provenance["tasks"].items():
        changes = {name: value for name, value in settings.items() if name in RECIPE_FIELDS}
        if changes:
            lines.append(f"- {task} with " + ", ".join(f"{name} {value}" for name, value in changes.items()))
    for versions in provenance["versions"]:
        lines.append("- " + ", ".join(f"{package} {version}" for package, version in sorted(versions.items())))
    return "## How it was made\n\n" + "\n".join(lines)
