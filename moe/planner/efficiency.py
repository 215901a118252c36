"""Seconds of one kernel and of one transfer on a chip: a roofline with shares of peak that published runs calibrate.

A kernel takes as long as the slower of its arithmetic and its memory traffic. What share of the peaks it reaches is in
`Efficiency`, the same for all chips, but for what the chip's own figures decide: tiles that do not fill its
multiprocessors, power, exponentials of attention, the second-level cache under small tiles.
"""

import math
from dataclasses import dataclass

from moe.ops.grouped_matmul.triton import HIGHEST, columns_of_tile
from moe.planner.channels import Channel, Channels, measured
from moe.planner.chips import Chip
from moe.planner.work import Run, Transfer
from parallel.network.links import Links
from parallel.platform import shared_memory_of

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Output tiles from which a library's product chooses."""
CUTS = (1, 2, 4, 8)
"""Parts into which a library cuts the contracted axis where tiles are few (split-K)."""
PROLOGUE = 128
"""Depth, in elements of the contracted axis, that a tile's first loads and its last stores cost."""
EXPONENTIALS = 16
"""A multiprocessor's exponentials in a clock (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""
HEAD_WIDTH = 128
"""Of an attention whose shape is not known."""
HEAD_STEP = 32
"""Heads are multiplied in widths of this many: of 80 as if they were 96 wide."""
CACHE_RATE = 33
"""Bytes that the second-level cache gives a multiprocessor in a clock: 8.6 TB/s on an H200, where grouped products in
tiles of 64 x 64, 64 x 128 and 128 x 128 took as long as their loads do at that rate (experiments/LOG.md)."""
LOST_CLOCKS = {"s8": 25, "f8": 120}
LOST_CLOCKS_16 = 103
LOST_CLOCKS_OF_BLOCKS = 710
"""Clocks in which a multiprocessor does not multiply, for each million operations of our grouped products: by the
format, in 16 bits and wider, and with a scale for each block of what is summed over. Beside a plain product of equal
shape, on an H200 (experiments/LOG.md): sums in fp8, and those of blocks, go through the ordinary cores. A chip with
slower tensor cores loses as many clocks, and so a smaller share."""
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

    matmul_cool: as `matmul`, where power is no limit. With an A100's last wave (`filling`, 0.95) it gives the 268 of
        312 TFLOP/s measured (stas00/ml-engineering, compute/accelerator, Maximum Achievable Matmul FLOPS); assumed for
        H20, L20, RTX 4090 and V100 as well.
    grouped: a library's grouped product's further share, against a plain product of equal shape. Assumed: a tenth is
        lost at the groups' borders and to their scheduling.
    grouped_own: whether grouped products are those of our kernels (moe/ops/grouped_matmul/triton.py); else a library's.
    attention: share of a product's rate that an attention's products reach, beside the exponentials.
    attention_exposed, attention_exposed_backward: what products do not hide, of a score: exponentials, and in the
        backward pass what softmax's gradient and its sums cost in their place. With both an H200 reaches 465 TFLOP/s
        forward and 424 backward with causal heads of 128 at 4K, as cuDNN was measured (experiments/LOG.md; backward
        FlashAttention-3 has 430, arXiv 2407.08608, figure 6), and an A100 190 backward, as FlashAttention-2 (arXiv
        2307.08691, figure 6).
    attention_scores: scores' time taken for each that the mask lets through. Ours are 2: the call to cuDNN is given
        its mask, with the documents, as an array, and took 1.7 to 2.1 times as long as without on an H200.
    host: of the PCIe rate, reached by copies to the host: 25 of 32 GB/s with pinned memory on PCIe 4.
    launch: seconds between one kernel's end and the next one's beginning on a stream.
    parallel_links: whether collectives inside nodes and across them have a stream each. XLA gives all of them one.
    """

    matmul: float = 0.737
    memory: float = 0.849
    inside: float = 0.802
    across: float = 0.846
    busy: float = 1.0
    error: float = 0.14
    matmul_cool: float = 0.92
    grouped: float = 0.9
    grouped_own: bool = True
    attention: float = 1.0
    attention_exposed: float = 1.6
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
        if efficiency.grouped_own:
            return run.flops / _own_grouped_rate(run, chip, rate * ceiling)
        return run.flops / (rate * ceiling * efficiency.grouped * _filling_of_groups(run, chip, TILES))
    if run.kind == "attention":
        flops, width = run.flops * efficiency.attention_scores, _head_width(run)
        exponentials = flops * _exposed_scores(run, efficiency) / (EXPONENTIALS * chip.sms * chip.clock * 1e9)
        flops *= math.ceil(width / HEAD_STEP) * HEAD_STEP / width
        return flops / (rate * ceiling * efficiency.attention) + exponentials
    return run.flops / (chip.fp32 * efficiency.memory)


def _exposed_scores(run: Run, efficiency: Efficiency) -> float:
    """Exponentials that products do not hide, for each of the attention's FLOPs: a score takes two products of the
    head's width, and five in the backward pass."""
    width = _head_width(run)
    if run.backward and not run.recomputed:
        return efficiency.attention_exposed_backward / (10 * width)
    return efficiency.attention_exposed / (4 * width)


def _head_width(run: Run) -> int:
    return run.shape[3] if run.shape else HEAD_WIDTH


def _own_grouped_rate(run: Run, chip: Chip, rate: float) -> float:
    """Operations/s of our kernels: `rate`, by what tiles and lost clocks leave of it; no more than the second-level
    cache feeds their tiles."""
    eight_bits = run.format.startswith(("f8", "s8"))
    size = 1 if eight_bits else 4 if run.format == "f32" else 2
    columns = 128
    if run.shape is not None and not eight_bits and run.shape[2] % 16 == 0:
        columns = columns_of_tile(run.shape[2], 128, shared_memory_of(chip.compute_capability))
    rate *= _filling_of_groups(run, chip, ((HIGHEST, columns),), cuts=(1,))
    clocks = chip.sms * chip.clock * 1e9
    lost = LOST_CLOCKS_OF_BLOCKS if run.block_scaled else LOST_CLOCKS.get(run.format[:2], LOST_CLOCKS_16)
    rate = 1 / (1 / rate + 1e-6 * lost / clocks)
    operations_per_byte = 2 * HIGHEST * columns / (size * (HIGHEST + columns))
    return min(rate, operations_per_byte * CACHE_RATE * clocks)


def _filling_of_groups(run: Run, chip: Chip, tiles: tuple[tuple[int, int], ...], cuts: tuple[int, ...] = CUTS) -> float:
    """`filling` of a grouped product with equal groups."""
    if run.shape is None:
        return 1.0
    experts, rows, n, k = run.shape
    return filling((experts, math.ceil(rows / experts), n, k), chip.sms, tiles, cuts)


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
        # Assumed: a smaller tile reads its operands more often for each product.
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
