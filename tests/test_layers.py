"""Methods on Conv1D layers, routers and experts, against closed forms in plain torch."""

import functools

import pytest
import torch
import transformers
from helpers import (
    EXPERTS,
    FLOAT32,
    GROUPED,
    HEAD,
    LABELS,
    LORA_RANK,
    NUM_EXPERTS,
    SIZES,
    WORDS,
    add_noise,
    load_tuned_model,
    make_tokenizer,
    read_weights,
    write_adaptation,
    write_sentences,
    write_upgrade,
)
from transformers.pytorch_utils import Conv1D

from regraft import Base, Upgrade, recycle
from regraft.adaptation import fresh_model, prepare_for_tuning, save_model
from regraft.errors import KindError
from regraft.methods.masked import Masking
from regraft.methods.ridge import Ridge
from regraft.methods.scaled import Scaling
from regraft.methods.trimmed import Trimming
from regraft.model import encode
from regraft.model.outputs import model_inputs
from regraft.task import load_data

STRENGTH = 0.3  # of the ridge penalty
MIXTURE = {**GROUPED, "num_experts_per_tok": 2}
CONFIGS = {
    "albert": ("AlbertConfig", {**SIZES, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2Config",
        {
            **SIZES,
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
    "gpt-oss": (
        "GptOssConfig",
        {**SIZES, **MIXTURE, "num_local_experts": NUM_EXPERTS, "layer_types": ["full_attention"] * 2},
    ),
    "mixtral": ("MixtralConfig", {**SIZES, **MIXTURE, "num_local_experts": NUM_EXPERTS}),
    "nomic-bert": ("NomicBertConfig", SIZES),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZES, **MIXTURE, "num_experts": NUM_EXPERTS, "moe_intermediate_size": 16}),
    "squeezebert": ("SqueezeBertConfig", {**SIZES, "embedding_size": 32}),
}


def write_base(architecture, folder):
    config_class, settings = CONFIGS[architecture]
    config = getattr(transformers, config_class)(**settings)
    is_decoder = architecture in ("gpt2", "gpt-oss", "mixtral", "qwen3-moe")
    auto_class = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer("llama" if is_decoder else architecture).save_pretrained(folder)
    return Base.open(folder)


@pytest.fixture(scope="module")
def upgrades(tmp_path_factory):
    """A function of an architecture, which returns its upgrade and the folder of a full fine-tune of the old base."""
    folder = tmp_path_factory.mktemp("layers")

    @functools.cache
    def build(architecture):
        old = write_base(architecture, folder / f"{architecture}-old")
        new = Base.open(write_upgrade(old.path, folder / f"{architecture}-new", 0.3))
        return Upgrade(old, new), write_adaptation(old, "full", folder / architecture / "adaptation")

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


def write_expert_lora(base, folder, modules):
    """Write a LoRA on the experts and on further modules, with all of its numbers changed."""
    from peft import LoraConfig

    config = LoraConfig(r=LORA_RANK, target_modules=modules, target_parameters=EXPERTS)
    model = prepare_for_tuning(fresh_model(base, HEAD, 1), base, HEAD, config, 1)
    add_noise(model, seed=2)
    (folder / "adaptation").mkdir(parents=True)
    save_model(model, base, HEAD, folder / "adaptation")
    return folder / "adaptation"


def make_batch(base, task_file):
    """Return the model inputs of all training texts in one batch, longest first."""
    data = load_data(task_file, 20).relabel(LABELS)
    examples = encode(base, data, data.train)
    longest_first = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])
    return model_inputs(examples.batch(longest_first))


def record_calls(model, batch):
    """Run a model, and return the arguments of all calls of each module, by its name."""
    calls = {name: [] for name, _ in model.named_modules()}

    def record(name, module, args, kwargs, output):
        calls[name].append((*args, *kwargs.values()))

    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(record, name), with_kwargs=True)
    with torch.no_grad():
        model.eval()(**batch)
    return calls


def select_rows(calls, mask, argument=0, last_only=False):
    """Return the rows of an argument of all calls in float64, without padding or only at each text's last token."""
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


def solve_ridge(delta, old_rows, new_rows):
    """Refit a delta (out × in) so that its outputs on the new rows are near to its outputs on the old rows."""
    cross, second = old_rows.T @ new_rows, new_rows.T @ new_rows
    strength = STRENGTH * second.diagonal().mean()
    return (delta @ cross + strength * delta) @ torch.linalg.inv(second + strength * torch.eye(len(second)).double())


