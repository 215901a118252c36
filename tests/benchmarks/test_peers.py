"""The driver, with processes that have no model."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.peers import TINY_SIZES, Run, jobs
from benchmarks.rivals.comparison import OURS
from benchmarks.rivals.job import Job, Setting
from benchmarks.rivals.protocol import Worker, WorkerError

ROOT = Path(__file__).parents[2]
JOB = Job("train", "float32", 4, 25, 0, TINY_SIZES)


class FakeRun(Run):
    """way: of `fake_worker`, by setting."""

    def __init__(self, way: Callable[[Setting | None], str]) -> None:
        super().__init__(repeats=2, limit=30, compiled=False)
        self.way = way
        self.progress.quiet = True

    def worker(self, job: Job, setting: Setting | None) -> Worker:
        name = setting.name(job.task) if setting else OURS
        command = [sys.executable, "-m", "tests.benchmarks.fake_worker", self.way(setting)]
        return Worker(name, command, folder=ROOT, limit=self.limit)


def test_what_fails_is_told_and_the_rest_is_measured():
    def way(setting: Setting | None) -> str:
        return "fails" if setting and (setting.family == "Qwen2Moe" or setting.experts == "eager") else "works"

    found = FakeRun(way).compare(JOB)
    assert [each.setting.name("train") for each in found.entrants] == [
        "HunYuanMoEV1, grouped_mm",
        "Qwen3Moe, grouped_mm",
    ]
    assert [failure.split(":")[0] for failure in found.failures] == [
        "HunYuanMoEV1, eager", "Qwen2Moe, eager", "Qwen2Moe, grouped_mm", "Qwen3Moe, eager",
    ]  # fmt: skip
    # A fake takes as many seconds as it has taken turns: of the two after the warm-up the first is the faster.
    assert set(map(str, found.heats.values())) == {"{'step': 2.0}"}
    assert [[pair.ours.seconds["step"] for pair in each.pairs] for each in found.entrants] == [[2.0, 3.0], [5.0, 6.0]]
    assert [[pair.rival.seconds["step"] for pair in each.pairs] for each in found.entrants] == [[2.0, 3.0]] * 2


def test_our_own_failure_ends_the_run():
    with pytest.raises(WorkerError, match=f"{OURS}: ValueError: out of paper"):
        FakeRun(lambda setting: "works" if setting else "fails").compare(JOB)


def test_jobs_are_those_asked_for():
    def names(only: str | None, format: str | None, device: str = "cpu") -> list[str]:
        return [job.name for job in jobs(Namespace(only=only, format=format, device=device, tiny=False))]

    assert names("train", None) == [f"train step, 158M, 4 x 512 tokens, {format}" for format in ("float32", "bfloat16")]
    assert names("decode", "bfloat16") == [
        f"decoding, 158M, batch {texts}, context 1024, bfloat16" for texts in (1, 8)
    ]  # fmt: skip
    assert len(names(None, None)) == 6
    assert names("train", "bfloat16", "gpu") == [
        "train step, 1,926M, 8 x 2048 tokens, bfloat16", "train step, 158M, 32 x 2048 tokens, bfloat16",
        "train step, 158M, 4 x 512 tokens, bfloat16",
    ]  # fmt: skip


def test_only_the_rivals_asked_for_are_tried():
    run = FakeRun(lambda setting: "works")
    run.rival = "Qwen2Moe, grouped"
    assert [each.name("train") for each in run.compare(JOB).heats] == ["Qwen2Moe, grouped_mm"]
