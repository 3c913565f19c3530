"""Write the page of experiment 3, on functional similarity and the distance of weights."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from tables import distinct_keys, distinct_values, format_mean, markdown_table, mean_and_deviation, select

from findings.charts import draw_bars
from findings.experiment import NOT_STATED, Finding, Page, judge_claim
from regraft.report.charts import chart_style, draw_heads, save_figure

if TYPE_CHECKING:
    from tables import Row

RANDOM_WEIGHTS, ANOTHER_SEED, ANOTHER_TASK = "random weights", "another seed on M_0", "another task on M_0"
FIGURES = ("divergence", "cosine", "nearest", "cka", "agreement")
"""The figures of a comparison in the tables."""
# The thresholds below are arbitrary, but were fixed before any cell was measured.
MAX_DIVERGENCE_RATIO = 0.5
"""The share of their divergence from random weights up to which heads count as attending alike."""
MIN_NEAREST_SHARE = 0.9
"""The share of heads nearest to themselves from which the claim on each head is confirmed."""
MIN_COSINE = 0.9
"""The cosine from which weights count as close in direction."""


def build_page(results: dict[str, Any]) -> Page:
    """Write one table of similarities per kind and a table of distances, and draw the heads of the first task."""
    runs = results["runs"]
    sections = []
    pictures = {}
    head = ["task", "against", "divergence (bits)", "cosine", "heads nearest to themselves", "CKA", "agreement"]
    for kind in distinct_values(runs, "kind"):
        kind_runs = select(runs, kind=kind)
        tasks = distinct_values(kind_runs, "task")
        rows = []
        for task, against in distinct_keys(kind_runs, "task", "against"):
            cell_runs = select(kind_runs, task=task, against=against)
            rows.append([task, against, *(format_mean([run[name] for run in cell_runs]) for name in FIGURES)])
        table = markdown_table(head, rows)
        sections.append(f"## {kind}\n\nThe model tuned on M_0, held against others.\n\n{table}")
        pictures[f"divergence-{kind}.svg"] = draw_bars(
            tasks, _divergences(kind_runs, tasks), "divergence of heads from M_0's (bits)"
        )
        sections.append(f"![Divergence of heads](divergence-{kind}.svg)")
        comparisons = select(results["heads"], kind=kind, task=tasks[0])
        divergences = [value for comparison in comparisons for layer in comparison["rows"] for value in layer]
        scale = max(divergences, default=0.0) or 1.0  # the same for all pictures; 1 if all divergences are 0
        nearest_and_random = (comparisons[0], comparisons[-1]) if comparisons else ()
        for comparison in nearest_and_random:
            against = comparison["against"]
            suffix = "random" if against == RANDOM_WEIGHTS else against.replace("_", "")
            picture = f"heads-{kind}-{suffix}.svg"
            with chart_style():
                pictures[picture] = save_figure(draw_heads(comparison["rows"], comparison["best"], scale), "svg")
            sections.append(
                f"Head by head, {tasks[0]}, against {against} (a ring: another head is nearer):\n\n"
                f"![Heads against {against}]({picture})"
            )
    sections.append(_distances_section(results))
    findings = (*_judge_similarity(runs), *_judge_distances(results["distances"]))
    return Page("\n\n".join(sections), pictures, findings)


def _divergences(runs: list[Row], tasks: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Return mean and deviation of the divergence per task, by the model that M_0's is compared with."""
    return {
        against: [
            mean_and_deviation([run["divergence"] for run in select(runs, task=task, against=against)])
            for task in tasks
        ]
        for against in distinct_values(runs, "against")
    }