def select_expert_inputs(modules, expert, part, inputs, routes):
    """Return the rows that an expert's `gate_up_proj` or `down_proj` reads in each of several models.

    Args:
        modules: The experts' module in each model.
        expert: The index of the expert.
        part: `gate_up_proj` or `down_proj`.
        inputs: The inputs of each module, tokens × width.
        routes: The indices of the experts of each token, tokens × experts per token.
    """
    rows = [module_inputs[(routes == expert).any(dim=1)] for module_inputs in inputs]
    if part == "gate_up_proj":
        return rows
    return [compute_down_inputs(module, expert, x) for module, x in zip(modules, rows, strict=True)]


def compute_down_inputs(experts, expert, rows):
    """Return the inputs of an expert's `down_proj` for the inputs of the expert."""
    weight = experts.gate_up_proj[expert].detach().double()
    projected = rows @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        projected = projected + experts.gate_up_proj_bias[expert].detach().double()
    return experts._apply_gate(projected)


@pytest.mark.parametrize("architecture", ["gpt2", "deberta-v2", "nomic-bert", "qwen3-moe", "mixtral", "gpt-oss"])
def test_ridge_equals_the_closed_form_in_every_layer(tmp_path, upgrades, task_file, architecture):
    """The closed form takes each layer's inputs in the old model and in the result."""
    upgrade, path = upgrades(architecture)
    outcome = recycle(
        upgrade, path, task_file, "ridge", tmp_path / "ridge", recipe=FLOAT32, options=Ridge(STRENGTH, 40)
    )
    batch = make_batch(upgrade.new, task_file)
    mask = batch["attention_mask"].bool()
    models = [
        load_tuned_model(path, upgrade.old),
        load_tuned_model(outcome.path / "adaptation", upgrade.new),
    ]
    calls = [record_calls(model, batch) for model in models]
    passed_over = outcome.record.notes.get("passed_over", {})
    num_compared = 0

    def compute_deltas(parameter):
        name = parameter.removeprefix(f"{upgrade.old.prefix}.")
        deltas = []
        for model, base in zip(models, (upgrade.old, upgrade.new), strict=True):
            weight = model.get_parameter(parameter).detach().double()
            deltas.append(weight - base.parameters[name].double() if name in base.parameters else weight)
        return deltas

    def compare_experts(name):
        """Compare each expert's deltas, and return their number."""
        modules = [model.get_submodule(name) for model in models]
        inputs = [select_rows(model_calls[name], mask) for model_calls in calls]
        routes = select_rows(calls[1][name], mask, argument=1)
        for part in ("gate_up_proj", "down_proj"):
            deltas = compute_deltas(f"{name}.{part}")
            skipped = []
            for expert in range(NUM_EXPERTS):
                old_rows, new_rows = select_expert_inputs(modules, expert, part, inputs, routes)
                old, new = (delta[expert].T if modules[0].is_transposed else delta[expert] for delta in deltas)
                if len(old_rows) < old_rows.shape[1]:  # too few to determine the weights: the delta stays
                    skipped.append(str(expert))
                    expected = old
                else:
                    expected = solve_ridge(old, old_rows, new_rows)
                torch.testing.assert_close(new, expected, rtol=0, atol=2e-5)
            assert (f"{name}.{part}" in passed_over) == bool(skipped)
            if skipped:
                experts = "all experts" if len(skipped) == NUM_EXPERTS else f"experts {', '.join(skipped)}"
                assert passed_over[f"{name}.{part}"].startswith(f"{experts}: ")
        return 2 * NUM_EXPERTS

    for name, module in models[0].named_modules():
        if hasattr(module, "_apply_gate"):
            num_compared += compare_experts(name)
        elif isinstance(module, torch.nn.Linear | Conv1D) or "Router" in type(module).__name__:
            is_decoder_head = upgrade.old.is_decoder and name == "score"
            rows = [select_rows(model_calls[name], mask, last_only=is_decoder_head) for model_calls in calls]
            old, new = (d.T if isinstance(module, Conv1D) else d for d in compute_deltas(f"{name}.weight"))
            torch.testing.assert_close(new, solve_ridge(old, *rows), rtol=0, atol=2e-5)
            num_compared += 1
    assert num_compared >= 9
    assert all("experts" in parameter for parameter in passed_over)


