"""Measure what text generation adds, section by section.

    python benchmarks/generation.py losses

Section `losses`: one step of each loss over a vocabulary, forward and backward, against the same loss of all logits
and, for the cross-entropy, against `torch.nn.functional.linear_cross_entropy` (torch ≥ 2.13) with its chunks. Each step
runs in a process of its own with one thread. Seconds are those of the processor, which other processes disturb less.
The head is frozen, as under a LoRA, or trained; its gradient then counts as memory of the step. Compare the ratios
within a round, since single times drift with the machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

NUM_TOKENS, VOCABULARY, WIDTH = 2048, 49152, 576
"""A batch of two texts of 1,024 tokens, and the head of SmolLM2-135M."""
WARM_UP_TOKENS = 32
"""Tokens of the untimed step, which loads the libraries; arbitrary."""
TOP_K = 64
TOP_MASS = 0.95
"""The teacher's probability of its most likely tokens; arbitrary, because the time does not depend on it."""
MEGABYTE = 1e6
LOSSES = {
    "cross-entropy": ("naive", "chunked", "torch"),
    "forward KL from states": ("naive", "chunked"),
    f"forward KL, top {TOP_K} + tail": ("naive", "chunked"),
    "reverse KL from states": ("naive", "chunked"),
}
"""The implementations of each loss, in the order of a round."""
CROSS_ENTROPY, FORWARD, TOP, REVERSE = LOSSES


def main():
    """Run a section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=("losses",))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each step")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure_step(*arguments.step)))
        return
    compare_losses(arguments.rounds)


def compare_losses(num_rounds):
    """Print the table of the section `losses`."""
    print("| loss | head | implementation | CPU seconds | MB | time over naive | memory over naive |")
    print("|---|---|---|---|---|---|---|")
    for loss, implementations in LOSSES.items():
        for head in ("frozen", "trained"):
            rounds = [{name: run_step(loss, head, name) for name in implementations} for _ in range(num_rounds)]
            for name in implementations:
                seconds, megabytes, time_ratio, memory_ratio = (
                    statistics.median(values)
                    for values in zip(
                        *((*measured[name], *ratios(measured[name], measured["naive"])) for measured in rounds),
                        strict=True,
                    )
                )
                cells = (f"{seconds:.1f}", f"{megabytes:.0f}", f"{time_ratio:.2f}", f"{memory_ratio:.2f}")
                print(f"| {loss} | {head} | {name} | {' | '.join(cells)} |", flush=True)


def ratios(measured, baseline):
    """Return the ratios of seconds and megabytes."""
    return [value / reference for value, reference in zip(measured, baseline, strict=True)]


def run_step(loss, head, implementation):
    """Return the seconds of a step in a separate process, and the growth of its memory in MB."""
    command = [sys.executable, __file__, "losses", "--step", loss, head, implementation]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure_step(loss, head, implementation):
    """Return the seconds of a step in this process, and the growth of its memory in MB."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(20)
    states, teacher_states = (torch.randn(NUM_TOKENS, WIDTH, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(0.1) for _ in range(2))
    targets = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    first_ids = torch.randint(VOCABULARY // TOP_K, (NUM_TOKENS, 1), generator=generator)
    ids = first_ids + torch.arange(TOP_K) * (VOCABULARY // TOP_K)
    top = (torch.randn(NUM_TOKENS, TOP_K, generator=generator).softmax(1) * TOP_MASS).log()
    weight.requires_grad_(head == "trained")
    compute = {"naive": naive_loss, "chunked": chunked_loss, "torch": torch_loss}[implementation]

    def step(rows):
        inputs = states[:rows].clone().requires_grad_()
        teacher = (teacher_states[:rows], teacher_weight, top[:rows], ids[:rows])
        (compute(loss, inputs, weight, targets[:rows], *teacher) / rows).backward()
        weight.grad = None

    step(WARM_UP_TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_memory("VmRSS")
    start = time.process_time()
    step(NUM_TOKENS)
    return time.process_time() - start, read_memory("VmHWM") - before


def read_memory(key):
    """Return an entry of the process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MEGABYTE for line in lines if line.startswith(key))


def naive_loss(loss, states, weight, targets, teacher_states, teacher_weight, top, ids):
    """Compute the sum of a loss from all logits."""
    import torch
    from torch.nn import functional

    logits = functional.linear(states, weight)
    if loss == CROSS_ENTROPY:
        return functional.cross_entropy(logits, targets, reduction="sum")
    log_q = logits.log_softmax(1)
    if loss == TOP:
        chosen = log_q.gather(1, ids)
        log_tail = torch.log1p(-chosen.exp().sum(1))
        tail = 1 - top.exp().sum(1)
        return (top.exp() * (top - chosen)).sum() + (tail * (tail.log() - log_tail)).sum()
    with torch.no_grad():
        log_p = functional.linear(teacher_states, teacher_weight).log_softmax(1)
    pair = (log_q, log_p) if loss == FORWARD else (log_p, log_q)
    return functional.kl_div(*pair, reduction="sum", log_target=True)


def chunked_loss(loss, states, weight, targets, teacher_states, teacher_weight, top, ids):
    """Compute the sum of a loss by regraft."""
    from regraft.task.types.token_logits import StateSignal, TokenLogits, TopKSignal, VocabularyHead
    from regraft.task.types.token_losses import cross_entropy_sum, divergence_sum

    logits = TokenLogits(states, VocabularyHead(weight))
    if loss == CROSS_ENTROPY:
        return cross_entropy_sum(logits, targets)
    if loss == TOP:
        return divergence_sum(logits, TopKSignal(top, ids.int()))
    signal = StateSignal(teacher_states, VocabularyHead(teacher_weight))
    return divergence_sum(logits, signal, kind="forward" if loss == FORWARD else "reverse")


def torch_loss(loss, states, weight, targets, *_):
    """Compute the sum of the cross-entropy by torch, in chunks."""
    import torch

    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(states, weight, targets, reduction="sum", options=options)


if __name__ == "__main__":
    main()
