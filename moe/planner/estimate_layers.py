"""What one group of layers holds on a device, from the settings alone: for the backward pass, and while it computes.

Counted in bytes. Each term stands for values that XLA was seen to hold at the peak of compiled programs
(moe/planner/buffers.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe.planner.job import Job
from moe.planner.sizes import Sizes
from moe.train.pipelined import pipelined_stack

Group = tuple[bool, ...]
"""Consecutive layers that share keys and values: whether each is dense."""


@dataclass(frozen=True)
class Layers:
    """Of one microbatch. sizes: of one device."""

    sizes: Sizes

    @property
    def job(self) -> Job:
        return self.sizes.job

    def groups(self) -> Iterator[tuple[Group, int]]:
        """(a group, how many of its kind this device computes in one go)."""
        stages = self.job.mesh.stage
        pipelined = pipelined_stack(self.job.model) if stages > 1 else -1
        for number, (group, repeat) in enumerate(self.job.model.layer_groups()):
            yield group, repeat // (stages * self.job.virtual_stages) if number == pipelined else repeat

    @property
    def stream(self) -> int:
        """Numbers of x_BTD."""
        return self.sizes.stream * self.sizes.model.d_model

    @property
    def heads(self) -> tuple[int, int]:
        """Numbers of q_BTNH and of k_BSMH."""
        model = self.sizes.model
        per_head = self.sizes.tokens * model.head_dim
        return per_head * model.num_heads // self.sizes.tensor, per_head * model.num_kv_heads // self.sizes.tensor

    def width(self, dense: bool) -> int:
        """Numbers of the hidden activation of a dense layer, or of the shared experts."""
        model = self.sizes.model
        width = model.d_dense if dense else model.num_shared_experts * model.d_expert
        return self.sizes.tokens * width // self.sizes.tensor

    @property
    def routed(self) -> tuple[int, int, int]:
        """Numbers of the rows that a device sends [R, D], of the buffer in which rows arrive [S, D], and of its
        experts' hidden activation [S, F]."""
        model, sizes = self.sizes.model, self.sizes
        sent = min(sizes.rows, sizes.buffer)
        return sent * model.d_model, sizes.buffer * model.d_model, sizes.buffer * sizes.expert_width

    def kept(self, group: Group) -> int:
        """What the scan over groups saves of one for the backward pass, by what is computed again (moe/model/remat.py);
        but for the group's weights."""
        remat = self.job.execution.remat
        inputs = self.sizes.compute * self.stream
        if remat == "none":
            return sum(self._everything(dense, first=place == 0) for place, dense in enumerate(group))
        if remat == "matmuls":
            return inputs + self.products(group)
        if remat == "matmuls_fp8":
            return inputs + self._products_in_fp8(group)
        return inputs

    def products(self, group: Group) -> int:
        """Outputs of the products with weights (`jax.checkpoint_policies.dots_with_no_batch_dims_saveable`). Those with
        the experts' weights are grouped, and no such products."""
        c, model = self.sizes.compute, self.sizes.model
        q, kv = self.heads
        found = 2 * c * kv
        for dense in group:
            width = self.width(dense)
            found += c * q + c * self.stream + 2 * c * width + (c * self.stream if width else 0)
            found += 0 if dense else 4 * self.sizes.stream * model.num_experts
        return found

    def _products_in_fp8(self, group: Group) -> int:
        """Of `products`, those in bfloat16 in a byte a number and four a vector."""
        model, (q, kv) = self.sizes.model, self.heads
        logits = sum(4 * self.sizes.stream * model.num_experts for dense in group if not dense)
        vectors = 2 * kv // model.head_dim
        for dense in group:
            vectors += q // model.head_dim + self.sizes.stream
            vectors += 2 * self.sizes.tokens + self.sizes.stream if self.width(dense) else 0
        return logits + (self.products(group) - logits) // self.sizes.compute + 4 * vectors

    def _everything(self, dense: bool, *, first: bool) -> int:
        """All that the backward pass of a layer reads.

        A norm keeps what it takes and what it gives; a SwiGLU its two products and the hidden activation. Attention
        keeps q, k, v and its output, twice; the router a few tables in float32; the experts' exchange the rows that
        came, and where results are weighed after they come back, those; in the hierarchical exchanges these are weighed
        on the experts' device.
        """
        c, model = self.sizes.compute, self.sizes.model
        norm = 2 * c
        q, kv = self.heads
        has_norm = model.qk_norm != "none"
        found = 2 * norm * self.stream + (norm * has_norm + 3 * c) * q + 3 * c * self.width(dense)
        if first:
            found += (c * has_norm + 2 * c) * kv
        if not dense:
            sent, rows, hidden = self.routed
            found += 4 * 4 * self.sizes.stream * model.num_experts
            found += 3 * c * hidden + c * rows
            if self.job.execution.gate == "after":
                found += c * (rows if "hierarchical" in self.job.execution.exchange else sent)
        return found

    def _recomputed(self, dense: bool) -> int:
        """Of a layer that is computed again and waits for its turn: XLA keeps products, and computes what lies between
        them where it is used."""
        c = self.sizes.compute
        q, kv = self.heads
        found = 4 * c * q + 3 * c * kv + 4 * c * self.stream + 2 * c * self.width(dense)
        if not dense:
            _, rows, hidden = self.routed
            found += 2 * c * hidden + c * rows
        return found

    def backward(self, group: Group) -> int:
        """The working set amid the backward pass of a group's last layer, while the layers before it wait; but for
        weights and their gradients.

        Of the experts either the gradients of both products and of the hidden activation live beside it, or, a moment
        later, what goes back to the rows from both products, before and after the padding's rows are zeroed.
        """
        c, dense = self.sizes.compute, group[-1]
        q, kv = self.heads
        own = 4 * c * q + 3 * c * kv + 5 * c * self.stream + 5 * c * self.width(dense)
        if not dense:
            _, rows, hidden = self.routed
            own += max(4 * c * hidden + 3 * c * rows, 3 * c * hidden + 7 * c * rows)
        return own + sum(self._recomputed(each) for each in group[:-1])

    def forward(self, group: Group) -> int:
        """The working set of a layer that nothing goes back through: attention's; or the experts' two products beside
        their rows and the shared experts' hidden activation, which takes one product's place; or the rows on their way,
        as they are sent and as they arrive."""
        c, dense = self.sizes.compute, group[-1]
        q, _ = self.heads
        own = 3 * c * q + 3 * c * self.stream + 3 * c * self.width(dense)
        if dense:
            return own
        _, rows, hidden = self.routed
        return max(own, 2 * c * hidden + c * rows + c * self.width(dense), 2 * c * rows)
