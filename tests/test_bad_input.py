"""Bad input on the command line: exit status 2, a message that names what and where, and nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import write_base
from safetensors.torch import load_file, save_file

from regraft import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command that must be refused; give what it said."""

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["regraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2, said
        assert "Traceback" not in said
        return said

    return refused


@pytest.fixture
def place(tmp_path, bases, tuned, task_file):
    """A copy of a good upgrade, adaptation and task, to be broken."""
    old, new = bases["bert"]
    shutil.copytree(old, tmp_path / "old")
    shutil.copytree(new, tmp_path / "new")
    for kind in ("full", "lora"):
        shutil.copytree(tuned["bert", kind], tmp_path / kind)
    shutil.copytree(task_file.parent, tmp_path / "task")
    (tmp_path / "out").mkdir()
    return tmp_path


def contents(place):
    return {p: p.is_file() and p.stat().st_mtime_ns for p in place.rglob("*")}


def check_and_recycle(run, place, kind="full", methods=("direct", "init", "init+distill", "scratch")):
    """Give both commands what is in the place; each must refuse it and leave nothing."""
    given = [
        "--old-base", place / "old", "--new-base", place / "new", "--adaptation", place / kind,
        "--task", place / "task" / "task.yaml",
    ]  # fmt: skip
    before = contents(place)
    said = [run("check", *given)]
    said += [run("recycle", *given, "--method", m, "--steps", 2, "--out", place / "out" / "o") for m in methods]
    said += [run("compare", *given, "--methods", ",".join(methods), "--steps", 2, "--out", place / "out" / "o")]
    assert contents(place) == before
    return said


def replace_base(place, which, **changes):
    shutil.rmtree(place / which)
    write_base(place / which, "bert", **changes)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_new_base_of_another_size(run, place, kind):
    replace_base(place, "new", hidden_size=48)
    for said in check_and_recycle(run, place, kind):
        assert f"{place / 'old'} and {place / 'new'} are not an upgrade of one another" in said
        assert "embeddings.LayerNorm.bias: (32,) and (48,)" in said


def test_a_new_base_with_more_layers(run, place):
    replace_base(place, "new", num_hidden_layers=3)
    for said in check_and_recycle(run, place):
        assert "16 tensors only in the new base: encoder.layer.2." in said


def test_a_new_base_of_another_kind(run, place, bases):
    shutil.rmtree(place / "new")
    shutil.copytree(bases["roberta"][1], place / "new")
    for said in check_and_recycle(run, place):
        assert "different kinds" in said
        assert "is a bert" in said
        assert "a roberta" in said


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_old_base_that_is_not_the_one(run, place, kind):
    shutil.rmtree(place / "old")
    shutil.copytree(place / "new", place / "old")
    for said in check_and_recycle(run, place, kind):
        assert f"{place / kind / 'adaptation'} was not tuned on {place / 'old'}" in said


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_made_elsewhere_on_a_base_of_another_size(run, place, kind):
    """Without a record of the base, the tensors themselves do not fit."""
    (place / kind / "outcome.json").unlink()
    (place / kind / "adaptation" / "lineage.json").unlink()
    for which in ("old", "new"):
        replace_base(place, which, hidden_size=48)
    for said in check_and_recycle(run, place, kind, methods=("direct", "init", "init+distill")):
        assert str(place / kind / "adaptation") in said
        assert "32" in said
        assert "48" in said


@pytest.mark.parametrize(
    "name",
    ["old/model.safetensors", "new/model.safetensors", "full/adaptation/model.safetensors",
     "lora/adaptation/adapter_model.safetensors"],
)  # fmt: skip
def test_a_truncated_file(run, place, name):
    os.truncate(place / name, (place / name).stat().st_size - 1)
    for said in check_and_recycle(run, place, "lora" if "lora" in name else "full"):
        assert f"{place / name}: the file ends early" in said
        assert "fetch it again" in said


@pytest.mark.parametrize("which", ["old", "new", "full/adaptation"])
def test_a_missing_shard(run, place, which):
    folder = place / which
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    for said in check_and_recycle(run, place):
        assert f"{folder}: shard model-00002-of-00002.safetensors named by" in said
        assert "is missing" in said


def add_a_label(place):
    for name in ("train", "dev", "test"):
        with (place / "task" / f"{name}.csv").open("a") as stream:
            stream.writelines(f"{name} says the film was {i} and so so,neutral\n" for i in range(8))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_label_map_of_another_size(run, place, kind):
    add_a_label(place)
    for said in check_and_recycle(run, place, kind):
        assert f"{place / kind / 'adaptation'} was not tuned for the labels of task mood" in said
        assert "neutral" in said


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_head_of_another_size_where_no_labels_are_recorded(run, place, kind):
    add_a_label(place)
    (place / kind / "outcome.json").unlink()
    (place / kind / "adaptation" / "lineage.json").unlink()
    config_file = place / kind / "adaptation" / "config.json"
    if kind == "full":
        config = json.loads(config_file.read_text())
        config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
        config_file.write_text(json.dumps(config))
    for said in check_and_recycle(run, place, kind, methods=("direct", "init", "init+distill")):
        assert str(place / kind / "adaptation") in said
        assert "negative, neutral, positive" in said


def test_a_tensor_missing_from_an_adaptation(run, place):
    for kind, file, lost in (
        ("full", "model", "bert.encoder.layer.1.output.dense.weight"),
        ("lora", "adapter_model", "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"),
    ):
        path = place / kind / "adaptation" / f"{file}.safetensors"
        tensors = load_file(path)
        del tensors[lost]
        save_file(tensors, path, metadata={"format": "pt"})
        for said in check_and_recycle(run, place, kind, methods=("direct", "init")):
            assert str(path.parent) in said
            assert "encoder.layer.1.output.dense" in said


def test_a_tensor_without_a_place(run, place):
    for kind, file in (("full", "model"), ("lora", "adapter_model")):
        path = place / kind / "adaptation" / f"{file}.safetensors"
        tensors = load_file(path)
        name = next(n for n in sorted(tensors) if "layer.1." in n)
        tensors[name.replace("layer.1.", "layer.7.")] = tensors[name].clone()
        save_file(tensors, path, metadata={"format": "pt"})
        for said in check_and_recycle(run, place, kind, methods=("direct", "init")):
            assert str(path.parent) in said
            assert "layer.7." in said


def test_adaptations_of_other_kinds(run, place):
    config = place / "lora" / "adaptation" / "adapter_config.json"
    given = json.loads(config.read_text())
    for changed, says in (
        (given | {"peft_type": "LORE"}, "type LORE, which the installed PEFT does not know"),
        ({"peft_type": "IA3", "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}, "without a place"),
        (given | {"init_lora_weights": "pissa_niter_4"}, "cannot be found again"),
    ):
        config.write_text(json.dumps(changed))
        assert says in check_and_recycle(run, place, "lora")[0]
    for said in check_and_recycle(run, place, "old"):
        assert "is no sequence classifier" in said
    for said in check_and_recycle(run, place, "nothing"):
        assert f"{place / 'nothing'}: no such folder" in said


def test_bad_rows_are_named_and_nothing_is_written(run, place):
    with (place / "task" / "dev.csv").open("a") as stream:
        stream.write("   ,positive\n")
    for said in check_and_recycle(run, place):
        assert "dev.csv" in said
        assert "61" in said
    assert "dev.csv" in run("tune", place / "old", "--task", place / "task" / "task.yaml", "--out", place / "out" / "o")
    assert not list((place / "out").iterdir())


def test_tune_and_pretrain_refuse_before_they_write(run, place):
    task, out = place / "task" / "task.yaml", place / "out" / "o"
    for arguments, says in [
        (("tune", place / "none", "--task", task), f"{place / 'none'}: no such file or folder"),
        (("tune", place / "task", "--task", task), "holds none of model.safetensors"),
        (("tune", place / "old" / "config.json", "--task", task), "is a file. Give the folder"),
        (("tune", place / "old", "--task", task, "--kind", "lore"), "there is no kind 'lore'"),
        (("tune", place / "old", "--task", place / "none.yaml"), "none.yaml"),
        (("pretrain", place / "old", place / "none.txt", "--block", 32), "none.txt"),
        (("pretrain", place / "old", place / "task" / "train.csv", "--block", 512), "--block 512 is more than the 64"),
    ]:
        assert says in run(*arguments, "--out", out)
    os.truncate(place / "old" / "model.safetensors", 1000)
    for arguments in (("tune", place / "old", "--task", task), ("pretrain", place / "old", task, "--block", 32)):
        assert f"{place / 'old' / 'model.safetensors'}: not a whole safetensors file" in run(*arguments, "--out", out)
    assert not list((place / "out").iterdir())


def test_a_folder_that_is_there_is_never_replaced(run, place):
    (place / "out" / "o").mkdir()
    (place / "out" / "o" / "precious").write_text("x")
    assert "is no outcome folder" in check_and_recycle_one(run, place)
    assert "is no outcome folder" in run(
        "tune", place / "old", "--task", place / "task" / "task.yaml", "--out", place / "out" / "o"
    )
    assert "made from something else" in run(
        "pretrain", place / "old", place / "task" / "train.csv", "--block", 32, "--out", place / "out" / "o"
    )
    assert [p.name for p in (place / "out").rglob("*")] == ["o", "precious"]


def check_and_recycle_one(run, place):
    return run(
        "recycle", "--old-base", place / "old", "--new-base", place / "new", "--adaptation", place / "full",
        "--task", place / "task" / "task.yaml", "--method", "direct", "--out", place / "out" / "o",
    )  # fmt: skip


def test_options_out_of_range(run, place):
    common = [
        "--old-base", place / "old", "--new-base", place / "new", "--adaptation", place / "full",
        "--task", place / "task" / "task.yaml", "--out", place / "out" / "o",
    ]  # fmt: skip
    for given, says in [
        (["recycle", "--method", "distil"], "Did you mean distill?"),
        (["recycle", "--method", "init", "-o", "alpha=0.5"], "method init has no option alpha"),
        (["recycle", "--method", "distill", "-o", "alpha=1.5"], "alpha"),
        (["recycle", "--method", "distill", "-o", "kl_reduction=sum"], "sum"),
        (["recycle", "--method", "distill", "-o", "beta=much"], "of type float"),
        (["recycle", "--method", "distill", "-o", "alfa=1"], "did you mean alpha?"),
        (["compare", "-o", "alpha=0.5"], "METHOD:NAME=VALUE"),
        (["recycle", "--method", "init", "--precision", "fp8"], "fp8"),
        (["recycle", "--method", "init", "--seed", -1], "a seed is from 0"),
        (["recycle", "--method", "init", "--seed", 2**32], "a seed is from 0"),
        (["recycle", "--method", "init", "--epochs", "inf"], "epochs must be a number above 0"),
        (["recycle", "--method", "init", "--epochs", "1e12"], "whose order is held in memory"),
        (["recycle", "--method", "init", "--steps", 10**20], "whose order is held in memory"),
        (["recycle", "--method", "init", "--batch-size", 10**12], "batch_size is up to"),
        (["recycle", "--method", "distill", "-o", "temperature=1e300"], "temperature above 0 and up to"),
        (["recycle", "--method", "auto", "-o", "target=nan"], "target is a score"),
        (["recycle", "--method", "auto", "-o", "target=high"], "of type float"),
        (["recycle", "--method", "auto", "-o", "budgets=[1e-9, nan]"], "budgets"),
        (["recycle", "--method", "auto", "-o", "tolerance=nan"], "tolerance"),
        (["compare", "--seeds", "20,20"], "each once"),
        (["compare", "--seeds", "²"], "--seeds takes whole numbers"),
        (["recycle", "--method", "init", "--steps", 0], "--steps"),
        (["recycle", "--method", "init", "--shots", 10_000], "10000"),
        (["compare", "--seeds", "20,x"], "--seeds takes whole numbers"),
    ]:
        assert says in run(given[0], *common, *given[1:]).replace(",000", "000")
    assert not list((place / "out").iterdir())


def test_numbers_of_other_commands(run, place):
    out = place / "out" / "o"
    bases = ["--old", place / "old", "--new", place / "new", "--tuned", place / "full" / "adaptation", "--out", out]
    tune = ["tune", place / "old", "--task", place / "task" / "task.yaml", "--out", out]
    for given, says in [
        (["weights", "graft", *bases, "--scale", "nan"], "--scale is a finite number"),
        (["weights", "graft", *bases, "--scale-for", "*=inf"], "--scale-for * is a finite number"),
        (["weights", "graft", *bases, "--scale-for", "none.*=0.5"], "--scale-for none.*: fits no tensor"),
        (["weights", "graft", *bases, "--shard-size", "inf"], "--shard-size is a finite number"),
        ([*tune, "--kind", "lora", "--rank", 10**6], "a LoRA's rank is up to"),
        ([*tune, "--kind", "bottleneck", "--inner-size", 10**6], "a bottleneck's inner size is up to"),
    ]:
        assert says in run(*given)
    assert not list((place / "out").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "regraft", "methods"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the output: the disk is full")
    assert len(done.stderr.splitlines()) == 1


def test_the_message_alone_goes_to_stderr(place):
    """As a user sees it: a process of its own, no traceback unless it is asked for."""
    command = [sys.executable, "-m", "regraft", "task", "check", str(place / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "none.yaml" in done.stderr
    command.insert(3, "--debug")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), MemoryError(), EOFError("Ran out of input")])
def test_an_error_that_no_command_foresaw_is_told_without_a_traceback(run, monkeypatch, tmp_path, error):
    def failing(*_):
        raise error

    monkeypatch.setattr("regraft.task.Task.load", failing)
    said = run("task", "check", tmp_path / "task.yaml")
    assert said.startswith("error: ")
    assert "regraft did not foresee this" in said


def test_help_and_import_load_no_torch():
    code = "import sys, regraft; assert dir(regraft) == regraft.__all__\n"
    code += "from typer.testing import CliRunner; from regraft.cli import app\n"
    code += "out = CliRunner().invoke(app, ['recycle', '--help']); assert out.exit_code == 0, out.output\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
