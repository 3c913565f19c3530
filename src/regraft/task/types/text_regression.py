"""The task type `text-regression`: a number per text or pair of texts."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from regraft.errors import DataError
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.split import Split
from regraft.task.types.counts import spread_evenly
from regraft.task.types.label_names import decode_label
from regraft.task.types.likelihood import Likelihood, Normal
from regraft.task.types.number_metrics import CONCORDANCE, PEARSON, RMSE, SPEARMAN
from regraft.task.types.probes import number_probe
from regraft.task.types.texts import ColumnName, TextTask
from regraft.task.types.view import Column, Scatter, Series, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task.source import SourceTable
    from regraft.task.split import Integers, Targets
    from regraft.task.types.view import ModelPredictions, View

MetricName = Literal["pearson", "spearman", "concordance", "rmse"]
MAX_STRATA = 8
"""The largest number of ranges between quantiles that samples are drawn from; arbitrary: a sample of 8 covers all."""
MAX_POINTS = 1000
"""The number of examples in a chart, beyond which points hide each other and a page grows large."""
QUANTILES = {"least": 0.0, "5th percentile": 0.05, "1st quartile": 0.25, "median": 0.5}
QUANTILES |= {"3rd quartile": 0.75, "95th percentile": 0.95, "greatest": 1.0}
"""The quantiles that `task check` shows, by name."""
OUTPUT_PRECISION = 1e-5
"""The share of the largest number that the standard deviation must exceed: about a hundred steps of float32."""
MAX_DEVIATION = 1e18
"""The largest standard deviation: float32 cannot hold the squares of larger numbers."""


class TextRegression(TextTask):
    """A task of predicting a number per text or pair of texts.

    Models are trained on standardised targets; saved models predict in the unit of the targets.

    Args:
        label: The column of numbers, or None for unlabelled data, which restricts the methods to those that read no
            labels.
        tolerance: The largest error of a right prediction, in the unit of the targets. It is required, because no value
            suits all numbers, and because what counts as a flip must not depend on the sample.
        metric: The name of the metric that is reported.
        shots: The number of training examples to keep in all, drawn evenly from ranges between quantiles; dev is
            limited to as many. By default, all are kept.
    """

    peft_task_type: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (PEARSON, SPEARMAN, CONCORDANCE, RMSE)
    agreement_metric: ClassVar[Metric | None] = CONCORDANCE
    problem_types: ClassVar[tuple[str | None, ...]] = ("regression",)
    head_policies: ClassVar[tuple[str, ...]] = ("copy", "fresh")
    likelihood: ClassVar[Likelihood] = Normal()
    guess: ClassVar[str] = "the mean"
    digest_keys: ClassVar[tuple[str, ...]] = ("tolerance",)

    type: Literal["text-regression"] = "text-regression"
    label: ColumnName | None = Field(description="the column that holds the number, or null where there are none")
    tolerance: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a number above 0, the largest error of a right prediction"
    )
    metric: MetricName = Field(default="pearson", description=f"one of {', '.join(get_args(MetricName))}")
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples in all, 1 or more")

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The column of numbers; empty for unlabelled data."""
        return () if self.label is None else (self.label,)

    @classmethod
    def head_settings(cls, labels: Sequence[str]) -> dict[str, Any]:
        """Describe a single output under the name that transformers gives it; see `Task.head_settings`."""
        return super().head_settings(("LABEL_0",))

    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Read the numbers; there are no labels; see `Task.read`."""
        import numpy as np

        splits = {}
        for split, table in tables.items():
            targets = np.array(self._numbers(table), dtype=np.float64)
            row_numbers = np.array(table.row_numbers, dtype=np.int64)
            splits[split] = Split(split, table.source, self.texts(table), targets, row_numbers)
        train = splits["train"]
        if self.label is not None and (train.targets == train.targets[0]).all():
            raise DataError(
                f"{train.source}: every row has the number {train.targets[0]:g} in column {self.label!r}; a task needs "
                "two numbers or more. Check that it is the column of numbers."
            )
        if self.label is not None:
            self._check_precision(train)
        if self.tolerance is None:
            suggestion = ""
            if self.label is not None:
                half = f"{train.targets.std() / 2:.2g}"
                suggestion = f", such as {float(half):g}, half the standard deviation of train"
            raise DataError(
                f"{train.source}: the key `tolerance` of the task is missing. Set it to the largest error of a right "
                f"prediction, in the unit of the numbers{suggestion}."
            )
        return (), splits

    def likelihood_for(self, targets: Targets) -> Likelihood:
        """Return a normal distribution with the targets' standard deviation; see `Task.likelihood_for`."""
        return Normal(self.target_scaling(targets)[1], self.tolerance or 0.0)

    def target_scaling(self, targets: Targets) -> tuple[float, float]:
        """Return the mean and the standard deviation of the targets, 1 if they are constant; see `Task`."""
        is_constant = bool((targets == targets[0]).all())  # their computed deviation may be slightly above 0
        return float(targets.mean()), 1.0 if is_constant else float(targets.std())

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Integers, list[str]]:
        """Divide examples into ranges between quantiles, at least two examples each; see `Task.strata`."""
        import numpy as np

        num_strata = max(1, min(MAX_STRATA, len(targets) // 2))
        edges = np.unique(np.quantile(targets, np.linspace(0, 1, num_strata + 1)))
        names = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)] or [f"{edges[0]:.4g}"]
        return np.searchsorted(edges[1:-1], targets, side="right").astype(np.int64), names

    def sample_counts(self, size: int, stratum_sizes: Sequence[int]) -> list[int]:
        """Divide a number of examples among the strata as evenly as they allow; see `Task.sample_counts`.

        Args:
            size: The number of examples in all.
            stratum_sizes: The number of available examples of each stratum.
        """
        return spread_evenly(size, stratum_sizes)

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> float:
        """Return the mean, with which every correlation is 0; see `Task.chance_prediction`."""
        return float(targets.mean())

    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Return the targets, which have no labels; see `Task.relabel`."""
        return targets

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the number with six significant digits; see `Task.describe`."""
        return f"{target:.6g}"

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return the predicted numbers; see `Task.as_targets`."""
        import numpy as np

        return np.array(predictions, dtype=np.float64)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Return which errors are within the tolerance; see `Task.right`."""
        within: list[bool] = (abs(self.as_targets(predictions) - targets) <= (self.tolerance or 0.0)).tolist()
        return within

    def linear_probe(self) -> Any:
        """Return a ridge regression; see `Task.linear_probe`."""
        return number_probe()

    def target_weakness(self, targets: Targets) -> str | None:
        """Report examples that all have the same number; see `Task.target_weakness`."""
        is_varied = (targets != targets[0]).any()
        return None if is_varied else "examples that all have the same number, with which no prediction correlates"

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return a chart of predicted by true numbers, with a table of the errors; see `Task.comparison_views`."""
        import numpy as np

        count = len(targets)
        shown = np.sort(np.random.default_rng(0).permutation(count)[:MAX_POINTS])
        columns = (
            Column("model", "text"),
            Column("mean error", "number"),
            Column("mean absolute error", "number"),
            Column("within the tolerance", "share"),
        )
        rows = []
        series = []
        for name, model in (("old", old), ("new", new)):
            predictions = self.as_targets(model.predictions)
            errors = predictions - targets
            rows.append((name, float(errors.mean()), float(abs(errors).mean()), sum(map(bool, model.right)) / count))
            x, y = (tuple(numbers[shown].tolist()) for numbers in (targets, predictions))
            series.append(Series(f"{name} model", x, y, (1,) * len(shown)))
        drawn = f" Drawn are {len(shown):,} of {count:,} examples, chosen at random." if len(shown) < count else ""
        before, after = (f"{row[2]:.3g}" for row in rows)
        chart = Scatter(
            name="predicted-by-true",
            title="Predicted by true number",
            lead=f"On the dotted line, the prediction is the true number.{drawn}",
            finding=f"Mean absolute error: old model {before}, new model {after}.",
            brief=("mean absolute error", f"{before} before, {after} after"),
            x="true number",
            y="predicted number",
            diagonal="exact prediction",
            joined=False,
            series=tuple(series),
            table=Table("Errors by model", columns, tuple(rows)),
        )
        return (chart,)

    def example_views(self, split: Split, labels: Sequence[str]) -> tuple[View, ...]:
        """Return quantiles, mean and standard deviation of the numbers; see `Task.example_views`."""
        import numpy as np

        rows = [(name, float(np.quantile(split.targets, share))) for name, share in QUANTILES.items()]
        rows += [("mean", float(split.targets.mean())), ("standard deviation", float(split.targets.std()))]
        return (
            Table(f"Numbers in {split.name}", (Column("statistic", "text"), Column("value", "number")), tuple(rows)),
        )

    def _check_precision(self, train: Split) -> None:
        """Refuse training targets that float32, in which models compute, cannot tell apart or hold."""
        import numpy as np

        least, greatest = train.targets.min(), train.targets.max()
        with np.errstate(over="ignore", invalid="ignore"):
            is_precise = OUTPUT_PRECISION * max(-least, greatest) < train.targets.std() < MAX_DEVIATION
        if not is_precise:
            raise DataError(
                f"{train.source}: models compute in float32, which cannot tell the numbers in column {self.label!r} "
                f"apart ({least:.9g} to {greatest:.9g}). Subtract their mean, or divide them by their largest."
            )

    def _numbers(self, table: SourceTable) -> list[float]:
        """Return the number of each row; for unlabelled data, 0 as a placeholder."""
        if self.label is None:
            return [0.0] * len(table.row_numbers)
        classes = table.classes.get(self.label)
        numbers = []
        for row, value in zip(table.row_numbers, table.columns[self.label], strict=True):
            number = _as_number(decode_label(value, classes) if classes else value)
            if number is None:
                raise DataError(
                    f"{table.source}, row {row}: expected a finite number in column {self.label!r}, found "
                    f"{value!r:.80}. Correct the row or remove it. If a test split hides its labels, use another split."
                )
            numbers.append(number)
        return numbers


def _as_number(value: object) -> float | None:
    """Return a finite number, also if it is text, as in CSV files; None for any other value."""
    is_numeric = isinstance(value, int | float | Decimal | str) and not isinstance(value, bool)
    if not is_numeric or "_" in str(value):  # Python reads 1_000 as a number
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


TASK = TextRegression
