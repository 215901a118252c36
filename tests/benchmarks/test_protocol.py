"""Driver and process, with processes that have no model."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.rivals.protocol import Worker, WorkerError

ROOT = Path(__file__).parents[2]


def worker(way: str, limit: float = 30) -> Worker:
    command = [sys.executable, "-m", "tests.benchmarks.fake_worker", way]
    return Worker("the fake", command, folder=ROOT, limit=limit)


def test_turns_are_taken_when_asked():
    with worker("works") as fake:
        assert fake.about == {"software": "fake 1.0", "parameters": 7}
        first = fake.turn()
        time.sleep(0.2)
        second = fake.turn()
    assert [first.seconds, second.seconds] == [{"step": 1.0}, {"step": 2.0}]
    assert [first.loss, second.loss] == [9.0, 8.0]
    assert second.peak >= first.peak > 2**20
    assert second.waited >= 0.2
    assert second.idle < 0.1
    assert fake._process.poll() is not None


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("fails", "the fake: ValueError: out of paper$"),
        ("dies", "the fake: ended with status 3; Killed by the weather$"),
    ],
)
def test_a_turn_that_fails_is_told(way, words):
    with worker(way) as fake, pytest.raises(WorkerError, match=words):
        fake.turn()


def test_a_process_that_is_not_ready_is_told():
    with pytest.raises(WorkerError, match="the fake: RuntimeError: no such kernel$"):
        worker("unready")


def test_a_process_that_takes_too_long_is_ended():
    with worker("hangs", limit=30) as fake:
        fake._limit = 0.2
        with pytest.raises(WorkerError, match="the fake: took longer than 0 s"):
            fake.turn()
        assert fake._process.wait(timeout=10) < 0
