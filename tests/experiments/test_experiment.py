import dataclasses
import json
from pathlib import Path

import pytest

from experiments.overrides import parse_changes
from experiments.run import load_experiment
from moe.model.config import ConfigError

TINY = load_experiment(Path(__file__).parent.parent.parent / "experiments/tiny.py")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh.expert": 6, "data.batch_size": 12}, "num_experts=8 does not divide over mesh.expert=6: use 1, 2"),
        ({"data.batch_size": 12}, "data.batch_size=12 does not divide over mesh.replica=1 x mesh.data=2"),
        ({"training.microbatches": 4}, "and training.microbatches=4: use a multiple of 32, such as 32"),
        ({"mesh.data": 3, "data.batch_size": 12}, "model.d_model=256 does not divide over mesh.data=3 x mesh.expert=4"),
        (
            {"mesh.data": 2, "layout.experts": ("data", "expert"), "model.num_experts": 4},
            "num_experts=4 does not divide over mesh.data=2 x mesh.expert=4: use 1, 2 or 4",
        ),
        (
            {"mesh.tensor": 4},
            "model.num_kv_heads=2 does not divide over mesh.sequence=1 x mesh.tensor=4: make it a multiple of 4, or "
            "share it out over 1 or 2 devices",
        ),
        ({"mesh.sequence": 4, "layout.sequence": "ring", "data.sequence_length": 132}, "make it a multiple of 8, or"),
        ({"mesh.tensor": 2, "data.sequence_length": 129}, "data.sequence_length=129 does not divide over mesh.seq"),
        ({"mesh.tensor": 2, "model.d_expert": 65}, "model.d_expert=65 does not divide over mesh.tensor=2: make it"),
        ({"mesh.stage": 3}, "do not divide over mesh.stage=3 x training.virtual_stages=1: make their product 1"),
        ({"training.virtual_stages": 2}, "training.virtual_stages=2 with mesh.stage=1: there is nothing to interleave"),
        (
            {"mesh.stage": 2, "training.virtual_stages": 2, "model.num_layers": 8},
            "training.microbatches=1 with training.virtual_stages=2: interleaving takes microbatches in groups of "
            "mesh.stage=2; use a multiple of 2",
        ),
        ({"layout.zero": 0}, "layout.zero=0: give one of 1, 2, 3"),
        ({"layout.zero": 2, "precision.gathered": "fp8"}, "layout.zero=2: every device holds whole matrices"),
        ({"optimizer.warmup_steps": 500}, "optimizer.warmup_steps=500 with training.steps=120: warm up for fewer"),
        ({"model.vocab_size": 100}, "model.vocab_size=100: a byte-level tokenizer needs at least 261 ids"),
        ({"name": "a/b"}, "name='a/b': it names a folder"),
        ({"model.router.top_k": 9}, "router.top_k=9 of num_experts=8: choose between 1 and 8"),
        ({"model.num_kv_heads": 3}, "num_heads=8 is not a multiple of num_kv_heads=3"),
        ({"training.steps": 1.5}, "training.steps=1.5: give a whole number"),
        ({"execution.attention": "flash"}, "execution.attention='flash': give one of auto, dense"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        TINY.vary(changes)
    assert sentence in str(caught.value)


def test_vary_changes_what_it_names_and_nothing_else():
    varied = TINY.vary({"model.router.top_k": 2, "mesh.expert": 2, "training.steps": 50})
    assert (varied.model.router.top_k, varied.mesh.expert, varied.training.steps) == (2, 2, 50)
    assert varied.optimizer == TINY.optimizer
    assert dataclasses.replace(varied.model, router=TINY.model.router) == TINY.model


def test_the_fingerprint_follows_the_numbers_only():
    same = TINY.vary({"training.checkpoint_every": 7, "training.peak_tflops": 1.0, "name": "other", "data.cache": "x"})
    assert same.fingerprint() == TINY.fingerprint()
    for path, value in [
        ("training.seed", 1),
        ("optimizer.b1", 0.8),
        ("mesh.data", 1),
        ("precision.compute", "float32"),
        ("layout.zero", 2),
        ("layout.experts", ("data",)),
    ]:
        assert TINY.vary({path: value}).fingerprint() != TINY.fingerprint()


def test_frozen_is_json():
    assert json.loads(json.dumps(TINY.frozen())) == TINY.frozen()
    assert TINY.frozen()["model"]["router"]["top_k"] == 1


def test_an_override_by_its_last_name_is_answered_with_the_path():
    with pytest.raises(ConfigError, match="did you mean optimizer.learning_rate"):
        parse_changes(TINY, ["learning_rate=1"])
