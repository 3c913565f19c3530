"""`regraft weights`: arithmetic on checkpoints of any size, from disk to disk."""

import fnmatch
import gc
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from regraft.checkpoint import Checkpoint, Derived
    from regraft.weights import RowMatch

app = typer.Typer(no_args_is_help=True)

New = Annotated[str, typer.Option(help="The upgraded base: a folder, a safetensors file or a hub id[@revision].")]
Tuned = Annotated[str, typer.Option(help="What was tuned on the old base.")]
Old = Annotated[str, typer.Option(help="The old base.")]
Out = Annotated[Path, typer.Option(help="The folder to make. If it is there, made from the same, nothing is done.")]
ShardSize = Annotated[float, typer.Option(help="The largest size of a file, in GB.", min=0.001)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it takes, and do nothing.")]
Finite = Annotated[bool, typer.Option("--check-finite", help="Refuse inputs with infinite or not-a-number values.")]


@app.callback()
def streamed() -> None:
    """Arithmetic on checkpoints of any size, from disk to disk."""
    # what takes memory is freed by its reference count; without rounds over all that transformers' modules hold, a
    # short command starts a fifth sooner
    gc.disable()


@app.command()
def graft(
    new: New,
    tuned: Tuned,
    old: Old,
    out: Out,
    scale: Annotated[float, typer.Option(help="The factor λ on the delta.")] = 1.0,
    scale_for: Annotated[
        list[str] | None, typer.Option(help="λ for names that fit a pattern, as '*.attention.*=0.5'; repeatable.")
    ] = None,
    shard_size: ShardSize = 5.0,
    check_finite: Finite = False,
    dry_run: DryRun = False,
) -> None:
    """Add what tuning changed in the old base to the new one: new + λ·(tuned − old); heads are copied."""
    from regraft.cli import show
    from regraft.errors import RecipeError
    from regraft.vocabulary import match_vocabularies, merged_tokenizer
    from regraft.weights import Named, counterparts, graft_all

    factors = {"*": _finite("--scale", scale), **_factors(scale_for or [])}
    factors["*"] = factors.pop("*")  # the first pattern that fits counts
    sides = _open(check_finite, {"new": new, "tuned": tuned, "old": old})
    views = _named(sides)
    rows = match_vocabularies({side: opened.folder for side, opened in sides.items()}, views)
    if rows:
        show.line(rows.summary())
        merged_tokenizer(sides["new"].folder, sides["tuned"].folder, rows)  # or a refusal, before anything is written
    if unused := [p for p in factors if p != "*" and not fnmatch.filter(views["tuned"], p)]:
        raise RecipeError(f"--scale-for {unused[0]}: fits no tensor; there are such as {next(iter(views['tuned']))}.")
    grafted = graft_all(views["new"], views["tuned"], views["old"], factors, rows)
    if left_out := counterparts(views["new"], views["tuned"], views["old"]).left_out:
        show.line(f"copied, as one of the bases lacks it: {', '.join(left_out)}")
    settings = _upgraded(sides, has_class=isinstance(views["tuned"], Named), has_same_ids=not rows)
    made_from = {"operation": "graft", "scale": factors}
    _write(grafted, out, sides, "tuned", made_from, shard_size, dry_run, rows, config=settings)


@app.command()
def delta(
    tuned: Tuned,
    old: Old,
    out: Out,
    shard_size: ShardSize = 5.0,
    check_finite: Finite = False,
    dry_run: DryRun = False,
) -> None:
    """Write what tuning changed: tuned − old, in float32."""
    from regraft.vocabulary import check_one_vocabulary
    from regraft.weights import delta_all

    sides = _open(check_finite, {"tuned": tuned, "old": old})
    views = _named(sides)
    check_one_vocabulary({side: opened.folder for side, opened in sides.items()}, views, "a delta")
    _write(delta_all(views["tuned"], views["old"]), out, sides, "tuned", {"operation": "delta"}, shard_size, dry_run)


@app.command()
def interpolate(
    first: Annotated[str, typer.Option(help="The checkpoint where t is 0.")],
    second: Annotated[str, typer.Option(help="The checkpoint where t is 1.")],
    t: Annotated[float, typer.Option("--t", help="The place on the line between them.")],
    out: Out,
    shard_size: ShardSize = 5.0,
    check_finite: Finite = False,
    dry_run: DryRun = False,
) -> None:
    """Walk the straight line between two checkpoints: (1 − t)·first + t·second."""
    from regraft.adaptation import differing_settings
    from regraft.errors import MismatchError
    from regraft.transformers_folder import read_config
    from regraft.vocabulary import check_same_rows
    from regraft.weights import Named, interpolate_all

    sides = _open(check_finite, {"first": first, "second": second})
    views = _named(sides)
    if isinstance(views["first"], Named):
        start, end = sides["first"], sides["second"]
        if differing := differing_settings(read_config(end), end.path, read_config(start), start.path):
            raise MismatchError(
                f"{end.path}/config.json does not go with {start.path}: {'; '.join(differing[:4])}. No model between "
                "them computes as both do."
            )
    check_same_rows({side: opened.folder for side, opened in sides.items()}, views)
    walked = interpolate_all(views["first"], views["second"], _finite("--t", t))
    _write(walked, out, sides, "first", {"operation": "interpolate", "t": t}, shard_size, dry_run)


@app.command("extract-lora")
def extract_lora(
    tuned: Annotated[str, typer.Option(help="The full fine-tune.")],
    old: Old,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The rank of every layer; or --energy.", min=1)] = None,
    energy: Annotated[float | None, typer.Option(help="The share of each squared norm to keep.")] = None,
    check_finite: Finite = False,
) -> None:
    """Draw a LoRA out of a full fine-tune: the best low-rank approximation of what it changed."""
    from regraft.adaptation import extract_lora as extract
    from regraft.adaptation import write_lora
    from regraft.checkpoint import fingerprint, is_made
    from regraft.cli import show
    from regraft.naming import class_of
    from regraft.vocabulary import check_one_vocabulary
    from regraft.weights import Named

    sides = _open(check_finite, {"tuned": tuned, "old": old})
    _check_apart(out, sides)
    options = {"operation": "extract-lora", "rank": rank, "energy": energy}
    made_from = {**options, **{side: fingerprint(opened, full=True) for side, opened in sides.items()}}
    if is_made(out, made_from):
        show.line(f"adapter: {out}")
        return
    views = _named(sides)
    check_one_vocabulary({side: opened.folder for side, opened in sides.items()}, views, "a LoRA")
    architecture = class_of(sides["tuned"]) if isinstance(views["tuned"], Named) else None
    with show.progress() as progress:
        found = extract(views["tuned"], views["old"], rank, energy, progress, architecture=architecture)
    write_lora(found, out, old, sides["tuned"].folder, made_from)
    show.line(
        f"kept {found.kept:.1%} of the squared norm of what tuning changed; {found.left_out:.1%} is in embeddings, "
        f"norms and biases, where a LoRA has no place\nadapter: {out}"
    )


@app.command("merge-lora")
def merge_lora(
    adapter: Annotated[str, typer.Option(help="The PEFT folder of a LoRA, rsLoRA or DoRA.")],
    base: Annotated[str, typer.Option(help="The base to merge it into.")],
    out: Out,
    start: Annotated[
        str | None, typer.Option(help="The adapter as it was initialised; PiSSA and OLoRA need it.")
    ] = None,
    shard_size: ShardSize = 5.0,
    check_finite: Finite = False,
    dry_run: DryRun = False,
) -> None:
    """Merge a LoRA into a base: a plain transformers folder comes of it, with all that the adapter tuned."""
    from regraft.adaptation import load_adaptation, lora_settings
    from regraft.adaptation import merge_lora as merge
    from regraft.checkpoint import find_path
    from regraft.vocabulary import has_tokenizer

    path = find_path(adapter)
    adaptation = load_adaptation(path.parent if path.is_file() else path)
    folder, settings = adaptation.path, lora_settings(adaptation.path)
    names = {"adapter": str(folder), "base": base} | ({"start": start} if start else {})
    sides = _open(check_finite, names)
    merged = merge(sides["adapter"], settings, sides["base"], sides.get("start"), adaptation.labels)
    _write(
        merged.tensors, out, sides, "base", {"operation": "merge-lora"}, shard_size, dry_run, config=merged.config,
        tokenizer_of=folder if has_tokenizer(folder) else None,
    )  # fmt: skip


@app.command()
def distance(
    first: Annotated[str, typer.Argument(help="A checkpoint.")],
    second: Annotated[str, typer.Argument(help="The one it is held against.")],
    check_finite: Finite = False,
) -> None:
    """Measure how far apart two checkpoints are: as wholes, by layer and by kind of tensor."""
    from regraft.cli import show
    from regraft.vocabulary import check_same_rows
    from regraft.weights import distances

    sides = _open(check_finite, {"first": first, "second": second})
    views = _named(sides)
    check_same_rows({side: opened.folder for side, opened in sides.items()}, views)
    with show.progress() as progress:
        found = distances(views["first"], views["second"], progress)
    show.distances(found)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a safetensors file or a hub id[@revision].")],
    full: Annotated[bool, typer.Option("--full", help="Hash every byte, rather than a sample of each tensor.")] = False,
    check_finite: Finite = False,
) -> None:
    """Show what a checkpoint holds: files, tensors by kind and dtype, bytes, and its fingerprint."""
    from regraft.checkpoint import fingerprint
    from regraft.cli import show

    opened = _open(check_finite, {"checkpoint": checkpoint}, as_stored=True)["checkpoint"]
    show.checkpoint(opened, fingerprint(opened, full=full))


