import itertools
from fractions import Fraction

import numpy as np
import pytest

from parallel.pipeline import PipelineError, Schedule

SCHEDULES = [
    Schedule(stages, virtual, microbatches)
    for stages, virtual, microbatches in itertools.product((2, 3, 4), (1, 2, 3), (1, 2, 6, 12, 24))
    if virtual == 1 or microbatches % stages == 0
]


def ticks(work, schedule: Schedule) -> dict[tuple[int, int], int]:
    """(microbatch, chunk of the network) -> tick."""
    found = {}
    for tick, stage in itertools.product(range(schedule.ticks), range(schedule.stages)):
        if (microbatch := work.microbatch[tick, stage]) >= 0:
            turn = int(microbatch), int(work.chunk[tick, stage]) * schedule.stages + stage
            assert turn not in found
            found[turn] = tick
    return found


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_microbatch_visits_every_chunk_in_order(schedule):
    chunks = schedule.stages * schedule.virtual
    forward, backward = ticks(schedule.forward, schedule), ticks(schedule.backward, schedule)
    every = set(itertools.product(range(schedule.microbatches), range(chunks)))
    assert set(forward) == set(backward) == every
    for microbatch, chunk in every:
        if chunk + 1 < chunks:
            # What a stage hands on in one tick, the next one takes in the following.
            assert forward[microbatch, chunk + 1] == forward[microbatch, chunk] + 1
            assert backward[microbatch, chunk] == backward[microbatch, chunk + 1] + 1
    for microbatch in range(schedule.microbatches):
        assert backward[microbatch, chunks - 1] == forward[microbatch, chunks - 1]
        assert schedule.finishes[forward[microbatch, chunks - 1]] == microbatch
    assert (schedule.finishes >= 0).sum() == schedule.microbatches


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_idle_time_is_that_of_the_papers(schedule):
    """(S-1) / (v·M) of the time that a stage works (arXiv 2104.04473, section 2.2)."""
    expected = Fraction(schedule.stages - 1, schedule.virtual * schedule.microbatches)
    for work in (schedule.forward, schedule.backward):
        some_stage_works = (work.microbatch >= 0).any(axis=1)
        works = (work.microbatch[some_stage_works] >= 0).sum(axis=0)
        idles = (work.microbatch[some_stage_works] < 0).sum(axis=0)
        assert [Fraction(int(i), int(w)) for i, w in zip(idles, works, strict=True)] == [expected] * schedule.stages
    np.testing.assert_allclose(schedule.bubble, float(expected))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_inputs_wait_untouched_and_few_at_a_time(schedule):
    assert schedule.slots <= schedule.virtual * schedule.stages + schedule.stages - 1
    for stage in range(schedule.stages):
        slots = {}
        for tick in range(schedule.ticks):
            if tick < schedule.forward_ticks:
                begun = schedule.forward.microbatch[tick, stage], schedule.forward.chunk[tick, stage]
                slots[schedule.forward.slot[tick, stage]] = begun
            if schedule.backward.microbatch[tick, stage] >= 0:
                ended = schedule.backward.microbatch[tick, stage], schedule.backward.chunk[tick, stage]
                assert slots.pop(schedule.backward.slot[tick, stage]) == ended


def test_interleaving_takes_whole_groups_of_microbatches():
    with pytest.raises(PipelineError, match="6 microbatches with 2 virtual stages on each of 4 stages: .* such as 8"):
        Schedule(4, 2, 6)
