"""Everything there is to ask of an upgrade and one adaptation, in one record."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation.outcome import versions
from regraft.checkpoint import check_place, to_json, write_atomic
from regraft.diagnosis.check import Check, check_pair
from regraft.diagnosis.compatibility import Point, compatibility
from regraft.diagnosis.connectivity import Plane, Segment, plane, segment
from regraft.diagnosis.kept import Kept, kept
from regraft.diagnosis.pair import load_counterpart, load_pair
from regraft.diagnosis.regressions import Regressions, regressions
from regraft.diagnosis.shift import Shift, shift
from regraft.diagnosis.similarity import Similarity, similarity
from regraft.diagnosis.verdict import Reason, Verdict, probe_gain, verdict
from regraft.errors import MismatchError, OutcomeError, RecipeError
from regraft.progress import Progress, silent
from regraft.task import chance_score, weakness
from regraft.tuning.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.adaptation import Adaptation
    from regraft.diagnosis.pair import Pair
    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade

SCHEMA = 1
RECORD = "diagnosis.json"
MOST_POINTS, MOST_A_SIDE = 1000, 100  # each point is a pass over the data; no picture shows more


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a diagnosis looks at beyond the two bases, the adaptation and the task.

    Args:
        points: How many points of the segment between the deployments are evaluated.
        counterparts: Outcomes of the same task on the new base. The old deployment is compared with the first rather
            than with the old weights as they are; further ones, of other seeds, tell the noise of flips.
        checkpoints: Bases on the way from the old to the new one, in order.
        text: Unlabelled text of the new base's domain; none for the task's own.
        plane: How many points a side the loss plane has; 0 for none. It takes a counterpart.

    Raises:
        RecipeError: There are too few points, or a plane without a counterpart.
    """

    points: int = 11
    counterparts: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    plane: int = 0

    def __post_init__(self) -> None:
        """Check every number."""
        if not 3 <= self.points <= MOST_POINTS:
            raise RecipeError(f"a segment takes from 3 to {MOST_POINTS:,} points, found {self.points}.")
        if self.plane > MOST_A_SIDE:
            raise RecipeError(f"a plane takes up to {MOST_A_SIDE} points a side, found {self.plane}.")
        if self.plane and (self.plane < 3 or not self.counterparts):
            raise RecipeError(
                f"a loss plane goes through the old deployment, the old weights as they are and a counterpart, and has "
                f"at least 3 points a side: found {self.plane} points and {len(self.counterparts)} counterparts."
            )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        task: The task's name.
        metric: Its metric.
        labels: Its labels, in the order of the heads.
        old_base: The old base.
        new_base: The new one.
        adaptation: What was tuned on the old base.
        kind: Its kind.
        compared: What the old deployment was compared with: `direct`, or an outcome.
        check: The old weights on the new base as they are.
        verdict: What to do.
        connectivity: The segment between the deployments.
        plane: The loss on a plane through three models.
        similarity: How alike the deployments work inside.
        shift: How far the bases moved, against what tuning had changed.
        regressions: What got worse and better.
        kept: Whether the new base's gain survives.
        compatibility: The old weights on checkpoints on the way.
        left_out: Why a question was not answered, by its name.
        seconds: What each took.
        fingerprints: Of both bases and the adaptation.
        versions: Of the libraries.
        schema: Of this record.
    """

    task: str
    metric: str
    labels: tuple[str, ...]
    old_base: str
    new_base: str
    adaptation: str
    kind: str
    compared: str
    check: Check
    verdict: Verdict
    connectivity: Segment | None
    plane: Plane | None
    similarity: Similarity | None
    shift: Shift
    regressions: Regressions
    kept: Kept | None
    compatibility: tuple[Point, ...]
    left_out: dict[str, str]
    seconds: dict[str, float]
    fingerprints: dict[str, str]
    versions: dict[str, str]
    schema: int = SCHEMA


def diagnose(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    out: str | Path | None = None,
    *,
    questions: Questions | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Diagnosis:
    """Ask everything of an upgrade and an adaptation.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        out: A folder for `diagnosis.json`, which `regraft report` shows; None to write nothing.
        questions: What else to look at.
        recipe: Whose seed and precision to use.
        force: Take the old base in spite of another fingerprint.
        progress: Told of each piece of work.

    Returns:
        What was found. A question that this kind of model does not answer is in `left_out`, with the reason.

    Raises:
        CheckpointError: A file of weights is not whole.
        DataError: The task's data cannot be used.
        MismatchError: Bases, adaptations and task do not belong together.
        OutcomeError: `out` holds something else.
    """
    asked, recipe = questions or Questions(), recipe or Recipe()
    if out is not None:
        _check_place(Path(out))
    first = asked.counterparts[0] if asked.counterparts else None
    given: dict[str, Any] = {"recipe": recipe, "force": force, "progress": progress}
    with load_pair(upgrade, adaptation, task, **given) as direct:
        pair = direct
        if first is not None:
            pair = dataclasses.replace(direct, new=load_counterpart(first, upgrade.new, direct.data))
        ask = _Asking()
        compared = "direct" if first is None else first
        ends = ("old deployment", "new deployment, direct" if first is None else f"new deployment, {Path(first).name}")
        checked = ask("check", lambda: check_pair(direct))
        moved = ask("shift", lambda: shift(upgrade, direct.adaptation, progress))
        others = [pair.predictions_of(path) for path in asked.counterparts[1:]]
        worse = ask("regressions", lambda: regressions(pair, others))
        found: dict[str, Any] = {
            "connectivity": ask(
                "connectivity",
                lambda: segment(
                    _alike(pair).old, pair.new, upgrade.old, pair.data, points=asked.points, precision=pair.precision,
                    ends=ends, progress=progress,
                ),
            ),
            "similarity": ask(
                "similarity",
                lambda: similarity(
                    _alike(pair).old, pair.new, upgrade.old, pair.data, precision=pair.precision, progress=progress
                ),
            ),
            "kept": ask("kept", lambda: kept(_alike(pair), asked.text)),
            "compatibility": ask("compatibility", lambda: compatibility(direct, asked.checkpoints))
            if asked.checkpoints
            else (),
            "plane": ask(
                "plane",
                lambda: plane(
                    (_alike(direct).old, direct.new, pair.new), (ends[0], "direct", ends[1]), upgrade.old, pair.data,
                    size=asked.plane, split=pair.split.name, precision=pair.precision, progress=progress,
                ),
            )
            if asked.plane
            else None,
        }  # fmt: skip
        gain = ask("probe", lambda: probe_gain(direct))
        decided = verdict(
            direct.data.metric,
            direct.split.labels,
            direct.before.argmax(dim=1).numpy(),
            direct.after.argmax(dim=1).numpy(),
            chance_score(direct.data, direct.split),
            gain=gain,
            weakness=weakness(direct.data, direct.split),
            reasons=_reasons(checked, found["connectivity"], found["similarity"]),
        )
    result = Diagnosis(
        task=pair.data.name,
        metric=pair.data.metric,
        labels=tuple(pair.data.labels),
        old_base=upgrade.old.name,
        new_base=upgrade.new.name,
        adaptation=str(pair.adaptation.path),
        kind=pair.adaptation.kind,
        compared=compared,
        check=checked,
        verdict=decided,
        shift=moved,
        regressions=worse,
        left_out=ask.left_out,
        seconds=ask.seconds,
        fingerprints={
            "old_base": upgrade.old.fingerprint,
            "new_base": upgrade.new.fingerprint,
            "adaptation": pair.adaptation.fingerprint,
        },
        versions=versions(),
        **found,
    )
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out) / RECORD, to_json(dataclasses.asdict(result), RECORD) + "\n")
    return result


class _Asking:
    """Asks questions, keeps the time, and remembers which could not be answered."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, question: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return question()
        except MismatchError as error:
            if name in ("check", "shift", "regressions"):
                raise
            self.left_out[name] = str(error)
            return () if name == "compatibility" else None
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 2)


