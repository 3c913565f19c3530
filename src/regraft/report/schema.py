"""What files must hold to be shown: each field's type and shape, with an error that names the one that is wrong."""

from __future__ import annotations

from typing import Any

from regraft.errors import OutcomeError

SCHEMA = 1
TEXT, NUMBER, WHOLE, YES_NO, NUMBER_OR_NONE = (
    "a text",
    "a number",
    "a whole number",
    "true or false",
    "a number or null",
)
NUMBERS, MATRIX = [NUMBER], [[NUMBER]]
BY_NAME = "*"
"""The key of an object whose keys are names, not fields."""

_MOVED = {
    "name": TEXT, "base": NUMBER, "shift": NUMBER, "delta": NUMBER, "cosine": NUMBER_OR_NONE, "signs": NUMBER_OR_NONE,
    "overlap": NUMBER_OR_NONE,
}  # fmt: skip
_BIN = {"low": NUMBER, "high": NUMBER, "count": WHOLE, "confidence": NUMBER_OR_NONE, "accuracy": NUMBER_OR_NONE}
_CHECK = {
    "task": TEXT, "metric": TEXT, "split": TEXT, "examples": WHOLE, "old": NUMBER, "new": NUMBER, "floor": NUMBER,
    "retained": NUMBER_OR_NONE, "agreement": NUMBER, "negative_flips": NUMBER, "positive_flips": NUMBER, "l2": NUMBER,
    "relative": NUMBER, "cosine": NUMBER, "effect": NUMBER, "lineage": TEXT, "verdict": TEXT,
}  # fmt: skip
_FLIP = {
    "row": WHOLE, "text": TEXT, "label": TEXT, "before": TEXT, "after": TEXT, "kind": ("negative", "positive"),
    "confidence": NUMBER_OR_NONE,
}  # fmt: skip
_CLASS = {"label": TEXT, "examples": WHOLE, "before": NUMBER, "after": NUMBER, "negative": WHOLE, "positive": WHOLE}
_QUESTIONS: dict[str, Any] = {
    "connectivity": {
        "ends": [TEXT], "mu": NUMBERS, "loss": {BY_NAME: NUMBERS}, "score": {BY_NAME: NUMBERS},
        "barrier": {BY_NAME: NUMBER}, "connected": YES_NO,
    },
    "plane": {
        "names": [TEXT], "places": MATRIX, "x": NUMBERS, "y": NUMBERS, "loss": MATRIX, "score": MATRIX, "split": TEXT,
    },
    "similarity": {
        "divergence": MATRIX, "cosine": MATRIX, "best": [[WHOLE]], "others": MATRIX, "cka": NUMBERS, "kl": NUMBER,
        "agreement": NUMBER, "texts": WHOLE,
        "maps": [{
            "layer": WHOLE, "head": WHOLE, "divergence": NUMBER, "tokens": [TEXT], "old": MATRIX, "new": MATRIX,
        }],
    },
    "shift": {"whole": _MOVED, "layers": [_MOVED], "kinds": [_MOVED]},
    "regressions": {
        "split": TEXT, "examples": WHOLE, "negative": WHOLE, "positive": WHOLE, "flips": [_FLIP], "classes": [_CLASS],
        "mcnemar": NUMBER, "noise": NUMBER_OR_NONE, "calibration": {BY_NAME: {"ece": NUMBER, "bins": [_BIN]}},
    },
    "kept": {"text": TEXT, "loss": {BY_NAME: NUMBER}, "share": NUMBER_OR_NONE},
}  # fmt: skip
_CONTROL = {"name": TEXT, "divergence": MATRIX, "cosine": MATRIX, "cka": NUMBERS}
_DIAGNOSIS = {
    "task": TEXT, "metric": TEXT, "labels": [TEXT], "old_base": TEXT, "new_base": TEXT, "adaptation": TEXT,
    "kind": TEXT, "compared": TEXT, "check": _CHECK,
    "compatibility": [{
        "name": TEXT, "distance": NUMBER, "score": NUMBER, "loss": NUMBER, "agreement": NUMBER,
        "steps": NUMBER_OR_NONE,
    }],
    "verdict": {
        "choice": TEXT, "sure": NUMBER, "predicted": NUMBER, "reasons": [{"name": TEXT, "value": TEXT, "says": TEXT}],
        "advice": TEXT,
    },
    "left_out": {BY_NAME: TEXT}, "seconds": {BY_NAME: NUMBER}, "versions": {BY_NAME: TEXT},
    "fingerprints": {BY_NAME: TEXT},
}  # fmt: skip
_FIGURES = ("start", "dev", "test", "negative_flips", "labels", "steps", "seconds")
_LACKING = ("test_deviation", "recovery", "steps_to_scratch", "seconds_to_scratch")
COMPARISON = {
    "task": TEXT, "metric": TEXT, "split": TEXT, "old": NUMBER, "majority": NUMBER, "outcomes": [TEXT],
    "rows": [{
        "method": TEXT, "seeds": [WHOLE], **dict.fromkeys(_FIGURES, NUMBER), **dict.fromkeys(_LACKING, NUMBER_OR_NONE),
    }],
}  # fmt: skip
_OUTCOME = {
    "method": TEXT, "kind": TEXT, "task": {"name": TEXT, "metric": TEXT, "train": WHOLE}, "labels": [TEXT],
    "seed": WHOLE, "recipe": {}, "scores": {BY_NAME: NUMBER_OR_NONE}, "notes": {}, "versions": {BY_NAME: TEXT},
    "cost": {"steps": NUMBER, "seconds": NUMBER, "labels": NUMBER}, "base": {"name": TEXT, "fingerprint": TEXT},
}  # fmt: skip


