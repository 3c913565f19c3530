"""Split labelled rows by group, reproducibly, and sample smaller splits with the same shares of each stratum."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.demo.texts import text_key
from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


DEV_DIVISOR = 10
"""By default, a tenth of the rows is held out as dev."""


class Row(NamedTuple):
    """An example of a task.

    Args:
        text: The text on one line.
        label: The label, of the form that the task's columns need.
        group: The name of the group that must stay in one split: an abstract, a licence or the text.
        stratum: The name of the stratum, whose share is the same in smaller splits: for classes, the class.
    """

    text: str
    label: Any
    group: str
    stratum: str


def split_rows(
    rows: Iterable[Row],
    name: str,
    test_seed: int,
    test_share: float,
    sizes: Mapping[str, int | None],
    seed: int,
    *,
    stop_early: bool,
    allow_fewer: bool = False,
) -> dict[str, list[Row]]:
    """Split rows into train, dev and test, with each text and each group in one split only.

    Args:
        rows: The rows. Only the first of several with the same text is used.
        name: The task's name.
        test_seed: The seed of the choice of test and dev groups, of which the name is a part too.
        test_share: The expected share of the groups that go to the test split.
        sizes: The number of rows by split; None for all (of dev: a tenth of the rows outside test).
        seed: The seed of the order and, with sizes, of the choice of rows.
        stop_early: Stop reading at twice the rows that the sizes ask for, plus a thousand, if all three sizes are set.
        allow_fewer: Return all rows of a split that has fewer than its size, instead of refusing it.

    Returns:
        The rows of `train`, `dev` and `test`.

    Raises:
        DataError: There are fewer rows for a split than its size.
    """
    train, dev, test = sizes["train"], sizes["dev"], sizes["test"]
    salt = f"{name}/{test_seed}"
    max_train_and_dev, max_test = math.inf, math.inf
    if stop_early and train and dev and test:
        max_train_and_dev, max_test = 1_000 + 2 * (train + dev), 1_000 + 2 * test
    keys: set[bytes] = set()
    pools: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    train_and_dev: list[Row] = []
    for row in rows:
        key = text_key(row.text)
        if key in keys:
            continue
        keys.add(key)
        (pools["test"] if _position(salt, row.group) < test_share else train_and_dev).append(row)
        if len(train_and_dev) >= max_train_and_dev and len(pools["test"]) >= max_test:
            break
    dev_groups = _dev_groups(salt, train_and_dev, max(dev or 0, len(train_and_dev) // DEV_DIVISOR))
    for row in train_and_dev:
        pools["dev" if row.group in dev_groups else "train"].append(row)
    for split, pool in pools.items():
        size = sizes[split]
        if size is not None and size > len(pool) and not allow_fewer:
            raise DataError(f"{name}: asked for {size:,} {split} rows, there are {len(pool):,}. Ask for fewer.")
    return {split: _sample(pool, sizes[split], random.Random(f"{seed}/{split}")) for split, pool in pools.items()}


def _position(salt: str, group: str) -> float:
    """Return a random number in [0, 1) that depends on nothing but the salt and the group."""
    return int.from_bytes(hashlib.blake2b(f"{salt}/{group}".encode(), digest_size=8).digest()) / 2**64


def _dev_groups(salt: str, rows: list[Row], count: int) -> set[str]:
    """Choose groups of `count` rows or more in all; those above a fifth of `count` come last, so that dev is varied."""
    sizes = Counter(row.group for row in rows)
    dev_groups: set[str] = set()
    num_rows = 0
    for group in sorted(sizes, key=lambda group: (sizes[group] > count // 5, _position(salt, group), group)):
        if num_rows >= count:
            break
        dev_groups.add(group)
        num_rows += sizes[group]
    return dev_groups


def _sample(rows: list[Row], size: int | None, rng: random.Random) -> list[Row]:
    """Shuffle rows and sample `size` of them, or all, with the same shares of each stratum.

    The largest remainders are rounded up.
    """
    rows = rows.copy()
    rng.shuffle(rows)
    if size is None or size >= len(rows):
        return rows
    counts = Counter(row.stratum for row in rows)
    shares = {stratum: size * count / len(rows) for stratum, count in sorted(counts.items())}
    quota = {stratum: int(share) for stratum, share in shares.items()}
    for stratum in sorted(shares, key=lambda stratum: quota[stratum] - shares[stratum])[: size - sum(quota.values())]:
        quota[stratum] += 1
    sample: list[Row] = []
    for row in rows:
        if quota[row.stratum] > 0:
            quota[row.stratum] -= 1
            sample.append(row)
    return sample
