"""`ridge` and its like on layers that are no plain nn.Linear: against the closed form in plain torch, with hooks."""

import pytest
import torch
from conftest import HEAD, LABELS, WORDS, adapt, make_tokenizer, move_base, weights, write_rows
from transformers.pytorch_utils import Conv1D

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle
from regraft.adaptation import attach, fresh_model, load_model, save_model
from regraft.errors import KindError
from regraft.methods.masked import Masking
from regraft.methods.ridge import Ridge
from regraft.methods.scaled import Scaling
from regraft.model import encode
from regraft.task import load_data

RIDGE = 0.3
QUICK = Recipe(precision="fp32")
SIZE = {
    "vocab_size": 5 + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "albert": ("AlbertConfig", {**SIZE, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2Config",
        {
            **SIZE, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
            "type_vocab_size": 0, "pooler_hidden_size": 32,
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 5 + len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66}),
    "gpt-oss": ("GptOssConfig", {**SIZE, **GROUPED, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "mixtral": ("MixtralConfig", {**SIZE, **GROUPED, "num_local_experts": 4}),
    "nomic-bert": ("NomicBertConfig", SIZE),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZE, **GROUPED, "num_experts": 4, "moe_intermediate_size": 16}),
    "squeezebert": ("SqueezeBertConfig", {**SIZE, "embedding_size": 32}),
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write_base(name, folder):
    import transformers

    kind, settings = CONFIGS[name]
    config = getattr(transformers, kind)(**settings)
    is_causal = name in ("gpt2", "gpt-oss", "mixtral", "qwen3-moe")
    auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    make_tokenizer("llama" if is_causal else name).save_pretrained(folder)
    return Base.open(folder)


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory):
    """Both bases of an architecture and a full fine-tune of the old one, built when they are first asked for."""
    folder, built = tmp_path_factory.mktemp("layers"), {}

    def build(name):
        if name not in built:
            old = write_base(name, folder / f"{name}-old")
            new = Base.open(move_base(old.path, folder / f"{name}-new", 0.3))
            built[name] = Upgrade(old, new), adapt(old, "full", folder / name / "adaptation")
        return built[name]

    return build


@pytest.fixture(scope="module")
def few_file(tmp_path_factory):
    """A task small enough for one batch."""
    folder = tmp_path_factory.mktemp("few")
    for name, count, seed in (("train", 40, 1), ("dev", 10, 2), ("test", 10, 3)):
        write_rows(folder / f"{name}.csv", count, seed)
    (folder / "task.yaml").write_text(
        "name: mood\ntrain: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\nmax_length: 32\n"
    )
    return folder / "task.yaml"


def adapt_experts(base, folder, modules):
    """Write a LoRA on the experts, and on other modules, whose every number is moved."""
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=modules, target_parameters=EXPERTS)
    model = attach(fresh_model(base, HEAD, 1), base, HEAD, config, 1)
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
    batch = examples.batch(sorted(range(len(examples)), key=lambda i: -len(examples.columns["input_ids"][i])))
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}


def watch(model, batch):
    """All that each module is called with in a forward pass, by name and call."""
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, kwargs, __, name=name: calls.setdefault(name, []).append((*args, *kwargs.values())),
            with_kwargs=True,
        )
    with torch.no_grad():
        model.eval()(**batch)
    return calls


def rows_of(calls, mask, position=0, read_last=False):
    """The rows of all calls, padding left out, in float64."""
    rows = []
    for call in calls:
        tensor = call[position]
        if read_last:
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


def inner_rows(experts, number, rows, gate_up=None):
    """What an expert's down_proj is fed."""
    weight = (experts.gate_up_proj[number] if gate_up is None else gate_up[number]).detach().double()
    projected = rows @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        projected = projected + experts.gate_up_proj_bias[number].detach().double()
    return experts._apply_gate(projected)


