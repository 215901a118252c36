"""Where an engine puts texts, and what comes of them on a mesh."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import HunyuanMoE
from moe.model.cache import cache_axes, empty_cache
from moe.serve.engine import Engine, _written, decode, prefill
from moe.serve.sampling import Sampling
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh
from tests.moe.serve.serving import CONFIG


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.data())
def test_a_prompts_row_is_on_the_device_of_its_slot(shards, slots_of_one, data):
    engine = Engine.__new__(Engine)
    engine.num_slots = shards * slots_of_one
    engine.weights = SimpleNamespace(served=SimpleNamespace(layout=SimpleNamespace(batch_shards=shards)))
    everywhere = range(engine.num_slots)
    engine._slots = dict.fromkeys(data.draw(st.sets(st.sampled_from(everywhere), max_size=engine.num_slots - 1)))
    free = engine.free
    count = data.draw(st.integers(1, len(free)))
    slots, rows, num_rows = engine._places(count)
    assert len(set(slots)) == len(set(rows)) == count
    assert set(slots) <= set(free)
    assert num_rows % shards == 0
    rows_of_one = num_rows // shards
    assert [row // rows_of_one for row in rows] == [slot // slots_of_one for slot in slots]
    # None takes a second prompt while another has a free slot and none yet.
    on_each = np.bincount([row // rows_of_one for row in rows], minlength=shards)
    room = np.bincount([slot // slots_of_one for slot in free], minlength=shards)
    assert all(on_each[i] == room[i] for i in range(shards) if on_each[i] < on_each.max() - 1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=2), MeshConfig(replica=2, data=2, expert=2)], ids=str)
def test_texts_that_come_and_go_on_a_mesh_are_those_of_one_device(checkpoint, mesh):
    alone, spread = (
        Engine(HunyuanMoE.from_hf(checkpoint, mesh=each).weights, slots=8, max_length=32) for each in (None, mesh)
    )
    sampling = Sampling(max_tokens=8)

    def told(engine: Engine) -> dict[int, list[int]]:
        texts: dict[int, list[int]] = {}
        number_of: dict[int, int] = {}

        def admit(prompts: list[list[int]]) -> None:
            for slot, token in engine.admit([(prompt, sampling) for prompt in prompts]):
                number_of[slot] = len(texts)
                texts[len(texts)] = [token]

        def step(times: int) -> None:
            for _ in range(times):
                for slot, token in engine.step():
                    texts[number_of[slot]].append(token)

        admit([[5, 6, 7], [9] * 17, [3], [250, 1]])
        step(2)
        for slot, number in list(number_of.items()):
            if number in (0, 2):
                engine.release(slot)
                del number_of[slot]
        admit([[8, 8], [1, 2, 3, 4], [30], [40], [50]])
        step(3)
        return texts

    assert told(spread) == told(alone)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=2, tensor=2)], ids=str)
def test_a_prefills_keys_and_values_go_to_their_slots_and_to_no_other_device(mesh):
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh))
    cache = empty_cache(CONFIG, 8, 6, jnp.float32, layout)
    new = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape), empty_cache(CONFIG, 4, 3, jnp.float32, layout)
    )
    # Of four devices' two slots each, the rows' own; one row is padding.
    places_B = np.array([1, 2, 8, 7], np.int32)
    write = jax.jit(lambda *given: _written(*given, layout)).lower(cache, new, places_B).compile()
    found = write(cache, new, places_B)
    new_BSGMH, found_BSGMH = (
        np.moveaxis(np.asarray(of.stacks[0].keys), cache_axes().index("S"), 1) for of in (new, found)
    )
    expected_BSGMH = np.zeros(found_BSGMH.shape, np.float32)
    for row, slot in enumerate(places_B):
        if slot < 8:
            expected_BSGMH[slot, :3] = new_BSGMH[row]
    np.testing.assert_array_equal(found_BSGMH, expected_BSGMH)
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", write.as_text())


@pytest.mark.parametrize("mesh", [None, pytest.param(MeshConfig(data=2, expert=2), marks=pytest.mark.slow)], ids=str)
def test_after_a_warm_up_only_longer_prompts_are_compiled_for(checkpoint, mesh):
    engine = Engine(HunyuanMoE.from_hf(checkpoint, mesh=mesh).weights, slots=4, max_length=32)
    engine.warm_up()
    compiled = prefill._cache_size(), decode._cache_size()
    for temperature in (0.0, 1.0):
        (slot, _), *_ = engine.admit([([1, 2, 3], Sampling(max_tokens=9, temperature=temperature))])
        engine.step()
        engine.step()
        engine.release(slot)
        engine.step()
    assert (prefill._cache_size(), decode._cache_size()) == compiled
    engine.admit([([1] * 17, Sampling(max_tokens=9))])
    assert prefill._cache_size() > compiled[0]


def answers(engine: Engine, requests: list[tuple[list[int], Sampling]]) -> dict[int, list[int]]:
    """Tokens by request; each comes as soon as there is a slot, and goes when it has all of its own."""
    waiting, running, texts = list(enumerate(requests)), {}, {}
    while waiting or running:
        while waiting and engine.free:
            number, request = waiting.pop(0)
            ((slot, token),) = engine.admit([request])
            running[slot], texts[number] = number, [token]
        arrived = engine.step()
        assert arrived
        for slot, token in arrived:
            texts[running[slot]].append(token)
        for slot, number in list(running.items()):
            if len(texts[number]) >= requests[number][1].max_tokens:
                engine.release(slot)
                del running[slot]
    return texts


def test_a_step_that_begins_before_the_last_is_read_makes_the_same_texts(checkpoint):
    weights = HunyuanMoE.from_hf(checkpoint).weights
    sizes = [(3, 5), (20, 12), (1, 2), (7, 25), (2, 3), (9, 23), (4, 2)]
    requests = [
        ([(17 * i + j) % 256 for j in range(length)], Sampling(max_tokens=count, temperature=i % 2, seed=i))
        for i, (length, count) in enumerate(sizes)
    ]
    # The longest fill their slots to the end, where the step that begins too early has no place to write.
    waits, ahead = (Engine(weights, slots=3, max_length=32) for _ in range(2))
    ahead._ahead = True
    assert answers(ahead, requests) == answers(waits, requests)


def test_no_row_is_alone_on_a_gpu(checkpoint, monkeypatch):
    weights = HunyuanMoE.from_hf(checkpoint).weights
    assert Engine(weights, slots=1, max_length=32).num_slots == 1
    monkeypatch.setattr("moe.serve.engine.platform", lambda: "gpu")
    assert [Engine(weights, slots=slots, max_length=32).num_slots for slots in (1, 2, 3)] == [2, 2, 3]
