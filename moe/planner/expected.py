"""What a job asks of one device: what its program's text does not say, and what the program is held against."""

import math

from flax import nnx

from moe.model.count import train_flops_per_token
from moe.model.parameter import specs_of
from moe.model.transformer import Transformer
from moe.ops.attention.chunked import BLOCK
from moe.planner.job import Job
from moe.planner.work import Use, Work


def routed_rows(job: Job) -> float:
    """Rows that one grouped product of a device works on, and that one exchange brings it, when the router is even: K
    for each token of the device in a microbatch, shared out over the chunks of the exchange, as far as the capacity
    lets them through."""
    length = 1 if job.kind == "decode" else job.sequence_length
    mesh = job.mesh
    shares = mesh.replica * mesh.data * mesh.expert
    # As parallel.layout.Layout.for_length splits positions, and moe.model.moe_layer gathers them over `tensor`.
    if length % mesh.sequence == 0:
        shares *= mesh.sequence
        if length % (mesh.sequence * mesh.tensor) == 0 and not job.layout.splits_width:
            shares *= mesh.tensor
    router = job.model.router
    kept = min(1.0, router.capacity_factor) if router.capacity_factor is not None else 1.0
    tokens = job.tokens / shares / job.microbatches
    return tokens * router.top_k * kept / job.execution.exchange_chunks


def key_blocks(job: Job) -> float:
    """Blocks of keys that chunked attention meets for a block of queries, in the mean, of whole documents: half of
    them for causality, and all that a cache holds in decoding. Where a ring goes round, in each of its chunks."""
    if job.kind == "decode":
        return math.ceil(job.sequence_length / BLOCK)
    # moe/ops/attention/ring.py cuts the sequence into two chunks for each device.
    chunks = 2 * job.mesh.sequence if job.layout.sequence == "ring" and job.mesh.sequence > 1 else 1
    blocks = chunks * math.ceil(job.sequence_length / chunks / BLOCK)
    return (blocks + 1) / 2 / chunks


def model_flops(job: Job) -> float:
    """Of one device in one step: the products of the model itself and causal attention, nothing twice (see
    moe.model.count). In prefilling the head counts for each token."""
    specs = specs_of(nnx.eval_shape(lambda: Transformer(job.model, job.precision, job.execution, rngs=nnx.Rngs(0))))
    # A token that is decoded sees all S keys, one of a whole sequence half of them in the mean.
    length = 2 * job.sequence_length if job.kind == "decode" else job.sequence_length
    forward_and_backward = train_flops_per_token(job.model, specs, length)
    passes = 3 if job.kind == "train" else 1
    return forward_and_backward * passes / 3 * job.tokens / job.mesh.num_devices


def executed_over_model(work: Work, job: Job) -> float:
    """FLOPs that a device executes for each that the model needs: above 1 by recomputation, by the scores that flash
    attention makes again in its backward pass, and by work on padding."""
    return work.flops / model_flops(job)


def flops_by_use(work: Work) -> dict[Use, float]:
    """Of one device in a step, the largest first."""
    found: dict[Use, float] = {}
    for times, run in work.runs():
        found[run.use] = found.get(run.use, 0.0) + times * run.flops
    return dict(sorted(found.items(), key=lambda item: -item[1]))
