"""How the model is computed: backends and rematerialisation. Choices here never change the mathematics."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Execution:
    """Backends by name. "auto" takes the fastest one measured for the platform (experiments/LOG.md).

    attention: see moe/ops/attention.
    grouped_matmul: see moe/ops/grouped_matmul.
    exchange: how rows travel between devices of the expert axis, see parallel/exchange.
    remat: what the backward pass recomputes, see moe/model/remat.py.
    """

    attention: Literal["auto", "dense", "chunked", "cudnn"] = "auto"
    grouped_matmul: Literal["auto", "blocked", "ragged", "triton"] = "auto"
    exchange: Literal["padded", "gathered"] = "padded"
    remat: Literal["none", "full", "matmuls", "matmuls_on_host"] = "none"