@pytest.mark.parametrize("name", ["gpt2", "deberta-v2", "nomic-bert", "qwen3-moe", "mixtral", "gpt-oss"])
def test_ridge_is_the_closed_form_in_every_layer(tmp_path, upgrades, few_file, name):
    """On the inputs that each layer has in the old tuned model and in the result itself."""
    upgrade, path = upgrades(name)
    out = recycle(upgrade, path, few_file, "ridge", tmp_path / "ridge", recipe=QUICK, options=Ridge(RIDGE, 40))
    batch = batch_of(upgrade.new, few_file)
    mask = batch["attention_mask"].bool()
    tuned = load_model(load_adaptation(path), upgrade.old, HEAD)
    result = load_model(load_adaptation(out.path / "adaptation"), upgrade.new, HEAD)
    old_calls, new_calls = watch(tuned, batch), watch(result, batch)
    named, checked = out.record.notes.get("passed_over", {}), 0
    prefix = upgrade.old.prefix + "."

    def deltas(parameter):
        inner = parameter.removeprefix(prefix)
        for model, base in ((tuned, upgrade.old), (result, upgrade.new)):
            value = model.get_parameter(parameter).detach().double()
            yield value - base.parameters[inner].double() if inner in base.parameters else value

    for module_name, module in tuned.named_modules():
        if hasattr(module, "_apply_gate"):
            sides = [rows_of(calls[module_name], mask) for calls in (old_calls, new_calls)]
            routed = rows_of(new_calls[module_name], mask, 1)
            for part in ("gate_up_proj", "down_proj"):
                before, after = deltas(f"{module_name}.{part}")
                few = []
                for number in range(4):
                    rows = [side[(routed == number).any(dim=1)] for side in sides]
                    if part == "down_proj":
                        both = (module, result.get_submodule(module_name))
                        rows = [inner_rows(experts, number, x) for experts, x in zip(both, rows, strict=True)]
                    pair = [d[number].T if module.is_transposed else d[number] for d in (before, after)]
                    expected = pair[0]
                    if len(rows[0]) < rows[0].shape[1]:
                        few.append(str(number))
                    else:
                        expected = closed_form(pair[0], *rows)
                    torch.testing.assert_close(pair[1], expected, rtol=0, atol=2e-5)
                    checked += 1
                assert (f"{module_name}.{part}" in named) == bool(few)
                assert all(number in named[f"{module_name}.{part}"] for number in few)
        elif isinstance(module, torch.nn.Linear | Conv1D) or "Router" in type(module).__name__:
            head = upgrade.old.is_decoder and module_name == "score"
            rows = [rows_of(calls[module_name], mask, read_last=head) for calls in (old_calls, new_calls)]
            pair = [d.T if isinstance(module, Conv1D) else d for d in deltas(f"{module_name}.weight")]
            torch.testing.assert_close(pair[1], closed_form(pair[0], *rows), rtol=0, atol=2e-5)
            checked += 1
    assert checked >= 9
    assert all("experts" in parameter for parameter in named)


