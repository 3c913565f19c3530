"""Invalid input on the command line: exit status 2, a message that names the input, and nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import read_modification_times, update_json, write_base
from safetensors.torch import load_file, save_file


@pytest.fixture
def run_refused(run_main):
    """A function that runs a command, checks that it is refused, and returns its message."""

    def run(*arguments):
        code, _, message = run_main(*arguments)
        assert code == 2, message
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def folder(tmp_path, bases, tuned_outcomes, task_file):
    """A folder with copies of a valid upgrade, two adaptations of it, and a task, for tests to break."""
    old, new = bases["bert"]
    shutil.copytree(old, tmp_path / "old")
    shutil.copytree(new, tmp_path / "new")
    for kind in ("full", "lora"):
        shutil.copytree(tuned_outcomes["bert", kind], tmp_path / kind)
    shutil.copytree(task_file.parent, tmp_path / "task")
    (tmp_path / "out").mkdir()
    return tmp_path


def input_options(folder, kind="full"):
    """Return the options that name a folder's bases, adaptation and task."""
    bases = ["--old-base", folder / "old", "--new-base", folder / "new"]
    return [*bases, "--adaptation", folder / kind, "--task", folder / "task" / "task.yaml"]


def run_refused_commands(run_refused, folder, kind="full", methods=("direct", "init", "init+distill", "scratch")):
    """Run check, recycle and compare on a folder's inputs, which must refuse them and write nothing.

    Returns:
        The messages of check, of recycle with each method, and of compare.
    """
    inputs = input_options(folder, kind)
    out = folder / "out" / "o"
    times = read_modification_times(folder)
    messages = [run_refused("check", *inputs)]
    for method in methods:
        messages.append(run_refused("recycle", *inputs, "--method", method, "--steps", 2, "--out", out))
    messages.append(run_refused("compare", *inputs, "--methods", ",".join(methods), "--steps", 2, "--out", out))
    assert read_modification_times(folder) == times
    return messages


def replace_base(folder, name, **changes):
    """Write a base with some settings changed in place of the base `name`."""
    shutil.rmtree(folder / name)
    write_base(folder / name, "bert", **changes)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_new_base_of_a_different_size_is_refused(run_refused, folder, kind):
    replace_base(folder, "new", hidden_size=48)
    for message in run_refused_commands(run_refused, folder, kind):
        assert f"{folder / 'new'} is not an upgrade of {folder / 'old'}" in message
        assert "embeddings.LayerNorm.bias: (32,) and (48,)" in message


def test_a_new_base_with_more_layers_is_refused(run_refused, folder):
    replace_base(folder, "new", num_hidden_layers=3)
    for message in run_refused_commands(run_refused, folder):
        assert "16 tensors only in the new base: encoder.layer.2." in message


def test_a_new_base_of_a_different_architecture_is_refused(run_refused, folder, bases):
    shutil.rmtree(folder / "new")
    shutil.copytree(bases["roberta"][1], folder / "new")
    for message in run_refused_commands(run_refused, folder):
        assert "different architectures" in message
        assert "is a bert" in message
        assert "a roberta" in message


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_adaptation_of_a_different_base_is_refused(run_refused, folder, kind):
    shutil.rmtree(folder / "old")
    shutil.copytree(folder / "new", folder / "old")
    for message in run_refused_commands(run_refused, folder, kind):
        assert f"{folder / kind / 'adaptation'} was not tuned on {folder / 'old'}" in message


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_adaptation_of_a_different_size_is_refused_without_a_record(run_refused, folder, kind):
    (folder / kind / "outcome.json").unlink()
    (folder / kind / "adaptation" / "lineage.json").unlink()
    for base in ("old", "new"):
        replace_base(folder, base, hidden_size=48)
    for message in run_refused_commands(run_refused, folder, kind, methods=("direct", "init", "init+distill")):
        assert str(folder / kind / "adaptation") in message
        assert "32" in message
        assert "48" in message


@pytest.mark.parametrize(
    "name",
    [
        "old/model.safetensors",
        "new/model.safetensors",
        "full/adaptation/model.safetensors",
        "lora/adaptation/adapter_model.safetensors",
    ],
)
def test_a_truncated_file_is_refused(run_refused, folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    for message in run_refused_commands(run_refused, folder, "lora" if "lora" in name else "full"):
        assert f"{folder / name}: the file is truncated" in message
        assert "Copy it again" in message


@pytest.mark.parametrize("name", ["old", "new", "full/adaptation"])
def test_a_missing_shard_is_refused(run_refused, folder, name):
    checkpoint = folder / name
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    tensor_names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": tensor_names[:5],
        "model-00002-of-00002.safetensors": tensor_names[5:],
    }
    for shard, shard_names in shards.items():
        save_file({name: tensors[name] for name in shard_names}, checkpoint / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, shard_names in shards.items() for name in shard_names}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    for message in run_refused_commands(run_refused, folder):
        assert (
            f"{checkpoint}: shard model-00002-of-00002.safetensors, which model.safetensors.index.json names" in message
        )
        assert "is missing" in message


