"""Arithmetic on whole checkpoints, compared with transformers and plain state dicts."""

import json
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, have_equal_tensors, write_upgrade
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from regraft.checkpoint import (
    Checkpoint,
    DerivedTensors,
    TensorSpec,
    flat_slice,
    plan_checkpoint,
    write_checkpoint,
    write_folder,
)
from regraft.checkpoint import derived as derived_module
from regraft.errors import CheckpointError, MismatchError, OutcomeError
from regraft.weights import (
    align,
    apply_all,
    delta_all,
    distance,
    distances,
    graft,
    graft_all,
    interpolate_all,
    kind_of,
    layer_of,
    mask_conflicts,
    orthogonal_part,
    trim,
)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("regraft.checkpoint.writer.CHUNK_ELEMENTS", 100)
    monkeypatch.setattr("regraft.checkpoint.derived.CHUNK_ELEMENTS", 100)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shard_bytes", [10_000, 10**9])
def test_transformers_loads_the_written_checkpoint(tmp_path, bases, small_chunks, architecture, shard_bytes):
    old, new = (Checkpoint.open(path) for path in bases[architecture])
    write_folder(graft_all(new, new, old), tmp_path / "out", bases[architecture][1], {}, shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes == 10_000)
    model, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert all("pooler" in name for name in report["missing_keys"])
    state = model.state_dict()
    for model_name, name in align(new, state).items():
        expected = new[name].double() + (new[name].double() - old[name].double())
        torch.testing.assert_close(state[model_name].double(), expected, rtol=1e-6, atol=1e-7)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grafts_and_interpolations_satisfy_identities(tmp_path, bases, small_chunks, dtype):
    paths = [bases["bert"][0], write_upgrade(bases["bert"][0], tmp_path / "tuned", 0.1, seed=5), bases["bert"][1]]
    old, tuned, new = (
        {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()} for path in paths
    )
    assert have_equal_tensors(graft_all(old, tuned, old), tuned)
    assert have_equal_tensors(graft_all(new, old, old), new)
    assert have_equal_tensors(interpolate_all(old, tuned, 0.0), old)
    assert have_equal_tensors(interpolate_all(old, tuned, 1.0), tuned)
    midpoint = interpolate_all(old, tuned, 0.5)
    for name, tensor in delta_all(tuned, old).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tuned[name].float() - old[name].float())
        expected = ((old[name].double() + tuned[name].double()) / 2).to(dtype)
        torch.testing.assert_close(midpoint[name], expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_scale_by_name_pattern(bases):
    old, new = (Checkpoint.open(path) for path in bases["bert"])
    grafted = graft_all(new, new, old, {"*.attention.*": 0.0, "*": 2.0})
    for name in new:
        expected = new[name] if ".attention." in name else graft(new[name], new[name], old[name], 2.0)
        assert torch.equal(grafted[name], expected)


def test_heads_are_copied_and_prefixes_aligned(bases, tuned_outcomes, tmp_path):
    old, new = bases["bert"]
    for role, path in (("old", old), ("new", new)):
        model = AutoModel.from_pretrained(path, add_pooling_layer=False, dtype="float32")
        model.save_pretrained(tmp_path / role)  # without the prefix that the fine-tune's names carry
    fine_tune = Checkpoint.open(tuned_outcomes["bert", "full"] / "adaptation")
    from_bodies = graft_all(Checkpoint.open(tmp_path / "new"), fine_tune, Checkpoint.open(tmp_path / "old"))
    from_full_bases = graft_all(Checkpoint.open(new), fine_tune, Checkpoint.open(old))
    assert have_equal_tensors(from_bodies, from_full_bases)
    assert torch.equal(from_bodies["classifier.weight"], fine_tune["classifier.weight"])
    assert not torch.equal(
        from_bodies["bert.encoder.layer.0.output.dense.weight"], fine_tune["bert.encoder.layer.0.output.dense.weight"]
    )


def test_mismatched_checkpoints_are_refused(bases):
    old, new = (dict(Checkpoint.open(path)) for path in bases["bert"])
    name = "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(MismatchError, match=rf"1 tuned tensors are in one base only, the old one: {name}"):
        graft_all({key: new[key] for key in new if key != name}, new, old)
    with pytest.raises(MismatchError, match=rf"1 tensors have different shapes: {name}"):
        graft_all(new, new, old | {name: old[name][1:]})
    with pytest.raises(MismatchError, match="Use checkpoints of one architecture"):
        delta_all({"a": old[name]}, {"b": old[name]})
    with pytest.raises(MismatchError, match=rf"1 tensors are in one of the two only: {name}"):
        interpolate_all(old, {key: new[key] for key in new if key != name}, 0.5)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_flat_slices_equal_slices_of_the_tensor(data):
    count = data.draw(st.integers(1, 700))
    a = torch.randn(count)
    b = torch.randn(count).to(torch.bfloat16)
    entries = {"x": TensorSpec("F16", (count,), (({"a": a}, "a"), ({"b": b}, "b")), lambda a, b: a * b)}
    inner = DerivedTensors(entries)
    outer = DerivedTensors({"y": TensorSpec("F32", (count,), ((inner, "x"), ({"a": a}, "a")), lambda x, a: x + a)})
    start = data.draw(st.integers(0, count - 1))
    size = data.draw(st.integers(0, count - start))
    expected = (a * b).to(torch.float16) + a
    assert torch.equal(flat_slice(outer, "y", start, size), expected[start : start + size])
    assert torch.equal(outer["y"], expected)


def test_interrupted_write_resumes_at_its_shard(tmp_path, bases):
    old, new = (Checkpoint.open(path) for path in bases["bert"])
    grafted = graft_all(new, new, old)
    write_folder(grafted, tmp_path / "uninterrupted", bases["bert"][1], {"a": 1}, 20_000)
    written = 0

    def interrupt(stage, done, total, figures):
        nonlocal written
        written = done
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(grafted, tmp_path / "out", bases["bert"][1], {"a": 1}, 20_000, interrupt)
    assert not (tmp_path / "out").exists()
    reused = {f.name: f.stat().st_mtime_ns for f in (tmp_path / ".out.partial").rglob("model-*.safetensors")}
    assert len(reused) >= 2
    written_bytes = []

    def record_writes(stage, done, total, figures):
        if stage == "write":
            written_bytes.append(done)

    write_folder(grafted, tmp_path / "out", bases["bert"][1], {"a": 1}, 20_000, record_writes)
    assert min(written_bytes) > sum((tmp_path / "out" / name).stat().st_size for name in reused) * 0.8
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in reused} == reused
    for file in (tmp_path / "uninterrupted").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()

    def expect_comparison_only(stage, *_):
        assert stage == "compare"

    write_folder(grafted, tmp_path / "out", bases["bert"][1], {"a": 1}, 20_000, expect_comparison_only)
    with pytest.raises(OutcomeError, match="not made from the same inputs"):
        write_folder(grafted, tmp_path / "out", bases["bert"][1], {"a": 2}, 20_000)


