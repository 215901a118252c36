"""How the model is computed: backends and rematerialisation. Choices here never change the mathematics."""

from dataclasses import dataclass
from typing import Literal

from moe.model.config import require_positive


@dataclass(frozen=True)
class Execution:
    """Backends by name. "auto" takes the fastest one measured for the platform (experiments/LOG.md).

    attention: see moe/ops/attention.
    grouped_matmul: see moe/ops/grouped_matmul.
    exchange: how rows travel between devices of the expert axis, see parallel/exchange.
    exchange_chunks: parts into which a device cuts its tokens, so that one part travels while the experts, and the
        shared one, compute another.
    devices_per_node: consecutive devices of the mesh that share a node. The hierarchical exchanges go by it, and the
        bytes that are told.
    remat: what the backward pass recomputes, see moe/model/remat.py.
    """

    attention: Literal["auto", "dense", "chunked", "cudnn"] = "auto"
    grouped_matmul: Literal["auto", "blocked", "ragged", "triton"] = "auto"
    exchange: Literal["padded", "gathered", "ragged", "hierarchical", "ragged_hierarchical"] = "padded"
    exchange_chunks: int = 1
    devices_per_node: int = 8
    remat: Literal["none", "full", "matmuls", "matmuls_on_host"] = "none"

    def __post_init__(self) -> None:
        require_positive(self, "exchange_chunks", "devices_per_node", area="execution.")
