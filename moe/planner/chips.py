"""Chips: what is known of each, with its source. One entry a chip; an experiment file can make its own."""

from dataclasses import dataclass, replace
from typing import Literal

from parallel.network.cluster import GpuLink
from parallel.platform import SHARED_MEMORY

Export = Literal["restricted", "notified", "free"]


class ChipError(ValueError):
    """A chip that is not known, or a description that is none: names the field, the value, and what would do."""


@dataclass(frozen=True)
class Chip:
    """Rates are dense: without 2:4 sparsity. 0 where the chip does not have the format.

    name: as `--chip` takes it. device: as NVIDIA's driver names it.
    capability: CUDA's compute capability.
    sms: streaming multiprocessors. clock: boost, GHz. l2: bytes.
    memory: bytes that a program can be given. bandwidth: of the memory, bytes/s.
    bf16, fp16, fp8, int8, tf32, fp32: of the tensor cores (fp32: of the ordinary ones), operations/s.
    link: how the GPUs of a node are joined; link_rate: bytes/s per direction of one GPU.
    pcie_rate: bytes/s per direction of its PCIe slot, by which it reaches its host.
    watts: of the board at full load. die: mm², of all dies together.
    sources: where the figures stand.

    Of a datasheet's peak `predict` takes shares (`moe/planner/efficiency.py`); XLA's compiler asks `target_config`.
    """

    name: str
    device: str
    capability: tuple[int, int]
    sms: int
    clock: float
    l2: int
    memory: int
    bandwidth: float
    bf16: float
    fp16: float
    fp8: float
    int8: float
    tf32: float
    fp32: float
    link: GpuLink
    link_rate: float
    pcie_rate: float
    watts: float
    die: float
    sources: tuple[str, ...]

    @property
    def tpp(self) -> float:
        """Total processing performance (ECCN 3A090, technical notes): operations/s in 1e12 times the bits of an
        operand, of the format in which that is largest."""
        return max(16 * self.bf16, 16 * self.fp16, 8 * self.fp8, 8 * self.int8) / 1e12

    @property
    def performance_density(self) -> float:
        """TPP for each mm² (ECCN 3A090, technical notes)."""
        return self.tpp / self.die

    @property
    def export(self) -> Export:
        """What ECCN 3A090 of the Export Administration Regulations (88 FR 73458, 2023-10-25) says of a chip with these
        figures that is made for data centers: paragraph a is "restricted" (a licence is needed), paragraph b "notified"
        (the authorities are told before), and the rest is "free". The rule alone: not what was decided for one chip."""
        tpp, density = self.tpp, self.performance_density
        if tpp >= 4800 or (tpp >= 1600 and density >= 5.92):
            return "restricted"
        if (tpp >= 2400 and density >= 1.6) or (tpp >= 1600 and density >= 3.2):
            return "notified"
        return "free"

    @property
    def compute_capability(self) -> str:
        """As JAX's devices spell it."""
        return "{}.{}".format(*self.capability)

    @property
    def target_config(self) -> str:
        """stream_executor.GpuTargetConfigProto as text: what XLA's compiler asks about the chip."""
        # CUDA 13 assembles for no older chip than Turing, which has no bfloat16 either.
        major, minor = max(self.capability, (7, 5))
        per_block = SHARED_MEMORY[self.compute_capability]
        # The runtime keeps a KiB of each block for itself from Ampere on.
        per_core = per_block + (1024 if self.capability >= (8, 0) else 0)
        threads = 1536 if self.capability == (8, 9) else 2048
        fpus = 64 if self.capability in ((7, 0), (8, 0)) else 128
        features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  threads_per_core_limit: {threads} core_count: {self.sms} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device}"