def _check_place(out: Path) -> None:
    check_place(out)
    if out.exists() and not (out.is_dir() and all(file.name == RECORD for file in out.iterdir())):
        raise OutcomeError(f"{out}: holds something else than a diagnosis. Choose another --out or remove it.")


def _alike(pair: Pair) -> Pair:
    """Refuse a question that holds two models against each other token by token, where they have other tokens."""
    if pair.upgrade.rows is not None or pair.upgrade.new.own_tokenizer is not None:
        raise MismatchError(
            "the two models have different vocabularies, and this holds them against each other by token"
        )
    return pair


def _reasons(checked: Check, line: Segment | None, alike: Similarity | None) -> tuple[Reason, ...]:
    found = [
        Reason("agreement", f"{100 * checked.agreement:.1f} %", "of the examples get the same prediction as before"),
        Reason("negative flips", f"{100 * checked.negative_flips:.1f} %", "of the examples were right and are wrong"),
        Reason("distance of the bases", f"{100 * checked.relative:.1f} %", "of the old base's norm"),
    ]
    if line is not None:
        height = max(line.barrier.values())
        says = "no barrier on the way: one basin" if line.connected else "a barrier lies between the deployments"
        found.append(Reason("barrier of the loss", f"{height:.3f}", says))
    if alike is not None:
        mean = _mean(alike.divergence)
        says = "between the attention of matched heads, in bits"
        if alike.control is not None:
            says += f" ({_mean(alike.control.divergence):.3f} for {alike.control.name})"
        found.append(Reason("head divergence", f"{mean:.3f}", says))
    return tuple(found)


def _mean(matrix: tuple[tuple[float, ...], ...]) -> float:
    values = [value for row in matrix for value in row]
    return sum(values) / len(values)
