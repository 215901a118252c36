"""Hunyuan-Large on a few H20s with quantized weights: jobs that fit, as experiments/minimum_hardware.py shows by
compiling them.

All have whole nodes of up to 8 GPUs and the model as released (moe/model/presets.py, HUNYUAN_LARGE). What binds:

- LoRA with a 4-bit base, 4-bit serving: 16 experts over expert=4, so that the experts' weights, 97% of all, never move.
  With two GPUs the 4-bit weights alone, 97 GB a GPU and 3 GB of scales, would fill them; 3 divides none of D = 6400,
  F = 18304, 16 experts and 8 key-value heads.
- 8-bit serving: with four GPUs the weights would take 97 GB each. Of 5, 6 and 7 only 5 divides any of these sizes, D;
  so data=5 shares out each matrix, and every GPU gathers a layer's, in 8 bits, when it comes to it: 6 GB a layer.
"""

from moe.model.adapter import LoraConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE
from moe.ops.quantize import Quantized
from moe.planner.job import Job, Kind
from parallel.mesh import MeshConfig

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