def add_label(folder):
    """Add eight examples of a third label to each split of the folder's task."""
    for split in ("train", "dev", "test"):
        with (folder / "task" / f"{split}.csv").open("a") as stream:
            stream.writelines(f"{split} says the film was {i} and so so,neutral\n" for i in range(8))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_task_with_more_labels_is_refused(run_refused, folder, kind):
    add_label(folder)
    for message in run_refused_commands(run_refused, folder, kind):
        assert f"{folder / kind / 'adaptation'} was not tuned for the labels of task mood" in message
        assert "neutral" in message


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_task_with_more_labels_than_a_head_without_names_is_refused(run_refused, folder, kind):
    add_label(folder)
    (folder / kind / "outcome.json").unlink()
    (folder / kind / "adaptation" / "lineage.json").unlink()
    config_file = folder / kind / "adaptation" / "config.json"
    if kind == "full":
        labels = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
        update_json(config_file, **labels)
    for message in run_refused_commands(run_refused, folder, kind, methods=("direct", "init", "init+distill")):
        assert str(folder / kind / "adaptation") in message
        assert "negative, neutral, positive" in message


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("full", "model", "bert.encoder.layer.1.output.dense.weight"),
        ("lora", "adapter_model", "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"),
    ],
)
def test_missing_and_unexpected_tensors_are_refused(run_refused, folder, kind, file, name):
    path = folder / kind / "adaptation" / f"{file}.safetensors"
    tensors = load_file(path)
    removed = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    for message in run_refused_commands(run_refused, folder, kind, methods=("direct", "init")):
        assert str(path.parent) in message
        assert "encoder.layer.1.output.dense" in message
    tensors |= {name: removed, name.replace("layer.1.", "layer.7."): removed.clone()}
    save_file(tensors, path, metadata={"format": "pt"})
    for message in run_refused_commands(run_refused, folder, kind, methods=("direct", "init")):
        assert str(path.parent) in message
        assert "layer.7." in message


