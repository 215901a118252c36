"""Published training speeds: what was trained, on what, and how fast it was."""

from dataclasses import dataclass, replace
from typing import Any

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.chips import H100, Chip
from moe.planner.implementation import Implementation
from moe.planner.job import Job
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster


def _moe(V: int, D: int, L: int, N: int, M: int, H: int, E: int, K: int, F: int, **more: Any) -> ModelConfig:
    settings: dict[str, Any] = {"num_shared_experts": 0, "qk_norm": "none", "tie_embeddings": False} | more
    return ModelConfig(V, D, L, N, M, H, E, F, router=RouterConfig(top_k=K), **settings)


MIXTRAL_8X7B = _moe(32_000, 4096, 32, 32, 8, 128, 8, 2, 14_336)
MIXTRAL_8X22B = _moe(32_768, 6144, 56, 48, 8, 128, 8, 2, 16_384)
QWEN3_30B = _moe(151_936, 2048, 48, 32, 4, 128, 128, 8, 768, qk_norm="before_rope")
QWEN3_235B = _moe(151_936, 4096, 94, 64, 4, 128, 128, 8, 1536, qk_norm="before_rope")
GPT_OSS_120B = _moe(201_088, 2880, 36, 64, 8, 64, 128, 4, 2880)
GPT_OSS_20B = _moe(201_088, 2880, 24, 64, 8, 64, 32, 4, 2880)
DEEPSEEK_V3 = _moe(
    129_280, 7168, 61, 100, 2, 128, 256, 8, 2048, num_shared_experts=1, num_dense_layers=3, d_dense=18_432
)
KIMI_K2 = _moe(163_840, 7168, 61, 54, 1, 128, 384, 8, 2048, num_shared_experts=1, num_dense_layers=1, d_dense=18_432)
"""Sizes from the config.json of each release. Latent attention (DeepSeek-V3, arXiv 2412.19437, section 2.1; Kimi K2)
stands here as grouped-query attention with as many parameters, 187M and 101M a layer; that its heads are wider is said
in `Implementation.scores`."""

LATENT_SCORES = {DEEPSEEK_V3: 128 * (192 + 128) / 2 / (100 * 128), KIMI_K2: 64 * (192 + 128) / 2 / (54 * 128)}
"""Keys are 192 wide and values 128."""
WINDOWED_SCORES = 0.5 * (1 + (128 * 129 / 2 + (4096 - 128) * 128) / (4096 * 4097 / 2))
"""GPT-OSS: every other layer sees the last 128 of 4096 tokens."""

MEGATRON = Implementation(
    prefetches=True, hides_tensor=True, scatters=True, sums_once=True, hides_stages=True, lockstep=False,
    deals_head=False, whole_table=False, full_buffers=False, fuses_rows=True, gate_passes=3,
)  # fmt: skip
"""Megatron-Core: distributed optimizer; its gathers and sums, and what interleaved stages hand on, beside the
computation; the head on the last stage; fused permutation (megatron/core/transformer/moe/README.md)."""
AUTOMODEL = replace(MEGATRON, hides_tensor=False, hides_stages=False, consecutive=True)
"""NeMo Automodel: PyTorch's FSDP2 with prefetching, DeepEP, Transformer Engine; interleaved 1F1B by layers a stage
(examples/benchmark/configs/*_te_deepep.yaml). Its benchmarks' FakeBalancedGate gives token i the experts K·i to
K·i + K - 1 (components/moe/layers.py)."""
GPT_OSS = replace(AUTOMODEL, scores=WINDOWED_SCORES, sums_once=False, gate_passes=18)
"""The experts' biases are added outside the product (`GroupedExpertsDeepEP._apply_bias`): 22 passes over the hidden
activations forward and 24 backward, beside the activation's 3 and 5."""


