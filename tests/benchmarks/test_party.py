"""Processes that a benchmark starts of itself."""

import sys

import pytest

from benchmarks.rivals.party import joins, party
from benchmarks.rivals.protocol import WorkerError


def test_a_party_is_told_what_it_is():
    with party("tests.benchmarks.fake_party", "8 experts, top-1", tokens=512) as fake:
        assert fake.about == {"name": "8 experts, top-1", "tokens": 512}
        assert fake.turn().seconds == {"step": 1.0}


def test_the_driver_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--repeats", "3"])
    assert joins() is None


def test_a_party_that_cannot_start_is_named():
    with pytest.raises(WorkerError, match="the absent: ended with status 1; .*no_such_benchmark"):
        party("benchmarks.no_such_benchmark", "the absent")
