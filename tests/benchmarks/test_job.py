import itertools
from dataclasses import replace

import numpy as np

from benchmarks.peers import FULL_SIZES
from benchmarks.rivals.job import Job, Setting, draw_tokens, read, settings, told

TRAIN = Job("train", "bfloat16", 4, 512, 0, FULL_SIZES)
DECODE = Job("decode", "float32", 8, 1024, 32, FULL_SIZES)


def test_a_process_reads_what_it_is_told():
    setting = Setting("Qwen2Moe", "grouped_mm", "batched_mm", cache="static")
    for job, way in itertools.product((TRAIN, DECODE), (setting, None)):
        assert read(told(job, way)) == (job, way)


def test_tokens_of_a_turn_by_part():
    assert TRAIN.tokens == {"step": 2048}
    assert replace(TRAIN, steps=10).tokens == {"step": 20_480}
    assert DECODE.tokens == {"prefill": 8192, "decode": 256}


def test_each_setting_is_tried_once_under_a_name_of_its_own():
    for job, plain, compiled in ((TRAIN, 3 * 2 * 2, 3 * 2 * 2), (DECODE, 3 * 3 * 2, 3 * 3)):
        assert len(settings(job, compiled=False)) == plain
        tried = settings(job, compiled=True)
        assert len({setting.name(job.task) for setting in tried}) == len(tried) == plain + compiled


def test_autocast_is_for_bfloat16_alone():
    assert not any(
        setting.autocast for setting in settings(Job("train", "float32", 4, 8, 0, FULL_SIZES), compiled=True)
    )


def test_both_sides_draw_the_same_tokens():
    for first, second in zip(draw_tokens(50, 3, 5), draw_tokens(50, 3, 5), strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.shape == (3, 5)
        assert first.dtype == np.int32
        assert first.min() >= 0
        assert first.max() < 50