@dataclass(frozen=True)
class Row:
    """
    tflops: model TFLOP/s of one GPU, as published.
    speed: tokens/s of one GPU, where they are published as well.
    eager: whether the host launches each kernel as the program goes, and does not keep up (`Efficiency.busy`).
    attention: `Efficiency.attention` of its kernel.
    accumulated: batches whose gradients are added up, each on its own through all stages.
    """

    name: str
    job: Job
    how: Implementation
    tflops: float
    source: str
    speed: float = 0.0
    eager: bool = False
    attention: float = 1.0
    accumulated: int = 1
    chip: Chip = H100

    @property
    def devices(self) -> int:
        return self.job.mesh.num_devices

    @property
    def cluster(self) -> Cluster:
        return Cluster(nodes=-(-self.devices // 8), gpus_per_node=min(8, self.devices))

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs. Without `speed` from TFLOP/s, whose FLOPs Megatron counted so: 6 for each parameter of a
        product, and all scores of the attention, those as well that causality hides (num_floating_point_operations of
        Megatron-LM, megatron/training/training.py, core_r0.9.0)."""
        if self.speed:
            return self.speed * self.devices
        model, T = self.job.model, self.job.sequence_length
        D, wide = model.d_model, model.num_heads * model.head_dim
        attention = 2 * D * (wide + model.num_kv_heads * model.head_dim)
        products = model.num_layers * (attention + 3 * D * model.d_expert * model.router.top_k) + model.vocab_size * D
        return self.tflops * 1e12 / (6 * products + 12 * model.num_layers * wide * T) * self.devices

    @property
    def flops_per_token(self) -> float:
        """As its source counts them."""
        return self.tflops * 1e12 * self.devices / self.tokens_per_second


def _job(model: ModelConfig, batch: int, mesh: MeshConfig, microbatches: int, **more: Any) -> Job:
    execution = Execution(exchange=more.pop("exchange", "ragged"), remat=more.pop("remat", "none"))
    precision = Precision(parameters="bfloat16")
    return Job("train", model, batch, 4096, precision, execution, mesh=mesh, microbatches=microbatches, **more)


FLEX = 0.55
"""FlexAttention's rate of cuDNN's: about 90% of FlashAttention-2's (PyTorch blog, FlexAttention, 2024-08), which is 350
TFLOP/s on an H100, where cuDNN and FlashAttention-3 reach 550 (arXiv 2407.08608, figure 5: causal, 4K)."""
ZERO1 = LayoutConfig(zero=1)
_MCORE = "Megatron-LM, megatron/core/transformer/moe/README.md (MCore 0.9; layout of 0.8)"
_AUTOMODEL = "NeMo Automodel, docs/performance-summary.md, 2025-10-02"
_ZOO = "yanring/Megatron-MoE-ModelZoo: best_practice/{Mixtral,Qwen3}, runtime_configs/benchmarking/runtime.conf"
_QWEN3_235B_STEP = 2048 * 4096 / 256
_DEEPEP = "ragged_hierarchical"

ROWS = (
    Row(
        "Mixtral 8x7B",
        _job(MIXTRAL_8X7B, 256, MeshConfig(stage=4, data=2, expert=8), 16, virtual_stages=8, layout=ZERO1),
        MEGATRON, 468, _MCORE,
    ),
    Row(
        "Mixtral 8x22B",
        _job(MIXTRAL_8X22B, 256, MeshConfig(stage=8, data=2, expert=2, tensor=4), 64, virtual_stages=7, layout=ZERO1),
        MEGATRON, 487, _MCORE,
    ),
    Row(
        "Qwen3-30B-A3B", _job(QWEN3_30B, 512, MeshConfig(expert=8), 16, exchange=_DEEPEP, remat="full"),
        AUTOMODEL, 277, _AUTOMODEL, speed=12_040, eager=True,
    ),
    Row(
        "DeepSeek-V3",
        _job(
            DEEPSEEK_V3, 512, MeshConfig(stage=4, expert=64), 8, virtual_stages=8, exchange=_DEEPEP, remat="full",
            layout=ZERO1,
        ),
        replace(AUTOMODEL, scores=LATENT_SCORES[DEEPSEEK_V3]), 250, _AUTOMODEL, speed=1002, eager=True,
    ),
    Row(
        "GPT-OSS 120B", _job(GPT_OSS_120B, 512, MeshConfig(expert=64), 4, exchange=_DEEPEP),
        GPT_OSS, 231, _AUTOMODEL, speed=7626, eager=True, attention=FLEX,
    ),
)  # fmt: skip
"""What the efficiencies are fitted on. All on nodes of 8 H100s with NVLink and 8 cards of 400 Gb/s, bfloat16, dropless,
routing forced to balance, sequence 4096. The layout of Mixtral 8x22B is that of an older version: 487 is what the
authors of parallel folding report (arXiv 2504.14960, 49.3%), whose configuration has TP 2, EP 8 and whole experts."""

OTHERS = (
    Row(
        "DeepSeek-V3, 1024",
        _job(
            DEEPSEEK_V3, 2048, MeshConfig(stage=4, data=4, expert=64), 8, virtual_stages=8, exchange=_DEEPEP,
            remat="full", layout=ZERO1,
        ),
        replace(AUTOMODEL, scores=LATENT_SCORES[DEEPSEEK_V3]), 216, _AUTOMODEL, speed=865, eager=True, accumulated=4,
    ),
    Row(
        "Kimi K2",
        _job(
            KIMI_K2, 256, MeshConfig(stage=8, expert=32), 8, virtual_stages=4, exchange=_DEEPEP, remat="full",
            layout=ZERO1,
        ),
        replace(AUTOMODEL, scores=LATENT_SCORES[KIMI_K2]), 189, _AUTOMODEL, speed=924, eager=True, accumulated=2,
    ),
    Row(
        "GPT-OSS 20B", _job(GPT_OSS_20B, 256, MeshConfig(expert=8), 16, exchange=_DEEPEP),
        GPT_OSS, 279, _AUTOMODEL, speed=13_058, eager=True, attention=FLEX,
    ),
    Row(
        "Mixtral 8x22B, folded",
        _job(
            MIXTRAL_8X22B, 256, MeshConfig(stage=8, data=2, expert=4, tensor=2), 32,
            layout=LayoutConfig(zero=1, experts=("expert", "tensor")),
        ),
        MEGATRON, 455, _ZOO,
    ),
    Row(
        "Qwen3-235B, EP 32 PP 8",
        _job(
            QWEN3_235B, 2048, MeshConfig(stage=8, expert=16, tensor=2), 128, virtual_stages=4, exchange=_DEEPEP,
            layout=LayoutConfig(zero=1, experts=("expert", "tensor")),
        ),
        MEGATRON, 245, _ZOO, speed=_QWEN3_235B_STEP / 19.7,
    ),
    Row(
        "Qwen3-235B, EP 8 PP 32",
        _job(
            QWEN3_235B, 2048, MeshConfig(stage=32, expert=4, tensor=2), 512, virtual_stages=3,
            layout=LayoutConfig(zero=1, experts=("expert", "tensor")),
        ),
        MEGATRON, 200, _ZOO, speed=_QWEN3_235B_STEP / 24.2,
    ),
    Row(
        "Qwen3-235B, EP 8 PP 8",
        _job(
            QWEN3_235B, 2048, MeshConfig(stage=8, data=4, expert=2, tensor=4), 256, virtual_stages=4, exchange=_DEEPEP,
            layout=LayoutConfig(zero=1, experts=("expert", "tensor")),
        ),
        MEGATRON, 167, _ZOO, speed=_QWEN3_235B_STEP / 29.0,
    ),
    Row(
        "Qwen3-235B, EP 8 FSDP",
        _job(
            QWEN3_235B, 2048, MeshConfig(data=32, expert=4, tensor=2), 4, exchange=_DEEPEP, remat="full",
            layout=LayoutConfig(experts=("expert", "tensor")),
        ),
        MEGATRON, 276, _ZOO, speed=_QWEN3_235B_STEP / 17.6,
    ),
)  # fmt: skip
"""Held out: never fitted on. Qwen3-235B with EP 8 and PP 8 shows what is not modelled: four devices share out one
sequence, and their kernels are too short for a host that launches them one by one."""
