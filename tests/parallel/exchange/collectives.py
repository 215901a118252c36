"""Bytes on the wire, read from a compiled program's text."""

import re

import numpy as np

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)\("
    r".*?replica_groups=(?P<groups>\{\{.*?\}\}|\[\S+?\]<=\[\S+?\](?:T\(\S+?\))?|mesh\[.*?\] \{.*?\})"
)


def collective_bytes(text: str, num_devices: int, node_size: int) -> tuple[float, float]:
    """Bytes that a device sends to others, inside its node and across, in the mean over devices.

    Each member of a group is taken to send straight to each other one.
    """
    inside = across = 0.0
    for line in text.splitlines():
        found = COLLECTIVE.search(line)
        if found is None:
            assert not re.search(r" (all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)\S*\(", line)
            continue
        result, kind = bytes_of(found["result"]), found["kind"]
        for members in groups_of(found["groups"]):
            # A result of all members' parts for an all-to-all and an all-gather; one part for a reduce-scatter.
            to_each = {"all-to-all": result / len(members), "all-gather": result / len(members)}.get(kind, result)
            assert kind in ("all-to-all", "all-gather", "reduce-scatter"), line
            for sender in members:
                near = sum(other // node_size == sender // node_size for other in members) - 1
                inside += near * to_each / num_devices
                across += (len(members) - 1 - near) * to_each / num_devices
    return inside, across


def bytes_of(shapes: str) -> int:
    """ "(f32[2,3]{1,0}, s32[4])" → 40."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        number = 1
        for size in filter(None, sizes.split(",")):
            number *= int(size)
        total += SIZES[kind] * number
    return total


def groups_of(text: str) -> list[list[int]]:
    """ "{{0,1},{2,3}}"; or "[2,2]<=[4]" and "[2,2]<=[2,2]T(1,0)": an iota, reshaped, transposed, reshaped; or, as newer
    XLA writes it, "mesh['data'=2,'expert'=2] {'expert'}"."""
    if text.startswith("mesh["):
        mesh, _, along = text.partition("]")
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", along)]
        members = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        members = np.moveaxis(members, axes, range(-len(axes), 0))
        return members.reshape(-1, np.prod(members.shape[-len(axes) :])).tolist()
    if text.startswith("{{"):
        return [[int(member) for member in group.split(",")] for group in re.findall(r"\{?\{([\d,]+)\}", text)]
    shape, source, order = re.fullmatch(r"\[(.+?)\]<=\[(.+?)\](?:T\((.+?)\))?", text).groups()
    members = np.arange(np.prod(numbers(source))).reshape(numbers(source))
    if order:
        members = members.transpose(numbers(order))
    return members.reshape(numbers(shape)).tolist()


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