def _open(check_finite: bool, names: "Mapping[str, str]", as_stored: bool = False) -> dict[str, "Checkpoint"]:
    from regraft.checkpoint import Checkpoint
    from regraft.checkpoint import check_finite as check
    from regraft.cli import show

    sides = {side: Checkpoint.open(name, as_stored=as_stored) for side, name in names.items()}
    if check_finite:
        with show.progress() as progress:
            for side in sides.values():
                check(side, progress)
    return sides


def _named(sides: dict[str, "Checkpoint"]) -> "dict[str, Mapping[str, torch.Tensor]]":
    """Name tensors as their transformers classes do; say so where stored names count instead."""
    from regraft.cli import show
    from regraft.errors import CheckpointError
    from regraft.naming import named_alike

    adapters = [opened.folder for opened in sides.values() if (opened.folder / "adapter_config.json").is_file()]
    if adapters and len(adapters) < len(sides):
        raise CheckpointError(
            f"{adapters[0]}: is an adapter, and arithmetic with models takes a model. Merge it into its base first "
            "(regraft weights merge-lora)."
        )
    views, reason = named_alike(sides)
    if reason:
        show.line(reason)
    return views


def _upgraded(sides: "Mapping[str, Checkpoint]", has_class: bool, has_same_ids: bool) -> dict[str, Any]:
    """Return the settings that a graft has of the new base: effective ones, or as the files have them."""
    from regraft.base import is_causal
    from regraft.checkpoint import read_json
    from regraft.transformers_folder import read_config, upgraded_settings

    order = [sides[side] for side in ("tuned", "old", "new")]
    if has_class:
        configs = [read_config(side) for side in order]
        settings, is_decoder = [config.to_dict() for config in configs], is_causal(configs[1])
    elif all((side.folder / "config.json").is_file() for side in order):
        settings, is_decoder = [read_json(side.folder / "config.json") for side in order], True
    else:
        return {}
    return upgraded_settings(*settings, is_decoder=is_decoder, has_same_ids=has_same_ids)


