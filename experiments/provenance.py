"""Write the sections of a page on the runs themselves: what was refused, and how the others were made."""

from __future__ import annotations

from typing import Any

from tables import distinct_keys


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
    for versions in provenance["versions"]:
        lines.append("- " + ", ".join(f"{package} {version}" for package, version in sorted(versions.items())))
    return "## How it was made\n\n" + "\n".join(lines)
