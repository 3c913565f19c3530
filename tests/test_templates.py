"""The tokenizer, chat template and end of text of a language model on the new base."""

import json
import logging
import shutil

import pytest
import torch
from helpers import WORDS, make_tokenizer, write_base, write_upgrade
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from regraft import Recipe, Upgrade, compare, recycle
from regraft.adaptation import load_adaptation, load_model
from regraft.adaptation.template import with_deployment_tokenizers
from regraft.chain import Chain, run_chain
from regraft.errors import MismatchError, OutcomeError
from regraft.model import Deployment
from regraft.model.answers import encode_prompts
from regraft.model.deployment import chance_score
from regraft.model.examples import encode
from regraft.progress import quiet
from regraft.task import load_data

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] == 'user' and 'the' or 'very' }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> very {% endif %}"
)
OTHER_TEMPLATE = TEMPLATE.replace("'very'", "'scene'").replace("very", "scene")
RECIPE = Recipe(steps=2, batch_size=4, learning_rate=1e-3, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    write_base(folder / "old", "llama")
    write_upgrade(folder / "old", folder / "new", 0.1)
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder / "old")
    torch.manual_seed(0)
    with quiet():
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / "lora")
    tokenizer.save_pretrained(folder / "lora")
    rows = [
        {"messages": [{"role": "user", "content": f"{WORDS[i]} film"}, {"role": "assistant", "content": WORDS[i + 10]}]}
        for i in range(10)
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_task(folder, **keys):
    keys = {"type": "text-generation", "metric": "exact_match", "max_new_tokens": 3, **keys}
    splits = {split: f"{split}.jsonl" for split in ("train", "dev", "test")}
    file = folder / f"task-{len(list(folder.glob('task-*')))}.yaml"
    file.write_text(json.dumps({**keys, **splits}))
    return file


def deploy(folder, **keys):
    adaptation = load_adaptation(folder / "lora")
    data = load_data(write_task(folder, **keys), 0)
    upgrade = Upgrade(folder / "old", folder / "new")
    return with_deployment_tokenizers(adaptation, upgrade, data.task), data


def decode_prompt(base, data):
    return base.tokenizer.decode(encode_prompts(base, data, data.test)[0])


def test_the_adaptations_template_is_used_on_both_bases(folder, caplog):
    with caplog.at_level(logging.WARNING):
        upgrade, data = deploy(folder)
    assert decode_prompt(upgrade.old, data) == decode_prompt(upgrade.new, data) == "<s> the good film </s> <s> very"
    assert "the new base has no chat template" in caplog.text
    out = folder / "direct"
    recycle(
        Upgrade(folder / "old", folder / "new"),
        folder / "lora",
        write_task(folder),
        "direct",
        out,
        recipe=RECIPE,
    )
    written = AutoTokenizer.from_pretrained(out / "adaptation")
    assert written.chat_template == TEMPLATE
    assert (out / "adaptation" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_file_or_the_new_bases_template_is_for_the_new_model(folder):
    (folder / "other.jinja").write_text(OTHER_TEMPLATE)
    upgrade, data = deploy(folder, template="other.jinja")
    assert decode_prompt(upgrade.old, data).endswith("very")
    assert decode_prompt(upgrade.new, data).endswith("scene")
    new = folder / "new-with-template"
    write_upgrade(folder / "old", new, 0.1)
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(new)
    adaptation = load_adaptation(folder / "lora")
    data = load_data(write_task(folder, template="new-base"), 0)
    upgrade = with_deployment_tokenizers(adaptation, Upgrade(folder / "old", new), data.task)
    assert decode_prompt(upgrade.old, data).endswith("very")
    assert decode_prompt(upgrade.new, data).endswith("scene")


def test_a_digest_tells_templates_apart(folder):
    (folder / "other.jinja").write_text(OTHER_TEMPLATE)
    first = load_data(write_task(folder, template="other.jinja"), 0).digest()
    (folder / "other.jinja").write_text(OTHER_TEMPLATE + " ")
    assert load_data(write_task(folder, template="other.jinja"), 0).digest() != first


def test_references_read_texts_as_the_deployments_do(folder, tmp_path):
    """The bases have no chat template, so that their own tokenizers could not even read the prompts."""
    task = write_task(folder)
    compare(Upgrade(folder / "old", folder / "new"), folder / "lora", task, ["direct"], tmp_path / "out", recipe=RECIPE)
    upgrade, data = deploy(folder)
    [old] = (tmp_path / "out" / "references").glob("old-deployment-*")
    rows = [json.loads(line) for line in (old / "predictions.jsonl").read_text().splitlines()]
    model = load_model(load_adaptation(folder / "lora"), upgrade.old, data.head)
    expected = Deployment(model, upgrade.old, data, "fp32").predictions(data.test)
    assert [row["prediction"]["answer"] for row in rows] == [prediction["answer"] for prediction in expected]
    [new_base] = (tmp_path / "out" / "references").glob("new-base-*")
    chance = chance_score(data, data.test, upgrade.new, "fp32")
    assert json.loads((new_base / "figures.json").read_text())["score"] == chance


def test_a_chain_measures_bare_bases_by_the_template_of_its_outcomes(folder):
    (folder / "chain.jinja").write_text(TEMPLATE)
    task = write_task(folder, template="chain.jinja")
    (folder / "chain.yaml").write_text(
        f"bases: [old, new]\ntasks: [{task.name}]\nkinds: [lora]\nmethods: [direct]\nprecision: fp32\n"
        "tuning: {steps: 2, batch_size: 4}\nrecycling: {steps: 2, batch_size: 4}\n"
    )
    chain = Chain.load(folder / "chain.yaml")
    rows = run_chain(chain, folder / "chain")
    upgrade, data = deploy(folder, template="chain.jinja")
    for row in rows:
        base = (upgrade.old, upgrade.new)[row.base]
        assert row.majority == chance_score(data, data.test, base, "fp32")


def test_an_outcome_of_another_template_or_keep_is_not_taken(folder, tmp_path):
    (tmp_path / "keep.txt").write_text("good film\n" * 200)
    shutil.copytree(folder / "lora", tmp_path / "lora")
    task = write_task(folder, keep=str(tmp_path / "keep.txt"))
    upgrade = Upgrade(folder / "old", folder / "new")

    def run():
        return recycle(upgrade, tmp_path / "lora", task, "direct", tmp_path / "out", recipe=RECIPE)

    assert run().record == run().record
    (tmp_path / "keep.txt").write_text("great film\n" * 200)
    with pytest.raises(OutcomeError):
        run()
    (tmp_path / "keep.txt").write_text("good film\n" * 200)
    run()
    (tmp_path / "lora" / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    with pytest.raises(OutcomeError):
        run()


def write_moved_vocabulary(folder, name, removed=()):
    """Write an upgrade whose tokens have other ids, some of which are removed and one of which is added."""
    new = folder / name
    write_upgrade(folder / "old", new, 0.0)
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    old_tokens = [*special, *WORDS]
    tokens = [*special, "brandnew", *(word for word in reversed(WORDS) if word not in removed)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(new)
    tensors = load_file(new / "model.safetensors")
    for tensor_name, tensor in tensors.items():
        if tensor.shape[0] == len(old_tokens) and tensor.dim() == 2:
            rows = [tensor[old_tokens.index(token)] if token in old_tokens else 0 * tensor[0] for token in tokens]
            tensors[tensor_name] = torch.stack(rows)
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokens)}))
    return new


