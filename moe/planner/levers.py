"""The levers that let a model train on what is at hand, each as what changes when it alone is turned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe.planner.equal_loss import SOURCE, dense_twin
from moe.planner.job import Job
from parallel.blocks import EIGHT_BIT
from parallel.layout import FSDP_AXES
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

Turned = Literal["off", "on"]


@dataclass(frozen=True)
class Variant:
    """A recipe with one lever turned.

    turned: "off" where the recipe uses the lever, "on" where it does not.
    instead: what stands in its place.
    settings: of the experiment, by dotted path. cluster: of the cluster, by field.
    """

    lever: str
    turned: Turned
    instead: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)


def variants(job: Job, cluster: Cluster, active: int) -> tuple[Variant, ...]:
    """One for each lever that the recipe can turn, those turned off first.

    Args:
        active: parameters of the model that take part in one token.
    """
    found = (lever(job, cluster, active) for lever in LEVERS)
    turned = (variant for variant in found if variant is not None)
    return tuple(sorted(turned, key=lambda variant: variant.turned))


def _experts(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if not job.model.has_moe:
        return None
    dense = dense_twin(job.model, active, job.steps * job.tokens)
    mesh = _moved(job, "expert", 1)
    instead = f"dense, of equal loss by {SOURCE}: d_dense={dense.d_dense}"
    return Variant("mixture of experts", "off", instead, {"model": dense, "mesh": mesh})


def _bfloat16(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.precision.compute != "bfloat16":
        settings = _formats("bfloat16", ("compute", "exchange"))
        return Variant("bfloat16", "on", "products and exchange in bfloat16", settings)
    names = ("parameters", "compute", "gradients", "exchange")
    # Flash attention takes 16-bit inputs only.
    settings = _formats("float32", names) | {"execution.attention": "chunked"}
    if job.precision.matmuls is not None:
        settings |= _WIDE_PRODUCTS
    # Float32 parameters lose nothing that these would keep.
    if job.optimizer.master_weights:
        settings["optimizer.master_weights"] = False
    if job.optimizer.rounding != "nearest":
        settings["optimizer.rounding"] = "nearest"
    return Variant("bfloat16", "off", "float32 throughout, attention in chunks", settings)


def _formats(format: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {f"precision.{name}": format for name in names}


_WIDE_PRODUCTS: dict[str, Any] = {"precision.matmuls": None, "precision.scaling": "tensor"}


def _products(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.kind != "train" or job.precision.quantized:
        return None
    if job.precision.matmuls is not None:
        return Variant("8-bit products", "off", f"products in {job.precision.compute}", _WIDE_PRODUCTS)
    settings = {"precision.matmuls": "fp8", "precision.scaling": "row"}
    return Variant("8-bit products", "on", "products in fp8, scaled by rows", settings)


def _wire(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if not job.model.has_moe or math.prod(job.mesh.sizes[axis] for axis in job.layout.experts) == 1:
        return None
    if job.precision.exchange in EIGHT_BIT:
        return Variant("8-bit exchange", "off", "rows in bfloat16", {"precision.exchange": "bfloat16"})
    return Variant("8-bit exchange", "on", "rows in fp8", {"precision.exchange": "fp8"})


def _quantization(job: Job, cluster: Cluster, active: int) -> Variant | None:
    """Of weights that nothing trains."""
    if job.kind == "train" and job.lora is None:
        return None
    if job.precision.quantized:
        return Variant("quantization", "off", "weights in bfloat16", {"precision.frozen": "bfloat16"})
    return Variant("quantization", "on", "weights in int8", {"precision.frozen": "int8"})


def _sharded_parameters(job: Job, cluster: Cluster, active: int) -> Variant | None:
    mesh = job.mesh
    if mesh.data == 1:
        return None
    copies = replace(mesh, data=1, replica=mesh.replica * mesh.data)
    return Variant("FSDP", "off", f"ZeRO-1 and {copies.replica} copies", {"mesh": copies, "layout.zero": 1})


def _zero(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.layout.zero == 1:
        return Variant("ZeRO-3", "on", "parameters and gradients shared out as well", {"layout.zero": 3})
    return Variant("ZeRO-3", "off", "ZeRO-1: parameters and gradients whole", {"layout.zero": 1})


def _axis(name: str, axis: str, size: Callable[[Job, Cluster], int]) -> "Lever":
    """A mesh axis: its devices go to `data` or `replica`, or come from there."""

    def lever(job: Job, cluster: Cluster, active: int) -> Variant | None:
        present = job.mesh.sizes[axis]
        wanted = 1 if present > 1 else size(job, cluster)
        if wanted == present:
            return None
        settings: dict[str, Any] = {"mesh": _moved(job, axis, wanted)}
        if axis == "stage":
            parts = 2 * wanted if wanted > 1 else 1
            settings |= {"training.microbatches": parts, "training.virtual_stages": 1}
        turned: Turned = "off" if wanted == 1 else "on"
        return Variant(name, turned, f"{settings['mesh'].text}", settings)

    return lever


def _moved(job: Job, axis: str, size: int) -> MeshConfig:
    """The mesh with `size` devices along `axis`. `data` gives or takes the difference, as far as the model's width
    divides over all that shares out parameters, and `replica` the rest."""
    mesh = job.mesh
    free = mesh.replica * mesh.data * mesh.sizes[axis] // size
    sizes = mesh.sizes | {axis: size, "data": 1, "replica": 1}
    others = math.prod(sizes[each] for each in FSDP_AXES)
    most = max(mesh.data, free // mesh.replica)
    fitting = (n for n in range(1, most + 1) if free % n == 0 and job.model.d_model % (n * others) == 0)
    data = max(fitting, default=1)
    return MeshConfig(**(sizes | {"data": data, "replica": free // data}))


def _recomputation(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.kind != "train":
        return None
    if job.execution.remat == "none":
        return Variant("recomputation", "on", "each layer computed again", {"execution.remat": "full"})
    return Variant("recomputation", "off", "all activations kept", {"execution.remat": "none"})


def _shared_layers(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.model.cla_factor > 1:
        return Variant("CLA", "off", "keys and values in each layer", {"model.cla_factor": 1})
    return None


def _shared_heads(job: Job, cluster: Cluster, active: int) -> Variant | None:
    heads = job.model.num_heads
    if job.model.num_kv_heads < heads:
        return Variant("GQA", "off", f"MHA: {heads} key-value heads", {"model.num_kv_heads": heads})
    return None


def _hierarchical(job: Job, cluster: Cluster, active: int) -> Variant | None:
    name = job.execution.exchange
    turned: dict[str, tuple[Turned, str]] = {
        "padded": ("on", "hierarchical"), "ragged": ("on", "ragged_hierarchical"), "hierarchical": ("off", "padded"),
        "ragged_hierarchical": ("off", "ragged"),
    }  # fmt: skip
    if cluster.nodes == 1 or name not in turned or not job.model.has_moe:
        return None
    way, other = turned[name]
    return Variant("hierarchical exchange", way, other.replace("_", " "), {"execution.exchange": other})


def _rdma(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if cluster.nodes == 1 or not cluster.rdma:
        return None
    if cluster.gpudirect:
        return Variant("GPUDirect RDMA", "off", "staged through the host", cluster={"gpudirect": False})
    return Variant("GPUDirect RDMA", "on", "network cards reach the GPUs' memory", cluster={"gpudirect": True})


def _offload(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.kind != "train":
        return None
    if job.layout.optimizer_states == "host":
        return Variant("offload", "off", "optimizer states on the GPU", {"layout.optimizer_states": "device"})
    return Variant("offload", "on", "optimizer states on the host", {"layout.optimizer_states": "host"})


def _small_states(job: Job, cluster: Cluster, active: int) -> Variant | None:
    if job.kind != "train" or job.optimizer.kind == "adafactor":
        return None
    if job.optimizer.states in EIGHT_BIT:
        return Variant("8-bit optimizer", "off", "optimizer states in float32", {"optimizer.states": "float32"})
    return Variant("8-bit optimizer", "on", "optimizer states in int8", {"optimizer.states": "int8"})


def _tensor(job: Job, cluster: Cluster) -> int:
    return _largest(job, cluster.gpus_per_node, job.model.num_kv_heads)


def _sequence(job: Job, cluster: Cluster) -> int:
    return _largest(job, cluster.gpus_per_node, job.model.num_kv_heads // job.mesh.tensor)


def _stages(job: Job, cluster: Cluster) -> int:
    groups = job.model.num_layers // job.model.cla_factor
    return _largest(job, 4, groups) if job.kind == "train" else 1


def _largest(job: Job, limit: int, size: int) -> int:
    """Devices up to `limit` that divide `size` and can be taken from `data` and `replica`."""
    free = job.mesh.replica * job.mesh.data
    return max(n for n in range(1, limit + 1) if size % n == 0 and free % n == 0)


def _expert_devices(job: Job, cluster: Cluster) -> int:
    return _largest(job, job.model.num_experts, job.model.num_experts) if job.model.has_moe else 1


Lever = Callable[[Job, Cluster, int], Variant | None]
LEVERS: tuple[Lever, ...] = (
    _experts,
    _bfloat16,
    _products,
    _wire,
    _quantization,
    _sharded_parameters,
    _zero,
    _axis("expert parallelism", "expert", _expert_devices),
    _axis("tensor parallelism", "tensor", _tensor),
    _axis("context parallelism", "sequence", _sequence),
    _axis("pipeline", "stage", _stages),
    _recomputation,
    _offload,
    _small_states,
    _shared_layers,
    _shared_heads,
    _hierarchical,
    _rdma,
)
