"""Our process beside a rival's. Started by `benchmarks.peers`."""

import os
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.rivals.job import Job, draw_tokens, read
from benchmarks.rivals.protocol import About, Take, resident, serve
from benchmarks.spread import processor
from benchmarks.train_step import stepper
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import ParameterSpec, is_spec, specs_of
from moe.model.precision import FULL, Precision
from moe.model.presets import SPEED_158M
from moe.model.transformer import Transformer
from moe.serve.engine import Engine, Served, Weights
from moe.serve.sampling import Sampling
from parallel.layout import SINGLE_DEVICE


def trainer(config: ModelConfig, job: Job) -> Take:
    """In bfloat16 as runs are by default: parameters and AdamW's moments stay in float32. On a GPU without a loop over
    layers, which there costs a tenth of the step, and on CPU gains nothing (lab book)."""
    precision, scan_layers = FULL if job.format == "float32" else Precision(), job.device == "cpu"
    return stepper(config, precision, job.batch, job.length, steps=job.steps, scan_layers=scan_layers)[0]


def drawn(served: Served) -> Weights:
    """With arrays of its own for each group of layers, as of a checkpoint: a model makes the stacks of all first."""
    rngs = nnx.Rngs(0)

    def draw(spec: ParameterSpec, x: jax.ShapeDtypeStruct) -> jax.Array:
        if spec.kind == "norm":
            return jnp.ones(x.shape, x.dtype)
        return 0.02 * jax.random.normal(rngs.params(), x.shape, x.dtype)

    shapes, specs = Weights.abstract(served), specs_of(served.abstract)
    params = jax.tree.map(draw, specs, shapes.params, is_leaf=is_spec)
    return shapes._replace(params=params, balance=jax.tree.map(jnp.zeros_like, shapes.balance))


def decoder(config: ModelConfig, job: Job) -> Take:
    precision = FULL if job.format == "float32" else Precision(parameters="bfloat16")
    weights = drawn(Served(config, precision, SINGLE_DEVICE, unrolled=True))
    weights.move_as_bits()
    engine = Engine(weights, slots=job.batch, max_length=job.length + job.answer + 1)
    tokens_BT, _ = draw_tokens(config.vocab_size, job.batch, job.length)
    requests = [(tokens_T.tolist(), Sampling(max_tokens=job.answer + 1)) for tokens_T in tokens_BT]

    def turn() -> tuple[dict[str, float], None]:
        begin = time.perf_counter()
        slots = [slot for slot, _ in engine.admit(requests)]
        filled = time.perf_counter()
        for _ in range(job.answer):
            engine.step()
        end = time.perf_counter()
        for slot in slots:
            engine.release(slot)
        return {"prefill": filled - begin, "decode": end - filled}, None

    return turn


def begin(job: Job) -> tuple[About, Take]:
    """
    Raises:
        RuntimeError: JAX found another device than the job's.
    """
    if jax.default_backend() != job.device:
        raise RuntimeError(f"--device {job.device}, and JAX here computes on {jax.default_backend()}")
    config = replace(SPEED_158M, **asdict(job.sizes))
    model = nnx.eval_shape(lambda: Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0)))
    about = {
        "software": f"jax {jax.__version__}",
        "device": jax.devices()[0].device_kind if job.device == "gpu" else processor(),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))),
    }
    return about, (trainer if job.task == "train" else decoder)(config, job)


def most_on_the_gpu() -> int:
    return int(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


if __name__ == "__main__":
    # A rival's process is on the same GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    job, _ = read(sys.argv[1])
    serve(partial(begin, job), most_on_the_gpu if job.device == "gpu" else resident)
