"""`regraft weights`: arithmetic on checkpoints of any size, from disk to disk."""

import fnmatch
import gc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from regraft.cli import options
from regraft.cli.weights_files import (
    check_separate,
    name_tensors,
    open_checkpoints,
    parse_factors,
    require_finite,
    upgraded_settings,
    write_result,
)
from regraft.errors import MAX_LISTED, MismatchError, RecipeError

OLD_NAMES = {"--new": "--new-base", "--old": "--old-base", "--tuned": "--adaptation", "--adapter": "--adaptation"}
"""The options of version 0.1 by their old names, which are accepted still."""


class _Command(TyperCommand):
    """A command that also accepts the names of its options in version 0.1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace old names of options, then parse.

        Args:
            ctx: Click's context.
            args: The command's arguments, as typed.

        Returns:
            Click's list of the arguments that it did not parse.
        """
        pairs = [argument.partition("=") for argument in args]
        return super().parse_args(ctx, ["".join((OLD_NAMES.get(name, name), *value)) for name, *value in pairs])


app = typer.Typer(help="Arithmetic on checkpoints of any size, from disk to disk.", no_args_is_help=True)

Tuned = Annotated[str, typer.Option("--adaptation", help="Full fine-tune of the old base.")]
OldBase = Annotated[str, typer.Option(help="Old base: a folder, a safetensors file or a hub id@revision.")]
NewBase = Annotated[str, typer.Option(help="New base: a folder, a safetensors file or a hub id@revision.")]
ShardSize = Annotated[float, typer.Option(help="Largest size of an output file, in GB.", min=0.001)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the disk space and memory needed; write nothing.")]
CheckFinite = Annotated[bool, typer.Option("--check-finite", help="Refuse inputs with infinite or NaN values.")]
CheckpointArgument = Annotated[
    str,
    typer.Argument(
        help="Checkpoint: a folder, a safetensors file or a hub id@revision.", metavar="CHECKPOINT", show_default=False
    ),
]


@app.callback()
def group() -> None:
    """Arithmetic on checkpoints of any size, from disk to disk."""
    # Large memory is freed by reference counts. Without the collector's rounds over all of transformers' modules, a
    # short command starts a fifth sooner.
    gc.disable()


@app.command(cls=_Command)
def graft(
    old_base: OldBase,
    new_base: NewBase,
    adaptation: Tuned,
    out: options.Out,
    scale: Annotated[float, typer.Option(help="Factor on the delta.")] = 1.0,
    scale_for: Annotated[
        list[str] | None,
        typer.Option(help="Factor on the delta of the tensors that match a pattern, as in '*.attention.*=0.5'."),
    ] = None,
    shard_size: ShardSize = 5.0,
    check_finite: CheckFinite = False,
    dry_run: DryRun = False,
) -> None:
    """Graft a full fine-tune onto the new base: new + scale·(adaptation − old). Heads are copied."""
    from regraft.cli.terminal import print_text
    from regraft.vocabulary import match_vocabularies, merged_tokenizer
    from regraft.weights import NamedTensors, counterparts, graft_all

    factors = parse_factors(scale_for or [])
    require_finite("--scale", scale)
    factors["*"] = factors.pop("*", scale)  # moved to the end, since the first pattern that matches counts
    checkpoints = open_checkpoints({"new": new_base, "tuned": adaptation, "old": old_base}, check_finite)
    tensors = name_tensors(checkpoints)
    rows = match_vocabularies({role: checkpoint.folder for role, checkpoint in checkpoints.items()}, tensors)
    if rows:
        print_text(rows.summary())
        # raises what writing the tokenizer would, before anything is written
        merged_tokenizer(checkpoints["new"].folder, checkpoints["tuned"].folder, rows)
    for pattern in factors:
        if pattern != "*" and not fnmatch.filter(tensors["tuned"], pattern):
            raise RecipeError(
                f"--scale-for {pattern}: matches no tensor. A tensor is, for example, {next(iter(tensors['tuned']))}."
            )
    grafted_tensors = graft_all(tensors["new"], tensors["tuned"], tensors["old"], factors, rows)
    if unmatched := counterparts(tensors["new"], tensors["tuned"], tensors["old"]).unmatched:
        print_text(f"copied unchanged, as one of the bases lacks them: {', '.join(unmatched)}")
    settings = upgraded_settings(
        checkpoints, has_class=isinstance(tensors["tuned"], NamedTensors), has_same_ids=not rows
    )
    provenance = {"operation": "graft", "scale": factors}
    write_result(grafted_tensors, out, checkpoints, "tuned", provenance, shard_size, dry_run, rows, config=settings)


@app.command(cls=_Command)
def delta(
    old_base: OldBase,
    adaptation: Tuned,
    out: options.Out,
    shard_size: ShardSize = 5.0,
    check_finite: CheckFinite = False,
    dry_run: DryRun = False,
) -> None:
    """Write the delta of a full fine-tune: adaptation − old, in float32."""
    from regraft.vocabulary import check_same_vocabulary
    from regraft.weights import delta_all

    checkpoints = open_checkpoints({"tuned": adaptation, "old": old_base}, check_finite)
    tensors = name_tensors(checkpoints)
    check_same_vocabulary({role: checkpoint.folder for role, checkpoint in checkpoints.items()}, tensors, "a delta")
    difference = delta_all(tensors["tuned"], tensors["old"])
    write_result(difference, out, checkpoints, "tuned", {"operation": "delta"}, shard_size, dry_run)


@app.command(cls=_Command)
def interpolate(
    first: Annotated[str, typer.Option(help="Checkpoint at t = 0.")],
    second: Annotated[str, typer.Option(help="Checkpoint at t = 1.")],
    t: Annotated[float, typer.Option("--t", help="Position on the line from the first to the second.")],
    out: options.Out,
    shard_size: ShardSize = 5.0,
    check_finite: CheckFinite = False,
    dry_run: DryRun = False,
) -> None:
    """Interpolate linearly between two checkpoints: (1 − t)·first + t·second."""
    from regraft.adaptation import differing_settings
    from regraft.transformers_folder import read_config
    from regraft.vocabulary import check_same_rows
    from regraft.weights import NamedTensors, interpolate_all

    require_finite("--t", t)
    checkpoints = open_checkpoints({"first": first, "second": second}, check_finite)
    tensors = name_tensors(checkpoints)
    if isinstance(tensors["first"], NamedTensors):
        start, end = checkpoints["first"], checkpoints["second"]
        if differences := differing_settings(read_config(end), end.path, read_config(start), start.path):
            raise MismatchError(
                f"{end.path}/config.json differs from {start.path}'s in settings of the computation: "
                f"{'; '.join(differences[:MAX_LISTED])}. No model between the two computes as both do."
            )
    check_same_rows({role: checkpoint.folder for role, checkpoint in checkpoints.items()}, tensors)
    interpolated_tensors = interpolate_all(tensors["first"], tensors["second"], t)
    provenance = {"operation": "interpolate", "t": t}
    write_result(interpolated_tensors, out, checkpoints, "first", provenance, shard_size, dry_run)


@app.command("extract-lora", cls=_Command)
def extract_lora(
    old_base: OldBase,
    adaptation: Tuned,
    out: options.Out,
    rank: Annotated[int | None, typer.Option(help="Rank of every layer; or set --energy.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each delta's squared norm to preserve, 0 to 1.")
    ] = None,
    check_finite: CheckFinite = False,
) -> None:
    """Extract a LoRA from a full fine-tune: the best low-rank approximation of its delta."""
    from regraft.adaptation import extract_lora as extract
    from regraft.adaptation import write_lora
    from regraft.checkpoint import fingerprint, is_up_to_date
    from regraft.cli.terminal import print_line, print_text, show_progress
    from regraft.naming import class_of
    from regraft.vocabulary import check_same_vocabulary
    from regraft.weights import NamedTensors

    checkpoints = open_checkpoints({"tuned": adaptation, "old": old_base}, check_finite)
    check_separate(out, checkpoints)
    fingerprints = {role: fingerprint(checkpoint, full=True) for role, checkpoint in checkpoints.items()}
    provenance = {"operation": "extract-lora", "rank": rank, "energy": energy, **fingerprints}
    if not is_up_to_date(out, provenance):
        tensors = name_tensors(checkpoints)
        check_same_vocabulary({role: checkpoint.folder for role, checkpoint in checkpoints.items()}, tensors, "a LoRA")
        architecture = class_of(checkpoints["tuned"]) if isinstance(tensors["tuned"], NamedTensors) else None
        with show_progress() as progress:
            lora = extract(tensors["tuned"], tensors["old"], rank, energy, progress, architecture=architecture)
        write_lora(lora, out, old_base, checkpoints["tuned"].folder, provenance)
        print_text(
            f"{lora.preserved:.1%} of the delta's squared norm preserved; {lora.excluded:.1%} is in embeddings, norms "
            "and biases, which a LoRA cannot change"
        )
    print_line(f"adapter: {out}")


@app.command("merge-lora", cls=_Command)
def merge_lora(
    base: Annotated[str, typer.Option(help="Base to merge into: a folder or a hub id@revision.")],
    adaptation: Annotated[str, typer.Option(help="PEFT folder of a LoRA, rsLoRA, DoRA, PiSSA or OLoRA.")],
    out: options.Out,
    start: Annotated[str | None, typer.Option(help="For PiSSA and OLoRA: the adapter as it was initialised.")] = None,
    shard_size: ShardSize = 5.0,
    check_finite: CheckFinite = False,
    dry_run: DryRun = False,
) -> None:
    """Merge a LoRA, and the other tensors that its adapter tuned, into a base."""
    from regraft.adaptation import load_adaptation, read_lora_config
    from regraft.adaptation import merge_lora as merge
    from regraft.adaptation.labels import output_names
    from regraft.checkpoint import find_path
    from regraft.task.types import task_types
    from regraft.vocabulary import has_tokenizer

    path = find_path(adaptation)
    adapter = load_adaptation(path.parent if path.is_file() else path)
    lora_config = read_lora_config(adapter.path)
    paths = {"adapter": str(adapter.path), "base": base} | ({"start": start} if start else {})
    checkpoints = open_checkpoints(paths, check_finite)
    merged_model = merge(
        checkpoints["adapter"], lora_config, checkpoints["base"], checkpoints.get("start"), output_names(adapter)
    )
    task_type = task_types().get(adapter.task_type or "")
    problem_type = {"problem_type": task_type.problem_types[0]} if task_type and task_type.problem_types[0] else {}
    write_result(
        merged_model.tensors,
        out,
        checkpoints,
        "base",
        {"operation": "merge-lora"},
        shard_size,
        dry_run,
        config={**merged_model.config, **problem_type},
        tokenizer_folder=adapter.path if has_tokenizer(adapter.path) else None,
    )


@app.command()
def distance(first: CheckpointArgument, second: CheckpointArgument, check_finite: CheckFinite = False) -> None:
    """Measure the distance between two checkpoints: in all, by layer and by kind of tensor."""
    from regraft.cli.terminal import console, new_table, show_progress
    from regraft.vocabulary import check_same_rows
    from regraft.weights import distances

    checkpoints = open_checkpoints({"first": first, "second": second}, check_finite)
    tensors = name_tensors(checkpoints)
    check_same_rows({role: checkpoint.folder for role, checkpoint in checkpoints.items()}, tensors)
    with show_progress() as progress:
        groups = distances(tensors["first"], tensors["second"], progress)
    table = new_table(None, ("",), ("L2", "of the norm", "cosine", "L2 a parameter", "parameters"))
    for grouping, distance_by_name in groups.items():
        for name, figures in distance_by_name.items():
            table.add_row(
                "[bold]all[/]" if grouping == "whole" else name,
                f"{figures.l2:.4g}",
                f"{figures.relative:.2%}",
                f"{figures.cosine:.6f}",
                f"{figures.per_parameter:.2e}",
                f"{figures.parameters:,}",
            )
        table.add_section()
    console.print(table)


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    full: Annotated[bool, typer.Option("--full", help="Hash every byte, not a sample of each tensor.")] = False,
    check_finite: CheckFinite = False,
) -> None:
    """Show a checkpoint's files, its tensors by kind and dtype, and its fingerprint."""
    import math

    from regraft.checkpoint import fingerprint
    from regraft.cli.terminal import console, new_table, print_line
    from regraft.weights import kind_of

    opened_checkpoint = open_checkpoints({"checkpoint": checkpoint}, check_finite, as_stored=True)["checkpoint"]
    print_line(
        f"{opened_checkpoint.path}: {len(opened_checkpoint.files)} files, {fingerprint(opened_checkpoint, full=full)}"
    )
    table = new_table(None, ("kind", "dtype"), ("tensors", "parameters", "bytes"))
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, tensor in opened_checkpoint.tensors.items():
        groups.setdefault((kind_of(name), tensor.dtype), []).append(tensor)
    for (kind, dtype), members in [*sorted(groups.items()), (("all", ""), list(opened_checkpoint.tensors.values()))]:
        parameters = sum(math.prod(tensor.shape) for tensor in members)
        size = sum(tensor.end - tensor.start for tensor in members)
        table.add_row(kind, dtype, f"{len(members):,}", f"{parameters:,}", f"{size:,}")
    console.print(table)