"""


H100 = Chip(
    name="h100",
    device="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    sms=132,
    clock=1.98,
    l2=52_428_800,
    memory=84_942_979_072,
    bandwidth=3.35e12,
    bf16=989.4e12,
    fp16=989.4e12,
    fp8=1978.9e12,
    int8=1978.9e12,
    tf32=494.7e12,
    fp32=66.9e12,
    link="nvlink",
    link_rate=450e9,
    pcie_rate=64e9,
    watts=700,
    die=814,
    sources=(
        "NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 2: H100 SXM5",
        "openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb: memory, clock, L2",
    ),
)

H800 = replace(
    H100,
    name="h800",
    device="NVIDIA H800",
    link_rate=200e9,
    sources=(
        *H100.sources,
        "DeepSeek-V3, arXiv 2412.19437, section 3.1; arXiv 2505.09343, section 4.1: NVLink of 400 GB/s",
    ),
)

H200 = replace(
    H100,
    name="h200",
    device="NVIDIA H200 141GB HBM3e",
    memory=151_397_597_184,
    bandwidth=4.8e12,
    sources=(
        "NVIDIA H200 Tensor Core GPU datasheet: an H100 with 141 GB at 4.8 TB/s",
        "openxla/xla, xla/backends/gpu/target_config/specs/h200.txtpb: memory, clock, L2",
    ),
)

H20 = replace(
    H100,
    name="h20",
    device="NVIDIA H20",
    sms=78,
    l2=62_914_560,
    memory=102_005_473_280,
    bandwidth=4.0e12,
    bf16=148e12,
    fp16=148e12,
    fp8=296e12,
    int8=296e12,
    tf32=74e12,
    fp32=44e12,
    watts=400,
    sources=(
        "NVIDIA H20 product brief, as tabled by Tom's Hardware, 2024-02: rates, 96 GB at 4.0 TB/s, 60 MB L2, "
        "900 GB/s of NVLink in both directions, 400 W",
        "SemiAnalysis, Nvidia's New China AI Chips, 2023-11: the die of an H100, performance density 2.9",
        "Geekbench's browser, H20: 78 multiprocessors",
    ),
)

A100 = Chip(
    name="a100",
    device="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    sms=108,
    clock=1.41,
    l2=41_943_040,
    memory=85_100_068_864,
    bandwidth=2.039e12,
    bf16=312e12,
    fp16=312e12,
    fp8=0,
    int8=624e12,
    tf32=156e12,
    fp32=19.5e12,
    link="nvlink",
    link_rate=300e9,
    pcie_rate=32e9,
    watts=400,
    die=826,
    sources=(
        "NVIDIA A100 Tensor Core GPU datasheet, 2021-06: A100 80GB SXM",
        "NVIDIA A100 Tensor Core GPU Architecture, V1.0, tables 1 and 4: multiprocessors, clock, L2, die",
        "openxla/xla, xla/backends/gpu/target_config/specs/a100_sxm_80.txtpb: memory",
    ),
)

A800 = replace(
    A100,
    name="a800",
    device="NVIDIA A800-SXM4-80GB",
    link_rate=200e9,
    sources=(*A100.sources, "NVIDIA to Reuters, 2022-11-07: an A100 with NVLink of 400 GB/s instead of 600"),
)

B200 = Chip(
    name="b200",
    device="NVIDIA B200",
    capability=(10, 0),
    sms=148,
    clock=1.965,
    l2=132_644_864,
    memory=191_514_411_008,
    bandwidth=8.0e12,
    bf16=2250e12,
    fp16=2250e12,
    fp8=4500e12,
    int8=4500e12,
    tf32=1100e12,
    fp32=80e12,
    link="nvlink",
    link_rate=900e9,
    pcie_rate=64e9,
    watts=1000,
    die=1600,
    sources=(
        "NVIDIA Blackwell Architecture Technical Brief, V1.1, HGX B200: rates, bandwidth, NVLink, watts",
        "openxla/xla, xla/backends/gpu/target_config/specs/b200.txtpb: multiprocessors, memory, clock, L2",
        "die: two at the limit of a reticle (same brief); that limit is 858 mm², so about 1600 mm² is an estimate",
    ),
)

L20 = Chip(
    name="l20",
    device="NVIDIA L20",
    capability=(8, 9),
    sms=92,
    clock=2.52,
    l2=100_663_296,
    memory=47_697_362_944,
    bandwidth=864e9,
    bf16=119.5e12,
    fp16=119.5e12,
    fp8=239e12,
    int8=239e12,
    tf32=59.8e12,
    fp32=59.8e12,
    link="pcie",
    link_rate=32e9,
    pcie_rate=32e9,
    watts=275,
    die=608.5,
    sources=(
        "NVIDIA L20 product brief, as tabled by Tom's Hardware, 2024-02: rates, 48 GB at 864 GB/s, 96 MB L2, PCIe 4",
        "TechPowerUp's database, L20: multiprocessors, clock; NVIDIA Ada GPU Architecture, V2.01: die of an AD102",
        "memory: 44.4 GiB, as PyTorch's messages give the total capacity of Ada chips of 48 GB with error correction",
    ),
)

RTX_4090 = Chip(
    name="rtx4090",
    device="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    sms=128,
    clock=2.52,
    l2=75_497_472,
    memory=25_386_352_640,
    bandwidth=1.008e12,
    bf16=165.2e12,
    fp16=165.2e12,
    fp8=330.3e12,
    int8=660.6e12,
    tf32=82.6e12,
    fp32=82.6e12,
    link="pcie",
    link_rate=32e9,
    pcie_rate=32e9,
    watts=450,
    die=608.5,
    sources=(
        "NVIDIA Ada GPU Architecture, V2.01, appendix A: GeForce RTX 4090, products summed in float32",
        "memory: 23.64 GiB, as PyTorch's messages give the total capacity on Linux",
    ),
)

V100 = Chip(
    name="v100",
    device="Tesla V100-SXM2-32GB",
    capability=(7, 0),
    sms=80,
    clock=1.53,
    l2=6_291_456,
    memory=34_089_730_048,
    bandwidth=900e9,
    bf16=0,
    fp16=125e12,
    fp8=0,
    int8=62.8e12,
    tf32=0,
    fp32=15.7e12,
    link="nvlink",
    link_rate=150e9,
    pcie_rate=16e9,
    watts=300,
    die=815,
    sources=(
        "NVIDIA Tesla V100 datasheet, 2020-01: V100 SXM2 32 GB",
        "NVIDIA Tesla V100 GPU Architecture, V1.1, table 1: multiprocessors, clock, L2, die; int8 by DP4A, four times "
        "float32",
        "openxla/xla, xla/backends/gpu/target_config/specs/v100.txtpb: clock, L2",
        "memory: 31.75 GiB, as PyTorch's messages give the total capacity",
    ),
)

CHIPS = {chip.name: chip for chip in (H20, H100, H800, H200, A100, A800, B200, L20, RTX_4090, V100)}


def chip_named(name: str) -> Chip:
    """
    Raises:
        ChipError: there is none of this name.
    """
    if name not in CHIPS:
        raise ChipError(f"chip {name!r}: give one of {', '.join(CHIPS)}")
    return CHIPS[name]