def test_full_disk_is_detected_before_writing(tmp_path, bases, monkeypatch):
    old = Checkpoint.open(bases["bert"][0])
    plan = plan_checkpoint(old, tmp_path / "deep" / "out")
    assert plan.disk_bytes == plan.read_bytes == sum(tensor.nbytes for tensor in old.values())
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"bytes have to be written, but the disk has 1,000 left"):
        write_folder(old, tmp_path / "deep" / "out", bases["bert"][0], {})
    with pytest.raises(CheckpointError, match=r"bytes have to be written, but the disk has 1,000 left"):
        write_checkpoint(tmp_path, old)
    assert not list(tmp_path.iterdir())


def test_error_in_a_rule_leaves_no_file(tmp_path):
    def fail(_):
        raise MismatchError("no")

    tensors = {"a": torch.zeros(10)}
    for rule in (fail, lambda t: t[1:]):
        broken = DerivedTensors({"a": TensorSpec("F32", (10,), ((tensors, "a"),), rule)})
        with pytest.raises((MismatchError, CheckpointError)):
            write_checkpoint(tmp_path, broken)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distances_of_groups_add_up(bases, architecture):
    old, new = (Checkpoint.open(path) for path in bases[architecture])
    by_grouping = distances(old, new)
    total = by_grouping["whole"]["all"]
    expected = distance((old[name], new[name]) for name in old)
    assert total.l2 == pytest.approx(expected.l2, rel=1e-12)
    assert total.cosine == pytest.approx(expected.cosine, rel=1e-12)
    assert total.parameters == expected.parameters
    assert total.per_parameter == pytest.approx(expected.l2 / expected.parameters)
    for grouping in ("layer", "kind"):
        assert sum(part.parameters for part in by_grouping[grouping].values()) == total.parameters
        assert sum(part.l2**2 for part in by_grouping[grouping].values()) == pytest.approx(total.l2**2)
    assert {"layer 0", "layer 1", "embeddings"} <= by_grouping["layer"].keys()
    assert {"attention", "feed-forward", "norm", "embedding"} <= by_grouping["kind"].keys()


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", "layer 11", "attention"),
        ("bert.encoder.layer.11.attention.output.LayerNorm.weight", "layer 11", "norm"),
        ("roberta.encoder.layer.3.intermediate.dense.bias", "layer 3", "feed-forward"),
        ("distilbert.transformer.layer.2.ffn.lin1.weight", "layer 2", "feed-forward"),
        ("model.layers.30.self_attn.q_proj.weight", "layer 30", "attention"),
        ("model.layers.30.mlp.down_proj.weight", "layer 30", "feed-forward"),
        ("model.layers.30.input_layernorm.weight", "layer 30", "norm"),
        ("transformer.h.5.attn.c_attn.weight", "layer 5", "attention"),
        ("transformer.h.5.ln_1.weight", "layer 5", "norm"),
        ("model.embed_tokens.weight", "embeddings", "embedding"),
        ("transformer.wte.weight", "embeddings", "embedding"),
        ("bert.embeddings.LayerNorm.weight", "embeddings", "norm"),
        ("classifier.weight", "outside the layers", "head"),
        ("lm_head.weight", "outside the layers", "head"),
    ],
)
def test_layer_and_kind_of_names(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)


