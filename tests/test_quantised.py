"""Quantised checkpoints: int8 and fp8 are dequantised as in transformers, and other formats are refused."""

import json
import re
import shutil

import pytest
import torch
from helpers import run_command, write_adaptation
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from regraft import Base, load_adaptation
from regraft.architecture import architecture_of
from regraft.checkpoint import Checkpoint, fingerprint, output_dtype
from regraft.errors import CheckpointError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 24]}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
INT8_STEP = 7.874015718698502e-3
"""1 / 127, as transformers' dequantize_bnb_weight rounds it."""
PROJECTION = "model.layers.0.self_attn.q_proj.weight"
MLP_LAYER = "model.layers.0.mlp.up_proj"


def write_tensors(file, **tensors):
    """Write tensors, which may be views of each other, and return the file."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return file


def expand_scales(scales, block, shape):
    """Expand the scales of blocks to the elements of a matrix."""
    block_rows, block_columns = (torch.arange(size) // edge for size, edge in zip(shape[-2:], block, strict=True))
    return scales.float()[..., block_rows, :][..., block_columns]


def grid_shape(shape, block):
    """Return the number of blocks in the last two dimensions, with incomplete blocks at the ends."""
    return [-(-size // edge) for size, edge in zip(shape[-2:], block, strict=True)]


def quantise_to_int8(tensors):
    """Quantise the projections by rows, as bitsandbytes does."""
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1)
            quantised[name] = (tensor / scale[:, None] * 127).round().to(torch.int8)
            quantised[name.replace("weight", "SCB")] = scale
            quantised[name + "_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            quantised[name] = tensor.half()
    return quantised


def quantise_to_fp8(tensors, suffix="_proj.weight"):
    """Quantise the weights whose names end in a suffix by blocks, with random scales."""
    block = FP8["weight_block_size"]
    quantised = {}
    for name, tensor in tensors.items():
        quantised[name] = tensor.bfloat16()
        if name.endswith(suffix):
            generator = torch.Generator().manual_seed(5)
            scale = torch.rand(grid_shape(tensor.shape, block), generator=generator) / 1000 + 1e-3
            quantised[name] = (tensor / expand_scales(scale, block, tensor.shape)).to(E4M3)
            quantised[name + "_scale_inv"] = scale
    return quantised


def dequantise(tensors, name):
    """Dequantise a weight by the published formulas."""
    tensor = tensors[name]
    if tensor.dtype == torch.int8:
        return tensor.double() * tensors[name.replace("weight", "SCB")].double()[:, None] / 127
    if tensor.dtype == E4M3:
        scales = expand_scales(tensors[name + "_scale_inv"], FP8["weight_block_size"], tensor.shape)
        return tensor.double() * scales.double()
    return tensor.double()


def write_quantised(folder, out, quantise, settings):
    """Write a copy of a checkpoint with quantised tensors and the settings in its config, and return its folder."""
    shutil.copytree(folder, out)
    write_tensors(out / "model.safetensors", **quantise(load_file(out / "model.safetensors")))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return out


def write_shards(folder):
    """Divide a folder's file into two shards, with scales and codes in different shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": {name: tensor for name, tensor in tensors.items() if tensor.dim() != 2},
        "model-00002-of-00002.safetensors": {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2},
    }
    for file, shard_tensors in shards.items():
        write_tensors(folder / file, **shard_tensors)
    weight_map = {name: file for file, shard_tensors in shards.items() for name in shard_tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory, bases):
    """The folders of an old base, a new base and a fine-tune, by role and by precision (plain, int8, fp8)."""
    folder = tmp_path_factory.mktemp("quantised")
    folders = {}
    old, new = bases["llama"]
    tuned = shutil.copytree(old, folder / "tuned")
    tensors = load_file(old / "model.safetensors")
    changed = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4))
        for name, tensor in tensors.items()
    }
    write_tensors(tuned / "model.safetensors", **changed)
    for role, path in (("old", old), ("new", new), ("tuned", tuned)):
        folders[role, "plain"] = path
        folders[role, "int8"] = write_quantised(path, folder / f"{role}-int8", quantise_to_int8, INT8)
        folders[role, "fp8"] = write_quantised(path, folder / f"{role}-fp8", quantise_to_fp8, FP8)
    return folders


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256), (200, 130), (576, 300), (3, 130, 64), (1, 5), (129, 1)])
def test_fp8_is_dequantised_by_blocks(tmp_path, shape, scale_dtype, dtype):
    torch.manual_seed(0)
    codes = torch.randn(shape).to(dtype)
    grid = (*shape[:-2], *grid_shape(shape, (128, 128)))
    if scale_dtype == torch.uint8:
        scale = torch.randint(110, 130, grid, dtype=torch.uint8)
        factors = (scale.float() - 127).exp2()
    else:
        scale = torch.rand(grid).to(scale_dtype)
        factors = scale.float()
    checkpoint = Checkpoint.open(write_tensors(tmp_path / "w.safetensors", w=codes, w_scale_inv=scale))
    expected = codes.float() * expand_scales(factors, (128, 128), shape)
    assert set(checkpoint) == {"w"}
    assert torch.equal(checkpoint["w"], expected)
    if not any(size % 128 for size in shape[-2:]):
        assert torch.equal(checkpoint["w"], Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32))
    for start, end in ((0, 1), (expected.numel() // 3, expected.numel() - 1), (1, min(700, expected.numel()))):
        assert torch.equal(checkpoint.flat_slice("w", start, end - start), expected.flatten()[start:end])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_scale_applies_to_all_elements(tmp_path, shape):
    codes = torch.randn(3, 20, 30).to(E4M3)
    file = write_tensors(tmp_path / "w.safetensors", w=codes, w_scale_inv=torch.full(shape, 0.3))
    assert torch.equal(Checkpoint.open(file)["w"], codes.float() * 0.3)


def test_int8_is_dequantised_by_rows(tmp_path):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (300, 70), dtype=torch.int8)
    scale = torch.rand(300)
    file = write_tensors(tmp_path / "w.safetensors", **{"a.weight": codes, "a.SCB": scale, "a.mask": codes[0] > 0})
    checkpoint = Checkpoint.open(file)
    expected = codes * scale[:, None] * INT8_STEP
    assert set(checkpoint) == {"a.weight", "a.mask"}
    assert torch.equal(checkpoint["a.weight"], expected)
    assert torch.equal(checkpoint.flat_slice("a.weight", 65, 300), expected.flatten()[65:365])


def test_int8_of_layers_that_may_be_conv1d_needs_a_config(tmp_path):
    codes = torch.ones(300, 70, dtype=torch.int8)
    tensors = {"h.0.attn.c_proj.weight": codes, "h.0.attn.c_proj.SCB": torch.ones(300)}
    write_tensors(tmp_path / "model.safetensors", **tensors)
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("model_type", "is_transposed"), [("gpt2", True), ("gpt_neo", False)])
def test_int8_of_conv1d_layers_is_stored_transposed(tmp_path, model_type, is_transposed):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (300, 70), dtype=torch.int8)
    scale = torch.rand(300)
    write_tensors(tmp_path / "model.safetensors", **{"h.0.attn.c_proj.weight": codes, "h.0.attn.c_proj.SCB": scale})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "quantization_config": INT8}))
    checkpoint = Checkpoint.open(tmp_path)
    expected = codes * scale[:, None] * INT8_STEP
    expected = expected.T if is_transposed else expected
    assert torch.equal(checkpoint["h.0.attn.c_proj.weight"], expected)
    assert torch.equal(checkpoint.flat_slice("h.0.attn.c_proj.weight", 65, 700), expected.flatten()[65:765])


