"""A small model with a tokenizer on disk, as a user has it, shared by the tests of serving."""

from pathlib import Path

from flax import nnx

from moe.model.config import ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.hf.convert import export_trained
from moe.model.precision import FULL
from moe.model.transformer import Transformer
from moe.train.tokenizer import train_tokenizer
from moe.train.trained import ArraySource

LINES = ["In the beginning was the word. ", "老师说：你好，世界！ ", "🙂 👩‍🚀 naïve café ", "abc " * 20]
TOKENIZER = train_tokenizer(LINES, 300)
CONFIG = ModelConfig(
    vocab_size=300, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=24,
    cla_factor=2, init_std=0.3, rope=RopeConfig(ntk_alpha=1000.0), router=RouterConfig(top_k=2),
)  # fmt: skip


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of random weights."""
    model = Transformer(CONFIG, FULL, Execution(), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    export_trained(ArraySource(params), CONFIG, folder, lambda count: None)
    TOKENIZER.save(folder / "tokenizer.json")
    return folder
