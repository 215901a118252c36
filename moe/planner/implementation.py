"""How a framework computes what the settings leave open. Estimates need it: for our own programs it is what XLA makes
of them, and for published figures what the code that was measured does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """
    prefetches: whether a layer's weights are gathered, and the gradients of the layer after summed, while a layer
        computes.
    hides_tensor: whether what `tensor` exchanges travels while the product beside it computes, but for the experts'.
    scatters: whether gradients are summed by a reduce-scatter whatever the layout. Ours are where each device keeps a
        part and no other devices keep copies; else XLA sums all of them on all devices.
    sums_once: whether gradients are summed once a step, in float32 and beside the last microbatch, instead of after
        each; parameters are then gathered beside the first one.
    hides_stages: whether what stages hand on travels while the next microbatch computes.
    lockstep: whether a pipeline is ours (parallel/pipeline.py): the backward pass begins with the stage's forward pass,
        and layers outside the longest run of equal ones are computed by all stages in every tick.
    deals_head: whether all stages of a pipeline share the head's work, instead of the last having all of it.
    whole_table: whether tokens are looked up in the whole embedding, which `tensor` splits, and its gradient is summed
        whole.
    full_buffers: whether the kernels between exchange and experts work on buffers for the most rows that could come.
    fuses_rows: whether rows are put in order by one kernel before they travel, and by one after it where a device has
        several experts; a hierarchical exchange then carries a token once to each device that it goes to. Ours are
        gathered three times each way, in buffers.
    gate_passes: the same of the experts' hidden activations, between the products.
    passes: memory traffic of all kernels that only move numbers, in units of what is estimated.
    consecutive: whether each token's experts follow each other, as a benchmark's balanced router has it, instead of
        being any: then a token travels to few devices.
    scores: of the attention's products, in units of what heads and their width say: for attentions that the model's
        configuration cannot describe.
    """

    prefetches: bool = False
    hides_tensor: bool = False
    scatters: bool = False
    sums_once: bool = False
    hides_stages: bool = False
    lockstep: bool = True
    deals_head: bool = True
    whole_table: bool = True
    full_buffers: bool = True
    fuses_rows: bool = False
    gate_passes: float = 5.0
    passes: float = 1.0
    consecutive: bool = False
    scores: float = 1.0


OURS = Implementation()
