import pytest

from moe.model.count import count_parameters, train_flops_per_token
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE, SPEED_158M, TINY
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from parallel.layout import SINGLE_DEVICE


def specs_of(config):
    return make_blueprint(config, Precision(), Execution(), OptimizerConfig(), SINGLE_DEVICE, steps=1000).specs


def test_hunyuan_large_has_the_published_size():
    count = count_parameters(HUNYUAN_LARGE, specs_of(HUNYUAN_LARGE))
    assert round(count.total / 1e9, 1) == 388.7
    assert round(count.active / 1e9, 1) == 51.3


def test_the_speed_preset_has_158m():
    count = count_parameters(SPEED_158M, specs_of(SPEED_158M))
    assert round(count.total / 1e6) == 158


@pytest.mark.parametrize("config", [HUNYUAN_LARGE, SPEED_158M, TINY])
def test_count_is_the_sum_by_hand(config):
    D, H, F, V = config.d_model, config.head_dim, config.d_expert, config.vocab_size
    projecting = -(-config.num_layers // config.cla_factor)
    attention = config.num_layers * 2 * D * config.num_heads * H + projecting * 2 * D * config.num_kv_heads * H
    expert = 3 * D * F
    rest = config.num_layers * (config.num_shared_experts * expert + D * config.num_experts + 2 * D + 2 * H) + D
    embeddings = V * D * (1 if config.tie_embeddings else 2)
    count = count_parameters(config, specs_of(config))
    assert count.active == attention + rest + embeddings + config.num_layers * config.router.top_k * expert
    assert count.total - count.active == config.num_layers * (config.num_experts - config.router.top_k) * expert


def test_flops_count_each_matrix_twice_forward_and_four_times_backward():
    specs = specs_of(SPEED_158M)
    D, F, V, L = 512, 1408, 8192, 4
    products = L * (2 * D * 8 * 64 + 2 * D * 2 * 64 + 2 * 3 * D * F + D * 16) + V * D
    attention = L * 3 * 2 * 2 * 8 * 64 * 128 / 2
    assert train_flops_per_token(SPEED_158M, specs, 128) == 6 * products + attention