def _check_apart(out: Path, sides: dict[str, "Checkpoint"]) -> None:
    from regraft.errors import OutcomeError

    for side, opened in sides.items():
        if out.resolve() == opened.folder.resolve():
            raise OutcomeError(
                f"{out}: is the folder of --{side}, and a result shares no folder with what it is made from. Choose "
                "another --out."
            )


def _write(
    tensors: "Derived",
    out: Path,
    sides: dict[str, "Checkpoint"],
    like: str,
    options: dict[str, Any],
    shard_size: float,
    dry_run: bool,
    rows: "RowMatch | None" = None,
    config: dict[str, Any] | None = None,
    tokenizer_of: Path | None = None,
) -> None:
    from regraft.checkpoint import TOKENIZER, copy_companions, fingerprint, plan_checkpoint, write_folder
    from regraft.cli import show
    from regraft.vocabulary import write_vocabulary

    _check_apart(out, sides)
    shard_bytes = int(_finite("--shard-size", shard_size) * 1e9)
    if dry_run:
        show.plan(plan_checkpoint(tensors, out, shard_bytes), out)
        return
    vocabulary: Callable[[Path], None] | None = None
    if tokenizer_of:
        vocabulary = partial(copy_companions, tokenizer_of, patterns=TOKENIZER)
    if rows:
        folders = {side: sides[side].folder for side in ("new", "tuned", "old")}
        vocabulary = partial(write_vocabulary, **folders, rows=rows)
    made_from = {**options, **{side: fingerprint(opened) for side, opened in sides.items()}}
    with show.progress() as progress:
        write_folder(
            tensors, out, sides[like].folder, made_from, shard_bytes, progress,
            vocabulary=vocabulary, config=config,
        )  # fmt: skip
    show.line(f"checkpoint: {out}")


def _factors(entries: list[str]) -> dict[str, float]:
    from regraft.errors import RecipeError

    factors = {}
    for entry in entries:
        pattern, _, number = entry.rpartition("=")
        try:
            factors[pattern] = _finite(f"--scale-for {pattern}", float(number))
        except ValueError:
            pattern = ""
        if not pattern:
            raise RecipeError(f"--scale-for takes PATTERN=NUMBER, found {entry!r}.")
    return factors


def _finite(option: str, number: float) -> float:
    from regraft.errors import RecipeError

    if not math.isfinite(number):
        raise RecipeError(f"{option} is a finite number, found {number}.")
    return number
