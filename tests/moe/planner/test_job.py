import json
from dataclasses import replace

import pytest

from moe.model.config import ConfigError, RopeConfig, RouterConfig
from moe.model.presets import HUNYUAN_LARGE, TINY
from moe.planner.chips import H20, Chip, ChipError, chip_named
from moe.planner.job import Job, job_from_json, rebuilt
from moe.train.optimizer import OptimizerConfig
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig

JOB = Job(
    kind="train",
    model=replace(HUNYUAN_LARGE, rope=RopeConfig(), router=RouterConfig(capacity_factor=1.25)),
    batch_size=8,
    sequence_length=4096,
    optimizer=OptimizerConfig(clip_norm=None, undecayed=("norm", "embedding")),
    mesh=MeshConfig(data=2, expert=4),
    layout=LayoutConfig(experts=("data", "expert"), zero=2),
)


def test_json_gives_the_same_job_back():
    assert job_from_json(JOB.to_json()) == JOB
    assert job_from_json(JOB.to_json()).fingerprint() == JOB.fingerprint()


def test_any_change_gives_another_fingerprint():
    variants = [
        replace(JOB, kind="decode"),
        replace(JOB, batch_size=16),
        replace(JOB, layout=LayoutConfig(experts=("data", "expert"), zero=3)),
        replace(JOB, model=replace(JOB.model, cla_factor=1)),
    ]
    assert len({job.fingerprint() for job in [JOB, *variants]}) == 5


def test_tokens_of_a_step():
    assert JOB.tokens == replace(JOB, kind="prefill").tokens == 8 * 4096
    assert replace(JOB, kind="decode").tokens == 8


def test_a_chip_survives_json():
    assert rebuilt(Chip, json.loads(json.dumps(H20.__dict__))) == H20


def test_mistakes():
    with pytest.raises(ConfigError, match=r"job.kind='serve': give one of train, prefill, decode"):
        Job(kind="serve", model=TINY, batch_size=1, sequence_length=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"job.batch_size=0"):
        Job(kind="train", model=TINY, batch_size=0, sequence_length=1)
    with pytest.raises(ConfigError, match="cannot be read"):
        job_from_json('{"kind": "train", "models": 3}')
    with pytest.raises(ChipError, match=r"chip 'h21': give one of .*h20"):
        chip_named("h21")
