"""Make the bases of the experiments over methods: MiniLM after a short pre-training, and two upgrades of it.

The old base is all-MiniLM-L6-v2 after a short pre-training on news: MiniLM has no language-modelling head, and without
that step every upgrade would begin with the noise of a fresh head.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from runner import Job, run_jobs

from regraft import Base, Corpus, Recipe, pretrain
from regraft.demo.domains import write_corpus
from regraft.demo.packages import MINILM, MINILM_PREFIX, extract_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CORPUS_CHARACTERS = 4_000_000
"""Characters of unlabelled text per domain: more than any pre-training here reads."""
BASES = {
    "old": ("minilm", "news", Recipe(steps=200, eval_every=100)),
    "mild": ("old", "bio", Recipe(steps=100, eval_every=50)),
    "halfway": ("old", "legal", Recipe(steps=300, eval_every=150, learning_rate=1e-3)),
    "heavy": ("halfway", "news", Recipe(steps=300, eval_every=150, learning_rate=4e-4)),
}
"""The source, the domain and the pre-training recipe of each base. The first half of the heavy upgrade moves far, to a
base on which scratch learns little; the second half, on general text, repairs that."""
BLOCK_TOKENS = 64
"""Tokens per packed block of pre-training."""


def make_bases(out: Path, held_out_files: Sequence[Path], workers: int) -> tuple[Path, dict[str, Path]]:
    """Make the texts and bases that are missing.

    Args:
        out: The folder of the experiment; its `texts` and `models` are written.
        held_out_files: The dev and test files of the tasks, whose texts are excluded.
        workers: The number of processes of one thread each.

    Returns:
        The old base, and the new bases by name of the upgrade.

    Raises:
        SystemExit: A base could not be made.
    """
    for _, domain, _ in BASES.values():
        corpus = out / "texts" / f"{domain}.jsonl"
        if not corpus.is_file():
            write_corpus(domain, corpus, CORPUS_CHARACTERS, exclude=held_out_files)
    folder = out / "models"
    extract_model(MINILM, MINILM_PREFIX, folder / "minilm")
    for generation in (("old",), ("mild", "halfway"), ("heavy",)):  # bases that are made from the previous generation
        missing_names = [name for name in generation if not (folder / name).is_dir()]
        jobs = [Job(f"base {name}", pretrain_base, (out, name)) for name in missing_names]
        failures = run_jobs(jobs, workers, print)
        if failures:
            sys.exit("\n".join(failures))
    return folder / "old", {name: folder / name for name in ("mild", "heavy")}


def pretrain_base(out: Path, name: str) -> str:
    """Pre-train a base.

    Args:
        out: The folder of the experiment.
        name: A key of `BASES`.

    Returns:
        A line on its loss.
    """
    source, domain, recipe = BASES[name]
    folder = out / "models"
    corpus = Corpus((str(out / "texts" / f"{domain}.jsonl"),))
    pretrain(Base.open(folder / source), corpus, folder / name, recipe, BLOCK_TOKENS)
    curve = json.loads((folder / name / "pretraining.json").read_text(encoding="utf-8"))["curve"]
    return f"loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}"
