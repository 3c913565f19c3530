"""How the command line shows what a check or a diagnosis found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from regraft.cli.show import console

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.diagnosis import Check, Diagnosis

_LINEAGE = {"proven": "records this old base", "unproven": "does not record its base", "forced": "records another base"}


def check(result: Check) -> None:
    """Print what a check found, a line a figure, the verdict last.

    Args:
        result: The check.
    """
    _columns(_checked(result))
    console.print(result.verdict, style="bold", highlight=False, markup=False)


def diagnosis(result: Diagnosis, out: Path | None) -> None:
    """Print what a diagnosis found, a line a figure, the verdict last.

    Args:
        result: The diagnosis.
        out: Where its record is, if it was written.
    """
    lines, worse = _checked(result.check), result.regressions
    if result.compared != "direct":
        lines.append(("compared below", f"the old deployment with {result.compared}"))
    lines.append(
        ("flips", f"{worse.negative} negative, {worse.positive} positive of {worse.examples:,}; McNemar p "
         f"{worse.mcnemar:.2g}" + ("" if worse.noise is None else f"; {worse.noise:.1%} negative between seeds"))
    )  # fmt: skip
    lines.append(
        ("calibration error", f"{worse.calibration['old'].ece:.3f} before, {worse.calibration['new'].ece:.3f} after")
    )
    if (line := result.connectivity) is not None:
        heights = ", ".join(f"{name} {height:.3f}" for name, height in line.barrier.items())
        lines.append(("barrier of the loss", f"{heights}: {'connected' if line.connected else 'not connected'}"))
    if (alike := result.similarity) is not None:
        values = [value for row in alike.divergence for value in row]
        own = sum(best == head for row in alike.best for head, best in enumerate(row))
        told = (
            f"divergence {sum(values) / len(values):.3f} bits; {own} of {len(values)} heads are nearest to themselves"
        )
        lines += [("attention heads", told), ("hidden states", f"CKA {min(alike.cka):.3f} at the least alike layer")]
    moved = result.shift.whole
    if moved.cosine is not None:
        told = (
            f"{moved.shift:.2f} and {moved.delta:.2f} (L2), cosine {moved.cosine:+.3f}, signs agree {moved.signs:.0%}"
        )
        lines.append(("shift against delta", told))
    if (gain := result.kept) is not None:
        told = ", ".join(f"{name} {loss:.3f}" for name, loss in gain.loss.items())
        lines.append(("loss as language models", told))
        if gain.share is not None:
            told = f"the deployments gain {gain.share:.0f} % of what the bases do"
            lines.append(("  the upgrade's gain", told))
    for point in result.compatibility:
        lines.append(
            (f"on {point.name}", f"{result.metric} {point.score:.4f}, L2 {point.distance:.2f} from the old base")
        )
    lines += [(f"no {name}", why) for name, why in result.left_out.items()]
    _columns(lines)
    told = f"{result.verdict.choice} ({result.verdict.sure:.0%} sure): {result.verdict.advice}"
    console.print(told, style="bold", highlight=False, markup=False)
    if out is not None:
        console.print(f"regraft report {escape(str(out))} --out report.html shows it all", highlight=False)


def _checked(result: Check) -> list[tuple[str, str]]:
    return [
        (f"{result.metric} on {result.split}", f"{result.examples:,} examples of {result.task}"),
        ("  old weights, old base", f"{result.old:.4f}"),
        ("  old weights, new base", f"{result.new:.4f}"),
        ("  floor (majority guess)", f"{result.floor:.4f}"),
        ("agreement of the two", f"{result.agreement:.1%}"),
        ("negative / positive flips", f"{result.negative_flips:.1%} / {result.positive_flips:.1%}"),
        ("distance of the bases", f"L2 {result.l2:.2f}, {result.relative:.2%} of the norm, cosine {result.cosine:.6f}"),
        ("effect on the old base", f"changes what the head reads by {result.effect:.1%}"),
        ("lineage", f"{result.lineage}: the adaptation {_LINEAGE[result.lineage]}"),
    ]


def _columns(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        console.print(f"{name:<{width}}  {value}", highlight=False, markup=False)