def test_tied_weights_are_grafted_once(tmp_path, bases):
    """A base whose language-modelling head is tied to its embeddings stores them once."""
    old, new = bases["bert"]
    write_folder(graft_all(Checkpoint.open(new), Checkpoint.open(new), Checkpoint.open(old)), tmp_path / "out", new, {})
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_commands_of_weights(tmp_path, bases, run_main):
    def run(*arguments):
        code, output, error = run_main("weights", *arguments)
        assert code == 0, error
        return output

    old, new = bases["bert"]
    checkpoints = ["--new", new, "--tuned", new, "--old", old]
    assert "nothing was written" in run("graft", *checkpoints, "--out", tmp_path / "out", "--dry-run")
    assert not list(tmp_path.iterdir())
    run("graft", *checkpoints, "--scale-for", "*.attention.*=0", "--check-finite", "--out", tmp_path / "out")
    grafted, source = Checkpoint.open(tmp_path / "out"), Checkpoint.open(new)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(grafted[name], source[name])
    assert json.loads((tmp_path / "out" / "regraft.json").read_text())["operation"] == "graft"
    run("delta", "--tuned", new, "--old", old, "--out", tmp_path / "delta")
    run("interpolate", "--first", old, "--second", new, "--t", 0.5, "--out", tmp_path / "half")
    assert "layer 1" in run("distance", old, tmp_path / "half")
    assert "feed-forward" in run("inspect", tmp_path / "delta", "--full")
    assert derived_module.CHUNK_ELEMENTS == 1 << 18


