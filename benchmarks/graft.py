"""Speed and memory of a graft on disk against mergekit on the same job and against `cp`.

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install -r benchmarks/mergekit.txt
    python benchmarks/graft.py --mergekit .venv-mergekit/bin/mergekit-yaml

Makes a synthetic bf16 checkpoint in shards three times over (old, tuned, new), and runs each command as a whole
process, in turn, disk to disk: `regraft weights graft`, mergekit's `task_arithmetic` (old + (tuned − old) +
(new − old), the same sum), `cp` of two checkpoints (as many bytes read and written together) and `cp` of one (as many
written). The ratio of each round is what counts. Both results are then held against each other.
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

SIDES = ("old", "tuned", "new")
CONFIG = """\
merge_method: task_arithmetic
base_model: {folder}/old
models:
  - {{model: {folder}/tuned, parameters: {{weight: 1.0}}}}
  - {{model: {folder}/new, parameters: {{weight: 1.0}}}}
parameters: {{normalize: false}}
dtype: bfloat16
"""


def make(folder, gigabytes):
    """Write the three checkpoints: about so many gigabytes each, in shards of an eighth of that."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    width, layers = 2048, max(1, round(gigabytes * 1e9 / 2 / (4 * 2048**2 + 3 * 2048 * 5632)))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16, vocab_size=8192,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(20)
    for side in SIDES:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)
                tensor.copy_(noise if side == "old" else tensor + 0.01 * noise)
        model.save_pretrained(folder / side, max_shard_size=f"{int(gigabytes * 125)}MB")


def run(command):
    """Run a command and bring what it wrote to the disk; give its seconds and its peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{command} failed:\n{said.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def compare(ours, theirs, folder):
    """Give the largest difference of two results, in steps of bf16 at the largest number that it is made from or is."""
    import torch

    from regraft.checkpoint import Checkpoint

    ours, theirs, *inputs = (Checkpoint.open(path) for path in (ours, theirs, *(folder / side for side in SIDES)))
    assert set(ours) == set(theirs)
    worst = 0.0
    for name in ours:
        largest = torch.stack([side[name].float().abs() for side in (ours, *inputs)]).amax(dim=0)
        step = 2.0 ** (torch.floor(torch.log2(largest.clamp(min=1e-30))) - 7)
        worst = max(worst, float(((ours[name].float() - theirs[name].float()).abs() / step).max()))
    return worst


def main():
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="the command mergekit-yaml of an environment of its own")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.gigabytes)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # in a process of its own: a child's peak memory would else begin with that of this one
        subprocess.run([sys.executable, __file__, "--make", folder, "--gigabytes", str(given.gigabytes)], check=True)
        (folder / "merge.yml").write_text(CONFIG.format(folder=folder))
        inputs = [folder / side for side in SIDES]
        graft = ["-m", "regraft", "weights", "graft", "--new", inputs[2], "--tuned", inputs[1], "--old", inputs[0]]
        commands = {
            "regraft": [sys.executable, *graft, "--out", folder / "regraft"],
            "mergekit": [given.mergekit, folder / "merge.yml", folder / "mergekit"],
            "cp of the bytes touched": ["cp", "-r", *inputs[:2], folder / "two"],
            "cp of one": ["cp", "-r", inputs[0], folder / "one"],
        }  # fmt: skip
        outs = {name: folder / Path(str(command[-1])).name for name, command in commands.items()}
        rounds = []
        for _ in range(given.rounds + 1):
            times = {}
            for name, command in commands.items():
                shutil.rmtree(outs[name], ignore_errors=True)
                if name == "cp of the bytes touched":
                    outs[name].mkdir()
                os.sync()
                times[name] = run(command)
            rounds.append(times)
        rounds = rounds[1:]  # the first one warms the disk's cache
        print(f"{given.gigabytes:g} GB a checkpoint, {given.rounds} rounds")
        print("| command | seconds | peak MB | its time over regraft's | its memory over regraft's |")
        print("|---|---|---|---|---|")
        for name in commands:
            figures = [
                statistics.median(times[name][0] for times in rounds),
                statistics.median(times[name][1] for times in rounds),
                statistics.median(times[name][0] / times["regraft"][0] for times in rounds),
                statistics.median(times[name][1] / times["regraft"][1] for times in rounds),
            ]
            print("| {} | {:.1f} | {:.0f} | {:.2f}× | {:.2f}× |".format(name, *figures))
        step = compare(*(outs[name] for name in ("regraft", "mergekit")), folder)
        print(f"largest difference of a number in the two results: {step:.2f} steps of bf16")


if __name__ == "__main__":
    main()
