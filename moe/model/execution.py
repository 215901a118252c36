"""How the model is computed: backends and rematerialisation. Choices here change nothing but rounding."""

from dataclasses import dataclass
from typing import Literal

from moe.model.config import ConfigError, require_choice, require_positive
from moe.model.precision import Precision


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
    gate: whether an expert's output is multiplied by the router's weight "after" the exchange has brought it back, or
        its hidden activation is, "before" the down projection. Then the weights travel with the rows, 4 bytes each, and
        the backward pass is saved no output rows.
    remat: what the backward pass recomputes, see moe/model/remat.py.
    scan_layers: whether a training step computes the layers in a loop, which is compiled once for all of them. Without
        one each is compiled by itself, and what the backward pass is kept, and gradients, are not copied into and out
        of stacks for all layers.
    """

    attention: Literal["auto", "dense", "chunked", "cudnn"] = "auto"
    grouped_matmul: Literal["auto", "blocked", "ragged", "triton"] = "auto"
    exchange: Literal["padded", "gathered", "ragged", "hierarchical", "ragged_hierarchical"] = "padded"
    exchange_chunks: int = 1
    devices_per_node: int = 8
    gate: Literal["after", "before"] = "after"
    remat: Literal["none", "full", "matmuls", "matmuls_fp8", "matmuls_on_host"] = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "exchange_chunks", "devices_per_node", area="execution.")
        require_choice(self, "gate", ("after", "before"), area="execution.")


def plain_execution(precision: Precision) -> Execution:
    """The fastest backends that have the formats of a precision, wherever the model was trained."""
    return Execution(attention="auto" if precision.softmax == "float32" else "dense")


def check_execution(execution: Execution, precision: Precision) -> None:
    """
    Raises:
        ConfigError: a number format that a backend does not have.
    """
    if precision.softmax != "float32" and execution.attention != "dense":
        raise ConfigError(
            f"precision.softmax={precision.softmax!r} with execution.attention={execution.attention!r}: kernels that "
            "never hold all scores have float32 ones; set execution.attention='dense', or softmax='float32'"
        )
    if execution.remat == "matmuls_fp8" and precision.compute != "bfloat16":
        raise ConfigError(
            f"execution.remat='matmuls_fp8' with precision.compute={precision.compute!r}: only bfloat16 is kept in "
            "8 bits; set precision.compute='bfloat16', or remat='matmuls'"
        )
