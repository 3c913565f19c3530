"""Compare the speed and memory of a graft on disk with mergekit on the same job and with `cp`.

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install -r benchmarks/mergekit.txt
    python benchmarks/graft.py --mergekit .venv-mergekit/bin/mergekit-yaml

Three synthetic bf16 checkpoints (old, tuned, new) are written in shards. Each command then runs in a separate process,
from disk to disk:

- `regraft weights graft`;
- mergekit's `task_arithmetic`, which computes the same sum, old + (tuned − old) + (new − old);
- `cp` of two checkpoints, which reads and writes as many bytes in total as a graft;
- `cp` of one checkpoint, which writes as many bytes as a graft.

Compare the ratios within a round, since single times drift. The two results are compared at the end.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKPOINTS = ("old", "tuned", "new")
MERGEKIT_CONFIG = """\
merge_method: task_arithmetic
base_model: {folder}/old
models:
  - {{model: {folder}/tuned, parameters: {{weight: 1.0}}}}
  - {{model: {folder}/new, parameters: {{weight: 1.0}}}}
parameters: {{normalize: false}}
dtype: bfloat16
"""
HIDDEN_SIZE, INNER_SIZE = 2048, 5632
"""The widths of a Llama of about one billion parameters."""
LAYER_PARAMETERS = 4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * INNER_SIZE
"""Parameters of the attention's and the feed-forward network's matrices."""
BF16_BYTES, BF16_MANTISSA_BITS = 2, 7
NUM_SHARDS = 8
"""Shards of each checkpoint."""
CP_TWO = "cp of the bytes touched"
"""The name of the command that copies two checkpoints."""
SMALLEST = 1e-30
"""Replaces zeros, whose logarithm is infinite; arbitrary, far below every number of the checkpoints."""


def main():
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="the path of mergekit-yaml in a separate environment")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="the size of a checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each command")
    arguments = parser.parse_args()
    if arguments.make:
        write_checkpoints(arguments.make, arguments.gigabytes)
        return
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        # A child of a process inherits its peak memory: a separate process writes the checkpoints.
        make = [sys.executable, __file__, "--make", folder, "--gigabytes", str(arguments.gigabytes)]
        subprocess.run(make, check=True)
        (folder / "merge.yml").write_text(MERGEKIT_CONFIG.format(folder=folder))
        old, tuned, new = (folder / name for name in CHECKPOINTS)
        graft = ["-m", "regraft", "weights", "graft", "--new-base", new, "--adaptation", tuned, "--old-base", old]
        commands = {
            "regraft": [sys.executable, *graft, "--out", folder / "regraft"],
            "mergekit": [arguments.mergekit, folder / "merge.yml", folder / "mergekit"],
            CP_TWO: ["cp", "-r", old, tuned, folder / "two"],
            "cp of one": ["cp", "-r", old, folder / "one"],
        }
        rounds = [run_round(commands) for _ in range(arguments.rounds + 1)]
        print(f"{arguments.gigabytes:g} GB per checkpoint, {arguments.rounds} rounds")
        print_table(rounds[1:])  # the first round warms the disk's cache
        units = largest_difference(folder / "regraft", folder / "mergekit", folder)
        print(f"largest difference of the two results: {units:.2f} units in the last place of bf16")


def write_checkpoints(folder, gigabytes):
    """Write the three checkpoints, each of about `gigabytes` GB in about `NUM_SHARDS` shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    num_layers = max(1, round(gigabytes * 1e9 / BF16_BYTES / LAYER_PARAMETERS))
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INNER_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        vocab_size=8192,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(20)
    for name in CHECKPOINTS:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)
                tensor.copy_(noise if name == "old" else tensor + 0.01 * noise)
        model.save_pretrained(folder / name, max_shard_size=f"{int(gigabytes * 1000 / NUM_SHARDS)}MB")


def run_round(commands):
    """Run each command once, and return its seconds and peak memory in MB by its name."""
    measurements = {}
    for name, command in commands.items():
        out = Path(command[-1])
        shutil.rmtree(out, ignore_errors=True)
        if name == CP_TWO:
            out.mkdir()  # cp of several folders needs an existing target
        os.sync()
        measurements[name] = run_command(command)
    return measurements


def run_command(command):
    """Run a command and flush its output to disk; return its seconds and its peak memory in MB."""
    start = time.perf_counter()
    words = [str(argument) for argument in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{command} failed:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def print_table(rounds):
    """Print the medians over the rounds."""
    print("| command | seconds | peak MB | its time over regraft's | its memory over regraft's |")
    print("|---|---|---|---|---|")
    for name in rounds[0]:
        seconds, megabytes = (statistics.median(measured[name][i] for measured in rounds) for i in (0, 1))
        time_ratio, memory_ratio = (
            statistics.median(measured[name][i] / measured["regraft"][i] for measured in rounds) for i in (0, 1)
        )
        print(f"| {name} | {seconds:.1f} | {megabytes:.0f} | {time_ratio:.2f}× | {memory_ratio:.2f}× |")


def largest_difference(first, second, folder):
    """Return the largest difference between two results, in units in the last place of bf16.

    The unit is taken at the largest absolute value of the first result and of the inputs at the same position.
    """
    import torch

    from regraft.checkpoint import Checkpoint

    first, second = Checkpoint.open(first), Checkpoint.open(second)
    inputs = [Checkpoint.open(folder / name) for name in CHECKPOINTS]
    assert set(first) == set(second)
    largest_units = 0.0
    for name in first:
        magnitude = torch.stack([checkpoint[name].float().abs() for checkpoint in (first, *inputs)]).amax(dim=0)
        unit = 2.0 ** (torch.floor(torch.log2(magnitude.clamp(min=SMALLEST))) - BF16_MANTISSA_BITS)
        difference = (first[name].float() - second[name].float()).abs()
        largest_units = max(largest_units, float((difference / unit).max()))
    return largest_units


if __name__ == "__main__":
    main()
