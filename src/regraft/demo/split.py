"""Splits labelled rows by group, the same way every time, and draws smaller splits that keep the classes' shares."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from regraft.demo.texts import same
from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Row(NamedTuple):
    """An example: its text, its label, and the group that is not to be split (an abstract, a licence; or itself)."""

    text: str
    label: str
    group: str


def split_rows(
    rows: Iterable[Row],
    name: str,
    draw: int,
    test_share: float,
    sizes: Mapping[str, int | None],
    seed: int,
    *,
    stop_early: bool,
) -> dict[str, list[Row]]:
    """Split rows into train, dev and test, each text and each group in one of them only.

    Args:
        rows: All rows; of those with the same text the first one counts.
        name: The task's name.
        draw: Decides, with the name, which groups are for testing.
        test_share: The share of the groups that are for testing.
        sizes: How many rows of each split to give; None: all (of dev: a tenth of what is not for testing).
        seed: Decides the order, and with sizes which rows.
        stop_early: Whether to read no more than twice the rows that the sizes ask for, and a thousand.

    Returns:
        The rows of `train`, `dev` and `test`.

    Raises:
        DataError: There are fewer rows than asked for.
    """
    train, dev, test = sizes["train"], sizes["dev"], sizes["test"]
    lot = f"{name}/{draw}"
    enough: tuple[float, float] = (math.inf, math.inf)
    if stop_early and train and dev and test:
        enough = (1_000 + 2 * (train + dev), 1_000 + 2 * test)
    seen: set[bytes] = set()
    pools: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    rest: list[Row] = []
    for row in rows:
        key = same(row.text)
        if key in seen:
            continue
        seen.add(key)
        (pools["test"] if _draw(lot, row.group) < test_share else rest).append(row)
        if len(rest) >= enough[0] and len(pools["test"]) >= enough[1]:
            break
    for_dev = _dev_groups(lot, rest, max(dev or 0, len(rest) // 10))
    for row in rest:
        pools["dev" if row.group in for_dev else "train"].append(row)
    for split, pool in pools.items():
        size = sizes[split]
        if size is not None and size > len(pool):
            raise DataError(f"{name}: asked for {size:,} {split} rows, there are {len(pool):,}. Ask for fewer.")
    return {split: _sample(pool, sizes[split], random.Random(f"{seed}/{split}")) for split, pool in pools.items()}


def _draw(lot: str, group: str) -> float:
    """Return a number in [0, 1) that a group always gets, however many others are read."""
    return int.from_bytes(hashlib.blake2b(f"{lot}/{group}".encode(), digest_size=8).digest()) / 2**64


def _dev_groups(lot: str, rows: list[Row], wanted: int) -> set[str]:
    """Choose groups that have `wanted` rows together; those with over a fifth of them come last, so that dev varies."""
    sizes = Counter(row.group for row in rows)
    chosen: set[str] = set()
    rows_chosen = 0
    for group in sorted(sizes, key=lambda group: (sizes[group] > wanted // 5, _draw(lot, group), group)):
        if rows_chosen >= wanted:
            break
        chosen.add(group)
        rows_chosen += sizes[group]
    return chosen


def _sample(rows: list[Row], size: int | None, rng: random.Random) -> list[Row]:
    """Shuffle rows and keep `size` of them with the classes' shares (those with the largest remainders round up)."""
    rows = rows.copy()
    rng.shuffle(rows)
    if size is None:
        return rows
    shares = {label: size * count / len(rows) for label, count in sorted(Counter(row.label for row in rows).items())}
    quota = {label: int(share) for label, share in shares.items()}
    for label in sorted(shares, key=lambda label: quota[label] - shares[label])[: size - sum(quota.values())]:
        quota[label] += 1
    kept: list[Row] = []
    for row in rows:
        if quota[row.label] > 0:
            quota[row.label] -= 1
            kept.append(row)
    return kept
