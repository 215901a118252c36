"""Collectives in HLO: who takes part, along which axes of the mesh, and how many bytes go over which links."""

import math
import re
from dataclasses import dataclass
from typing import get_args

import numpy as np

from moe.planner.hlo import HloError, Instruction
from moe.planner.work import TransferKind
from parallel.mesh import MeshConfig

COLLECTIVES: tuple[TransferKind, ...] = get_args(TransferKind)[:6]


@dataclass(frozen=True)
class Fabric:
    """The devices of a program: laid over a mesh, the first axis outermost, `devices_per_node` consecutive ones in each
    node."""

    mesh: MeshConfig
    devices_per_node: int

    def varying(self, members: list[int]) -> tuple[str, ...]:
        """Axes along which they do not all stand at the same place."""
        sizes = self.mesh.sizes
        places = np.unravel_index(members, tuple(sizes.values()))
        return tuple(axis for axis, place in zip(sizes, places, strict=True) if len(set(place.tolist())) > 1)

    def axes(self, members: list[int]) -> tuple[str, ...]:
        """Of which the members are all devices; () where there are none such."""
        found = self.varying(members)
        return found if math.prod(self.mesh.sizes[axis] for axis in found) == len(members) else ()

    def nodes(self, members: list[int]) -> int:
        return len({member // self.devices_per_node for member in members})


@dataclass(frozen=True)
class Journey:
    """What `work.Transfer` says of a transfer's way; `size` is its S."""

    kind: TransferKind
    axes: tuple[str, ...]
    devices: int
    nodes: int
    inside: float
    across: float


def collective(instruction: Instruction, kind: TransferKind, size: float, fabric: Fabric) -> Journey:
    """
    Args:
        size: S of `work.Transfer`, bytes.

    Raises:
        HloError: its groups are written in a way that is not known here.
    """
    if kind == "collective-permute":
        return _permute(instruction, size, fabric)
    groups = groups_of(instruction, fabric.mesh.num_devices)
    # Of groups that lie differently over the nodes, the one that is spread widest: the others wait for it.
    members = max(groups, key=fabric.nodes)
    count, nodes = len(members), fabric.nodes(members)
    inside, across = sent(kind, size, count, nodes)
    return Journey(kind, fabric.axes(members), count, nodes, inside, across)


def sent(kind: TransferKind, size: float, devices: int, nodes: int) -> tuple[float, float]:
    """Bytes that one device sends inside its node and across, as `work.Transfer` has it."""
    near = devices / nodes
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * (near - 1) / devices, size * (devices - near) / devices
    rings = 2 if kind == "all-reduce" else 1
    inside = size * (devices - 1) / devices if near > 1 else 0.0
    return rings * inside, rings * size * (devices - near) / devices / near


def to_host(kind: TransferKind, size: float) -> Journey:
    return Journey(kind, (), 1, 1, size, 0.0)


def _permute(instruction: Instruction, size: float, fabric: Fabric) -> Journey:
    pairs = [pair for pair in _pairs(instruction.attributes["source_target_pairs"]) if pair[0] != pair[1]]
    axes = max((fabric.varying(pair) for pair in pairs), key=len, default=())
    far = any(fabric.nodes(pair) > 1 for pair in pairs)
    members = sorted({member for pair in pairs for member in pair})
    inside, across = (0.0, size) if far else (size if pairs else 0.0, 0.0)
    return Journey("collective-permute", axes, len(members), max(1, fabric.nodes(members)), inside, across)


def _pairs(text: str) -> list[list[int]]:
    return [[int(end) for end in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", text)]


def groups_of(instruction: Instruction, num_devices: int) -> list[list[int]]:
    """Of a collective, whatever way XLA writes them (xla/hlo/ir/collective_device_list.cc, replica_group.cc):

    "{{0,1},{2,3}}"; "{}", all devices; "[2,2]<=[2,2]T(1,0)", an iota that is reshaped, transposed and reshaped;
    "mesh['a'=2,'b'=2] {'b'}", devices along axes of a mesh, where `'b':(2)3` is a part of an axis: of size 3, with
    2 parts before it; and with "device_ids=([2,2]T(1,0))" before the axes, of a mesh whose devices are in that order.

    Raises:
        HloError: it is none of these.
    """
    text = instruction.attributes.get("replica_groups", "{}")
    if text in ("{}", "{{}}"):
        return [list(range(num_devices))]
    if text.startswith("{{"):
        return [_numbers(group) for group in re.findall(r"\{?\{([\d,]+)\}", text)]
    if text.startswith("mesh["):
        return _along_axes(text, instruction.attributes.get("device_ids", ""))
    found = re.fullmatch(r"\[([\d,]+)\](<=.*)", text)
    if found is None:
        raise HloError(f"{instruction.name}: the groups {text[:80]!r} are written in a way that is not known")
    return _iota(found[2]).reshape(_numbers(found[1])).tolist()


def _along_axes(text: str, device_ids: str) -> list[list[int]]:
    mesh, _, along = text.partition("]")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    devices = np.arange(math.prod(sizes.values()))
    if device_ids:
        order, _, along = device_ids.partition(")) ")
        dims, _, transposed = order.strip("()").partition("T(")
        devices = devices.reshape(_numbers(dims.strip("[]")))
        devices = devices.transpose(_numbers(transposed)) if transposed else devices
    # Each axis as its parts: those before a part that is asked for, the part, and those behind.
    parts: list[int] = []
    chosen: list[int] = []
    asked = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    for axis, size in sizes.items():
        done = 1
        for _, before, part in sorted((each for each in asked if each[0] == axis), key=lambda each: int(each[1] or 1)):
            before, part = int(before or 1), int(part or size)
            chosen.append(len(parts) + 1)
            parts += [before // done, part]
            done = before * part
        parts.append(size // done)
    members = np.moveaxis(devices.reshape(parts), chosen, range(-len(chosen), 0))
    return members.reshape(-1, math.prod(parts[place] for place in chosen)).tolist()


def _iota(text: str) -> np.ndarray:
    """ "<=[2,3]T(1,0)": 0, 1, … reshaped and transposed."""
    found = re.fullmatch(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise HloError(f"the devices {text[:80]!r} are written in a way that is not known")
    members = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return members.transpose(_numbers(found[2])) if found[2] else members


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
