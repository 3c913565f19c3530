"""Experiment 3: the functional similarity of models tuned on different bases, and the distance of their weights."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tables import DIGITS

from findings.experiment import Cell, CellRecord, Experiment
from findings.settings import StrictModel, TasksByKind, list_task_kinds
from findings.similarity_page import ANOTHER_SEED, ANOTHER_TASK, FIGURES, RANDOM_WEIGHTS, build_page
from findings.store import Tuning
from regraft import load_adaptation
from regraft.diagnosis import similarity
from regraft.diagnosis.pair import load_counterpart
from regraft.model.attention import random_model
from regraft.weights import distance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from findings.store import Store


HEAD_DIGITS = 4
"""Decimal places of the divergence of a single head; fewer than `DIGITS`, since every comparison has one per head."""
L2_DIGITS = 4
"""Decimal places of an L2 distance."""
RATIO_DIGITS = 6
"""Decimal places of a cosine or a relative distance; more than `DIGITS`, since close weights are near 1 or 0."""
PER_PARAMETER_DIGITS = 5
"""Significant digits of the L2 distance per parameter, whose order of magnitude depends on the number of parameters."""


class Config(StrictModel):
    """The tasks and controls to measure.

    Args:
        tasks: Tasks by kind of adaptation.
        controls: The control task of each task, by the task's name: a different task with as many classes.
        texts: The number of test texts on which models are compared.
    """

    tasks: TasksByKind = Field(description="lists of tasks by kind of adaptation")
    controls: dict[str, str] = Field(default={}, description="the control task of each task")
    texts: int = Field(default=64, ge=1, description="a whole number of texts, 1 or more")


def list_tunings(config: Config, seeds: Sequence[int], num_bases: int) -> Iterable[Tuning]:
    """Yield the tunings on every base, and the tunings of the controls on M_0."""
    for task, kind in list_task_kinds(config.tasks):
        for seed in seeds:
            for base in range(num_bases):
                yield Tuning(task, kind, base, seed)
            if task in config.controls:
                yield Tuning(config.controls[task], kind, 0, seed)


def list_cells(store: Store, config: Config) -> list[Cell]:
    """Return one cell for the bases, and one cell per adaptation of M_0."""
    seeds = store.size.seeds
    next_seed = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    cells = [Cell("bases", measure_bases, (store.num_bases,))]
    for seed in seeds:
        for task, kind in list_task_kinds(config.tasks):
            control = config.controls.get(task)
            arguments = (task, kind, seed, next_seed[seed], control, store.num_bases, config.texts)
            cells.append(Cell(f"{task}-{kind}-seed{seed}", measure, arguments))
    return cells


def measure_bases(store: Store, work_folder: Path, num_bases: int) -> dict[str, Any]:
    """Measure the distance between every two bases."""
    rows = []
    for i, j in itertools.combinations(range(num_bases), 2):
        rows.append({"first": i, "second": j, **_distance_figures(store.load_upgrade(i, j).distance())})
    return {"bases": rows}


def measure(
    store: Store,
    work_folder: Path,
    task: str,
    kind: str,
    seed: int,
    second_seed: int,
    control_task: str | None,
    num_bases: int,
    num_texts: int,
) -> dict[str, Any]:
    """Compare a tuning on M_0 with the tunings on later bases, a second seed, a control task and random weights.

    Args:
        store: The store, with the tunings to compare.
        work_folder: Not used.
        task: The name of the task.
        kind: The kind of adaptation.
        seed: The seed of the tunings on M_0, on later bases and for the control task, and of the random weights.
        second_seed: The seed of another tuning on M_0.
        control_task: The name of the control task; None for no control.
        num_bases: The number of bases of the chain, M_0 included.
        num_texts: The number of test texts on which models are compared.

    Returns:
        `compared`: the figures of each comparison, by the name of the model; `distance`: one row per later base.
    """
    data = store.load_data(task)
    first_base = store.load_upgrade(0, 1).old
    precision = store.recipe(kind, seed, 0).resolve_precision()
    first_folder = store.tuning_folder(task, kind, 0, seed)
    first_model = load_counterpart(first_folder, first_base, data)

    def compare_with(model: Any) -> dict[str, Any]:
        """Return the similarity of a model and the tuning on M_0, as means over heads and head by head."""
        comparison = similarity(
            first_model,
            model,
            first_base,
            data,
            control=model,  # No control is read from the result; the model itself saves building a random one.
            control_name="itself",
            maps=0,
            texts=num_texts,
            precision=precision,
        )
        is_nearest_to_itself = [[best == head for head, best in enumerate(layer)] for layer in comparison.best]
        return {
            "divergence": round(_mean_over_heads(comparison.divergence), DIGITS),
            "cosine": round(_mean_over_heads(comparison.cosine), DIGITS),
            "nearest": round(_mean_over_heads(is_nearest_to_itself), DIGITS),
            "cka": round(statistics.fmean(comparison.cka[1:]), DIGITS),
            "agreement": round(comparison.agreement, DIGITS),
            "heads": [[round(value, HEAD_DIGITS) for value in layer] for layer in comparison.divergence],
            "best": [list(layer) for layer in comparison.best],
        }

    comparisons = {}
    distances = []
    for base in range(1, num_bases):
        upgrade = store.load_upgrade(0, base)
        folder = store.tuning_folder(task, kind, base, seed)
        comparisons[f"M_{base}"] = compare_with(load_counterpart(folder, upgrade.new, data))
        weights_distance = _tuned_distance((first_folder, upgrade.old), (folder, upgrade.new))
        distances.append({"base": base, **_distance_figures(weights_distance)})
    second_folder = store.tuning_folder(task, kind, 0, second_seed)
    comparisons[ANOTHER_SEED] = compare_with(load_counterpart(second_folder, first_base, data))
    if control_task is not None:
        control_folder = store.tuning_folder(control_task, kind, 0, seed)
        control_data = store.load_data(control_task)
        comparisons[ANOTHER_TASK] = compare_with(load_counterpart(control_folder, first_base, control_data))
    comparisons[RANDOM_WEIGHTS] = compare_with(random_model(first_model, seed))
    return {"compared": comparisons, "distance": distances}


def _tuned_distance(first: tuple[Path, Any], second: tuple[Path, Any]) -> Any:
    """Measure the distance between two tunings over the tensors that both tuned.

    Args:
        first: The folder and the base of a tuning.
        second: The folder and the base of the tuning to compare with.

    Returns:
        The distance, as `regraft.weights.distance` returns it.
    """
    vectors = []
    for folder, base in (first, second):
        adaptation = load_adaptation(folder)
        vectors.append(adaptation.family.vector(adaptation, base))
    first_vector, second_vector = vectors
    return distance(
        (first_vector.tensors[first_vector.names[name]], second_vector.tensors[second_vector.names[name]])
        for name in first_vector.names
        if name in second_vector.names
    )


def _mean_over_heads(layers: Iterable[Sequence[float]]) -> float:
    return statistics.fmean(float(value) for layer in layers for value in layer)


def _distance_figures(weights_distance: Any) -> dict[str, float]:
    return {
        "l2": round(weights_distance.l2, L2_DIGITS),
        "cosine": round(weights_distance.cosine, RATIO_DIGITS),
        "relative": round(weights_distance.relative, RATIO_DIGITS),
        "per_parameter": float(f"{weights_distance.per_parameter:.{PER_PARAMETER_DIGITS - 1}e}"),
    }


def collect_results(store: Store, config: Config, records: list[CellRecord]) -> dict[str, Any]:
    """Return each comparison and each distance, and for the first seed the figures of each head."""
    runs, distances, heads, bases = [], [], [], []
    for record in records:
        if "bases" in record.figures:
            bases = record.figures["bases"]
            continue
        task, kind, seed, *_ = record.arguments
        key = {"task": task, "kind": kind, "seed": seed}
        for against, figures in record.figures["compared"].items():
            runs.append({**key, "against": against, **{name: figures[name] for name in FIGURES}})
            if seed == store.size.seeds[0]:
                heads.append({**key, "against": against, "rows": figures["heads"], "best": figures["best"]})
        distances += [key | row for row in record.figures["distance"]]
    return {"bases": bases, "runs": runs, "distances": distances, "heads": heads}


EXPERIMENT = Experiment(
    "3-similarity",
    "3 · Functional similarity and distance",
    "Heads and layers of what was tuned on M_0 and on later bases, on the same texts of test; against random weights, "
    "another seed and another task on M_0. And how far apart the weights are.",
    Config,
    list_tunings,
    list_cells,
    collect_results,
    build_page,
)