def test_graft_onto_a_base_with_new_tokens(tmp_path, bases, tuned_outcomes):
    """Rows of tokens that only the new base has are copied from it, the other rows are grafted."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    old = bases["bert"][0]
    fine_tune = tuned_outcomes["bert", "full"] / "adaptation"
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.add_tokens(["zebra", "yak"])
    model = AutoModelForMaskedLM.from_pretrained(bases["bert"][1], dtype="float32")
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "new")
    checkpoints = ["--new", tmp_path / "new", "--tuned", fine_tune, "--old", old]
    from typer.testing import CliRunner

    from regraft.cli import app

    result = CliRunner().invoke(app, ["weights", "graft", *map(str, checkpoints), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "2 only in the new vocabulary, 0 only in the old" in result.output
    grafted, new, tuned_weights, base = (
        Checkpoint.open(path) for path in (tmp_path / "out", tmp_path / "new", fine_tune, old)
    )
    name = "bert.embeddings.word_embeddings.weight"
    count = tuned_weights.tensors[name].shape[0]
    assert torch.equal(grafted[name][count:], new[name][count:])
    expected = new[name][:count].double() + (tuned_weights[name].double() - base[name].double())
    torch.testing.assert_close(grafted[name][:count].double(), expected, rtol=1e-6, atol=1e-7)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a zebra was good", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert int(ids["input_ids"].max()) >= count


def test_apply_all_composes_rules(bases):
    old, new = (Checkpoint.open(path) for path in bases["bert"])
    change = delta_all(new, old)
    trimmed = apply_all(lambda tensor: trim(tensor, 0.2), change, elementwise=False)
    orthogonal = apply_all(orthogonal_part, trimmed, change, elementwise=False)
    masked = apply_all(mask_conflicts, orthogonal, change)
    name = "bert.encoder.layer.0.output.dense.weight"
    expected = new[name] - old[name]
    assert torch.equal(trimmed[name], trim(expected, 0.2))
    assert torch.equal(masked[name], mask_conflicts(orthogonal_part(trim(expected, 0.2), expected), expected))
    with pytest.raises(MismatchError, match="are not in all"):
        apply_all(mask_conflicts, change, {key: change[key] for key in change if key != name})


def test_nonfinite_values_are_counted_by_tensor(tmp_path):
    from regraft.checkpoint import check_finite

    tensors = {"a": torch.ones(10), "b": torch.tensor([1.0, float("nan"), float("inf")]), "n": torch.tensor([1])}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors hold values .*: b \(2 of 3\)\."):
        check_finite(Checkpoint.open(tmp_path / "m.safetensors"))
    save_file({"a": torch.ones(10, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    check_finite(Checkpoint.open(tmp_path / "m.safetensors"))


def test_full_fingerprint_covers_every_byte(tmp_path):
    from regraft.checkpoint import fingerprint

    large = torch.zeros(100_000)
    save_file({"w": large}, tmp_path / "one.safetensors")
    large[12_345] = 1.0  # between the samples
    save_file({"w": large}, tmp_path / "two.safetensors")
    first, second = (Checkpoint.open(tmp_path / file) for file in ("one.safetensors", "two.safetensors"))
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first, full=True) != fingerprint(second, full=True)
    write_checkpoint(tmp_path, {"w": large}, 10)
    assert fingerprint(Checkpoint.open(tmp_path), full=True) == fingerprint(second, full=True)


NAMES = (
    "layer.0.first.weight",
    "layer.0.second.weight",
    "layer.1.first.bias",
    "classifier.weight",
    "pooler.dense.weight",
)
COMMON = "layer.1.second.weight"  # a tensor that is always in both, so that names can be aligned


@settings(deadline=None)
@given(*[st.sets(st.sampled_from(NAMES), min_size=1)] * 3)
def test_graft_of_any_subsets_of_tensors(new_names, tuned_names, old_names):
    """Tensors of both bases are grafted, of neither copied; of one base only, refused except for poolers."""
    checkpoints = [
        {
            name: torch.full((2,), amount + index)
            for index, name in enumerate((*NAMES, COMMON))
            if name in {*names, COMMON}
        }
        for amount, names in ((100.0, new_names), (30.0, tuned_names), (7.0, old_names))
    ]
    new, tuned, old = checkpoints
    if any("pooler" not in name for name in (new_names ^ old_names) & tuned_names):
        with pytest.raises(MismatchError):
            graft_all(new, tuned, old)
        return
    grafted = graft_all(new, tuned, old)
    assert set(grafted) == set(tuned)
    for name in tuned:
        is_grafted = name in new and name in old
        assert torch.equal(grafted[name], new[name] + tuned[name] - old[name] if is_grafted else tuned[name])