@pytest.mark.parametrize("method", ["direct", "init+distill", "label-free", "on-policy"])
def test_ids_are_mapped_by_token(folder, tmp_path, method):
    new = folder / "moved"
    if not new.exists():
        write_moved_vocabulary(folder, "moved")
    upgrade = Upgrade(folder / "old", new)
    outcome = recycle(upgrade, folder / "lora", write_task(folder), method, tmp_path / "out", recipe=RECIPE)
    adaptation = load_adaptation(folder / "lora")
    data = load_data(write_task(folder), 0)
    deployed = with_deployment_tokenizers(adaptation, upgrade, data.task)
    old_examples, new_examples = (encode(base, data, data.test) for base in (deployed.old, deployed.new))
    assert old_examples.tokens == new_examples.tokens
    for old_ids, new_ids in zip(old_examples.columns["input_ids"], new_examples.columns["input_ids"], strict=True):
        old_tokens = deployed.old.tokenizer.convert_ids_to_tokens(old_ids)
        assert old_tokens == deployed.new.tokenizer.convert_ids_to_tokens(new_ids)
        assert old_ids != new_ids
    if method == "direct":  # the same function of tokens, so the same answers
        same = recycle(
            Upgrade(folder / "old", folder / "old"),
            folder / "lora",
            write_task(folder),
            "direct",
            tmp_path / "same",
            recipe=RECIPE,
        )
        answers = [[prediction["answer"] for prediction in o.predictions("test")] for o in (outcome, same)]
        assert answers[0] == answers[1]


def test_a_token_that_the_new_vocabulary_lacks_is_refused(folder):
    new = write_moved_vocabulary(folder, "without", removed=("great",))
    adaptation = load_adaptation(folder / "lora")
    data = load_data(write_task(folder), 0)
    upgrade = with_deployment_tokenizers(adaptation, Upgrade(folder / "old", new), data.task)
    with pytest.raises(MismatchError, match=r"row 3: the token 'great' of the old deployment is not in the vocab"):
        encode(upgrade.new, data, data.test)
