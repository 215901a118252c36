"""Model configurations by name."""

from moe.model.config import ModelConfig, RopeConfig, RouterConfig

HUNYUAN_LARGE = ModelConfig(
    vocab_size=128_512,
    d_model=6400,
    num_layers=64,
    num_heads=80,
    num_kv_heads=8,
    head_dim=80,
    num_experts=16,
    d_expert=18_304,
    num_shared_experts=1,
    cla_factor=2,
    rope=RopeConfig(theta=10_000.0, ntk_alpha=100_000.0),
    router=RouterConfig(top_k=1),
)
"""Hunyuan-Large, Pretrain (arXiv 2411.02265 table 1, and config.json of the release): 389B parameters, 52B active."""

SPEED_158M = ModelConfig(
    vocab_size=8192,
    d_model=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    num_experts=16,
    d_expert=1408,
    num_shared_experts=1,
    tie_embeddings=False,
    router=RouterConfig(top_k=1),
)
"""158M parameters, of which 28M are active: the model that speed is compared on (benchmarks/)."""

TINY = ModelConfig(
    vocab_size=4096,
    d_model=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    d_expert=512,
    num_shared_experts=1,
    cla_factor=2,
    rope=RopeConfig(theta=10_000.0, ntk_alpha=1000.0),
    router=RouterConfig(top_k=1),
)
"""Hunyuan-Large in small, with every part of its block: trains in minutes on two cores."""
