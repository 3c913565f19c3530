"""Names from files are shown as text: on a terminal, in messages and in a model card."""

import re
import shutil
from pathlib import Path

import torch
from helpers import update_json
from safetensors.torch import load_file, save_file

from regraft.adaptation.card import model_card
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, TaskRecord
from regraft.printable import printable

CONTROL_CHARACTERS = "\x1b]0;x\x07\x1b[31m\u202eb\x9b\u2066"


def test_text_from_files_cannot_control_the_terminal(run_main, tmp_path, bases, tuned_outcomes):
    assert (
        printable(f"a{CONTROL_CHARACTERS}\tü\n")
        == "a" + "\ufffd" + "]0;x" + 2 * "\ufffd" + "[31m" + "\ufffdb" + 2 * "\ufffd" + "\tü\n"
    )
    lora = tuned_outcomes["bert", "lora"] / "adaptation"
    shown = shutil.copytree(lora, tmp_path / "shown")
    update_json(shown / "lineage.json", labels=["negative", "positive" + CONTROL_CHARACTERS])
    code, out, _ = run_main("adaptation", "show", shown)
    assert code == 0
    assert "positive" in out
    assert not set(CONTROL_CHARACTERS) & {"\x1b", "\x07", "\u202e"} & set(out)
    name = f"x{CONTROL_CHARACTERS}\nerror: all is well"
    forged = shutil.copytree(lora, tmp_path / "forged")
    tensors = load_file(forged / "adapter_model.safetensors")
    save_file({**tensors, name: torch.ones(2)}, forged / "adapter_model.safetensors", metadata={"format": "pt"})
    code, _, error = run_main("adaptation", "show", forged, "--base", bases["bert"][0])
    assert code == 2
    assert "1 unexpected" in error
    assert not {"\x1b", "\x07", "\u202e"} & set(error)
    assert [line[:6] for line in error.splitlines() if line.startswith("error")] == ["error:"]


def test_model_card_escapes_markup_in_names():
    markup = "<img src=http://x/y.png> ![a](http://x) `c`\n# heading www.x.org"
    record = OutcomeRecord(
        method="direct", kind="full", inputs={}, task=TaskRecord(markup, "accuracy", "d", 1),
        labels=("positive", markup), seed=1, recipe={}, scores=Scores(dev=1.0), best_step=0, cost=Cost(0, 0.0, 0),
        notes={}, base=BaseRecord(markup, "f"), recycled_from=None, versions={},
    )  # fmt: skip
    card = model_card(record, Path(), [])
    text_outside_code = re.sub(r"`[^`]*`", "", card)
    assert "positive" in text_outside_code
    for markup_token in ("<", "![", "](", "http", "www", "heading"):
        assert markup_token not in text_outside_code
    assert sum(line.startswith("#") for line in card.splitlines()) == 1
