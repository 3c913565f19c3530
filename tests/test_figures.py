"""Every method on a real model and real texts, against committed scores and predictions.

`.venv/bin/python tests/test_figures.py` writes a new `figures.json` after an intended change of figures. The script
also computes the figures with the instructions of older processors, and writes nothing if a prediction then differs.
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
NUM_LAYERS = 2  # 2 of the model's 6 layers do the same computations in a third of the time
# Steps and learning rate on the old base: with fewer or smaller ones, rounding decides between the classes.
TUNING = {"full": (24, 1e-3), "lora": (72, 4e-3)}
RECYCLING_STEPS = 8
RECYCLING_RATES = {"full": 5e-4, "lora": 2e-3}
TOLERANCE = 1e-4
LOSS_TOLERANCE = 5e-3  # losses in training differ between processors by up to 6e-4
OLDER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def write_inputs(folder: Path) -> tuple[Path, Path, list[Path]]:
    """Write the first layers of a real base, their upgrade on the demo's domain, and two draws of a real task.

    Returns:
        The folders of the old and the new base, and the files of the tasks.
    """
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
    AutoModel.from_pretrained(source, num_hidden_layers=NUM_LAYERS).save_pretrained(folder / "old")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "old")
    write_corpus(DOMAIN, folder / "corpus.jsonl", limit=50_000)
    recipe = Recipe(steps=8, batch_size=8, eval_every=8, learning_rate=1e-3, precision="fp32")
    pretrain(Base.open(folder / "old"), Corpus((str(folder / "corpus.jsonl"),)), folder / "new", recipe, block_size=32)
    return folder / "old", folder / "new", tasks


def compute_figures(kind: str, folder: Path, old: Path, new: Path, tasks: list[Path]) -> dict[str, dict[str, Any]]:
    """Run every method on a kind of adaptation, and return the figures of the check and of each outcome."""
    from regraft import Recipe, Upgrade, check, compare, load_outcome, tune
    from regraft.methods import methods, parse_options

    def make_recipe(steps: int, rate: float) -> Recipe:
        return Recipe(steps=steps, batch_size=8, eval_every=steps // 2, learning_rate=rate, precision="fp32")

    task, second_task = tasks
    upgrade = Upgrade(old, new)
    tuning = make_recipe(*TUNING[kind])
    recycling = make_recipe(RECYCLING_STEPS, RECYCLING_RATES[kind])
    source = tune(old, task, folder / "tuned", kind=kind, recipe=tuning)
    old_pair, new_pair = (
        tune(base, second_task, folder / base.name, kind=kind, recipe=tuning).path for base in (old, new)
    )
    options = {"project": parse_options("project", [f"pairs=[{old_pair}={new_pair}]"])}
    names = [name for name, method in methods().items() if not method.generation_only]
    comparison = compare(upgrade, source.path, task, names, folder / "recycled", recipe=recycling, options=options)
    checked = check(upgrade, source.path, task, recipe=recycling)
    figures = {
        "check": {name: getattr(checked, name) for name in ("old", "new", "floor", "agreement", "effect")},
        "tune": read_figures(source),
    }
    for row, path in zip(comparison.rows, comparison.outcomes, strict=True):
        figures[row.method] = {"negative_flips": row.negative_flips} | read_figures(load_outcome(path))
    return figures


def read_figures(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome's scores, its predictions as one digit per example, and its learning curve."""
    return {
        **{name: outcome.scores[name] for name in ("dev_at_start", "dev", "test")},
        "predictions": ["".join(map(str, outcome.predictions(split))) for split in ("dev", "test")],
        "curve": [point["score"] for point in outcome.curve],
        "losses": [point["loss"] for point in outcome.curve if "loss" in point],
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    from helpers import fetch_or_skip

    from regraft.demo.packages import BBC, MEDLINE, MINILM

    for package in (BBC, MEDLINE, MINILM):
        fetch_or_skip(package)
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.contract)])
def test_every_method_has_the_committed_figures(
    kind: str, inputs: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    computed = compute_figures(kind, tmp_path, *inputs)
    expected = json.loads(FIGURES.read_text(encoding="utf-8"))[kind]
    assert list(computed) == list(expected)
    for method, figures in expected.items():
        for name, value in figures.items():
            tolerance = LOSS_TOLERANCE if name == "losses" else TOLERANCE
            committed = value if name == "predictions" else pytest.approx(value, abs=tolerance)
            assert computed[method][name] == committed, f"{method}: {name}"


def main() -> None:
    """Write the file of figures, or only print them if the environment has `OLDER_PROCESSOR`."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder))
        computed = {kind: compute_figures(kind, Path(folder) / kind, *inputs) for kind in TUNING}
    if OLDER_PROCESSOR.items() <= os.environ.items():
        print(json.dumps(computed))
        return
    process = subprocess.run(
        [sys.executable, __file__], env=os.environ | OLDER_PROCESSOR, stdout=subprocess.PIPE, text=True, check=True
    )
    older = json.loads(process.stdout.splitlines()[-1])
    for kind, methods in computed.items():
        for method, figures in methods.items():
            if figures.get("predictions") != older[kind][method].get("predictions"):
                sys.exit(f"{kind}, {method}: predictions depend on the processor. Choose other steps or rates.")
    kinds = []
    for kind, methods in computed.items():
        lines = [f"  {json.dumps(method)}: {json.dumps(figures)}" for method, figures in methods.items()]
        kinds.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n }")
    FIGURES.write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests
    main()
