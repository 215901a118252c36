"""Turns that two processes take one after the other, so that they share the machine's moods, and what comes of them."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from benchmarks.rivals.protocol import Turn

Key = TypeVar("Key")


class Player(Protocol):
    def turn(self) -> Turn: ...


class Pair(NamedTuple):
    """Two turns that followed each other."""

    ours: Turn
    rival: Turn


def alternate(ours: Player, rival: Player, repeats: int, after: Callable[[], object] = lambda: None) -> list[Pair]:
    """`repeats` pairs of turns, of which every other one the rival begins. A turn of each goes before, to warm up.

    Args:
        after: called after each pair.
    """
    ours.turn(), rival.turn()
    pairs = []
    for number in range(repeats):
        if number % 2 == 0:
            own = ours.turn()
            pairs.append(Pair(own, rival.turn()))
        else:
            other = rival.turn()
            pairs.append(Pair(ours.turn(), other))
        after()
    return pairs


def ratios(pairs: Sequence[Pair], part: str) -> list[float]:
    """How many times as fast as the rival we were in each pair."""
    return [pair.rival.seconds[part] / pair.ours.seconds[part] for pair in pairs]


def best(entrants: Iterable[tuple[Key, Sequence[Pair]]], part: str) -> Key:
    """The rival that came closest to us, or was the farthest ahead: of the least median ratio."""
    return min(entrants, key=lambda entrant: statistics.median(ratios(entrant[1], part)))[0]


def finalists(heats: dict[Key, dict[str, float]], group: Callable[[Key], object]) -> list[Key]:
    """Of each group those that were the fastest in a part, in the order of `heats`.

    Args:
        heats: seconds by part.
    """
    fastest = set()
    for name in {group(key) for key in heats}:
        members = [key for key in heats if group(key) == name]
        for part in heats[members[0]]:
            fastest.add(min(members, key=lambda key: heats[key][part]))
    return [key for key in heats if key in fastest]
