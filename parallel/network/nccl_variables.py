"""The NCCL variables that decide over GPUDirect RDMA, with NCCL's own meaning and defaults.

Sources: NCCL's user guide, Environment Variables; src/graph/paths.cc (ncclGetLevel, ncclTopoCheckGdr).
"""

from collections.abc import Mapping
from dataclasses import dataclass

LEVELS = ("LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS")
"""NCCL's path types from near to far. It has no NODE: what nvidia-smi calls so is PHB to NCCL."""
DEFAULT_LEVEL = "PXB"
_NUMBERED_LEVELS = ("LOC", "PIX", "PXB", "PHB", "SYS")


@dataclass(frozen=True)
class Settings:
    """What the variables say.

    level: NCCL_NET_GDR_LEVEL, the farthest distance at which GPUDirect RDMA is used; None where it is not understood.
    read: NCCL_NET_GDR_READ; False stages what a GPU sends through the host. None leaves it to NCCL.
    """

    variables: Mapping[str, str]
    level: str | None
    read: bool | None

    @property
    def rdma_off(self) -> str | None:
        """The assignment that turns RDMA off altogether, or None."""
        if _number(self.variables.get("NCCL_IB_DISABLE")) == 1:
            return "NCCL_IB_DISABLE=" + self.variables["NCCL_IB_DISABLE"]
        if self.variables.get("NCCL_NET", "").lower() == "socket":
            return "NCCL_NET=" + self.variables["NCCL_NET"]
        return None

    @property
    def plugin(self) -> str | None:
        """The assignment that hands the network to a plugin, whose ways are its own; or None."""
        if self.variables.get("NCCL_NET", "ib").lower() not in ("ib", "socket"):
            return "NCCL_NET=" + self.variables["NCCL_NET"]
        if self.variables.get("NCCL_NET_PLUGIN", "none").lower() != "none":
            return "NCCL_NET_PLUGIN=" + self.variables["NCCL_NET_PLUGIN"]
        return None

    @property
    def dma_buf(self) -> bool:
        """NCCL_DMABUF_ENABLE; on by default since NCCL 2.13."""
        return _number(self.variables.get("NCCL_DMABUF_ENABLE")) != 0

    @property
    def pxn(self) -> bool:
        """Whether a GPU may use a neighbour's card through NVLink (NCCL_PXN_DISABLE)."""
        return _number(self.variables.get("NCCL_PXN_DISABLE")) != 1

    def near_enough(self, distance: str) -> bool:
        """Whether NCCL uses GPUDirect RDMA at a distance of nvidia-smi's. It ignores a level that it does not know."""
        level = self.level or DEFAULT_LEVEL
        return LEVELS.index("PHB" if distance == "NODE" else distance) <= LEVELS.index(level)

    def uses_device(self, device: str, port: int) -> bool:
        """Whether NCCL_IB_HCA lets NCCL use the card."""
        return matches(self.variables.get("NCCL_IB_HCA", ""), device, port)


def read_settings(variables: Mapping[str, str]) -> Settings:
    """Understands the variables as NCCL does."""
    read = _number(variables.get("NCCL_NET_GDR_READ"))
    return Settings(variables, _level(variables), None if read is None or read < 0 else bool(read))


def matches(pattern: str, name: str, port: int | None = None) -> bool:
    """Whether a list such as =mlx5_0,mlx5_1:1 or ^docker,lo takes in `name`. Without `=` a word is a prefix.

    This is the form of NCCL_IB_HCA and NCCL_SOCKET_IFNAME; an empty one takes in everything.
    """
    exclude = pattern.startswith("^")
    pattern = pattern.removeprefix("^")
    exact = pattern.startswith("=")
    words = [word.strip() for word in pattern.removeprefix("=").split(",") if word.strip()]
    if not words:
        return True
    return exclude != any(_matches_word(word, name, port, exact) for word in words)


def _matches_word(word: str, name: str, port: int | None, exact: bool) -> bool:
    wanted, _, number = word.partition(":")
    same_port = port is None or not number.isdecimal() or int(number) == port
    return same_port and (name == wanted if exact else name.startswith(wanted))


def _level(variables: Mapping[str, str]) -> str | None:
    text = variables.get("NCCL_NET_GDR_LEVEL")
    if text is None:
        return DEFAULT_LEVEL
    if text in LEVELS:
        return text
    number = _number(text)
    if number is not None and number >= 0:
        return _NUMBERED_LEVELS[min(number, len(_NUMBERED_LEVELS) - 1)]
    return None


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text, 0)
    except ValueError:
        return None
