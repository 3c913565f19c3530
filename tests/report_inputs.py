"""Inputs of a report with realistic figures: a diagnosis, and the outcome folders of a comparison."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

from regraft.adaptation.outcome import versions, write_outcome
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, Source, TaskRecord

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
LABELS = ("joy", "anger", f"</script>{ATTACK}")
METHODS = {  # test score, steps to scratch's last score, steps, labels
    "scratch": (0.902, None, 300, 2400),
    "direct": (0.843, None, 0, 0),
    "ridge": (0.881, None, 0, 0),
    "init": (0.909, 60, 300, 2400),
    "init+distill": (0.917, 30, 300, 2400),
}


def diagnosis(attack: str = ATTACK) -> dict:
    """Return a diagnosis in the format of regraft 0.1, with an answer to every question."""
    rng = random.Random(3)
    layers, heads = 6, 8
    mu = [i / 10 for i in range(11)]

    def hump(start, end, height):
        return [start + m * (end - start) + height * math.sin(math.pi * m) for m in mu]

    def table(low, high):
        return [[round(rng.uniform(low, high), 4) for _ in range(heads)] for _ in range(layers)]

    def attention(sharpness, tokens):
        rows = [[math.exp(sharpness * rng.random()) for _ in tokens] for _ in tokens]
        return [[value / sum(row) for value in row] for row in rows]

    def group_shift(name, scale=1.0):
        return {
            "name": name,
            "base": 40.0 * scale,
            "shift": 2.1 * scale * rng.uniform(0.6, 1.4),
            "delta": 0.9 * scale,
            "cosine": rng.uniform(-0.05, 0.09),
            "signs": rng.uniform(0.48, 0.55),
            "overlap": rng.uniform(0.1, 0.4),
        }

    def bins(exponent):
        edges = [i / 10 for i in range(11)]
        return [
            {
                "low": low,
                "high": high,
                "count": round(8 + 300 * (low**3)),
                "confidence": (low + high) / 2,
                "accuracy": ((low + high) / 2) ** exponent,
            }
            for low, high in itertools.pairwise(edges)
            if low >= 0.3
        ]

    texts = [
        "i cannot believe how well this went",
        "they left us waiting again",
        "nobody told me the price was $5 or $6",
    ]
    flips = [
        {
            "row": 7 + 13 * i,
            "text": f"{texts[i % 3]}, example {i}",
            "label": LABELS[i % 2],
            "before": LABELS[i % 2],
            "after": LABELS[(i + 1) % 2],
            "kind": "negative" if i % 3 else "positive",
            "confidence": 0.5 + 0.011 * i,
        }
        for i in range(36)
    ]
    flips.append(
        {
            "row": 990,
            "text": f"needle {attack} \ud83d \x00 | @someone #12 `x` ~~y~~",
            "label": LABELS[2],
            "before": LABELS[2],
            "after": "joy",
            "kind": "negative",
            "confidence": None,
        }
    )
    grid = [round(-1 + 0.25 * i, 2) for i in range(13)]
    tokens = ["<s>", "they", "left", "us", "waiting", "again", "and", "nobody", "cared", attack[:40], "$x_2$", "</s>"]
    maps = [
        {
            "layer": layer,
            "head": head,
            "divergence": divergence,
            "tokens": tokens,
            "old": attention(3, tokens),
            "new": attention(4, tokens),
        }
        for layer, head, divergence in ((4, 2, 0.31), (0, 5, 0.02), (2, 1, 0.11))
    ]
    best = [[head for head in range(heads)] for _ in range(layers)]
    best[4][2], best[5][6] = 3, 1
    return {
        "schema": 1,
        "task": "feelings",
        "metric": "accuracy",
        "labels": list(LABELS),
        "old_base": "models/small-v1",
        "new_base": f"models/small-v2{attack}",
        "adaptation": "runs/feelings-v1/adaptation",
        "kind": "lora",
        "compared": "runs/compare/init-distill-seed20",
        "check": {
            "task": "feelings",
            "metric": "accuracy",
            "split": "test",
            "examples": 1000,
            "old": 0.894,
            "new": 0.843,
            "floor": 0.412,
            "retained": 89.4,
            "agreement": 0.871,
            "negative_flips": 0.089,
            "positive_flips": 0.038,
            "l2": 12.31,
            "relative": 0.051,
            "cosine": 0.9987,
            "effect": 0.21,
            "lineage": "proven",
            "verdict": "89 % of the old score above guessing survives: a short tuning should close the gap.",
        },
        "connectivity": {
            "ends": ["old deployment", "init+distill"],
            "mu": mu,
            "loss": {"dev": hump(0.31, 0.27, 0.062), "test": hump(0.33, 0.285, 0.071)},
            "score": {"dev": hump(0.897, 0.921, -0.018), "test": hump(0.894, 0.917, -0.021)},
            "barrier": {"dev": 0.062, "test": 0.071},
            "connected": True,
        },
        "plane": {
            "names": ["old deployment", "old weights, new base", "init+distill"],
            "places": [[0.0, 0.0], [1.2, 0.0], [0.6, 1.0]],
            "x": grid,
            "y": grid,
            "split": "dev",
            "loss": [[0.3 + 0.5 * ((x - 0.6) ** 2 + (y - 0.4) ** 2) for x in grid] for y in grid],
            "score": [[0.9 - 0.2 * ((x - 0.6) ** 2 + (y - 0.4) ** 2) for x in grid] for y in grid],
        },
        "similarity": {
            "divergence": table(0.02, 0.31),
            "cosine": table(0.8, 0.99),
            "best": best,
            "others": table(0.4, 0.7),
            "control": {
                "name": "another seed",
                "divergence": table(0.35, 0.62),
                "cosine": table(0.3, 0.5),
                "cka": [0.41, 0.44, 0.37, 0.33, 0.29, 0.31, 0.35],
            },
            "cka": [0.998, 0.991, 0.984, 0.972, 0.961, 0.944, 0.921],
            "kl": 0.083,
            "agreement": 0.931,
            "maps": maps,
            "texts": 128,
        },
        "shift": {
            "whole": group_shift("all", 6),
            "layers": [group_shift(name) for name in ("embeddings", *(f"layer {i}" for i in range(1, 7)))],
            "kinds": [group_shift(name) for name in ("embedding", "attention", "feed-forward", "norm", "bias")],
        },
        "regressions": {
            "split": "test",
            "examples": 1000,
            "negative": 25,
            "positive": 12,
            "flips": flips,
            "mcnemar": 0.0473,
            "noise": 0.021,
            "classes": [
                {"label": "joy", "examples": 412, "before": 0.932, "after": 0.941, "negative": 6, "positive": 9},
                {"label": "anger", "examples": 388, "before": 0.887, "after": 0.861, "negative": 14, "positive": 3},
                {"label": LABELS[2], "examples": 200, "before": 0.801, "after": 0.776, "negative": 5, "positive": 0},
            ],
            "calibration": {"old": {"ece": 0.061, "bins": bins(1.25)}, "new": {"ece": 0.034, "bins": bins(1.1)}},
        },
        "kept": {
            "text": "2,000 lines of the new domain",
            "loss": {"old base": 3.412, "new base": 2.987, "old deployment": 3.455, "new deployment": 3.021},
            "share": 92.0,
        },
        "compatibility": [
            {
                "name": f"step-{steps}",
                "distance": 0.06 * steps**0.5,
                "score": 0.894 - 0.0016 * steps**0.5,
                "loss": 0.33 + 0.002 * steps**0.5,
                "agreement": 1 - 0.004 * steps**0.5,
                "steps": steps,
            }
            for steps in range(0, 1001, 100)
        ],
        "verdict": {
            "choice": "short tuning",
            "sure": 0.86,
            "predicted": 89.4,
            "reasons": [
                {"name": "survives", "value": "89 %", "says": "of the old score above guessing, without any tuning"},
                {"name": "barrier", "value": "0.071", "says": "both models lie in one basin"},
                {"name": "heads", "value": "0.14 bits", "says": "apart on average, the control 0.48"},
            ],
            "advice": "a short tuning from the old weights should close the gap (init+distill)",
        },
        "left_out": {"noise of seeds": f"no second outcome was named {attack}"},
        "seconds": {"check": 4.2, "connectivity": 31.7, "similarity": 12.9, "shift": 1.3},
        "versions": {"regraft": "0.1.0", "torch": "2.13.0"},
        "fingerprints": {"old_base": "sample:1a2b", "new_base": "sample:3c4d", "adaptation": "sample:5e6f"},
    }


def write_diagnosis(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "diagnosis.json").write_text(json.dumps(content))
    return folder


def write_outcomes(folder: Path, seeds=(20, 21), task="feelings", attack: str = "") -> Path:
    """Write the outcome folders of a comparison, and of the old deployment."""
    old_base, new_base = (
        BaseRecord("models/small-v1", "sample:1a2b"),
        BaseRecord(f"models/small-v2{attack}", "sample:3c4d"),
    )
    old = _write_outcome(folder / "old", "tune", 20, task, old_base, None, (0.894, None, 300, 2400))
    source = Source(f"{old.path}/adaptation", "sample:5e6f", old_base.name, old_base.fingerprint, "proven")
    for seed in seeds:
        for method, figures in METHODS.items():
            name = f"{method.replace('+', '-')}-seed{seed}{'<b>' if attack else ''}"
            _write_outcome(folder / name, method, seed, task, new_base, source, figures)
    return folder


def _write_outcome(out, method, seed, task, base, source, figures):
    rng = random.Random(f"{method} {seed}")
    score, steps_to_scratch, steps, labels = figures
    score = round(score + 0.002 * (seed - 20.5), 4)
    staging = out.parent / f".{out.name}.staging"
    (staging / "adaptation").mkdir(parents=True)
    time_constant = 75 if steps_to_scratch is None else steps_to_scratch / 2.5
    start = 0.42 if method in ("scratch", "tune") else 0.8 if steps else score
    curve = [
        {
            "step": step,
            "seconds": 0.21 * step,
            "score": round(score - (score - start) * math.exp(-step / time_constant), 4),
        }
        for step in range(0, steps + 1, 30)
    ]
    predictions = []
    for split, count in (("dev", 40), ("test", 200)):
        for row in range(count):
            label = row % 3
            prediction = label if rng.random() < score else (label + 1) % 3
            predictions.append({"split": split, "row": row, "label": label, "prediction": prediction})
    record = OutcomeRecord(
        method=method,
        kind="lora",
        inputs={"method": method, "options": {"alpha": 0.5} if "+" in method else None},
        task=TaskRecord(task, "accuracy", "d", 2400),
        labels=LABELS,
        seed=seed,
        recipe={"steps": 300, "batch_size": 16, "learning_rate": 5e-4, "precision": "bf16", "seed": seed},
        scores=Scores(score, 0.41, score, 0.412, curve[0]["score"]),
        best_step=steps,
        cost=Cost(steps, 0.21 * steps + 1.4, labels),
        notes={},
        base=base,
        recycled_from=source,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, predictions)
