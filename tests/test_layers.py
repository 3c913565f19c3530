"""Methods on layers other than nn.Linear: Conv1D, routers and experts, against closed forms in plain torch."""

import pytest
import torch
from helpers import HEAD, LABELS, WORDS, make_tokenizer, read_weights, write_adaptation, write_sentences, write_upgrade
from transformers.pytorch_utils import Conv1D

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import fresh_model, load_model, prepare_for_tuning, save_model
from regraft.errors import KindError
from regraft.methods.masked import Masking
from regraft.methods.ridge import Ridge
from regraft.methods.scaled import Scaling
from regraft.model import encode
from regraft.model.outputs import model_inputs
from regraft.task import load_data

RIDGE = 0.3
FLOAT32 = Recipe(precision="fp32")
SIZE = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "albert": ("AlbertConfig", {**SIZE, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2Config",
        {
            **SIZE,
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": 32,
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 5 + len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66}),
    "gpt-oss": ("GptOssConfig", {**SIZE, **GROUPED, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "mixtral": ("MixtralConfig", {**SIZE, **GROUPED, "num_local_experts": 4}),
    "nomic-bert": ("NomicBertConfig", SIZE),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZE, **GROUPED, "num_experts": 4, "moe_intermediate_size": 16}),
    "squeezebert": ("SqueezeBertConfig", {**SIZE, "embedding_size": 32}),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write_base(name, folder):
    import transformers

    config_class, settings = CONFIGS[name]
    config = getattr(transformers, config_class)(**settings)
    is_causal = name in ("gpt2", "gpt-oss", "mixtral", "qwen3-moe")
    auto_class = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer("llama" if is_causal else name).save_pretrained(folder)
    return Base.open(folder)


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory):
    """A function that returns an upgrade of an architecture, built once, and a full fine-tune of the old base."""
    folder = tmp_path_factory.mktemp("layers")
    cache = {}

    def build(name):
        if name not in cache:
            old = write_base(name, folder / f"{name}-old")
            new = Base.open(write_upgrade(old.path, folder / f"{name}-new", 0.3))
            cache[name] = Upgrade(old, new), write_adaptation(old, "full", folder / name / "adaptation")
        return cache[name]

    return build


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """A task whose training examples fit into one batch."""
    folder = tmp_path_factory.mktemp("task")
    for name, count, seed in (("train", 40, 1), ("dev", 10, 2), ("test", 10, 3)):
        write_sentences(folder / f"{name}.csv", count, seed)
    (folder / "task.yaml").write_text(
        "name: mood\ntrain: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\nmax_length: 32\n"
    )
    return folder / "task.yaml"


def adapt_experts(base, folder, modules):
    """Write a LoRA on the experts and on other modules, with all weights changed."""
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=modules, target_parameters=EXPERTS)
    model = prepare_for_tuning(fresh_model(base, HEAD, 1), base, HEAD, config, 1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "adaptation").mkdir(parents=True)
    save_model(model, base, HEAD, folder / "adaptation")
    return folder / "adaptation"


def batch_of(base, task_file):
    data = load_data(task_file, 20).relabel(LABELS)
    examples = encode(base, data, data.train)
    longest_first = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])
    return model_inputs(examples.batch(longest_first))


def record_calls(model, batch):
    """Run a model, and return the arguments of all calls of each module, by its name."""
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, kwargs, __, name=name: calls.setdefault(name, []).append((*args, *kwargs.values())),
            with_kwargs=True,
        )
    with torch.no_grad():
        model.eval()(**batch)
    return calls


def rows_of(calls, mask, argument=0, last_only=False):
    """Return the rows of one argument of all calls, without padding, in float64."""
    rows = []
    for call in calls:
        tensor = call[argument]
        if last_only:
            tensor = tensor[torch.arange(len(mask)), mask.sum(dim=1) - 1]
        elif tensor.dim() == 3 and tensor.shape[:2] == mask.shape:
            tensor = tensor[mask]
        elif tensor.dim() == 2 and len(tensor) == mask.numel():
            tensor = tensor[mask.flatten()]
        rows.append(tensor.flatten(0, -2).double())
    return torch.cat(rows)


