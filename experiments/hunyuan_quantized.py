"""Hunyuan-Large on a few H20s with quantized weights: the jobs that show by compilation that it fits.

    python -m experiments.hunyuan_quantized          # compiles each for the H20, about a minute apiece

All have whole nodes of up to 8 GPUs and the model as released (moe/model/presets.py, HUNYUAN_LARGE). What binds:

- LoRA with a 4-bit base, 4-bit serving: 16 experts over expert=4, so that the experts' weights, 97% of all, never move.
  With two GPUs the 4-bit weights alone, 97 GB a GPU and 3 GB of scales, would fill them; 3 divides none of D = 6400,
  F = 18304, 16 experts and 8 key-value heads.
- 8-bit serving: with four GPUs the weights would take 97 GB each. Of 5, 6 and 7 only 5 divides any of these sizes, D;
  so data=5 shares out each matrix, and every GPU gathers a layer's, in 8 bits, when it comes to it: 6 GB a layer.
"""

from dataclasses import replace

from moe.model.adapter import LoraConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE
from moe.ops.quantize import Quantized
from moe.planner.chips import chip_named
from moe.planner.compile import compile_job
from moe.planner.job import Job, Kind
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

CONTEXT = 32768
"""Tokens, prompt and answer together: Hunyuan-Large's first long context (arXiv 2411.02265 §2.2.4)."""


def lora_on_four(base: Quantized = "nf4") -> Job:
    """QLoRA as the release fine-tunes: q, k, v, o, rank 64, sequences of 2048; one a GPU."""
    return Job(
        "train",
        HUNYUAN_LARGE,
        batch_size=4,
        sequence_length=2048,
        precision=Precision(frozen=base),
        execution=Execution(remat="full"),
        mesh=MeshConfig(expert=4),
        lora=LoraConfig(),
    )


def serving(kind: Kind, weights: Quantized, mesh: MeshConfig) -> Job:
    """One text of `CONTEXT` tokens a GPU."""
    precision = Precision(parameters="bfloat16", frozen=weights)
    return Job(kind, HUNYUAN_LARGE, mesh.num_devices, CONTEXT, precision=precision, mesh=mesh)


def served_in_8_bits(kind: Kind, weights: Quantized = "int8") -> Job:
    """On five GPUs."""
    return serving(kind, weights, MeshConfig(data=5))


def served_in_4_bits(kind: Kind, weights: Quantized = "int4") -> Job:
    """On four GPUs."""
    return serving(kind, weights, MeshConfig(expert=4))


JOBS = {
    "LoRA, nf4 base, sequence 2048": lora_on_four(),
    "decode, int8, 32K context": served_in_8_bits("decode"),
    "prefill, int8, 32K tokens": served_in_8_bits("prefill"),
    "decode, int4, 32K context": served_in_4_bits("decode"),
    "prefill, int4, 32K tokens": served_in_4_bits("prefill"),
}


def main() -> None:
    chip = chip_named("h20")
    print(f"{'':32} {'GPUs':>4} {'weights and states':>19} {'allocated':>10} of {chip.memory / 1e9:.1f} GB a GPU")
    for name, job in JOBS.items():
        cluster = replace(Cluster(), nodes=1, gpus_per_node=job.mesh.num_devices)
        facts = compile_job(job, chip, cluster).facts
        resident, allocated = facts.arguments / 1e9, facts.allocated / 1e9
        print(f"{name:32} {job.mesh.num_devices:4} {resident:16.1f} GB {allocated:7.1f} GB", flush=True)


if __name__ == "__main__":
    main()