def check_outcome(record: Any, file: str) -> None:
    """Hold the record of an outcome against what the report reads of it.

    Args:
        record: The content of `outcome.json`.
        file: Its name, for the error.

    Raises:
        OutcomeError: A field is missing or of another type.
    """
    remedy = "the method that made it"
    hold(record, _OUTCOME, file, remedy)
    if record.get("recycled_from") is not None:
        fields = dict.fromkeys(("adaptation", "fingerprint", "old_base", "old_base_fingerprint"), TEXT)
        hold(record["recycled_from"], fields, f"{file}: recycled_from", remedy)


def check_diagnosis(content: dict[str, Any], file: str) -> None:
    """Hold a diagnosis against its schema.

    Args:
        content: The content of `diagnosis.json`.
        file: Its name, for the error.

    Raises:
        OutcomeError: It has another schema, or a field is missing, of another type or of another shape.
    """
    if content.get("schema") != SCHEMA:
        raise OutcomeError(
            f"{file}: has schema {content.get('schema')!r:.40}, this regraft reads {SCHEMA}. "
            "Make it again with this regraft's `regraft check --deep`."
        )
    remedy = "regraft check --deep"
    hold(content, _DIAGNOSIS, file, remedy)
    for question, fields in _QUESTIONS.items():
        if content.get(question) is not None:
            hold(content[question], fields, f"{file}: {question}", remedy)
            _check_shape(question, content[question], f"{file}: {question}")
    control = (content.get("similarity") or {}).get("control")
    if control is not None:
        hold(control, _CONTROL, f"{file}: similarity.control", remedy)
        _rectangle(control, ("divergence", "cosine"), f"{file}: similarity.control")


def hold(value: Any, wanted: Any, where: str, remedy: str) -> None:
    """Hold a value against the types it must have.

    Args:
        value: Any JSON.
        wanted: A type's name, a tuple of allowed texts, a list with the type of its entries, or a dict of fields;
            fields that it does not name are allowed.
        where: The file and the field, for the error.
        remedy: The command that writes the file.

    Raises:
        OutcomeError: It is of another type.
    """
    if isinstance(wanted, dict):
        _require(isinstance(value, dict), where, "an object", value, remedy)
        if BY_NAME in wanted:
            wanted = dict.fromkeys(value, wanted[BY_NAME])
        for name, entry in wanted.items():
            _require(name in value, f"{where}: {name}", "it", None, remedy)
            hold(value[name], entry, f"{where}: {name}", remedy)
    elif isinstance(wanted, list):
        _require(isinstance(value, list), where, "a list", value, remedy)
        for place, entry in enumerate(value):
            hold(entry, wanted[0], f"{where}[{place}]", remedy)
    elif isinstance(wanted, tuple):
        _require(value in wanted, where, f"one of {', '.join(wanted)}", value, remedy)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right = {
            TEXT: isinstance(value, str),
            NUMBER: number,
            NUMBER_OR_NONE: number or value is None,
            WHOLE: number and isinstance(value, int),
            YES_NO: isinstance(value, bool),
        }
        _require(right[wanted], where, wanted, value, remedy)


def _require(holds: bool, where: str, wanted: str, value: Any, remedy: str = "regraft check --deep") -> None:
    if not holds:
        raise OutcomeError(f"{where}: expected {wanted}, found {value!r:.80}. Make it again with `{remedy}`.")


def _check_shape(question: str, found: dict[str, Any], where: str) -> None:
    if question == "connectivity":
        _require(len(found["ends"]) == 2, f"{where}: ends", "two names", found["ends"])
        for name in ("loss", "score"):
            for split, values in found[name].items():
                _long(values, len(found["mu"]), f"{where}: {name}: {split}")
    elif question == "plane":
        _require(
            len(found["names"]) == len(found["places"]) == 3 and all(len(place) == 2 for place in found["places"]),
            where, "three names and three places", found["names"],
        )  # fmt: skip
        for name in ("loss", "score"):
            _long(found[name], len(found["y"]), f"{where}: {name}")
            for row in found[name]:
                _long(row, len(found["x"]), f"{where}: {name}")
    elif question == "similarity":
        _rectangle(found, ("divergence", "cosine", "best", "others"), where)
        for one in found["maps"]:
            for rows in (one["old"], one["new"]):
                for row in (rows, *rows):
                    _long(row, len(one["tokens"]), f"{where}: maps")


def _rectangle(found: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    first = found[names[0]]
    for name in names:
        _long(found[name], len(first), f"{where}: {name}")
        for row in found[name]:
            _long(row, len(first[0]), f"{where}: {name}")


def _long(values: list[Any], length: int, where: str) -> None:
    _require(len(values) == length, where, f"{length} values", f"{len(values)} values")