def _distances_section(results: dict[str, Any]) -> str:
    """Write the distances between bases, and between the tunings on M_0 and on later bases."""
    rows = [
        [
            f"M_{row['first']} and M_{row['second']}",
            "the bases",
            f"{row['l2']:.2f}",
            f"{row['cosine']:.5f}",
            f"{row['per_parameter']:.2e}",
        ]
        for row in results["bases"]
    ]
    for task, kind, base in distinct_keys(results["distances"], "task", "kind", "base"):
        distances = select(results["distances"], task=task, kind=kind, base=base)
        rows.append(
            [
                f"M_0 and M_{base}",
                f"{task}, {kind}",
                format_mean([row["l2"] for row in distances], 2),
                format_mean([row["cosine"] for row in distances], 5),
                f"{statistics.fmean(row['per_parameter'] for row in distances):.2e}",
            ]
        )
    table = markdown_table(["tuned on", "what", "L2", "cosine", "L2 a parameter"], rows)
    return f"## Distances\n\nHeads left out; of adapters, their own tensors alone.\n\n{table}"


def _judge_similarity(runs: list[Row]) -> tuple[Finding, ...]:
    """Judge whether heads attend alike on all bases, are nearest to themselves, and diverge over hops."""
    ratios, nearest_shares, random_nearest_shares, is_rising = [], [], [], []
    for task, kind in distinct_keys(runs, "task", "kind"):
        cell_runs = select(runs, task=task, kind=kind)
        random_runs = select(cell_runs, against=RANDOM_WEIGHTS)
        if random_runs:
            random_nearest_shares.append(_mean(random_runs, "nearest"))
        divergences = []
        for against in sorted(distinct_values(cell_runs, "against")):
            if against.startswith("M_"):
                upgrade_runs = select(cell_runs, against=against)
                divergences.append(_mean(upgrade_runs, "divergence"))
                random_divergence = _mean(random_runs, "divergence") or 1.0  # 1 if even random heads attend alike
                ratios.append(divergences[-1] / random_divergence)
                nearest_shares.append(_mean(upgrade_runs, "nearest"))
        if len(divergences) > 1:
            is_rising.append(divergences[-1] > divergences[0])
    part = "3. functional similarity"
    nearest_figure = (
        f"{_format_mean_share(nearest_shares)} of heads; {_format_mean_share(random_nearest_shares)} against random "
        "weights"
    )
    return (
        judge_claim(
            "Heads of models tuned on M_0 and on a later base attend alike: they diverge at most half as much as from "
            "unrelated (random) weights.",
            part,
            [ratio <= MAX_DIVERGENCE_RATIO for ratio in ratios],
            f"median {100 * statistics.median(ratios):.0f} % of the divergence to random weights" if ratios else "",
        ),
        judge_claim(
            "Each head is nearest to itself: at least 9 of 10 heads.",
            part + NOT_STATED,
            [share >= MIN_NEAREST_SHARE for share in nearest_shares],
            nearest_figure,
        ),
        judge_claim("Heads become less alike with more hops.", part + NOT_STATED, is_rising, "last base against M_1"),
    )


def _judge_distances(distances: list[Row]) -> tuple[Finding, ...]:
    """Judge whether distances grow over hops, and whether full fine-tunes stay close in direction."""
    ends = []
    for task, kind in distinct_keys(distances, "task", "kind"):
        cell_distances = select(distances, task=task, kind=kind)
        means = [
            _mean(select(cell_distances, base=base), "l2") for base in sorted(distinct_values(cell_distances, "base"))
        ]
        if len(means) > 1:
            ends.append((means[0], means[-1]))
    cosines = [row["cosine"] for row in select(distances, kind="full")]
    part = "4. distance" + NOT_STATED
    return (
        judge_claim(
            "The distance of tuned weights grows with the hops between their bases.",
            part,
            [last > first for first, last in ends],
            "; ".join(f"L2 {first:.1f} to {last:.1f}" for first, last in ends),
        ),
        judge_claim(
            "Fully tuned weights stay close in direction: a cosine of at least 0.9.",
            part,
            [cosine >= MIN_COSINE for cosine in cosines],
            f"lowest {min(cosines):.4f}" if cosines else "",
        ),
    )


def _mean(runs: list[Row], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _format_mean_share(shares: list[float]) -> str:
    return f"{100 * statistics.fmean(shares):.0f} %" if shares else "none"
