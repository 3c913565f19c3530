"""The page of experiment 3: how alike tuned models are inside, and how far apart."""

from __future__ import annotations

import statistics
from typing import Any

from tables import mean_sd, table

from findings.charts import bars
from findings.experiment import OURS, Page, tell
from regraft.report.charts import chart_style, draw_heads, save_figure

RANDOM, SEED, TASK = "random weights", "another seed on M_0", "another task on M_0"
FIGURES = ("divergence", "cosine", "nearest", "cka", "agreement")
ALIKE = 0.5
"""Of the divergence to random weights, the most that heads which work alike may have."""
NEAREST = 0.9
"""The share of heads that are nearest to themselves where that is said of all."""


def page(results: dict[str, Any]) -> Page:
    """Write the tables of likeness and of distances, and draw the heads."""
    runs, parts, pictures = results["runs"], [], {}
    head = ["task", "against", "divergence (bits)", "cosine", "heads nearest to themselves", "CKA", "agreement"]
    for kind in dict.fromkeys(run["kind"] for run in runs):
        mine = [run for run in runs if run["kind"] == kind]
        places = list(dict.fromkeys((run["task"], run["against"]) for run in mine))
        rows = [
            [
                *place,
                *(mean_sd([run[name] for run in mine if (run["task"], run["against"]) == place]) for name in FIGURES),
            ]
            for place in places
        ]
        tasks, every = (list(dict.fromkeys(run[name] for run in mine)) for name in ("task", "against"))
        series = {
            against: [_spread([r["divergence"] for r in mine if (r["task"], r["against"]) == (task, against)])
                      for task in tasks]
            for against in every
        }  # fmt: skip
        pictures[f"divergence-{kind}.svg"] = bars(tasks, series, "divergence of heads from M_0's (bits)")
        parts.append(f"## {kind}\n\nThe model tuned on M_0, held against others.\n\n" + table(head, rows))
        parts.append(f"![Divergence of heads](divergence-{kind}.svg)")
        shown = [one for one in results["heads"] if one["kind"] == kind and one["task"] == tasks[0]]
        for one in (shown[0], shown[-1]) if shown else ():
            name = f"heads-{kind}-{'random' if one['against'] == RANDOM else one['against'].replace('_', '')}.svg"
            top = max(value for other in shown for row in other["rows"] for value in row) or 1.0
            with chart_style():
                pictures[name] = save_figure(draw_heads(one["rows"], one["best"], top), "svg")
            parts.append(f"Head by head, {tasks[0]}, against {one['against']} (a ring: another head is nearer):\n\n"
                         f"![Heads against {one['against']}]({name})")  # fmt: skip
    parts.append(_distances(results))
    return Page("\n\n".join(parts), pictures, _findings(results))


def _spread(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _distances(results: dict[str, Any]) -> str:
    rows = [
        [f"M_{row['first']} and M_{row['second']}", "the bases", f"{row['l2']:.2f}", f"{row['cosine']:.5f}",
         f"{row['per_parameter']:.2e}"] for row in results["bases"]
    ]  # fmt: skip
    of = results["distances"]
    for task, kind, base in dict.fromkeys((row["task"], row["kind"], row["base"]) for row in of):
        mine = [row for row in of if (row["task"], row["kind"], row["base"]) == (task, kind, base)]
        each = [[row[name] for row in mine] for name in ("l2", "cosine", "per_parameter")]
        rows.append([f"M_0 and M_{base}", f"{task}, {kind}", mean_sd(each[0], 2), mean_sd(each[1], 5),
                     f"{statistics.fmean(each[2]):.2e}"])  # fmt: skip
    head = ["tuned on", "what", "L2", "cosine", "L2 a parameter"]
    return "## Distances\n\nHeads left out; of adapters, their own tensors alone.\n\n" + table(head, rows)


def _findings(results: dict[str, Any]) -> tuple[Any, ...]:
    means = {
        place: {
            name: statistics.fmean(run[name] for run in results["runs"] if _where(run) == place) for name in FIGURES
        }
        for place in dict.fromkeys(map(_where, results["runs"]))
    }
    upgraded = {place: one for place, one in means.items() if place[2].startswith("M_")}
    ratios = [one["divergence"] / (means[*place[:2], RANDOM]["divergence"] or 1.0) for place, one in upgraded.items()]
    nearest = [one["nearest"] for one in upgraded.values()]
    chance = [one["nearest"] for place, one in means.items() if place[2] == RANDOM]
    told = f"{_share(nearest)} of heads; {_share(chance)} against random weights"
    rises = []
    for task, kind in dict.fromkeys(place[:2] for place in upgraded):
        along = [one["divergence"] for place, one in sorted(upgraded.items()) if place[:2] == (task, kind)]
        rises += [along[-1] > along[0]] if len(along) > 1 else []
    pairs = []
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in results["distances"]):
        mine = [row for row in results["distances"] if (row["task"], row["kind"]) == (task, kind)]
        each = {
            base: statistics.fmean(r["l2"] for r in mine if r["base"] == base) for base in {r["base"] for r in mine}
        }
        pairs += [(each[min(each)], each[max(each)])] if len(each) > 1 else []
    cosines = [row["cosine"] for row in results["distances"] if row["kind"] == "full"]
    likeness, apart = "3. functional similarity", "4. distance"
    return (
        tell("Heads of models tuned on M_0 and on a later base attend alike: they diverge at most half as much as from "
             "unrelated (random) weights.", likeness, [ratio <= ALIKE for ratio in ratios],
             f"median {100 * statistics.median(ratios):.0f} % of the divergence to random weights" if ratios else ""),
        tell("Each head is nearest to itself: at least 9 of 10 heads.", likeness + OURS,
             [share >= NEAREST for share in nearest], told),
        tell("Heads become less alike with more hops.", likeness + OURS, rises, "last base against M_1"),
        tell("The distance of tuned weights grows with the hops between their bases.", apart + OURS,
             [last > first for first, last in pairs],
             "; ".join(f"L2 {first:.1f} to {last:.1f}" for first, last in pairs)),
        tell("Fully tuned weights stay close in direction: a cosine of at least 0.9.", apart + OURS,
             [cosine >= 0.9 for cosine in cosines], f"lowest {min(cosines):.4f}" if cosines else ""),
    )  # fmt: skip


def _where(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["task"], run["kind"], run["against"]


def _share(shares: list[float]) -> str:
    return f"{100 * statistics.fmean(shares):.0f} %" if shares else "none"