def closed_form(delta, old_rows, new_rows):
    cross, second = old_rows.T @ new_rows, new_rows.T @ new_rows
    strength = RIDGE * second.diagonal().mean()
    return (delta @ cross + strength * delta) @ torch.linalg.inv(second + strength * torch.eye(len(second)).double())


def inner_rows(experts, expert, rows):
    """Return the inputs of an expert's down_proj."""
    weight = experts.gate_up_proj[expert].detach().double()
    projected = rows @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        projected = projected + experts.gate_up_proj_bias[expert].detach().double()
    return experts._apply_gate(projected)


@pytest.mark.parametrize("name", ["gpt2", "deberta-v2", "nomic-bert", "qwen3-moe", "mixtral", "gpt-oss"])
def test_ridge_equals_the_closed_form_in_every_layer(tmp_path, upgrades, task_file, name):
    """On each layer's inputs in the old tuned model and in the result."""
    upgrade, path = upgrades(name)
    out = recycle(upgrade, path, task_file, "ridge", tmp_path / "ridge", recipe=FLOAT32, options=Ridge(RIDGE, 40))
    batch = batch_of(upgrade.new, task_file)
    mask = batch["attention_mask"].bool()
    tuned = load_model(load_adaptation(path), upgrade.old, HEAD)
    result = load_model(load_adaptation(out.path / "adaptation"), upgrade.new, HEAD)
    old_calls, new_calls = record_calls(tuned, batch), record_calls(result, batch)
    passed_over = out.record.notes.get("passed_over", {})
    count = 0
    prefix = upgrade.old.prefix + "."

    def deltas(parameter):
        inner = parameter.removeprefix(prefix)
        for model, base in ((tuned, upgrade.old), (result, upgrade.new)):
            value = model.get_parameter(parameter).detach().double()
            yield value - base.parameters[inner].double() if inner in base.parameters else value

    for module_name, module in tuned.named_modules():
        if hasattr(module, "_apply_gate"):
            inputs = [rows_of(calls[module_name], mask) for calls in (old_calls, new_calls)]
            routes = rows_of(new_calls[module_name], mask, 1)
            for part in ("gate_up_proj", "down_proj"):
                old_deltas, new_deltas = deltas(f"{module_name}.{part}")
                skipped = []
                for expert in range(4):
                    rows = [model_rows[(routes == expert).any(dim=1)] for model_rows in inputs]
                    if part == "down_proj":
                        models = (module, result.get_submodule(module_name))
                        rows = [inner_rows(experts, expert, x) for experts, x in zip(models, rows, strict=True)]
                    old = old_deltas[expert]
                    new = new_deltas[expert]
                    if module.is_transposed:
                        old, new = old.T, new.T
                    if len(rows[0]) < rows[0].shape[1]:  # too few to determine the weights: the delta stays
                        skipped.append(str(expert))
                        expected = old
                    else:
                        expected = closed_form(old, *rows)
                    torch.testing.assert_close(new, expected, rtol=0, atol=2e-5)
                    count += 1
                assert (f"{module_name}.{part}" in passed_over) == bool(skipped)
                assert all(expert in passed_over[f"{module_name}.{part}"] for expert in skipped)
        elif isinstance(module, torch.nn.Linear | Conv1D) or "Router" in type(module).__name__:
            is_head = upgrade.old.is_decoder and module_name == "score"
            rows = [rows_of(calls[module_name], mask, last_only=is_head) for calls in (old_calls, new_calls)]
            old, new = (d.T if isinstance(module, Conv1D) else d for d in deltas(f"{module_name}.weight"))
            torch.testing.assert_close(new, closed_form(old, *rows), rtol=0, atol=2e-5)
            count += 1
    assert count >= 9
    assert all("experts" in parameter for parameter in passed_over)


