"""Twenty steps of training by Hugging Face's model on PyTorch and by us, from the same weights: `make test-peers`."""

from dataclasses import replace

import numpy as np
import pytest

from moe.model.execution import Execution
from moe.model.folder import Origin
from moe.model.hf.config import model_config
from moe.model.hf.convert import export
from moe.model.precision import FULL
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.step import make_train_step
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE

torch = pytest.importorskip("torch", reason="run by `make test-peers` in an environment of its own")
transformers = pytest.importorskip("transformers", reason="run by `make test-peers` in an environment of its own")

from benchmarks.rivals.torch_step import make_step  # noqa: E402

STEPS, RATE = 20, 2e-3
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 4, "initializer_range": 0.1, "max_position_embeddings": 64, "pad_token_id": None,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
# HunYuanMoEV1 with one expert a token gives it weight 1, so that its router's gradients are rounding alone, which Adam
# makes as large as any.
PEERS = {
    "HunYuanMoEV1, top-2": ("HunYuanMoEV1", "eager", {"intermediate_size": 48, "moe_topk": 2}),
    "Qwen3Moe, top-1": (
        "Qwen3Moe", "grouped_mm", {"moe_intermediate_size": 48, "num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_the_losses_of_twenty_steps_agree(name, tmp_path):
    family, experts, own = PEERS[name]
    theirs = getattr(transformers, f"{family}Config")(**COMMON, **own)
    settings = theirs.to_dict() | {"architectures": [f"{family}ForCausalLM"]}
    _, config = model_config(settings)
    config = replace(config, router=replace(config.router, balance="none"))
    optimizer = OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_steps=0)
    blueprint = make_blueprint(config, FULL, Execution(), optimizer, SINGLE_DEVICE, steps=STEPS)
    state = blueprint.create_state(seed=0)

    export(
        ArraySource(state.params), config, Origin(theirs.model_type, settings, False), tmp_path / "ours", lambda n: None
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, experts_implementation=experts
    )
    their_step, our_step = make_step(model, RATE), make_train_step(blueprint, seed=0)

    texts = np.random.default_rng(0).integers(0, 96, (4, 2, 2, 24)).astype(np.int32)
    positions_BT = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    ones_BT = np.ones((2, 24), np.int32)
    losses = []
    for number in range(STEPS):
        tokens_BT, targets_BT = texts[number % 4]
        state, metrics = our_step(
            state, Batch(tokens_BT, targets_BT, positions_BT, ones_BT, ones_BT.astype(np.float32))
        )
        other = their_step(*(torch.from_numpy(x).long() for x in (tokens_BT, targets_BT)))
        losses.append((float(metrics.loss), other))
    ours, others = np.array(losses).T
    np.testing.assert_allclose(ours, others, rtol=0, atol=1e-3)
    assert ours[-4:].mean() < ours[:4].mean() - 0.5, "nothing was learnt, so nothing was compared"
