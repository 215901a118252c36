from dataclasses import replace

import pytest

from moe.model.precision import Precision
from moe.model.presets import TINY
from moe.planner.chips import A100
from moe.planner.compile import CompileError, compile_job
from moe.planner.job import Job
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster


def test_fp8_is_refused_on_a_chip_without_it(tmp_path):
    job = Job("train", TINY, batch_size=16, sequence_length=256, mesh=MeshConfig(data=8))
    job = replace(job, precision=Precision(matmuls="fp8"))
    with pytest.raises(CompileError, match="'fp8' on .*A100.*: take 'int8'"):
        compile_job(job, A100, Cluster(), cache=tmp_path)
