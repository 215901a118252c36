"""What the exchange of rows sends, estimated: for each backend of parallel/exchange, where the router is even."""

import math
from dataclasses import dataclass, replace
from typing import Any

from moe.planner.implementation import Implementation
from moe.planner.sizes import Sizes
from moe.planner.work import Transfer, TransferKind
from parallel.exchange.wire import bytes_of_row

BYTES_OF_WEIGHT = 4
"""Of a router's weight, float32, where it travels with its row."""


@dataclass(frozen=True)
class RowExchange:
    """Of one MoE layer's rows. name: with which its transfers' begin."""

    sizes: Sizes
    how: Implementation
    name: str

    def passes(self) -> float:
        """Rows read and written between the residual stream and the experts, one way."""
        s = self.sizes
        if not self.how.fuses_rows:
            return 2 * (s.rows + 2 * (s.buffer if self.how.full_buffers else s.rows))
        if s.job.execution.exchange == "ragged_hierarchical":
            return s.routed * (1 + 2 * self.reached(s.expert_devices)) + s.rows
        return s.routed + s.rows * (1 if s.experts == 1 else 3)

    def there(self, **flags: Any) -> tuple[Transfer, list[Transfer]]:
        """The chunk for which the experts wait, and the others, which travel while they compute."""
        return self._cut(self._whole("send", flags))

    def back(self, **flags: Any) -> tuple[Transfer, list[Transfer]]:
        """The last chunk, for which what follows waits, and the others."""
        return self._cut(self._whole("bring_back", flags))

    def reached(self, parts: int) -> float:
        """Of `parts` that share out the experts evenly, how many a token's choices fall on, in the mean."""
        E, K = self.sizes.model.num_experts, self.sizes.model.router.top_k
        if not self.how.consecutive:
            return parts * (1 - (1 - 1 / parts) ** K)
        size = E / parts
        turns = range(E // math.gcd(E, K))
        return sum(len({(K * i + k) % E // size for k in range(K)}) for i in turns) / len(turns)

    def _cut(self, exchange: Transfer) -> tuple[Transfer, list[Transfer]]:
        chunks = self.sizes.job.execution.exchange_chunks
        if chunks == 1:
            return exchange, []

        def part(name: str, share: float) -> Transfer:
            inside, across = exchange.inside * share, exchange.across * share
            return replace(exchange, name=f"{exchange.name}.{name}", inside=inside, across=across)

        return part("first", 1 / chunks), [part("rest", 1 - 1 / chunks)]

    def _whole(self, way: str, flags: dict[str, Any]) -> Transfer:
        s, backend = self.sizes, self.sizes.job.execution.exchange
        row = float(bytes_of_row(s.model.d_model, s.job.precision.exchange))
        if way == "send" and s.job.execution.gate == "before" and "hierarchical" not in backend:
            row += BYTES_OF_WEIGHT
        if backend == "padded":
            return self._transfer(way, "all-to-all", s.buffer * row, flags)
        if backend == "ragged":
            return self._transfer(way, "ragged-all-to-all", s.rows * row, flags)
        if backend == "gathered":
            kind: TransferKind = "all-gather" if way == "send" else "reduce-scatter"
            return self._transfer(way, kind, s.expert_devices * s.rows * row, flags)
        return self._hierarchical(way, row, flags)

    def _hierarchical(self, way: str, row: float, flags: dict[str, Any]) -> Transfer:
        """Its two steps as one, inside and across at once."""
        s = self.sizes
        ragged = s.job.execution.exchange == "ragged_hierarchical"
        flat = self._transfer(way, "ragged-all-to-all" if ragged else "all-to-all", 1.0, flags)
        N, near = flat.nodes, flat.devices // flat.nodes
        if ragged:
            nodes, devices = self.reached(N), self.reached(N * near)
            across, inside = s.routed * nodes * (N - 1) / N, s.routed * devices * (near - 1) / near
        else:
            limit = s.block // max(1, s.experts)
            arrived = N * min(s.routed, limit * s.model.num_experts // N)
            block = min(arrived * s.model.router.top_k, limit * N * s.experts)
            across, inside = (N - 1) * arrived / N, float((near - 1) * block)
        return replace(flat, inside=inside * row, across=across * row)

    def _transfer(self, way: str, kind: TransferKind, size: float, flags: dict[str, Any]) -> Transfer:
        name = f"{self.name}.{way}.{'backward' if flags.get('backward') else 'forward'}"
        return self.sizes.transfer(name, "exchange", kind, self.sizes.job.layout.experts, size, **flags)
