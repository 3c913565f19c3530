"""Experiment 3: do models tuned on different bases work alike inside, and how far apart are they?"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from pydantic import Field

from findings.experiment import Cell, Experiment
from findings.settings import Settings, Tasks
from findings.similarity_page import FIGURES, RANDOM, SEED, TASK, page
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


class Config(Settings):
    """What is measured.

    Args:
        tasks: By kind of adaptation.
        controls: Of each task, another one with as many classes.
        texts: How many texts of test are looked at.
    """

    tasks: Tasks = Field(description="lists of tasks by kind of adaptation")
    controls: dict[str, str] = Field(default={}, description="tasks by the tasks they are the control of")
    texts: int = Field(default=64, ge=1, description="a whole number of texts, 1 or more")


def places(config: Config) -> list[tuple[str, str]]:
    """Give each task and kind."""
    return [(task, kind) for kind, tasks in config.tasks.items() for task in tasks]


def tunings(config: Config, seeds: Sequence[int], bases: int) -> Iterable[Tuning]:
    """Give the tunings on every base, and of the controls on the first."""
    for task, kind in places(config):
        for seed in seeds:
            yield from (Tuning(task, kind, base, seed) for base in range(bases))
            if task in config.controls:
                yield Tuning(config.controls[task], kind, 0, seed)


def cells(store: Store, config: Config) -> list[Cell]:
    """Give one for each adaptation of M_0, and one for the bases themselves."""
    seeds = store.size.seeds
    following = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    bases = len(store.size.domains) + 1
    return [Cell("bases", measure_bases, (bases,))] + [
        Cell(f"{task}-{kind}-seed{seed}", measure,
             (task, kind, seed, following[seed], config.controls.get(task), bases, config.texts))
        for seed in seeds for task, kind in places(config)
    ]  # fmt: skip


def measure_bases(store: Store, work: Path, bases: int) -> dict[str, Any]:
    """Measure the distance between each two bases."""
    rows = []
    for i, j in itertools.combinations(range(bases), 2):
        rows.append({"first": i, "second": j, **_rounded(store.upgrade(i, j).distance())})
    return {"bases": rows}


def measure(
    store: Store, work: Path, task: str, kind: str, seed: int, other: int, control: str | None, bases: int, texts: int
) -> dict[str, Any]:
    """Hold what was tuned on M_0 against what was tuned on later bases, and what it has less to do with."""
    data, first_base = store.data(task), store.upgrade(0, 1).old
    precision = store.recipe(kind, seed, 0).resolve(len(data.train), 1.0).precision
    first = load_counterpart(store.tuned(task, kind, 0, seed), first_base, data)

    def against(model: Any) -> dict[str, Any]:
        found = similarity(first, model, first_base, data, control=model, control_name="itself", maps=0, texts=texts,
                           precision=precision)  # fmt: skip
        best = [[head == place for place, head in enumerate(layer)] for layer in found.best]
        return {
            "divergence": round(_mean(found.divergence), 5),
            "cosine": round(_mean(found.cosine), 5),
            "nearest": round(_mean(best), 5),
            "cka": round(statistics.fmean(found.cka[1:]), 5),
            "agreement": round(found.agreement, 5),
            "heads": [[round(value, 4) for value in layer] for layer in found.divergence],
            "best": [list(layer) for layer in found.best],
        }

    compared, apart = {}, []
    for base in range(1, bases):
        folder = store.tuned(task, kind, base, seed)
        opened = store.upgrade(0, base)
        compared[f"M_{base}"] = against(load_counterpart(folder, opened.new, data))
        tuned = ((load_adaptation(store.tuned(task, kind, 0, seed)), opened.old), (load_adaptation(folder), opened.new))
        sides = [adaptation.family.vector(adaptation, one) for adaptation, one in tuned]
        whole = distance((sides[0].tensors[sides[0].names[name]], sides[1].tensors[sides[1].names[name]])
                         for name in sides[0].names if name in sides[1].names)  # fmt: skip
        apart.append({"base": base, **_rounded(whole)})
    compared[SEED] = against(load_counterpart(store.tuned(task, kind, 0, other), first_base, data))
    if control is not None:
        compared[TASK] = against(load_counterpart(store.tuned(control, kind, 0, seed), first_base, store.data(control)))
    compared[RANDOM] = against(random_model(first, seed))
    return {"compared": compared, "distance": apart}


def _mean(rows: Iterable[Sequence[float]]) -> float:
    return statistics.fmean(float(value) for row in rows for value in row)


def _rounded(apart: Any) -> dict[str, float]:
    return {
        "l2": round(apart.l2, 4),
        "cosine": round(apart.cosine, 6),
        "relative": round(apart.relative, 6),
        "per_parameter": float(f"{apart.per_parameter:.4e}"),
    }


def collect(store: Store, config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give each comparison, each distance, and the heads of the first seed."""
    runs, distances, heads, bases = [], [], [], []
    for cell in found:
        if "bases" in cell["found"]:
            bases = cell["found"]["bases"]
            continue
        task, kind, seed, *_ = cell["arguments"]
        where = {"task": task, "kind": kind, "seed": seed}
        for against, figures in cell["found"]["compared"].items():
            runs.append({**where, "against": against, **{name: figures[name] for name in FIGURES}})
            if seed == store.size.seeds[0]:
                heads.append({**where, "against": against, "rows": figures["heads"], "best": figures["best"]})
        distances += [where | row for row in cell["found"]["distance"]]
    return {"bases": bases, "runs": runs, "distances": distances, "heads": heads}


EXPERIMENT = Experiment(
    "3-similarity",
    "3 · Functional similarity and distance",
    "Heads and layers of what was tuned on M_0 and on later bases, on the same texts of test; against random weights, "
    "another seed and another task on M_0. And how far apart the weights are.",
    Config, tunings, cells, collect, page,
)  # fmt: skip
