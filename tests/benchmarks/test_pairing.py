from benchmarks.rivals.pairing import Pair, alternate, best, finalists, ratios
from benchmarks.rivals.protocol import Turn


def turn(**seconds: float) -> Turn:
    return Turn(seconds, None, peak=0, waited=1.0, idle=0.0)


class Player:
    """Takes 1, 2, 3 … seconds, times a pace, and writes down that it did."""

    def __init__(self, name: str, pace: float, diary: list[str]) -> None:
        self.name, self.pace, self.diary, self.count = name, pace, diary, 0

    def turn(self) -> Turn:
        self.diary.append(self.name)
        self.count += 1
        return turn(step=self.count * self.pace)


def test_who_begins_changes_and_the_warm_up_is_left_out():
    diary: list[str] = []
    pairs = alternate(Player("we", 1.0, diary), Player("they", 3.0, diary), 3, lambda: diary.append("."))
    assert diary == ["we", "they", "we", "they", ".", "they", "we", ".", "we", "they", "."]
    assert [(pair.ours.seconds, pair.rival.seconds) for pair in pairs] == [
        ({"step": 2.0}, {"step": 6.0}),
        ({"step": 3.0}, {"step": 9.0}),
        ({"step": 4.0}, {"step": 12.0}),
    ]


def test_ratios_compare_a_turn_with_the_one_beside_it():
    pairs = [Pair(turn(step=1.0), turn(step=2.0)), Pair(turn(step=10.0), turn(step=5.0))]
    assert ratios(pairs, "step") == [2.0, 0.5]


def test_the_best_rival_is_the_one_that_came_closest_and_not_the_one_met_in_a_fast_hour():
    met_in_a_fast_hour = [Pair(turn(step=0.1), turn(step=0.3))]
    met_in_a_slow_hour = [Pair(turn(step=1.0), turn(step=2.0)), Pair(turn(step=1.0), turn(step=2.1))]
    assert best([("a", met_in_a_fast_hour), ("b", met_in_a_slow_hour)], "step") == "b"


def test_finalists_are_the_fastest_of_their_group_in_any_part():
    heats = {
        "ant plain": {"prefill": 1.0, "decode": 5.0},
        "ant grouped": {"prefill": 2.0, "decode": 3.0},
        "ant batched": {"prefill": 2.5, "decode": 3.5},
        "bee plain": {"prefill": 9.0, "decode": 9.0},
        "bee grouped": {"prefill": 8.0, "decode": 8.0},
    }
    assert finalists(heats, lambda name: name.split()[0]) == ["ant plain", "ant grouped", "bee grouped"]
    assert finalists({}, len) == []
