"""Chips: what is known of each, with its source. One entry a chip; an experiment file can make its own."""

from dataclasses import dataclass

from parallel.network.cluster import GpuLink


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
    watts: of the board at full load. die: mm².
    sources: where the figures stand.
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
    watts: float
    die: float
    sources: tuple[str, ...]

    @property
    def target_config(self) -> str:
        """stream_executor.GpuTargetConfigProto as text: what XLA's compiler asks about the chip."""
        major, minor = self.capability
        # The shared memory of a multiprocessor, and what one block may take of it (CUDA C++ Programming Guide, table of
        # technical specifications by compute capability).
        per_core, per_block = {
            (7, 0): (98304, 98304),
            (8, 0): (167936, 166912),
            (8, 9): (102400, 101376),
            (9, 0): (233472, 232448),
            (10, 0): (233472, 232448),
        }[self.capability]
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


H20 = Chip(
    name="h20",
    device="NVIDIA H20",
    capability=(9, 0),
    sms=78,
    clock=1.98,
    l2=62914560,
    memory=102005473280,
    bandwidth=4.0e12,
    bf16=148e12,
    fp16=148e12,
    fp8=296e12,
    int8=296e12,
    tf32=74e12,
    fp32=44e12,
    link="nvlink",
    link_rate=450e9,
    watts=400,
    die=814,
    sources=("shared/FACTS.md section 2",),
)

CHIPS = {chip.name: chip for chip in (H20,)}


def chip_named(name: str) -> Chip:
    """
    Raises:
        ChipError: there is none of this name.
    """
    if name not in CHIPS:
        raise ChipError(f"chip {name!r}: give one of {', '.join(CHIPS)}")
    return CHIPS[name]
