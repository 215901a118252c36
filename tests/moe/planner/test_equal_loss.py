from dataclasses import replace

import pytest

from moe.model.presets import HUNYUAN_LARGE, SPEED_158M, TINY
from moe.planner.equal_loss import dense_parameters, dense_twin, loss
from moe.planner.job import Job
from moe.planner.plan import model_size

# The law reduced to L = m N^mu + n D^nu + c for each number of experts: arXiv 2502.05172, table 4.
REDUCED = {
    1: (30.3640, -0.1817, 53.9838, -0.1965),
    2: (27.7982, -0.1780, 66.8401, -0.2065),
    4: (24.8462, -0.1731, 87.7022, -0.2192),
    8: (21.8330, -0.1676, 119.9126, -0.2338),
    16: (19.0159, -0.1617, 167.5073, -0.2494),
    32: (16.5424, -0.1557, 234.6726, -0.2652),
}


@pytest.mark.parametrize("experts", REDUCED)
@pytest.mark.parametrize(("active", "tokens"), [(79e6, 1e9), (1.1e9, 80e9)])
def test_the_law_is_the_published_one(experts, active, tokens):
    m, mu, n, nu = REDUCED[experts]
    assert loss(active, tokens, experts) == pytest.approx(m * active**mu + n * tokens**nu + 1.3637, rel=1e-3)


@pytest.mark.parametrize("experts", [4, 8.5, 32])
def test_the_dense_model_has_the_same_loss(experts):
    dense = dense_parameters(1e9, 80e9, experts)
    assert dense > 1e9
    assert loss(dense, 80e9, 1) == pytest.approx(loss(1e9, 80e9, experts), rel=1e-9)


def test_a_dense_model_is_its_own_twin():
    assert dense_parameters(1e9, 80e9, 1) == pytest.approx(1e9, rel=1e-9)


@pytest.mark.parametrize("model", [TINY, SPEED_158M, HUNYUAN_LARGE])
@pytest.mark.parametrize("tokens", [1e6, 7e12])
def test_the_twin_has_the_parameters_of_the_law(model, tokens):
    _, active, _ = model_size(Job("train", model, 1, 256))
    twin = dense_twin(model, active, tokens)
    total, of_twin, _ = model_size(Job("train", twin, 1, 256))
    chosen = model.router.top_k + model.num_shared_experts
    experts = (model.num_experts + model.num_shared_experts) / chosen
    assert total == of_twin
    assert not twin.has_moe
    width = 3 * model.d_model * model.num_layers * 128
    assert total == pytest.approx(dense_parameters(active, max(tokens, 20 * active), experts), abs=width)


def test_dense_layers_of_the_mixture_count_as_they_are():
    model = replace(SPEED_158M, num_dense_layers=1, d_dense=1024)
    _, active, _ = model_size(Job("train", model, 1, 256))
    total, _, _ = model_size(Job("train", dense_twin(model, active, 1e12), 1, 256))
    assert total == pytest.approx(dense_parameters(active, 1e12, 8.5), rel=0.03)
