"""Whether a network card may be given the GPU's memory at all: nvidia_peermem, DMA-BUF, and the limit on locked memory.

NCCL asks for /sys/module/nvidia_peermem/version, and else for DMA-BUF of both the card's driver and CUDA, which CUDA
has with the open kernel driver (NCCL, src/transport/net_ib; NVIDIA's GPUDirect RDMA guide).
"""

from parallel.network.facts import Facts

PEER_MODULES = ("nvidia_peermem", "nv_peer_mem")
"""The second is the older one, from Mellanox."""
DMA_BUF_DRIVER = 515
DMA_BUF_KERNEL = (5, 12)
LEAST_LOCKED_MEMORY = 1 << 30
"""Bytes. NCCL pins tens of MB of host memory for each connection's buffers and fails where it may not."""


def peer_module(facts: Facts) -> str | None:
    """The loaded module that lets network cards reach the GPU's memory."""
    return next((name for name in PEER_MODULES if name in (facts.modules or ())), None)


def why_no_dma_buf(facts: Facts) -> str | None:
    """What stands in the way of DMA-BUF, in words; None where nothing does, as far as can be read."""
    if facts.settings is not None and not facts.settings.dma_buf:
        return "NCCL_DMABUF_ENABLE=0 forbids DMA-BUF"
    if facts.driver is not None and not facts.driver.open:
        return f"the closed NVIDIA driver {facts.driver.version} offers no DMA-BUF"
    if facts.driver is not None and facts.driver.major < DMA_BUF_DRIVER:
        return f"the NVIDIA driver {facts.driver.version} is older than {DMA_BUF_DRIVER}, the first with DMA-BUF"
    if facts.kernel is not None and facts.kernel < DMA_BUF_KERNEL:
        version, least = (".".join(map(str, numbers)) for numbers in (facts.kernel, DMA_BUF_KERNEL))
        return f"the kernel {version} is older than {least}, the first with DMA-BUF for RDMA"
    return None


def can_register(facts: Facts, nic: str) -> tuple[bool | None, str]:
    """Whether the card can be given the GPU's memory, None where it cannot be told, and by what or why not.

    NCCL's log decides where it names the card; the modules then tell why.
    """
    possible, why = _concluded(facts)
    logged = facts.log.supported.get(nic) if facts.log else None
    if logged is None or logged == possible:
        return possible, why
    return logged, f"NCCL's log finds GPUDirect RDMA {'possible' if logged else 'impossible'} with {nic}"


def _concluded(facts: Facts) -> tuple[bool | None, str]:
    module, obstacle = peer_module(facts), why_no_dma_buf(facts)
    if module:
        return True, f"{module} is loaded"
    if facts.modules is None:
        return None, "which modules are loaded is not known"
    if obstacle:
        return False, f"nvidia_peermem is not loaded, and {obstacle}"
    if facts.driver is None or facts.kernel is None:
        return None, "nvidia_peermem is not loaded, and whether there is DMA-BUF instead is not known"
    return True, f"DMA-BUF (open driver {facts.driver.version})"


def too_little_locked_memory(facts: Facts) -> bool | None:
    """Whether NCCL will fail to pin its buffers; None where it cannot be told."""
    if facts.locked_memory is None:
        return None
    return facts.locked_memory < LEAST_LOCKED_MEMORY and not facts.may_lock
