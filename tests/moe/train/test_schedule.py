import numpy as np
import pytest

from moe.train.schedule import make_schedule


def rates(kind, steps=200, warmup=10, final_share=0.25):
    schedule = make_schedule(kind, 2.0, steps, warmup, final_share)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "hunyuan"])
def test_warmup_rises_in_equal_parts_to_the_peak(kind):
    np.testing.assert_allclose(rates(kind)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "hunyuan"])
def test_no_warmup_starts_at_the_peak(kind):
    np.testing.assert_allclose(rates(kind, warmup=0)[0], 2.0, rtol=1e-6)


def test_constant_stays():
    np.testing.assert_allclose(rates("constant")[10:], 2.0)


def test_linear_and_cosine_fall_to_the_final_share():
    progress = np.arange(190) / 190
    np.testing.assert_allclose(rates("linear")[10:], 2.0 - 1.5 * progress, rtol=1e-5)
    np.testing.assert_allclose(rates("cosine")[10:], 0.5 + 1.5 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def test_hunyuan_anneals_the_last_twentieth_to_a_tenth_of_the_peak():
    found = rates("hunyuan")
    progress = np.arange(180) / 180
    np.testing.assert_allclose(found[10:190], 0.5 + 1.5 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[190:], 0.5 + (0.2 - 0.5) * np.arange(10) / 10, rtol=1e-5)
