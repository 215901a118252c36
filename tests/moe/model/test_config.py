import pytest

from moe.model.config import ConfigError, ModelConfig, RopeConfig, RouterConfig
from moe.model.precision import Precision
from moe.model.presets import TINY

SIZES = {
    "vocab_size": 64,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "d_expert": 8,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"d_model": 0}, "d_model=0"),
        ({"num_layers": 2.0}, "num_layers=2.0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3: use 1, 2 or 4"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"d_expert": 0}, "d_expert=0"),
        ({"num_experts": 0}, "d_dense=0"),
        ({"num_dense_layers": 3}, "num_dense_layers=3 of num_layers=2"),
        ({"router": RouterConfig(top_k=5)}, r"router.top_k=5 of num_experts=4"),
    ],
)
def test_sizes_that_cannot_work(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(**(SIZES | change))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RouterConfig(top_k=0), "top_k=0"),
        (lambda: RouterConfig(capacity_factor=0.0), r"capacity_factor=0.0"),
        (lambda: RouterConfig(overflow="recycle"), "dropless routing never overflows"),
        (lambda: RouterConfig(overflow="recycle", capacity_factor=0.5), "fewer slots"),
        (lambda: RouterConfig(overflow="recycle", capacity_factor=1.0, top_k=2), "top-1"),
        (lambda: RouterConfig(balance="luck"), "balance='luck'"),
        (lambda: RouterConfig(aux_loss_weight=-1.0), "aux_loss_weight=-1.0"),
        (lambda: RopeConfig(theta=0), "theta=0"),
        (lambda: RopeConfig(ntk_alpha=-1), "ntk_alpha=-1"),
        (lambda: Precision(compute="float16"), "precision.compute='float16'"),
        (lambda: Precision(exchange="int4"), "precision.exchange='int4'.*float32, bfloat16, fp8, int8"),
        (lambda: Precision(gathered="bfloat16"), "precision.gathered='bfloat16'.*fp8, int8"),
        (lambda: Precision(gathered="fp8", frozen="nf4"), "precision.frozen='nf4'.*as they are stored"),
    ],
)
def test_choices_that_cannot_work(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_kinds_of_layers():
    config = ModelConfig(**(SIZES | {"num_dense_layers": 1, "d_dense": 8}))
    assert [config.is_dense(layer) for layer in range(2)] == [True, False]
    assert config.has_moe
    assert config.has_dense
    assert TINY.has_moe
    assert not TINY.has_dense
