"""Speed and memory of a graft on disk against mergekit on the same job and against `cp`.

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install -r benchmarks/mergekit.txt
    python benchmarks/graft.py --mergekit .venv-mergekit/bin/mergekit-yaml

Writes three synthetic bf16 checkpoints in shards (old, tuned, new) and runs each command in turn as a process of its
own, from disk to disk: `regraft weights graft`, mergekit's `task_arithmetic` (old + (tuned − old) + (new − old), the
same sum), `cp` of two checkpoints (as many bytes as are read and written together) and `cp` of one (as many as are
written). The ratio within each round is what counts, since single times drift. The two results are compared at the end.
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
BF16_BYTES, BF16_MANTISSA_BITS = 2, 7


def main():
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="the command mergekit-yaml of an environment of its own")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.make:
        write_checkpoints(arguments.make, arguments.gigabytes)
        return
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        # in a process of its own: the commands are its siblings then, and do not inherit its peak memory
        make = [sys.executable, __file__, "--make", folder, "--gigabytes", str(arguments.gigabytes)]
        subprocess.run(make, check=True)
        (folder / "merge.yml").write_text(MERGEKIT_CONFIG.format(folder=folder))
        old, tuned, new = (folder / name for name in CHECKPOINTS)
        graft = ["-m", "regraft", "weights", "graft", "--new", new, "--tuned", tuned, "--old", old]
        commands = {
            "regraft": [sys.executable, *graft, "--out", folder / "regraft"],
            "mergekit": [arguments.mergekit, folder / "merge.yml", folder / "mergekit"],
            "cp of the bytes touched": ["cp", "-r", old, tuned, folder / "two"],
            "cp of one": ["cp", "-r", old, folder / "one"],
        }
        rounds = [run_round(commands) for _ in range(arguments.rounds + 1)]
        print(f"{arguments.gigabytes:g} GB a checkpoint, {arguments.rounds} rounds")
        print_table(rounds[1:])  # the first round warms the disk's cache
        steps = largest_difference(folder / "regraft", folder / "mergekit", folder)
        print(f"largest difference of a number in the two results: {steps:.2f} steps of bf16")


def write_checkpoints(folder, gigabytes):
    """Write the three checkpoints, each of about this many gigabytes, in eight shards."""
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
        model.save_pretrained(folder / name, max_shard_size=f"{int(gigabytes * 125)}MB")


def run_round(commands):
    """Run each command once, and return seconds and peak memory in MB by its name."""
    measurements = {}
    for name, command in commands.items():
        out = Path(command[-1])
        shutil.rmtree(out, ignore_errors=True)
        if name == "cp of the bytes touched":
            out.mkdir()  # cp of several folders needs an existing one
        os.sync()
        measurements[name] = run_command(command)
    return measurements


def run_command(command):
    """Run a command and flush what it wrote to disk; return its seconds and its peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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
        seconds, megabytes = (statistics.median(r[name][index] for r in rounds) for index in (0, 1))
        time_ratio, memory_ratio = (
            statistics.median(r[name][index] / r["regraft"][index] for r in rounds) for index in (0, 1)
        )
        print(f"| {name} | {seconds:.1f} | {megabytes:.0f} | {time_ratio:.2f}× | {memory_ratio:.2f}× |")


def largest_difference(first, second, folder):
    """Return the largest difference of two results, in steps of bf16 at the largest number involved."""
    import torch

    from regraft.checkpoint import Checkpoint

    first, second = Checkpoint.open(first), Checkpoint.open(second)
    inputs = [Checkpoint.open(folder / name) for name in CHECKPOINTS]
    assert set(first) == set(second)
    largest_steps = 0.0
    for name in first:
        magnitude = torch.stack([checkpoint[name].float().abs() for checkpoint in (first, *inputs)]).amax(dim=0)
        step = 2.0 ** (torch.floor(torch.log2(magnitude.clamp(min=1e-30))) - BF16_MANTISSA_BITS)
        difference = (first[name].float() - second[name].float()).abs()
        largest_steps = max(largest_steps, float((difference / step).max()))
    return largest_steps


if __name__ == "__main__":
    main()
