"""Seconds of one kernel and of one transfer on a chip: a roofline with shares of peak that published runs calibrate.

A kernel takes as long as the slower of its arithmetic and its memory traffic. What share of the peaks it reaches is in
`Efficiency`, the same for all chips, but for what the chip's own figures decide: tiles that do not fill its
multiprocessors, power, exponentials of attention, the second-level cache under small tiles.
"""

import math
from dataclasses import dataclass

from moe.planner.channels import Channel, Channels, measured
from moe.planner.chips import Chip
from moe.planner.work import Run, Transfer
from parallel.network.links import Links

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles from which a library's product chooses (CUTLASS's default configurations)."""
CUTS = (1, 2, 4, 8)
"""Parts into which a library cuts the contracted axis where tiles are few (split-K)."""
PROLOGUE = 128
"""Depth, in elements of the contracted axis, that a tile's first loads and its last stores cost."""
EXPONENTIALS = 16
"""A multiprocessor's exponentials in a clock (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""
HEAD_WIDTH = 128
"""Of an attention whose shape is not known."""
CACHE_RATE = 30
"""Bytes that the second-level cache gives a multiprocessor in a clock: about 7 TB/s on an H100 (Chips and Cheese,
Nvidia's H100, 2023, measured 5.7 TB/s on the 114 multiprocessors of the PCIe model), half of what the bus could."""
HOT = 1.0
"""Watts for each bf16 TFLOP/s, below which a chip lowers its clock under products: 0.7 on an H100, 0.4 on a B200, 1.3
on an A100, 2.7 on an H20."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of peak, the same for every chip; shapes and the chip's own figures modify them in the functions below.

    Fitted on published training speeds, all of H100s (`python -m moe.planner.calibrate`):

    matmul: a large product's share of the tensor cores' peak, on a chip that lowers its clock under products.
    memory: of the memory's bandwidth, reached by kernels that only move numbers.
    inside, across: of a link's rate, reached by a collective inside a node, and across nodes.
    busy: share of the time of arithmetic in which the device has work. In the rest it waits for a host that launches
        the kernels one by one: fitted for eager PyTorch (`calibrate.predict_row`), 1 for a compiled program.
    error: relative, of a predicted speed: the largest one of leave-one-out.

    Measured by others, or counted:

    matmul_cool: as `matmul`, where power is no limit: 285 of an A100's 312 TFLOP/s for large products (CUTLASS's
        profiler); assumed for H20, L20, RTX 4090 and V100 as well.
    grouped: a grouped product's further share, against a plain product of equal shape: TransformerEngine's and
        CUTLASS's lose about a tenth to the groups' borders and their scheduling.
    grouped_tile: rows and columns of the grouped kernel's output tile, ours (moe/ops/grouped_matmul/triton.py); None
        for a library's, which chooses.
    attention: share of a product's rate that an attention's products reach, beside the exponentials.
    attention_exposed, attention_exposed_backward: what products do not hide, of a score: exponentials, and in the
        backward pass what softmax's gradient and its sums cost in their place. With both an H100 reaches 580 TFLOP/s
        forward and 430 backward, as FlashAttention-3 does for causal heads of 128 at 4K (arXiv 2407.08608, figures 5
        and 6), and an A100 190 backward, as FlashAttention-2 (arXiv 2307.08691, figure 6).
    attention_scores: scores computed for each that the mask lets through. Ours are 2: the call to cuDNN is given its
        mask, with the documents, as an array, so no block is skipped; a kernel that knows of causality has 1.
    host: of the PCIe rate, reached by copies to the host: 25 of 32 GB/s with pinned memory on PCIe 4.
    launch: seconds between one kernel's end and the next one's beginning on a stream.
    parallel_links: whether collectives inside nodes and across them have a stream each. XLA gives all of them one.
    """

    matmul: float = 0.735
    memory: float = 0.849
    inside: float = 0.802
    across: float = 0.846
    busy: float = 1.0
    error: float = 0.14
    matmul_cool: float = 0.92
    grouped: float = 0.9
    grouped_tile: tuple[int, int] | None = (64, 128)
    attention: float = 1.0
    attention_exposed: float = 0.75
    attention_exposed_backward: float = 5.0
    attention_scores: float = 2.0
    host: float = 0.8
    launch: float = 3e-6
    parallel_links: bool = False


CALIBRATED = Efficiency()
"""Of this project's own programs, as XLA compiles them."""


def peak(chip: Chip, format: str) -> float:
    """Operations/s of products of `format`. Where the chip lacks it, of the format to which XLA converts: Volta has no
    bfloat16, and XLA computes such products in float32, from copies in that format."""
    rates = {
        "bf16": chip.bf16, "f16": chip.fp16, "f8e4m3fn": chip.fp8, "f8e5m2": chip.fp8, "s8": chip.int8, "u8": chip.int8,
        "tf32": chip.tf32,
    }  # fmt: skip
    wider = chip.bf16 if format.startswith("f8") else 0
    return rates.get(format, 0) or wider or chip.fp32


def run_seconds(run: Run, chip: Chip, efficiency: Efficiency, load: float = 1.0) -> float:
    """Without the gap before the next kernel.

    Args:
        load: rows of the experts, in units of what an even router gives this device.
    """
    scale = load if run.use == "experts" else 1.0
    memory = run.bytes * scale / (chip.bandwidth * efficiency.memory)
    return max(memory, _arithmetic_seconds(run, chip, efficiency) * scale)


def _arithmetic_seconds(run: Run, chip: Chip, efficiency: Efficiency) -> float:
    if not run.flops:
        return 0.0
    rate = peak(chip, run.format)
    ceiling = efficiency.matmul if chip.watts / (chip.bf16 / 1e12 or chip.fp16 / 1e12) < HOT else efficiency.matmul_cool
    if run.kind == "matmul":
        return run.flops / (rate * ceiling * (filling(run.shape, chip.sms, TILES) if run.shape else 1.0))
    if run.kind == "grouped_matmul":
        return run.flops / (ceiling * efficiency.grouped * _grouped_rate(run, chip, efficiency, rate))
    if run.kind == "attention":
        flops = run.flops * efficiency.attention_scores
        exponentials = flops * _exposed_scores(run, efficiency) / (EXPONENTIALS * chip.sms * chip.clock * 1e9)
        return flops / (rate * ceiling * efficiency.attention) + exponentials
    return run.flops / (chip.fp32 * efficiency.memory)


def _exposed_scores(run: Run, efficiency: Efficiency) -> float:
    """Exponentials that products do not hide, for each of the attention's FLOPs: a score takes two products of the
    head's width, and five in the backward pass."""
    width = run.shape[3] if run.shape else HEAD_WIDTH
    if run.backward and not run.recomputed:
        return efficiency.attention_exposed_backward / (10 * width)
    return efficiency.attention_exposed / (4 * width)


def _grouped_rate(run: Run, chip: Chip, efficiency: Efficiency, rate: float) -> float:
    """Operations/s: `rate` by how the tiles fill the chip; of our own kernel no more than the second-level cache feeds
    its tiles."""
    tile = efficiency.grouped_tile
    if run.shape is not None:
        experts, rows, n, k = run.shape
        each = (experts, math.ceil(rows / experts), n, k)
        rate *= filling(each, chip.sms, (tile,), cuts=(1,)) if tile else filling(each, chip.sms, TILES)
    if tile is None:
        return rate
    size = 1 if run.format.startswith(("f8", "s8")) else 4 if run.format == "f32" else 2
    operations_per_byte = 2 * tile[0] * tile[1] / (size * (tile[0] + tile[1]))
    return min(rate, operations_per_byte * CACHE_RATE * chip.sms * chip.clock * 1e9)


def filling(
    shape: tuple[int, int, int, int], sms: int, tiles: tuple[tuple[int, int], ...], cuts: tuple[int, ...] = CUTS
) -> float:
    """Share of the multiprocessors' time in which they multiply numbers that are asked for, with the best tile.

    Tiles are computed in waves of one a multiprocessor, and the last wave is not full; a tile reaches beyond the
    matrix's edge; each begins and ends without products.

    Args:
        shape: (batch, m, n, k).
    """
    batch, m, n, k = shape
    best = 0.0
    for rows, columns in tiles:
        # A tile of half the area reads as many bytes again for each product: a tenth slower by CUTLASS's profiler.
        slower = 1.0 if rows * columns >= 256 * 128 else 0.95 if rows * columns >= 128 * 128 else 0.85
        slower = slower if len(tiles) > 1 else 1.0
        for parts in cuts:
            if k // parts < 512 and parts > 1:
                break
            count = batch * parts * math.ceil(m / rows) * math.ceil(n / columns)
            waves = math.ceil(count / sms)
            spent = waves * sms * rows * columns * (k / parts + PROLOGUE)
            best = max(best, slower * batch * m * n * k / spent)
    return best


def transfer_seconds(
    transfer: Transfer, derived: Channels, efficiency: Efficiency, links: Links | None = None, load: float = 1.0
) -> tuple[float, float]:
    """(inside the node or to the host, across nodes), seconds; both go on at once, and the longer one counts.

    Args:
        load: as of `run_seconds`. A padded exchange sends its blocks full whatever the load.
    """
    scale = load if transfer.kind == "ragged-all-to-all" else 1.0
    if transfer.kind in ("to-host", "to-device"):
        return _seconds(transfer.inside, derived.host, efficiency.host), 0.0
    near, far = (measured(links, transfer, link) for link in ("inside_node", "across_nodes"))
    inside = _seconds(transfer.inside * scale, near or derived.inside, 1.0 if near else efficiency.inside)
    across = _seconds(transfer.across * scale, far or derived.across, 1.0 if far else efficiency.across)
    return inside, across


def _seconds(sent: float, channel: Channel, share: float) -> float:
    return channel.latency + sent / (channel.bandwidth * share) if sent else 0.0
