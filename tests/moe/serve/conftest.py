import pytest

from moe import HunyuanMoE
from tests.moe.serve.serving import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("serving") / "small")


@pytest.fixture(scope="session")
def model(checkpoint):
    return HunyuanMoE.from_hf(checkpoint)