def test_a_lora_on_experts_is_refitted_expert_by_expert(tmp_path, upgrades, few_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", ["q_proj"])
    out = recycle(upgrade, path, few_file, "ridge", tmp_path / "ridge", recipe=QUICK, options=Ridge(RIDGE, 40))
    before, after = weights(path), weights(out.path / "adaptation")
    batch = batch_of(upgrade.new, few_file)
    mask = batch["attention_mask"].bool()
    models = [
        load_model(load_adaptation(folder), base, HEAD)
        for folder, base in ((path, upgrade.old), (out.path / "adaptation", upgrade.new))
    ]
    calls = [watch(model, batch) for model in models]
    merged = [dict(model.merge_and_unload().named_modules()) for model in models]  # what experts multiply by
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        base_layer = f"base_model.model.{name}.base_layer.base_layer"
        sides = [rows_of(side[base_layer], mask) for side in calls]
        routed = rows_of(calls[1][base_layer], mask, 1)
        for stored, part in ((f"base_model.model.{name}.base_layer", "gate_up"), (f"base_model.model.{name}", "down")):
            old_a, new_a = (side[f"{stored}.lora_A.weight"].reshape(4, 3, -1).double() for side in (before, after))
            assert torch.equal(before[f"{stored}.lora_B.weight"], after[f"{stored}.lora_B.weight"])
            for number in range(4):
                rows = [side[(routed == number).any(dim=1)] for side in sides]
                if part == "down":
                    rows = [inner_rows(side[name], number, x) for side, x in zip(merged, rows, strict=True)]
                expected = closed_form(old_a[number], *rows)
                torch.testing.assert_close(new_a[number], expected, rtol=0, atol=2e-5)


def test_rules_on_deltas_reach_every_expert_of_a_lora(tmp_path, upgrades, few_file):
    """Trimmed and projected as the dense delta of all experts is, then brought back to the rank of each."""
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", ["q_proj"])
    before = weights(path)
    half = recycle(upgrade, path, few_file, "scaled", tmp_path / "half", recipe=QUICK, options=Scaling(scale=0.5))
    for name, tensor in weights(half.path / "adaptation").items():
        torch.testing.assert_close(tensor, before[name] * (0.5 if "lora_B" in name else 1))

    def dense(stored, module):
        a, b = (stored[f"base_model.model.{module}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
        return torch.einsum("ore,eri->eoi", b.reshape(len(b), 3, 4), a.reshape(4, 3, -1)) * 8 / 3  # alpha / r

    for method in ("trimmed", "orthogonal", "masked"):
        out = recycle(upgrade, path, few_file, method, tmp_path / method, recipe=QUICK)
        after = weights(out.path / "adaptation")
        assert before.keys() == after.keys()
        for layer in range(2):
            for path_of, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
                module = f"model.layers.{layer}.mlp.experts{path_of}"
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
def test_an_upgrade_that_changed_nothing_gives_the_old_weights(tmp_path, upgrades, few_file, name):
    upgrade, path = upgrades(name)
    before = weights(path)
    for method in ("direct", "ridge", "scaled", "aligned", "orthogonal", "masked"):
        same = Upgrade(upgrade.old, upgrade.old)
        after = weights(recycle(same, path, few_file, method, tmp_path / method, recipe=QUICK).path / "adaptation")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-5 if method == "aligned" else 1e-7)


@pytest.mark.parametrize("name", ["nomic-bert", "mixtral"])
def test_masked_reads_gradients_under_the_names_that_tensors_are_stored_by(tmp_path, upgrades, few_file, name):
    upgrade, path = upgrades(name)
    options = Masking(labels=20)
    out = recycle(upgrade, path, few_file, "masked", tmp_path / "masked", recipe=QUICK, options=options)
    direct = recycle(upgrade, path, few_file, "direct", tmp_path / "direct", recipe=QUICK)
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
    data = load_data(few_file, 20).relabel(LABELS)
    assert len(data.train) == options.labels * 2  # so that all of them are drawn
    examples = encode(upgrade.new, data, data.train)
    batch = examples.batch(list(range(len(examples))))
    labels = torch.as_tensor(data.train.labels)
    logits = bare(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for parameter, weight in bare.named_parameters():
        if base[parameter] is None or torch.equal(base[parameter], before[parameter]):
            continue  # what the upgrade left as it was keeps its delta
        delta = grafted.get_parameter(parameter) - base[parameter]
        agrees = (delta * weight.grad <= 0) | (weight.grad == 0)
        sure = weight.grad.abs() > 1e-6 * weight.grad.abs().max()  # below that it is a rounding's sign
        expected = torch.where(agrees, grafted.get_parameter(parameter), base[parameter])
        actual = masked.get_parameter(parameter)
        torch.testing.assert_close(actual[sure], expected[sure], rtol=0, atol=1e-6)


def test_aligned_turns_conv1d_and_names_experts(tmp_path, upgrades, few_file):
    upgrade, path = upgrades("gpt2")
    direct = weights(recycle(upgrade, path, few_file, "direct", tmp_path / "direct", recipe=QUICK).path / "adaptation")
    out = recycle(upgrade, path, few_file, "aligned", tmp_path / "gpt2", recipe=QUICK)
    turned = weights(out.path / "adaptation")
    assert "passed_over" not in out.record.notes
    assert not [name for name in direct if torch.equal(direct[name], turned[name])]
    upgrade, path = upgrades("qwen3-moe")
    direct = weights(recycle(upgrade, path, few_file, "direct", tmp_path / "moe", recipe=QUICK).path / "adaptation")
    out = recycle(upgrade, path, few_file, "aligned", tmp_path / "out", recipe=QUICK)
    turned = weights(out.path / "adaptation")
    left = {name for name in direct if torch.equal(direct[name], turned[name])}
    assert out.record.notes["passed_over"].keys() == {
        f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("gate", "experts")
    }
    assert left and all(".mlp.gate." in name or ".experts." in name for name in left)


def test_layers_that_cannot_be_watched_are_named(tmp_path, upgrades, few_file):
    upgrade, path = upgrades("squeezebert")
    named = recycle(upgrade, path, few_file, "ridge", tmp_path / "out", recipe=QUICK).record.notes["passed_over"]
    assert "transformer.encoder.layers.0.attention.query.weight" in named
    assert not [name for name in named if "embeddings" in name or name.startswith("classifier")]


def test_where_nothing_can_be_refitted_ridge_refuses(tmp_path, upgrades, few_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = adapt_experts(upgrade.old, tmp_path / "old", [])
    with pytest.raises(KindError, match=r"can refit none .*experts\.gate_up_proj \(all experts: reached by fewer"):
        recycle(upgrade, path, few_file, "ridge", tmp_path / "out", recipe=QUICK, options=Ridge(texts=1))
    assert not (tmp_path / "out").exists()