def test_adaptations_of_unsupported_kinds_are_refused(run_refused, folder):
    config_file = folder / "lora" / "adaptation" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    for changed_config, expected in (
        (config | {"peft_type": "LORE"}, "peft_type is LORE, which the installed PEFT lacks"),
        ({"peft_type": "IA3", "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}, "unexpected"),
        (config | {"init_lora_weights": "pissa_niter_4"}, "cannot be reproduced from its base"),
    ):
        config_file.write_text(json.dumps(changed_config))
        assert expected in run_refused_commands(run_refused, folder, "lora")[0]
    for message in run_refused_commands(run_refused, folder, "old"):
        assert "is neither a classifier nor a decoder" in message
    for message in run_refused_commands(run_refused, folder, "nothing"):
        assert f"{folder / 'nothing'}: no such folder" in message


def test_invalid_rows_are_refused(run_refused, folder):
    with (folder / "task" / "dev.csv").open("a") as stream:
        stream.write("   ,positive\n")
    for message in run_refused_commands(run_refused, folder):
        assert "dev.csv" in message
        assert "61" in message
    task, out = folder / "task" / "task.yaml", folder / "out" / "o"
    assert "dev.csv" in run_refused("tune", folder / "old", "--task", task, "--out", out)
    assert not list((folder / "out").iterdir())


def test_tune_and_pretrain_check_their_inputs_first(run_refused, folder):
    task, out = folder / "task" / "task.yaml", folder / "out" / "o"
    for arguments, expected in [
        (("tune", folder / "none", "--task", task), f"{folder / 'none'}: no such file or folder"),
        (("tune", folder / "task", "--task", task), "has none of model.safetensors"),
        (("tune", folder / "old" / "config.json", "--task", task), "is a file. Use the folder"),
        (("tune", folder / "old", "--task", task, "--kind", "lore"), "there is no kind 'lore'"),
        (("tune", folder / "old", "--task", folder / "none.yaml"), "none.yaml"),
        (("pretrain", folder / "old", folder / "none.txt", "--block", 32), "none.txt"),
        (("pretrain", folder / "old", folder / "task" / "train.csv", "--block", 512), "512 is more than the 64"),
    ]:
        assert expected in run_refused(*arguments, "--out", out)
    os.truncate(folder / "old" / "model.safetensors", 1000)
    for arguments in (("tune", folder / "old", "--task", task), ("pretrain", folder / "old", task, "--block", 32)):
        message = run_refused(*arguments, "--out", out)
        assert f"{folder / 'old' / 'model.safetensors'}: not a complete safetensors file" in message
    assert not list((folder / "out").iterdir())


def test_an_existing_folder_is_never_replaced(run_refused, folder):
    task, out = folder / "task", folder / "out" / "o"
    out.mkdir()
    (out / "precious").write_text("x")
    for arguments, expected in [
        (("recycle", *input_options(folder), "--method", "direct"), "is not an outcome folder"),
        (("tune", folder / "old", "--task", task / "task.yaml"), "is not an outcome folder"),
        (("pretrain", folder / "old", task / "train.csv", "--block", 32), "not the result of the same inputs"),
    ]:
        assert expected in run_refused(*arguments, "--out", out)
    assert [path.name for path in (folder / "out").rglob("*")] == ["o", "precious"]


def test_recycle_and_compare_refuse_options_out_of_range(run_refused, folder):
    for (command, *options), expected in [
        (["recycle", "--method", "distil"], "Did you mean 'distill'?"),
        (["recycle", "--method", "init", "-o", "alpha=0.5"], "method init has no option 'alpha'"),
        (["recycle", "--method", "distill", "-o", "alpha=1.5"], "alpha"),
        (["recycle", "--method", "distill", "-o", "kl_reduction=sum"], "sum"),
        (["recycle", "--method", "distill", "-o", "beta=much"], "of type float"),
        (["recycle", "--method", "distill", "-o", "alfa=1"], "Did you mean 'alpha'?"),
        (["compare", "-o", "alpha=0.5"], "METHOD:NAME=VALUE"),
        (["recycle", "--method", "init", "--precision", "fp8"], "fp8"),
        (["recycle", "--method", "init", "--seed", -1], "seed must be from 0"),
        (["recycle", "--method", "init", "--seed", 2**32], "seed must be from 0"),
        (["recycle", "--method", "init", "--epochs", "inf"], "epochs must be a number above 0"),
        (["recycle", "--method", "init", "--epochs", "1e12"], "whose order is held in memory"),
        (["recycle", "--method", "init", "--steps", 10**20], "whose order is held in memory"),
        (["recycle", "--method", "init", "--batch-size", 10**12], "batch_size must be at most"),
        (["recycle", "--method", "distill", "-o", "temperature=1e300"], "temperature must be above 0 and up to"),
        (["recycle", "--method", "auto", "-o", "target=nan"], "target must be a score"),
        (["recycle", "--method", "auto", "-o", "target=high"], "of type float"),
        (["recycle", "--method", "auto", "-o", "budgets=[1e-9, nan]"], "budgets"),
        (["recycle", "--method", "auto", "-o", "tolerance=nan"], "tolerance"),
        (["compare", "--seeds", "20,20"], "one or more different numbers"),
        (["compare", "--seeds", "²"], "--seeds takes whole numbers"),
        (["recycle", "--method", "init", "--steps", 0], "steps must be a number above 0"),
        (["recycle", "--method", "init", "--shots", 10_000], "10000"),
        (["compare", "--seeds", "20,x"], "--seeds takes whole numbers"),
    ]:
        message = run_refused(command, *input_options(folder), "--out", folder / "out" / "o", *options)
        assert expected in message.replace(",000", "000")
    assert not list((folder / "out").iterdir())


def test_weights_and_tune_refuse_numbers_out_of_range(run_refused, folder):
    out = folder / "out" / "o"
    graft = ["weights", "graft", "--old-base", folder / "old", "--new-base", folder / "new"]
    graft += ["--adaptation", folder / "full" / "adaptation", "--out", out]
    tune = ["tune", folder / "old", "--task", folder / "task" / "task.yaml", "--out", out]
    for arguments, expected in [
        ([*graft, "--scale", "nan"], "--scale takes a finite number"),
        ([*graft, "--scale-for", "*=inf"], "--scale-for * takes a finite number"),
        ([*graft, "--scale-for", "none.*=0.5"], "--scale-for none.*: matches no tensor"),
        ([*graft, "--shard-size", "inf"], "--shard-size takes a finite number"),
        ([*tune, "--kind", "lora", "--rank", 10**6], "a LoRA's rank must be at most"),
        ([*tune, "--kind", "bottleneck", "--inner-size", 10**6], "a bottleneck's inner size must be at most"),
    ]:
        assert expected in run_refused(*arguments)
    assert not list((folder / "out").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full_disk:
        command = [sys.executable, "-m", "regraft", "methods"]
        result = subprocess.run(command, stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the output: the disk is full")
    assert len(result.stderr.splitlines()) == 1


def test_stderr_has_the_message_and_with_debug_the_traceback(folder):
    command = [sys.executable, "-m", "regraft", "task", "check", str(folder / "none.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "none.yaml" in result.stderr
    command.insert(3, "--debug")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), MemoryError(), EOFError("Ran out of input")])
def test_an_unforeseen_error_is_reported_without_a_traceback(run_refused, monkeypatch, tmp_path, error):
    def fail(file):
        raise error

    monkeypatch.setattr("regraft.task.Task.load", fail)
    message = run_refused("task", "check", tmp_path / "task.yaml")
    assert message.startswith("error: ")
    assert "This is unexpected" in message


def test_help_and_import_load_no_torch():
    script = """
import sys

from typer.testing import CliRunner

import regraft
from regraft.cli import app

assert dir(regraft) == regraft.__all__
result = CliRunner().invoke(app, ["recycle", "--help"])
assert result.exit_code == 0, result.output
print(sorted({"torch", "transformers", "peft", "datasets", "pandas"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr
