"""Properties of methods for text generation: identities, decoding, accumulation, resumption and grown vocabularies."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import (
    InterruptedRunError,
    add_noise,
    have_equal_tensors,
    interrupt_at,
    make_adapted_model,
    make_sentence,
    read_curve,
    read_weights,
    write_base,
    write_upgrade,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft import Base, Recipe, Upgrade, load_adaptation, recycle, tune
from regraft.adaptation import KINDS, load_model, save_model, write_graft
from regraft.errors import DataError, RecipeError
from regraft.methods import parse_options
from regraft.model import Deployment
from regraft.model import deployment as deployment_module
from regraft.model.answers import AnswerSettings, answer_settings, encode_prompts, generate_answers
from regraft.progress import silent
from regraft.task import Head, TextGeneration, load_data
from regraft.tuning import OnPolicy
from regraft.tuning import on_policy as on_policy_module
from regraft.tuning import trainer as trainer_module

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*")]

HEAD = Head(TextGeneration, ())
SIZES = {"hidden_size": 16, "intermediate_size": 24, "eos_token_id": 2, "bos_token_id": 1}
RECIPE = Recipe(steps=4, batch_size=4, learning_rate=1e-2, eval_every=2, save_every=2, precision="fp32")
UNIFORM_KINDS = ("full", "lora", "bottleneck")
"""The kinds whose delta is linear in a stored tensor."""


def write_task(folder: Path, **keys: Any) -> Path:
    """Write a task whose completions are one to five words long."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", 16), ("dev", 5), ("test", 6)):
        rows = [
            {
                "prompt": make_sentence(rng, bool(i % 2)),
                "completion": " " + " ".join(make_sentence(rng, bool(i % 2)).split()[: rng.randint(1, 5)]),
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {split: f"{split}.jsonl" for split in ("train", "dev", "test")}
    content = {"type": "text-generation", **sources, "metric": "exact_match", "max_new_tokens": 5, **keys}
    (folder / "task.yaml").write_text(json.dumps(content))
    return folder / "task.yaml"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory) -> Upgrade:
    """An old base whose answers differ from prompt to prompt, and its upgrade."""
    folder = tmp_path_factory.mktemp("bases")
    model = AutoModelForCausalLM.from_pretrained(write_base(folder / "old", "llama", **SIZES))
    add_noise(model, 0.3, seed=0).save_pretrained(folder / "old")
    return Upgrade(Base.open(folder / "old"), Base.open(write_upgrade(folder / "old", folder / "new", 0.1)))


@pytest.fixture(scope="module")
def adaptations(tmp_path_factory, upgrade) -> dict[str, Path]:
    """An adaptation of the old base of each kind."""
    folder = tmp_path_factory.mktemp("adaptations")
    for kind in KINDS:
        model, initial = make_adapted_model(upgrade.old, kind, HEAD)
        (folder / kind).mkdir()
        save_model(model, upgrade.old, HEAD, folder / kind, initial)
    return {kind: folder / kind for kind in KINDS}


def deploy(adaptation: Path, base: Base, task: Path) -> Deployment:
    data = load_data(task, 0)
    model = load_model(load_adaptation(adaptation), base, HEAD)
    return Deployment(model, base, data, "fp32")


# Identities


IDENTITIES = {
    "direct": ("full", "lora", "dora", "pissa", "bottleneck", "prefix", "prompt", "ia3"),
    "ridge": UNIFORM_KINDS,
    "scaled": UNIFORM_KINDS,
    "aligned": UNIFORM_KINDS,
    "orthogonal": ("full", "lora"),
    "masked": ("full", "lora"),
    "trimmed": ("full", "lora"),
}
"""The methods that change nothing if the upgrade changes nothing, with kinds that they take. The last three transform
the delta of a tensor only if the upgrade changed the tensor."""


@pytest.mark.parametrize(("method", "kind"), [(method, kind) for method in IDENTITIES for kind in IDENTITIES[method]])
def test_answers_do_not_change_if_the_base_does_not(upgrade, adaptations, task, tmp_path, method, kind):
    old = upgrade.old
    outcome = recycle(Upgrade(old, old), adaptations[kind], task, method, tmp_path / "out", recipe=RECIPE)
    before, after = deploy(adaptations[kind], old, task), deploy(outcome.path, old, task)
    test = before.data.test
    answers = before.answer_ids(test)
    assert len(set(map(tuple, answers))) > 1
    assert after.answer_ids(after.data.test) == answers


@pytest.fixture
def first_batch(monkeypatch):
    """Replace the training by one backward pass; the list gets the model, the objective and the batch."""
    calls: list[tuple[Any, Any, dict[str, torch.Tensor]]] = []

    def train_nothing(model, data, collate, objective, evaluate, recipe, *_: Any, **__: Any):
        batch = collate(list(data)[: recipe.batch_size])
        objective(model, batch, 0).backward()
        calls.append((model, objective, batch))
        return [{"step": 0, "seconds": 0.0, **evaluate(model)}]

    monkeypatch.setattr(trainer_module, "train", train_nothing)
    return calls


def largest_gradient(model: torch.nn.Module) -> float:
    return max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)


OBJECTIVES = {
    "forward": ("direct+distill", ["alpha=1", "top_k=0"]),
    "top-k and tail": ("direct+distill", ["alpha=1", "top_k=4"]),
    "reverse": ("direct+distill", ["alpha=1", "divergence=reverse"]),
    "js": ("direct+distill", ["alpha=1", "divergence=js", "mixture=0.3"]),
    "temperature": ("direct+distill", ["alpha=1", "top_k=0", "temperature=2"]),
    "label-free": ("direct+label-free", []),
    "on-policy": ("on-policy", []),
}


@pytest.mark.parametrize(
    ("objective", "kind"), [*((name, "full") for name in OBJECTIVES), ("forward", "lora"), ("on-policy", "lora")]
)
def test_a_student_that_equals_its_teacher_has_no_gradient(
    upgrade, adaptations, task, tmp_path, first_batch, objective, kind
):
    """Through the whole objective; on another base, the gradient is thousands of times larger."""
    method, settings = OBJECTIVES[objective]
    options = parse_options(method, settings)
    gradients = []
    for name, new in (("same", upgrade.old), ("other", upgrade.new)):
        recycle(
            Upgrade(upgrade.old, new), adaptations[kind], task, method, tmp_path / name, recipe=RECIPE, options=options
        )
        gradients.append(largest_gradient(first_batch[-1][0]))
    assert gradients[0] < 1e-6 < 1e-3 < gradients[1]


# Decoding


def answer_naively(model: Any, prompt: list[int], settings: AnswerSettings) -> list[int]:
    """Append the most likely token of a pass over all tokens so far, until an answer ends."""
    ids = list(prompt)
    model.eval()
    while len(ids) - len(prompt) < settings.max_new_tokens:
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in settings.stop_ids:
            break
    return ids[len(prompt) :]


def state_of(model: Any) -> tuple[Any, ...]:
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    return modes, config, model.generation_config.to_dict(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_batched_answers_are_those_of_a_naive_loop(upgrade, task, kind):
    """Left padding, caches and the model's own generation settings change nothing, and neither does decoding."""
    model, _ = make_adapted_model(upgrade.old, kind, HEAD)
    model.generation_config.update(repetition_penalty=9.0, temperature=0.1, do_sample=True, min_new_tokens=5, top_k=2)
    data = load_data(task, 0)
    prompts = encode_prompts(upgrade.old, data, data.train)
    assert len(set(map(len, prompts))) > 3
    settings = AnswerSettings(frozenset({2, 8, 20, 33}), 6, 0)
    expected = [answer_naively(model, prompt, settings) for prompt in prompts]
    assert len({answer[-1] in settings.stop_ids for answer in expected}) == 2  # some end, some are cut
    model.train()
    before = state_of(model)
    answers = generate_answers(model, prompts, settings, "fp32")
    assert answers == expected
    assert [generate_answers(model, [prompt], settings, "fp32")[0] for prompt in prompts] == expected
    sampled = [
        generate_answers(model, prompts, dataclasses.replace(settings, sampling_seed=seed), "fp32")
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert state_of(model) == before


def test_answers_end_at_tokens_of_each_source(upgrade, tmp_path):
    """The tokenizer's, those of `generation_config.json`, and the one by which a chat template ends an answer."""
    shutil.copytree(upgrade.old.path, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mask>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': 'film', 'assistant': 'good'}[m.role] }} <mask>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    data = load_data(write_task(tmp_path / "task"), 0)
    assert answer_settings(base, data).stop_ids == {2, 9, 4}


def test_an_answer_lacks_an_ordinary_token_that_ends_it(upgrade, task, tmp_path, monkeypatch):
    shutil.copytree(upgrade.old.path, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    base, data = Base.open(tmp_path / "base"), load_data(task, 0)
    monkeypatch.setattr(deployment_module, "generate_answers", lambda *_: [[7, 9], [7, 8], [9], [], [7], [7]])
    predictions = Deployment(AutoModelForCausalLM.from_pretrained(base.path), base, data, "fp32").predictions(data.test)
    words = base.tokenizer.convert_ids_to_tokens([7, 8])
    assert [prediction["answer"] for prediction in predictions[:4]] == [words[0], " ".join(words), "", ""]
    assert [(prediction["ended"], prediction["tokens"]) for prediction in predictions[:3]] == [
        (True, 2),
        (False, 2),
        (True, 1),
    ]


def test_prompts_leave_room_for_the_answers_of_on_policy(upgrade, adaptations, task, tmp_path, monkeypatch):
    lengths = []

    def generate(model, prompts, settings, precision):
        lengths.extend(len(prompt) + settings.max_new_tokens for prompt in prompts)
        return generate_answers(model, prompts, settings, precision)

    monkeypatch.setattr(on_policy_module, "generate_answers", generate)
    longest = upgrade.new.max_input_length
    options = OnPolicy(max_new_tokens=longest - 4)
    recycle(upgrade, adaptations["lora"], task, "on-policy", tmp_path / "out", recipe=RECIPE, options=options)
    assert max(lengths) == longest


# Training


@pytest.fixture
def gradients(monkeypatch):
    """Record the gradients of each step of the optimiser."""
    steps: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def recording(self, *args: Any, **kwargs: Any):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        steps.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    return steps


@pytest.mark.parametrize(
    ("method", "micro_batch_size"),
    [("init", 1), ("init", 2), ("direct+distill", 2), ("direct+label-free", 1), ("text-classification", 2)],
)
def test_accumulated_gradients_are_those_of_the_batch(
    upgrade, adaptations, task, task_file, tmp_path, gradients, method, micro_batch_size
):
    """The mean is over the tokens of the whole batch, although its parts have different numbers of them."""
    whole = dataclasses.replace(RECIPE, steps=1)
    for recipe in (whole, dataclasses.replace(whole, micro_batch_size=micro_batch_size)):
        out = tmp_path / str(recipe.micro_batch_size)
        if method == "text-classification":
            tune(upgrade.old, task_file, out, kind="lora", recipe=recipe)
        else:
            recycle(upgrade, adaptations["lora"], task, method, out, recipe=recipe)
    assert len(gradients) == 2
    assert max(float(gradient.abs().max()) for gradient in gradients[0]) > 1e-3
    for accumulated, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(accumulated, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora"])
def test_activation_checkpointing_does_not_change_a_training(upgrade, adaptations, task, tmp_path, kind):
    curves = []
    for enabled in (False, True):
        recipe = dataclasses.replace(RECIPE, activation_checkpointing=enabled)
        outcome = recycle(upgrade, adaptations[kind], task, "direct+distill", tmp_path / str(enabled), recipe=recipe)
        curves.append([(point["step"], point["loss"]) for point in read_curve(outcome.path)])
    assert curves[0] == curves[1]
    assert len({loss for _, loss in curves[0]}) > 1


@pytest.mark.parametrize("method", ["direct+distill", "direct+label-free", "on-policy"])
def test_an_interrupted_training_resumes_to_the_same_weights(upgrade, adaptations, task, tmp_path, method):
    arguments = (upgrade, adaptations["lora"], task, method)
    expected = recycle(*arguments, tmp_path / "whole", recipe=RECIPE)
    with pytest.raises(InterruptedRunError):
        recycle(*arguments, tmp_path / "out", recipe=RECIPE, progress=interrupt_at("tune", 3))
    resumed = recycle(*arguments, tmp_path / "out", recipe=RECIPE)
    assert have_equal_tensors(read_weights(resumed.path / "adaptation"), read_weights(expected.path / "adaptation"))
    curves = [
        [{key: value for key, value in point.items() if key != "seconds"} for point in read_curve(outcome.path)]
        for outcome in (resumed, expected)
    ]
    assert curves[0] == curves[1]
    assert len({point["loss"] for point in curves[0]}) == len(curves[0]) > 1


# Grown vocabularies


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def grown(request, tmp_path_factory) -> Upgrade:
    """A base, and an upgrade with two more tokens, padded rows, and two old tokens with each other's ids."""
    folder = tmp_path_factory.mktemp("grown")
    model = AutoModelForCausalLM.from_pretrained(
        write_base(folder / "old", "llama", **SIZES, tie_word_embeddings=request.param)
    )
    add_noise(model, 0.3, seed=0).save_pretrained(folder / "old")
    tokenizer = AutoTokenizer.from_pretrained(folder / "old")
    ids = tokenizer.get_vocab()
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder / "new")
    file = folder / "new" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"good": ids["bad"], "bad": ids["good"]}
    file.write_text(json.dumps(content))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=8)
    with torch.no_grad():
        for embeddings in {model.get_input_embeddings(), model.get_output_embeddings()}:
            exchanged = embeddings.weight[[ids["bad"], ids["good"]]]
            embeddings.weight[[ids["good"], ids["bad"]]] = exchanged
            if request.param:
                break
    add_noise(model, 0.02, seed=1).save_pretrained(folder / "new")
    return Upgrade(Base.open(folder / "old"), Base.open(folder / "new"))


def write_adaptation(base: Base, kind: str, folder: Path) -> Path:
    model, initial = make_adapted_model(base, kind, HEAD)
    folder.mkdir()
    save_model(model, base, HEAD, folder, initial)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", ["direct+distill", "on-policy"])
def test_losses_match_tokens_of_grown_vocabularies(grown, task, tmp_path, first_batch, kind, method):
    """The divergences of dense distributions over the student's tokens."""
    source = write_adaptation(grown.old, kind, tmp_path / "adaptation")
    settings = ["alpha=1", "top_k=0"] if method == "direct+distill" else []
    recycle(grown, source, task, method, tmp_path / "out", recipe=RECIPE, options=parse_options(method, settings))
    model, objective, batch = first_batch[0]
    old_ids, new_ids = (base.tokenizer.get_vocab() for base in (grown.old, grown.new))
    to_new = {old_id: new_ids[token] for token, old_id in old_ids.items()}
    to_old = {new_id: old_id for old_id, new_id in to_new.items()}
    order = [to_new[old_id] for old_id in range(len(to_new))]
    teacher = load_model(load_adaptation(source), grown.old, HEAD).eval()
    if method == "on-policy":
        data = load_data(task, RECIPE.seed)
        prompts = encode_prompts(grown.new, data, data.train)
        drawn = [prompts[index] for index in batch["prompt"].tolist()]
        sampling_seed = (RECIPE.seed * 1_000_003 * 1_000_003 + int(batch["prompt"][0])) % 2**32
        settings = answer_settings(grown.new, data, sampling_seed)
        answers = generate_answers(model, drawn, settings, "fp32")
        sequences = [(prompt, answer) for prompt, answer in zip(drawn, answers, strict=True)]
    else:
        masks = batch["attention_mask"].bool()
        sequences = []
        for index in range(len(masks)):
            ids = batch["input_ids"][index][masks[index]].tolist()
            first = int(batch["token"][batch["example"] == index].min()) + 1
            sequences.append((ids[:first], ids[first:]))
    total, count = 0.0, 0
    for prompt, answer in sequences:
        answer = answer[: next((i for i, token in enumerate(answer) if token not in to_old), len(answer))]
        rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        ids = [*prompt, *answer]
        with torch.no_grad():
            q = model.eval()(input_ids=torch.tensor([ids])).logits[0, rows].double().log_softmax(1)
            p = teacher(input_ids=torch.tensor([[to_old[i] for i in ids]])).logits[0, rows].double().log_softmax(1)
        if method == "on-policy":  # over the tokens that both have
            q = q[:, order].log_softmax(1)
            total += float((q.exp() * (q - p)).sum())
        else:
            total += float((p.exp() * (p - q[:, order])).sum())
        count += len(p)
    assert float(objective(model, batch, 0).detach()) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "full") for method in ("ridge", "scaled", "aligned", "masked", "trimmed", "direct+label-free")),
        ("scaled", "lora"),
    ],
)
def test_methods_take_grown_vocabularies(grown, task, tmp_path, kind, method):
    source = write_adaptation(grown.old, kind, tmp_path / "adaptation")
    recipe = dataclasses.replace(RECIPE, steps=2)
    outcome = recycle(grown, source, task, method, tmp_path / "out", recipe=recipe)
    answers = deploy(outcome.path, grown.new, task).answer_ids(load_data(task, 0).test)
    assert len(set(map(tuple, answers))) > 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_lora_on_the_head_is_grafted_by_token(grown, task, tmp_path, use_dora):
    """The delta of the head moves with its tokens, and new tokens have none."""
    if grown.old.config.tie_word_embeddings:
        pytest.skip("a LoRA on a tied head is a LoRA on a copy of it")
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], use_dora=use_dora)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(grown.old.path), config)
    add_noise(tuned.get_submodule("base_model.model.lm_head.lora_B"), 0.3, seed=2)
    tuned.save_pretrained(tmp_path / "adaptation", save_embedding_layers=False)
    write_graft(load_adaptation(tmp_path / "adaptation"), grown, tmp_path / "out", silent)
    new_model = AutoModelForCausalLM.from_pretrained(grown.new.path)
    new_head = new_model.lm_head.weight.detach().clone()
    grafted = PeftModel.from_pretrained(new_model, tmp_path / "out").merge_and_unload().lm_head.weight
    layer = tuned.get_submodule("base_model.model.lm_head")
    delta = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    new_ids = grown.new.tokenizer.get_vocab()
    for token, old_id in grown.old.tokenizer.get_vocab().items():
        row = new_head[new_ids[token]]
        expected = row + delta[old_id]
        if use_dora:  # its magnitudes are the norms of the base's rows
            expected = expected * row.norm() / expected.norm()
        torch.testing.assert_close(grafted[new_ids[token]], expected)
    torch.testing.assert_close(grafted[new_ids["<new1>"]], new_head[new_ids["<new1>"]])


def test_aligned_takes_prompts_alone(upgrade, adaptations, task, tmp_path):
    folder = tmp_path / "prompts"
    shutil.copytree(task.parent, folder)
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    outcome = recycle(upgrade, adaptations["full"], folder / "task.yaml", "aligned", tmp_path / "out", recipe=RECIPE)
    assert all(tensor.isfinite().all() for tensor in read_weights(outcome.path / "adaptation").values())


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_split_whose_answers_are_all_cut_off_is_refused(upgrade, task, tmp_path, split):
    folder = tmp_path / "long"
    shutil.copytree(task.parent, folder)
    row = json.dumps({"prompt": "film " * 100, "completion": " good"}) + "\n"
    (folder / f"{split}.jsonl").write_text(row * 4)
    with pytest.raises(DataError, match=f"no example of {split} has a label within .* tokens"):
        tune(upgrade.old, folder / "task.yaml", tmp_path / "out", kind="lora", recipe=RECIPE)


def test_a_prefix_with_activation_checkpointing_is_refused(upgrade, task, tmp_path):
    recipe = dataclasses.replace(RECIPE, activation_checkpointing=True)
    with pytest.raises(RecipeError, match="activation_checkpointing cannot be used with a prefix"):
        tune(upgrade.old, task, tmp_path / "out", kind="prefix", recipe=recipe)
