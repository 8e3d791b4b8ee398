"""Ways to damage bytes, and values as JSON and YAML have them; a seeded generator decides which."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

_NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-30, 1e308, float("inf"), float("nan")),
]
_OTHERS = [None, True, False, "", "x", "\0", "..", "/", "ä" * 300, "1", "-1", [], [[]], {}, {"a": 1}, [None], [1, "a"]]


def damaged_bytes(random: Random, content: bytes) -> bytes:
    """Return ``content`` with one piece of damage, as disks, networks and editors do it."""
    damaged = bytearray(content)
    start = random.randrange(len(damaged) + 1)
    length = min(int(random.expovariate(1 / 16)) + 1, len(damaged) - start)
    piece = damaged[start : start + length]
    how = random.randrange(8)
    if how == 0:
        del damaged[start:]
    elif how == 1:
        del damaged[start : start + length]
    elif how == 2:
        damaged[start : start + length] = bytes(length)
    elif how == 3:
        damaged[start : start + length] = random.randbytes(length)
    elif how == 4:
        damaged[start:start] = random.randbytes(length + 1)
    elif how == 5:
        damaged[start:start] = piece
    elif damaged:
        for _ in range(random.choice((1, 1, 2, 8))):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def damaged_value(random: Random, value: Any) -> Any:
    """Return a copy of a nested value in which one or two entries are missing, doubled or something else."""
    damaged = [copy.deepcopy(value)]  # so that the value as a whole is an entry, too
    for _ in range(random.choice((1, 1, 2))):
        if entries := [*_entries(damaged)]:
            _damage_entry(random, *random.choice(entries))
    return damaged[0] if damaged else None


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with every key or index in it, at any depth."""
    keys = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _entries(container[key])


def _damage_entry(random: Random, container: Any, key: Any) -> None:
    how = random.randrange(9)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[random.choice([f"{key}x", "", "x", str(key).upper()])] = container.pop(key)
    elif how == 1:
        container.insert(key, copy.deepcopy(container[key]))
    elif how == 2:
        other, place = random.choice([*_entries(container)])
        container[key] = copy.deepcopy(other[place])
    elif how in (3, 4):
        container[key] = _changed(random, container[key])
    elif how in (5, 6):
        container[key] = random.choice(_NUMBERS)
    elif how == 7:
        container[key] = copy.deepcopy(random.choice(_OTHERS))
    else:
        for _ in range(random.choice((1, 1, 50))):
            container[key] = [container[key]] if random.random() < 0.5 else {"a": container[key]}


def _changed(random: Random, value: Any) -> Any:
    """Return a value near another one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return random.choice([value + 1, value - 1, 2 * value, -value, value / 3, str(value), float(value)])
    if isinstance(value, str):
        return damaged_bytes(random, value.encode()).decode(errors="replace")
    if isinstance(value, list):
        return random.sample(value, len(value))
    return dict(random.sample([*value.items()], random.randint(0, len(value))))


def damage_file(random: Random, path: Path) -> None:
    """Damage a file's bytes."""
    path.write_bytes(damaged_bytes(random, path.read_bytes()))


def damage_json(random: Random, path: Path) -> None:
    """Damage a JSON file's values, at times its bytes; now and then it is nested deeper than anybody can read."""
    how = random.random()
    if how < 0.2:
        damage_file(random, path)
    elif how < 0.21:
        path.write_text('{"a": ' * 100_000)
    else:
        path.write_text(json.dumps(damaged_value(random, json.loads(path.read_text()))))
