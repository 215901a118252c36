from types import SimpleNamespace
from typing import Any

from moe.planner.predict import TERMS
from moe.planner.rank import Option, ranked, why_lost


def option(seconds: float, spare: int = 1, changes: dict | None = None, **terms: float) -> Option:
    spent = dict.fromkeys(TERMS, 0.0) | terms
    plan: Any = SimpleNamespace(prediction=SimpleNamespace(seconds=seconds, terms=spent), spare=spare, fits=spare >= 0)
    return Option(changes or {}, "", plan)


def test_what_fits_goes_first_and_then_time_and_then_what_lacks_least():
    fast, slow = option(1.0), option(2.0)
    near, far = option(0.1, spare=-5), option(0.1, spare=-50)
    assert ranked([far, slow, near, fast]) == [fast, slow, near, far]


def test_equals_come_in_the_order_of_their_settings():
    first, second = option(1.0, changes={"mesh.data": 2}), option(1.0, changes={"mesh.data": 4})
    assert ranked([second, first]) == ranked([first, second]) == [first, second]


def test_the_term_that_grew_most_is_blamed():
    best = option(1.0, matmul=0.9, exposed_across=0.1)
    lost = option(1.5, matmul=0.8, exposed_across=0.6, launches=0.1)
    assert why_lost(lost, best) == "50.0% slower: waiting for other nodes takes 500 ms more"
    assert why_lost(option(1.0), best) == "as fast"
    assert why_lost(option(0.1, spare=-(3 << 30)), best) == "lacks 3.00 GiB on each GPU"