def test_ridge_refits_a_lora_of_experts_expert_by_expert(tmp_path, upgrades, task_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = write_expert_lora(upgrade.old, tmp_path / "old", ["q_proj"])
    outcome = recycle(
        upgrade, path, task_file, "ridge", tmp_path / "ridge", recipe=FLOAT32, options=Ridge(STRENGTH, 40)
    )
    before, after = read_weights(path), read_weights(outcome.path / "adaptation")
    batch = make_batch(upgrade.new, task_file)
    mask = batch["attention_mask"].bool()
    models = [
        load_tuned_model(folder, base)
        for folder, base in ((path, upgrade.old), (outcome.path / "adaptation", upgrade.new))
    ]
    calls = [record_calls(model, batch) for model in models]
    # the experts' module computes with merged weights
    merged = [dict(model.merge_and_unload().named_modules()) for model in models]
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        wrapped = f"base_model.model.{name}.base_layer.base_layer"
        modules = [model_modules[name] for model_modules in merged]
        inputs = [select_rows(model_calls[wrapped], mask) for model_calls in calls]
        routes = select_rows(calls[1][wrapped], mask, argument=1)
        for suffix, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            stored = f"base_model.model.{name}{suffix}"
            old_a, new_a = (
                tensors[f"{stored}.lora_A.weight"].reshape(NUM_EXPERTS, LORA_RANK, -1).double()
                for tensors in (before, after)
            )
            assert torch.equal(before[f"{stored}.lora_B.weight"], after[f"{stored}.lora_B.weight"])
            for expert in range(NUM_EXPERTS):
                rows = select_expert_inputs(modules, expert, part, inputs, routes)
                expected = solve_ridge(old_a[expert], *rows)
                torch.testing.assert_close(new_a[expert], expected, rtol=0, atol=2e-5)


def test_delta_methods_change_every_expert_of_a_lora(tmp_path, upgrades, task_file):
    """The methods change the dense delta of all experts, then reduce each expert's delta to the LoRA's rank."""
    upgrade, _ = upgrades("qwen3-moe")
    path = write_expert_lora(upgrade.old, tmp_path / "old", ["q_proj"])
    before = read_weights(path)
    halved = recycle(upgrade, path, task_file, "scaled", tmp_path / "half", recipe=FLOAT32, options=Scaling(scale=0.5))
    for name, tensor in read_weights(halved.path / "adaptation").items():
        torch.testing.assert_close(tensor, before[name] * (0.5 if "lora_B" in name else 1))

    def compute_dense_delta(stored, module):
        a, b = (stored[f"base_model.model.{module}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
        a, b = a.reshape(NUM_EXPERTS, LORA_RANK, -1), b.reshape(len(b), LORA_RANK, NUM_EXPERTS)
        return torch.einsum("ore,eri->eoi", b, a) * 8 / LORA_RANK  # 8 is PEFT's default of lora_alpha

    for method in ("trimmed", "orthogonal", "masked"):
        out = recycle(upgrade, path, task_file, method, tmp_path / method, recipe=FLOAT32)
        after = read_weights(out.path / "adaptation")
        assert before.keys() == after.keys()
        for layer in range(2):
            for suffix, part in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
                module = f"model.layers.{layer}.mlp.experts{suffix}"
                old, new = compute_dense_delta(before, module), compute_dense_delta(after, module)
                name = f"layers.{layer}.mlp.experts.{part}"
                shift = (upgrade.new.parameters[name] - upgrade.old.parameters[name]).double()
                if method == "masked":
                    assert all(not torch.allclose(n, o, atol=1e-3) for n, o in zip(new, old, strict=True))
                    continue
                if method == "trimmed":
                    threshold = old.abs().flatten().sort().values[round((1 - Trimming().density) * old.numel())]
                    changed = torch.where(old.abs() >= threshold, old, 0)
                else:
                    changed = old - (old * shift).sum() / shift.square().sum() * shift
                u, s, v = torch.linalg.svd(changed)
                expected = torch.einsum("eor,er,eri->eoi", u[..., :LORA_RANK], s[..., :LORA_RANK], v[:, :LORA_RANK])
                torch.testing.assert_close(new, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["albert", "deberta-v2", "gpt2", "nomic-bert", "qwen3-moe"])
def test_an_upgrade_without_changes_returns_the_old_weights(tmp_path, upgrades, task_file, architecture):
    upgrade, path = upgrades(architecture)
    before = read_weights(path)
    unchanged = Upgrade(upgrade.old, upgrade.old)
    for method in ("direct", "ridge", "scaled", "aligned", "orthogonal", "masked"):
        outcome = recycle(unchanged, path, task_file, method, tmp_path / method, recipe=FLOAT32)
        after = read_weights(outcome.path / "adaptation")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5 if method == "aligned" else 1e-7)


@pytest.mark.parametrize("architecture", ["nomic-bert", "mixtral"])
def test_masked_keeps_entries_of_the_delta_against_the_gradient(tmp_path, upgrades, task_file, architecture):
    """Also where the names or the layout of parameters differ from those of the stored tensors."""
    upgrade, path = upgrades(architecture)
    options = Masking(labels=20)
    outcome = recycle(upgrade, path, task_file, "masked", tmp_path / "masked", recipe=FLOAT32, options=options)
    direct_outcome = recycle(upgrade, path, task_file, "direct", tmp_path / "direct", recipe=FLOAT32)

    def load_result(folder):
        return load_tuned_model(folder / "adaptation", upgrade.new)

    masked, grafted, bare = map(load_result, (outcome.path, direct_outcome.path, direct_outcome.path))
    prefix = f"{upgrade.new.prefix}."
    names = [name for name, _ in bare.named_parameters()]
    old_base, new_base = (
        {name: base.parameters.get(name.removeprefix(prefix)) for name in names} for base in (upgrade.old, upgrade.new)
    )
    with torch.no_grad():
        for name, weight in bare.named_parameters():
            if new_base[name] is not None:
                weight.copy_(new_base[name])
    data = load_data(task_file, 20).relabel(LABELS)
    assert len(data.train) == options.labels * len(LABELS)  # so that all examples are drawn
    examples = encode(upgrade.new, data, data.train)
    batch = examples.batch(list(range(len(examples))))
    labels = torch.as_tensor(data.train.labels)
    logits = bare(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, weight in bare.named_parameters():
        if new_base[name] is None or torch.equal(new_base[name], old_base[name]):
            continue  # tensors that the upgrade did not change keep their delta
        delta = grafted.get_parameter(name) - new_base[name]
        agrees = (delta * weight.grad <= 0) | (weight.grad == 0)
        is_certain = weight.grad.abs() > 1e-6 * weight.grad.abs().max()  # rounding decides the signs of smaller ones
        expected = torch.where(agrees, grafted.get_parameter(name), new_base[name])
        actual = masked.get_parameter(name)
        torch.testing.assert_close(actual[is_certain], expected[is_certain], rtol=0, atol=1e-6)


def recycle_by_direct_and_aligned(upgrade, path, task_file, folder):
    """Return the weights that `direct` and `aligned` give, and the layers that `aligned` passes over."""
    outcomes = [
        recycle(upgrade, path, task_file, method, folder / method, recipe=FLOAT32) for method in ("direct", "aligned")
    ]
    direct, aligned = (read_weights(outcome.path / "adaptation") for outcome in outcomes)
    return direct, aligned, outcomes[1].record.notes.get("passed_over")


def test_aligned_rotates_conv1d_layers(tmp_path, upgrades, task_file):
    direct, aligned, passed_over = recycle_by_direct_and_aligned(*upgrades("gpt2"), task_file, tmp_path)
    assert passed_over is None
    assert not [name for name in direct if torch.equal(direct[name], aligned[name])]


def test_aligned_passes_over_experts_and_their_routers(tmp_path, upgrades, task_file):
    direct, aligned, passed_over = recycle_by_direct_and_aligned(*upgrades("qwen3-moe"), task_file, tmp_path)
    unchanged = {name for name in direct if torch.equal(direct[name], aligned[name])}
    assert passed_over.keys() == {
        f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("gate", "experts")
    }
    assert unchanged and all(".mlp.gate." in name or ".experts." in name for name in unchanged)


def test_layers_that_cannot_be_observed_are_passed_over(tmp_path, upgrades, task_file):
    upgrade, path = upgrades("squeezebert")
    outcome = recycle(upgrade, path, task_file, "ridge", tmp_path / "out", recipe=FLOAT32)
    passed_over = outcome.record.notes["passed_over"]
    assert "transformer.encoder.layers.0.attention.query.weight" in passed_over
    assert not [name for name in passed_over if "embeddings" in name or name.startswith("classifier")]


def test_ridge_is_refused_if_it_can_refit_nothing(tmp_path, upgrades, task_file):
    upgrade, _ = upgrades("qwen3-moe")
    path = write_expert_lora(upgrade.old, tmp_path / "old", [])
    with pytest.raises(KindError, match=r"can refit none .*experts\.gate_up_proj \(all experts: reached by fewer"):
        recycle(upgrade, path, task_file, "ridge", tmp_path / "out", recipe=FLOAT32, options=Ridge(texts=1))
    assert not (tmp_path / "out").exists()
