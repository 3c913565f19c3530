"""`regraft adaptation`: inspect an adaptation, or convert it to another kind."""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import regraft
from regraft.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.adaptation import Server, ServingProblem

app = typer.Typer(help="Inspect an adaptation, or convert it to another kind.", no_args_is_help=True)

AdaptationArgument = Annotated[
    Path,
    typer.Argument(
        help="Adaptation: an outcome, or a folder saved by transformers or PEFT.",
        metavar="ADAPTATION",
        show_default=False,
    ),
]
SETTINGS = (
    "r",
    "lora_alpha",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "num_virtual_tokens",
    "inner_size",
    "placement",
    "activation",
    "tune_norms",
)
"""The settings of an adapter's config that are printed, in this order; those that are missing, false, 0 or empty are
left out."""


@app.command()
def show(
    path: AdaptationArgument,
    base: Annotated[
        str | None, typer.Option(help="Base to load it on, which checks its lineage and that every tensor loads.")
    ] = None,
) -> None:
    """Show what an adaptation consists of; with a base, also whether the two belong together."""
    from regraft.adaptation import load_model, stored_head
    from regraft.adaptation.tokens import with_adaptation_tokens

    adaptation = regraft.load_adaptation(path)
    lineage = None
    if base:
        opened_base = regraft.Base.open(base)
        lineage = adaptation.check_base(opened_base)
        adapted_base = with_adaptation_tokens(adaptation, regraft.Upgrade(opened_base, opened_base)).old
        load_model(adaptation, adapted_base, stored_head(adaptation, opened_base))
    print_adaptation(adaptation, base, lineage)


@app.command()
def convert(
    path: AdaptationArgument,
    old_base: options.OldBase,
    out: options.Out,
    kind: Annotated[str, typer.Option("--to", help="Kind to convert to: full or lora.")],
    new_base: Annotated[
        str | None, typer.Option(help="New base to put the result on; by default, the old base.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="For lora: rank of every layer; or set --energy.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="For lora: share of each delta's squared norm to preserve, 0 to 1.")
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(help="For lora: task file, on whose texts the outputs are approximated, rather than the weights."),
    ] = None,
    served_base: options.ServedBase = None,
    force: options.Force = False,
) -> None:
    """Convert an adaptation to a LoRA or to a full fine-tune."""
    from regraft.cli.terminal import print_line, print_text, show_progress

    with show_progress() as progress:
        conversion = regraft.convert(
            path,
            old_base,
            out,
            kind,
            new=new_base,
            rank=rank,
            energy=energy,
            task=task,
            served_base=served_base,
            force=force,
            progress=progress,
        )
    print_text(f"{conversion.kind}: {conversion.preserved:.1%} of the delta's squared norm preserved")
    if conversion.excluded:
        print_text(f"{conversion.excluded:.1%} is in embeddings, norms and biases, which a LoRA cannot change")
    print_line(f"adaptation: {conversion.path}")


@app.command()
def servable(
    path: AdaptationArgument,
    base: Annotated[str, typer.Option(help="Base that the server loads: a folder or a hub id@revision.")],
    served_base: Annotated[
        str | None, typer.Option(help="What `vllm serve` gets as the model, a path or a hub id; vLLM compares it.")
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="Server that is needed: vllm or sglang; repeat for both, the default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Check whether vLLM and SGLang would serve an adaptation; the status is 1 if a needed server would not."""
    from regraft.adaptation import check_servable, servers_named

    servers = servers_named(server or ())
    problems = [problem for problem in check_servable(path, base, served_base) if problem.server in servers]
    if as_json:
        print(json.dumps([dataclasses.asdict(problem) for problem in problems], indent=2))
    else:
        print_servable(problems, servers)
    if any(problem.blocks for problem in problems):
        raise typer.Exit(1)


def print_servable(problems: "Sequence[ServingProblem]", servers: "Sequence[Server]") -> None:
    """Print a verdict for each server, and a table of the problems.

    Args:
        problems: The result of `check_servable`, for these servers.
        servers: The servers.
    """
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text

    for server in servers:
        own_problems = [problem for problem in problems if problem.server == server]
        verdict = "does not serve it" if any(problem.blocks for problem in own_problems) else "serves it"
        if own_problems and verdict == "serves it":
            verdict += ", with the settings below"
        print_text(f"{server} {verdict}", style="bold")
    if not problems:
        return
    table = new_table(None, ["server", "it is"], [])
    for heading in ("problem", "remedy"):
        table.add_column(heading, overflow="fold")
    for problem in problems:
        table.add_row(*map(escape, (problem.server, problem.severity, problem.problem, problem.remedy)))
    console.print(table)


def print_adaptation(adaptation: "regraft.Adaptation", base: str | None, lineage: str | None) -> None:
    """Print an adaptation's kind, size, settings, labels and lineage.

    Args:
        adaptation: The adaptation, of which the headers of the weight files are read.
        base: The folder or Hub id of the base that it was loaded on; None if it was not loaded.
        lineage: Whether the adaptation records that base, in a word, as `Adaptation.check_base` returns it; None
            without a base.
    """
    from regraft.cli.terminal import format_size, print_pairs

    tensors = adaptation.checkpoint.tensors.values()
    config = adaptation.config
    pairs = {
        "kind": adaptation.kind,
        "tensors": f"{len(tensors):,}",
        "parameters": f"{sum(math.prod(tensor.shape) for tensor in tensors):,}",
        "size": format_size(sum(tensor.end - tensor.start for tensor in tensors)),
        "settings": ", ".join(f"{name} {config[name]}" for name in SETTINGS if config.get(name)),
        "labels": ", ".join(adaptation.labels) if adaptation.labels else "none recorded",
        "task type": adaptation.task_type or "not recorded",
        "tuned on": adaptation.base or "not recorded: its lineage is unproven",
        "fingerprint": adaptation.fingerprint,
        "on the base": f"{base}: loads wholly, lineage {lineage}" if base else "",
    }
    print_pairs([(name, value) for name, value in pairs.items() if value])