def test_ridge_refits_a_lora_on_experts_expert_by_expert(tmp_path, upgrades, task_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", ["q_proj"])
    out = recycle(upgrade, path, task_file, "ridge", tmp_path / "ridge", recipe=FLOAT32, options=Ridge(RIDGE, 40))
    before, after = read_weights(path), read_weights(out.path / "adaptation")
    batch = batch_of(upgrade.new, task_file)
    mask = batch["attention_mask"].bool()
    models = [
        load_model(load_adaptation(folder), base, HEAD)
        for folder, base in ((path, upgrade.old), (out.path / "adaptation", upgrade.new))
    ]
    calls = [record_calls(model, batch) for model in models]
    merged = [dict(model.merge_and_unload().named_modules()) for model in models]  # experts compute with merged weights
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        base_layer = f"base_model.model.{name}.base_layer.base_layer"
        inputs = [rows_of(model_calls[base_layer], mask) for model_calls in calls]
        routes = rows_of(calls[1][base_layer], mask, 1)
        for stored, part in ((f"base_model.model.{name}.base_layer", "gate_up"), (f"base_model.model.{name}", "down")):
            old_a, new_a = (
                tensors[f"{stored}.lora_A.weight"].reshape(4, 3, -1).double() for tensors in (before, after)
            )
            assert torch.equal(before[f"{stored}.lora_B.weight"], after[f"{stored}.lora_B.weight"])
            for expert in range(4):
                rows = [model_rows[(routes == expert).any(dim=1)] for model_rows in inputs]
                if part == "down":
                    rows = [inner_rows(modules[name], expert, x) for modules, x in zip(merged, rows, strict=True)]
                expected = closed_form(old_a[expert], *rows)
                torch.testing.assert_close(new_a[expert], expected, rtol=0, atol=2e-5)


def test_delta_methods_change_every_expert_of_a_lora(tmp_path, upgrades, task_file):
    """They change the dense delta of all experts, then reduce each expert's to its rank."""
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", ["q_proj"])
    before = read_weights(path)
    halved = recycle(upgrade, path, task_file, "scaled", tmp_path / "half", recipe=FLOAT32, options=Scaling(scale=0.5))
    for name, tensor in read_weights(halved.path / "adaptation").items():
        torch.testing.assert_close(tensor, before[name] * (0.5 if "lora_B" in name else 1))

    def dense(stored, module):
        a, b = (stored[f"base_model.model.{module}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
        return torch.einsum("ore,eri->eoi", b.reshape(len(b), 3, 4), a.reshape(4, 3, -1)) * 8 / 3  # alpha / r

    for method in ("trimmed", "orthogonal", "masked"):
        out = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FLOAT32)
        after = read_weights(out.path / "adaptation")
        assert before.keys() == after.keys()
        for layer in range(2):
            for suffix, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
                module = f"model.layers.{layer}.mlp.experts{suffix}"
                old, new = dense(before, module), dense(after, module)
                name = f"layers.{layer}.mlp.experts.{part}"
                shift = (upgrade.new.parameters[name] - upgrade.old.parameters[name]).double()
                if method == "trimmed":
                    smallest = old.abs().flatten().sort().values[round(0.3 * old.numel())]
                    old = torch.where(old.abs() >= smallest, old, 0)
                elif method == "orthogonal":
                    old = old - (old * shift).sum() / shift.square().sum() * shift
                else:
                    assert not torch.allclose(new, old, atol=1e-3)
                    continue
                u, s, v = torch.linalg.svd(old)
                closest = torch.einsum("eor,er,eri->eoi", u[..., :3], s[..., :3], v[:, :3])
                torch.testing.assert_close(new, closest, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["albert", "deberta-v2", "gpt2", "nomic-bert", "qwen3-moe"])
def test_an_upgrade_without_changes_returns_the_old_weights(tmp_path, upgrades, task_file, name):
    upgrade, path = upgrades(name)
    before = read_weights(path)
    for method in ("direct", "ridge", "scaled", "aligned", "orthogonal", "masked"):
        unchanged = Upgrade(upgrade.old, upgrade.old)
        after = read_weights(
            recycle(unchanged, path, task_file, method, tmp_path / method, recipe=FLOAT32).path / "adaptation"
        )
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-5 if method == "aligned" else 1e-7)


@pytest.mark.parametrize("name", ["nomic-bert", "mixtral"])
def test_masked_matches_gradients_to_stored_tensors(tmp_path, upgrades, task_file, name):
    upgrade, path = upgrades(name)
    options = Masking(labels=20)
    out = recycle(upgrade, path, task_file, "masked", tmp_path / "masked", recipe=FLOAT32, options=options)
    direct = recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FLOAT32)
    masked, grafted = (
        load_model(load_adaptation(outcome.path / "adaptation"), upgrade.new, HEAD) for outcome in (out, direct)
    )
    bare = load_model(load_adaptation(direct.path / "adaptation"), upgrade.new, HEAD)
    prefix = upgrade.new.prefix + "."
    base = {n: upgrade.new.parameters.get(n.removeprefix(prefix)) for n, _ in bare.named_parameters()}
    before = {n: upgrade.old.parameters.get(n.removeprefix(prefix)) for n in base}
    with torch.no_grad():
        for parameter, weight in bare.named_parameters():
            if base[parameter] is not None:
                weight.copy_(base[parameter])
    data = load_data(task_file, 20).relabel(LABELS)
    assert len(data.train) == options.labels * 2  # so that all examples are drawn
    examples = encode(upgrade.new, data, data.train)
    batch = examples.batch(list(range(len(examples))))
    labels = torch.as_tensor(data.train.labels)
    logits = bare(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for parameter, weight in bare.named_parameters():
        if base[parameter] is None or torch.equal(base[parameter], before[parameter]):
            continue  # tensors that the upgrade did not change keep their delta
        delta = grafted.get_parameter(parameter) - base[parameter]
        agrees = (delta * weight.grad <= 0) | (weight.grad == 0)
        is_certain = weight.grad.abs() > 1e-6 * weight.grad.abs().max()  # smaller signs are those of rounding errors
        expected = torch.where(agrees, grafted.get_parameter(parameter), base[parameter])
        actual = masked.get_parameter(parameter)
        torch.testing.assert_close(actual[is_certain], expected[is_certain], rtol=0, atol=1e-6)


def test_aligned_rotates_conv1d_and_passes_over_experts(tmp_path, upgrades, task_file):
    upgrade, path = upgrades("gpt2")
    direct = read_weights(
        recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FLOAT32).path / "adaptation"
    )
    out = recycle(upgrade, path, task_file, "aligned", tmp_path / "gpt2", recipe=FLOAT32)
    rotated = read_weights(out.path / "adaptation")
    assert "passed_over" not in out.record.notes
    assert not [name for name in direct if torch.equal(direct[name], rotated[name])]
    upgrade, path = upgrades("qwen3-moe")
    direct = read_weights(
        recycle(upgrade, path, task_file, "direct", tmp_path / "moe", recipe=FLOAT32).path / "adaptation"
    )
    out = recycle(upgrade, path, task_file, "aligned", tmp_path / "out", recipe=FLOAT32)
    rotated = read_weights(out.path / "adaptation")
    unchanged = {name for name in direct if torch.equal(direct[name], rotated[name])}
    assert out.record.notes["passed_over"].keys() == {
        f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("gate", "experts")
    }
    assert unchanged and all(".mlp.gate." in name or ".experts." in name for name in unchanged)


def test_layers_that_cannot_be_observed_are_passed_over(tmp_path, upgrades, task_file):
    upgrade, path = upgrades("squeezebert")
    passed_over = recycle(upgrade, path, task_file, "ridge", tmp_path / "out", recipe=FLOAT32).record.notes[
        "passed_over"
    ]
    assert "transformer.encoder.layers.0.attention.query.weight" in passed_over
    assert not [name for name in passed_over if "embeddings" in name or name.startswith("classifier")]


def test_ridge_refuses_if_it_can_refit_nothing(tmp_path, upgrades, task_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", [])
    with pytest.raises(KindError, match=r"can refit none .*experts\.gate_up_proj \(all experts: reached by fewer"):
        recycle(upgrade, path, task_file, "ridge", tmp_path / "out", recipe=FLOAT32, options=Ridge(texts=1))
    assert not (tmp_path / "out").exists()