@pytest.mark.parametrize(
    ("shape", "grid"), [((40, 72), (5, 9)), ((48, 30), (48, 1)), ((4, 256, 200), (4, 1, 1)), ((256, 200), (4, 1))]
)
@pytest.mark.parametrize("settings", [{}, {"quantization_config": FP8 | {"weight_block_size": None}}])
def test_blocks_without_a_config_divide_the_weight(tmp_path, shape, grid, settings):
    codes = torch.randn(shape).to(E4M3)
    scale = torch.rand(grid)
    write_tensors(tmp_path / "model.safetensors", w=codes, w_scale_inv=scale)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(Checkpoint.open(tmp_path)["w"], Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32))


def test_ambiguous_blocks_are_refused(tmp_path):
    """Blocks of 16 × 16 and of 12 × 16 both divide a weight of 36 × 32 into a grid of 3 × 2."""
    codes = torch.ones(36, 32).to(E4M3)
    file = write_tensors(tmp_path / "w.safetensors", w=codes, w_scale_inv=torch.ones(3, 2))
    with pytest.raises(CheckpointError, match="weight_block_size"):
        Checkpoint.open(file)


@pytest.mark.parametrize(
    "precisions", ["int8 int8 int8", "fp8 fp8 fp8", "plain plain int8", "fp8 plain plain", "plain fp8 int8"]
)
def test_a_graft_is_computed_from_dequantised_weights(tmp_path, llamas, precisions):
    new, tuned, old = (llamas[key] for key in zip(("new", "tuned", "old"), precisions.split(), strict=True))
    run_command("weights", "graft", "--new", new, "--tuned", tuned, "--old", old, "--out", tmp_path / "out")
    operands = [load_file(path / "model.safetensors") for path in (new, tuned, old)]
    grafted = load_file(tmp_path / "out/model.safetensors")
    assert set(grafted) == set(load_file(llamas["tuned", "plain"] / "model.safetensors"))
    for name, tensor in grafted.items():
        n, t, o = (dequantise(tensors, name) for tensors in operands)
        stored = operands[1][name].dtype
        assert tensor.dtype == (stored if stored not in (torch.int8, E4M3) else torch.bfloat16)
        torch.testing.assert_close(tensor.double(), n + t - o, rtol=2**-8, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")  # transformers renamed the attribute
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_lora_is_merged_into_a_quantised_base(tmp_path, llamas, precision):
    tensors = load_file(llamas["old", precision] / "model.safetensors")
    parameter_names = load_file(llamas["old", "plain"] / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(llamas["old", "plain"])
    model.load_state_dict({name: dequantise(tensors, name).float() for name in parameter_names}, strict=False)
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    # some trainers save the base's config beside the adapter
    shutil.copyfile(llamas["old", precision] / "config.json", tmp_path / "adapter/config.json")
    write_shards(shutil.copytree(llamas["old", precision], tmp_path / "base"))
    run_command(
        "weights",
        "merge-lora",
        "--adapter",
        tmp_path / "adapter",
        "--base",
        tmp_path / "base",
        "--out",
        tmp_path / "out",
    )
    merged = load_file(tmp_path / "out/model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == parameter_names
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-6)


def test_delta_distance_and_lora_are_computed_from_dequantised_weights(tmp_path, llamas):
    tuned, old = llamas["tuned", "plain"], llamas["old", "int8"]
    run_command("weights", "delta", "--tuned", tuned, "--old", old, "--out", tmp_path / "delta")
    delta = load_file(tmp_path / "delta/model.safetensors")
    tuned_weight, old_weight = (dequantise(load_file(path / "model.safetensors"), PROJECTION) for path in (tuned, old))
    torch.testing.assert_close(delta[PROJECTION].double(), tuned_weight - old_weight)
    run_command("weights", "extract-lora", "--tuned", tuned, "--old", old, "--rank", 32, "--out", tmp_path / "lora")
    lora = load_file(tmp_path / "lora/adapter_model.safetensors")
    b, a = (lora["base_model.model." + PROJECTION.replace("weight", f"lora_{part}.weight")] for part in "BA")
    torch.testing.assert_close(b @ a, delta[PROJECTION], rtol=1e-3, atol=1e-5)
    distances = run_command("weights", "distance", tuned, old)
    (total,) = [line.split() for line in distances.splitlines() if line.split()[:1] == ["all"]]
    assert float(total[2].rstrip("%")) > 0


def test_fingerprint_covers_scales_in_any_shard(tmp_path, llamas):
    single = shutil.copytree(llamas["old", "fp8"], tmp_path / "single")
    sharded = shutil.copytree(single, tmp_path / "sharded")
    write_shards(sharded)
    assert fingerprint(Checkpoint.open(single)) == fingerprint(Checkpoint.open(sharded))
    original = fingerprint(Checkpoint.open(single))
    tensors = load_file(single / "model.safetensors")
    scale_name = PROJECTION + "_scale_inv"
    write_tensors(single / "model.safetensors", **tensors | {scale_name: 2 * tensors[scale_name]})
    assert fingerprint(Checkpoint.open(single)) != original


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_base_is_refused(tmp_path, llamas, precision):
    with pytest.raises(CheckpointError, match="regraft weights interpolate") as error:
        Base.open(llamas["old", precision])
    command = str(error.value).split("regraft ")[1].rstrip(".").replace("FOLDER", str(tmp_path / "full"))
    run_command(*command.split())
    assert Base.open(tmp_path / "full").checkpoint.tensors[PROJECTION].dtype == "BF16"
    assert {"int8": "I8", "fp8": "F8_E4M3"}[precision] in run_command("weights", "inspect", llamas["old", precision])


@pytest.mark.parametrize("settings", [{"quantization_config": INT8}, {}])
def test_quantised_fine_tune_is_refused(tmp_path, opened_bases, settings):
    folder = write_adaptation(opened_bases["llama"][0], "full", tmp_path / "tuned")
    write_tensors(folder / "model.safetensors", **quantise_to_int8(load_file(folder / "model.safetensors")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=r"is quantised.*regraft weights interpolate"):
        load_adaptation(folder)


BYTES, CODES, INTEGERS = (torch.ones(4, 4, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.int32))
MATRIX = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (
            {
                f"{MLP_LAYER}.weight": BYTES,
                f"{MLP_LAYER}.weight.absmax": MATRIX,
                f"{MLP_LAYER}.weight.quant_state.bitsandbytes__nf4": BYTES,
            },
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes.*dequantize.*-bnb-4bit",
        ),
        (
            {f"{MLP_LAYER}.qweight": INTEGERS, f"{MLP_LAYER}.qzeros": INTEGERS, f"{MLP_LAYER}.scales": MATRIX.half()},
            {},
            "GPTQ or AWQ.*quantised from",
        ),
        ({"mlp.experts.down_proj_blocks": BYTES, "mlp.experts.down_proj_scales": BYTES}, {}, "MXFP4.*Mxfp4Config"),
        (
            {f"{MLP_LAYER}.weight_packed": INTEGERS, f"{MLP_LAYER}.weight_scale": MATRIX},
            {},
            "compressed-tensors.*CompressedTensorsConfig",
        ),
        (
            {f"{MLP_LAYER}.weight": MATRIX.to(E4M3), f"{MLP_LAYER}.weight_scale": MATRIX},
            {},
            "compressed-tensors.*quantised from",
        ),
        (
            {f"{MLP_LAYER}.weight": CODES, f"{MLP_LAYER}.weight_scale": MATRIX[:, :1]},
            {},
            "compressed-tensors.*quantised from",
        ),
        (
            {f"{MLP_LAYER}.weight": INTEGERS.view(torch.uint32), f"{MLP_LAYER}.scales": MATRIX},
            {},
            "U32.*full precision",
        ),
        ({f"{MLP_LAYER}.weight:qdata": INTEGERS, f"{MLP_LAYER}.weight:scale": MATRIX}, {}, "I32. is not a weight"),
        ({f"{MLP_LAYER}.weight": MATRIX.to(E5M2)}, {"quantization_config": FP8}, "'fp8'.*F8_E5M2.*full precision"),
        ({f"{MLP_LAYER}.weight": CODES}, {}, "I8. is not a weight.*full precision"),
        (
            {f"{MLP_LAYER}.weight": MATRIX, f"{MLP_LAYER}.weight_scale_inv": MATRIX[:1, :1]},
            {},
            "scale without an eight-bit weight",
        ),
        (
            {f"{MLP_LAYER}.weight": MATRIX},
            {"quantization_config": {"quant_method": "hqq"}},
            "'hqq'.*remove quantization_config",
        ),
        ({f"{MLP_LAYER}.weight": CODES, f"{MLP_LAYER}.SCB": MATRIX[0, :3]}, {}, "one for each row"),
        (
            {f"{MLP_LAYER}.weight": MATRIX.to(E4M3), f"{MLP_LAYER}.weight_scale_inv": MATRIX[:3, :3]},
            {},
            "each block of 128 × 128",
        ),
        (
            {f"{MLP_LAYER}.weight": MATRIX.to(E4M3), f"{MLP_LAYER}.weight_scale_inv": MATRIX[:2, :2]},
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, "many"]}},
            "weight_block_size is .*many",
        ),
        (
            {
                f"{MLP_LAYER}.weight": CODES,
                f"{MLP_LAYER}.SCB": MATRIX[0],
                f"{MLP_LAYER}.weight_format": torch.tensor(2, dtype=torch.uint8),
            },
            {},
            "GPU's tiles",
        ),
        (
            {f"{MLP_LAYER}.indices": INTEGERS, f"{MLP_LAYER}.centroids": MATRIX},
            {"quantization_config": {"quant_method": "vptq"}},
            "'vptq'.*indices.*is not a weight",
        ),
    ],
)
def test_unsupported_formats_are_refused_with_a_remedy(tmp_path, tensors, settings, message):
    write_tensors(tmp_path / "model.safetensors", norm=MATRIX[0], **tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        run_command("weights", "delta", "--tuned", tmp_path, "--old", tmp_path, "--out", out)
    assert not out.exists()
    assert "norm" in run_command("weights", "inspect", tmp_path)


def test_masks_and_positions_are_not_codes(tmp_path):
    masks = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.0.attn.mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4)[None],
        "steps": torch.tensor(3, dtype=torch.int32),
    }
    assert set(Checkpoint.open(write_tensors(tmp_path / "m.safetensors", **masks))) == set(masks)


def test_fused_experts_are_built_from_dequantised_weights(tmp_path):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=20, num_local_experts=3, num_key_value_heads=2, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")

    def quantise_experts(tensors):
        return quantise_to_fp8(tensors, ".w2.weight")

    folder = write_quantised(tmp_path / "plain", tmp_path / "fp8", quantise_experts, FP8)
    checkpoint = Checkpoint.open(folder)
    tensors = load_file(folder / "model.safetensors")
    experts = architecture_of(config, "MixtralForCausalLM").in_memory(checkpoint)
    name = "model.layers.0.mlp.experts.down_proj"
    stored_names = [f"model.layers.0.block_sparse_moe.experts.{expert_index}.w2.weight" for expert_index in range(3)]
    expected = torch.stack([dequantise(tensors, stored_name) for stored_name in stored_names])
    torch.testing.assert_close(experts[name].double(), expected)
    assert output_dtype(experts, name) == "BF16"
