"""How far the analytic estimate of memory is from what XLA allocates, on random layouts.

python -m benchmarks.plan_memory --layouts 20 --seed 0

Each layout is compiled for a described H20 (moe/planner/compile.py), in 10 to 20 seconds on one core; what was compiled
before is found in .cache/plan. Runs nothing, and needs no GPU.
"""

import argparse
import random
import statistics
import time
from dataclasses import replace

from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.presets import HUNYUAN_LARGE
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.estimate_memory import estimate_memory
from moe.planner.job import Job, Kind
from parallel.layout import LayoutConfig, LayoutError
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

MIXTRAL = ModelConfig(
    vocab_size=32_000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, num_experts=8,
    d_expert=14_336, num_shared_experts=0, qk_norm="none", tie_embeddings=False, router=RouterConfig(top_k=2),
)  # fmt: skip
"""As Mixtral 8x7B (arXiv 2401.04088, table 1)."""

FINE_GRAINED = ModelConfig(
    vocab_size=151_936, d_model=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128,
    d_expert=768, num_shared_experts=0, qk_norm="before_rope", tie_embeddings=False, router=RouterConfig(top_k=8),
)  # fmt: skip
"""As Qwen3-30B-A3B (arXiv 2505.09388, table 2)."""

SHARED_FINE = ModelConfig(
    vocab_size=102_400, d_model=2048, num_layers=28, num_heads=16, num_kv_heads=16, head_dim=128, num_experts=64,
    d_expert=1408, num_shared_experts=2, num_dense_layers=1, d_dense=11_264, qk_norm="none", tie_embeddings=False,
    router=RouterConfig(top_k=6),
)  # fmt: skip
"""As DeepSeekMoE 16B (arXiv 2401.06066, section 5.1), its 10944 wide dense layer rounded up to a multiple of 1024."""

MODELS = (HUNYUAN_LARGE, MIXTRAL, FINE_GRAINED, SHARED_FINE)


def random_job(draw: random.Random) -> Job:
    """A layout that divides, and that fits as far as the estimate knows; drawn until one does."""
    while True:
        job = _attempt(draw)
        if job is not None:
            return job


def _attempt(draw: random.Random) -> Job | None:
    model = draw.choice(MODELS)
    capacity = draw.choice((None, None, 1.25, 2.0))
    model = replace(
        model,
        num_layers=draw.choice((8, 16)) + model.num_dense_layers,
        router=replace(model.router, capacity_factor=capacity),
    )
    devices = draw.choice((8, 16, 32, 64))
    kind: Kind = draw.choice(("train",) * 8 + ("prefill", "decode"))
    mesh = _random_mesh(draw, devices, serving=kind != "train")
    if model.num_kv_heads % (mesh.tensor * mesh.sequence):
        return None
    batch_parts = mesh.replica * mesh.data * mesh.expert
    length = draw.choice((1024, 2048, 4096, 8192))
    microbatches = draw.choice((1, 2, 4)) if kind == "train" else 1
    if mesh.stage > 1:
        microbatches = mesh.stage * draw.choice((1, 2))
    sequences = draw.choice((1, 2)) if kind == "train" else draw.choice((4, 16))
    try:
        job = Job(
            kind,
            model,
            batch_parts * sequences * microbatches,
            length,
            execution=Execution(
                exchange=draw.choice(("padded", "padded", "hierarchical")),
                remat=draw.choice(("none", "full", "matmuls")),
            ),
            mesh=mesh,
            layout=LayoutConfig(
                experts=draw.choice((("expert",), ("expert",), ("expert", "tensor"))),
                zero=draw.choice((1, 2, 3, 3)),
            ),
            microbatches=microbatches,
            virtual_stages=draw.choice((1, 2)) if mesh.stage > 1 else 1,
        )
        estimate = estimate_memory(job, H20, 8)
    except (ConfigError, LayoutError, ValueError):
        return None
    # XLA computes a program that does not fit otherwise: it reschedules and rematerialises by itself.
    return job if estimate.allocated <= H20.memory else None


def _random_mesh(draw: random.Random, devices: int, *, serving: bool) -> MeshConfig:
    axes = (
        ["replica", "data", "expert", "tensor"]
        if serving
        else ["stage", "replica", "data", "data", "expert", "expert", "sequence", "tensor"]
    )
    sizes: dict[str, int] = {}
    while devices > 1:
        axis = draw.choice(axes)
        sizes[axis] = sizes.get(axis, 1) * 2
        devices //= 2
    return MeshConfig(**sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    jobs = [random_job(draw) for _ in range(given.layouts)]
    errors = []
    for number, job in enumerate(jobs):
        start = time.perf_counter()
        estimate = estimate_memory(job, H20, 8)
        seconds = time.perf_counter() - start
        compiled = compile_job(job, H20, Cluster(nodes=job.mesh.num_devices // 8))
        error = estimate.allocated / compiled.facts.allocated - 1
        errors.append(error)
        GiB = 2**30
        print(
            f"{number:3} {describe(job):110} estimate {estimate.allocated / GiB:7.2f} GiB ({seconds * 1e3:.0f} ms)  "
            f"XLA {compiled.facts.allocated / GiB:7.2f}  peak {compiled.facts.peak / GiB:7.2f}  error {error:+.1%}",
            flush=True,
        )
    sizes = [abs(error) for error in errors]
    print(
        f"within 10%: {sum(size <= 0.1 for size in sizes)} of {len(sizes)}; median {statistics.median(sizes):.1%}, "
        f"largest {max(sizes):.1%}"
    )


def describe(job: Job) -> str:
    model, layout, execution = job.model, job.layout, job.execution
    capacity = model.router.capacity_factor
    return (
        f"{job.kind} D{model.d_model} L{model.num_layers} K{model.router.top_k} B{job.batch_size} "
        f"T{job.sequence_length} {job.mesh.text.replace(' x ', ' ')} zero{layout.zero} {'+'.join(layout.experts)} "
        f"{execution.remat} {execution.exchange} {'dropless' if capacity is None else f'cap{capacity}'} "
        f"m{job.microbatches} v{job.virtual_stages}"
    )


if __name__ == "__main__":
    main()
