"""Latency and bandwidth of the links between devices, as `bench` fits them and planning reads them.

The time of a collective is modelled as latency + bytes sent / bandwidth (bytes sent: parallel/network/collectives.py).
One fit for each collective, class of link and number of devices that take part.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from parallel.network.collectives import COLLECTIVES

VERSION = 1
LinkClass = Literal["inside_node", "across_nodes"]
T = TypeVar("T")


class LinksError(ValueError):
    """Measurements that give no link, or a file that holds none: names the field, and what would do."""


@dataclass(frozen=True)
class Measurement:
    """A collective's time over one mesh axis: the median of several, the fastest and the slowest, in seconds."""

    collective: str
    axis: str
    devices: int
    link: LinkClass
    message_bytes: int
    sent_bytes: float
    seconds: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Link:
    """A fitted link.

    latency: seconds; bandwidth: bytes/s that a device sends.
    worst_error: of the fit, relative to the measured time.
    """

    collective: str
    link: LinkClass
    devices: int
    latency: float
    bandwidth: float
    worst_error: float


@dataclass(frozen=True)
class Links:
    """All fits of a machine, with the measurements that they come from.

    platform, device: such as "gpu", "NVIDIA H20"; mesh: devices by axis; hosts: machines that took part.
    """

    platform: str
    device: str
    jax: str
    mesh: dict[str, int]
    processes: int
    hosts: int
    links: tuple[Link, ...]
    measurements: tuple[Measurement, ...]

    def seconds(self, collective: str, link: LinkClass, devices: int, message_bytes: int) -> float:
        """The modelled time of a collective, by the fit of the nearest number of devices.

        Raises:
            LinksError: this collective was not measured over such a link.
        """
        fits = [each for each in self.links if (each.collective, each.link) == (collective, link)]
        if not fits:
            measured = sorted({f"{each.collective} {each.link}" for each in self.links})
            raise LinksError(f"{collective} {link} was not measured; there are {', '.join(measured)}")
        fit = min(fits, key=lambda each: abs(math.log(each.devices / devices)))
        return fit.latency + COLLECTIVES[collective].bytes_sent(message_bytes, devices) / fit.bandwidth


def fit_links(measurements: Sequence[Measurement]) -> tuple[tuple[Link, ...], tuple[str, ...]]:
    """One link for each collective, class and number of devices; and why there is none, for those that give no line."""
    groups: dict[tuple[str, LinkClass, int], list[Measurement]] = {}
    for each in measurements:
        groups.setdefault((each.collective, each.link, each.devices), []).append(each)
    links, failures = [], []
    for (collective, link, devices), group in groups.items():
        try:
            links.append(_fit(collective, link, devices, group))
        except LinksError as error:
            failures.append(f"{collective} over {devices} devices, {link.replace('_', ' ')}: {error}")
    return tuple(links), tuple(failures)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bandwidth of least squared relative error in seconds = latency + size / bandwidth, latency ≥ 0.

    Raises:
        LinksError: fewer than two sizes, or times that do not grow with the size.
    """
    if len(set(sizes)) < 2:
        raise LinksError("a latency and a bandwidth need two sizes at least; give more with --sizes")
    weights = [1 / time**2 for time in seconds]
    w, ws, wss, wt, wst = (
        sum(weight * size**i * time**j for weight, size, time in zip(weights, sizes, seconds, strict=True))
        for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
    )
    slope = (w * wst - ws * wt) / (w * wss - ws**2)
    latency = (wt - slope * ws) / w
    if latency < 0:
        latency, slope = 0.0, wst / wss
    if slope <= 0:
        raise LinksError(
            f"times do not grow from {min(sizes):,.0f} to {max(sizes):,.0f} bytes: latency hides the bandwidth; "
            "give larger messages with --sizes"
        )
    return latency, 1 / slope


def write_links(links: Links, path: Path) -> None:
    """Writes the file, in one step."""
    content = {"version": VERSION} | dataclasses.asdict(links)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(unfinished, path)


def read_links(path: Path) -> Links:
    """Reads a file that `write_links` wrote.

    Raises:
        LinksError: no such file, no JSON, another version, or a field that is missing or of a wrong kind.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LinksError(f"{path}: {error}; `python -m parallel.network bench --output {path}` writes one") from error
    if not isinstance(content, dict) or content.pop("version", None) != VERSION:
        raise LinksError(f"{path}: version: this program reads {VERSION}; measure anew")
    for name, kind in (("links", Link), ("measurements", Measurement)):
        if isinstance(content.get(name), list):
            content[name] = tuple(_build(kind, each, f"{path}: {name}[{i}]") for i, each in enumerate(content[name]))
    return _build(Links, content, f"{path}: links file")


def _fit(collective: str, link: LinkClass, devices: int, group: Sequence[Measurement]) -> Link:
    latency, bandwidth = fit_line([each.sent_bytes for each in group], [each.seconds for each in group])
    errors = (abs(latency + each.sent_bytes / bandwidth - each.seconds) / each.seconds for each in group)
    return Link(collective, link, devices, latency, bandwidth, max(errors))


def _build(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from a dictionary, each field of its kind and in its range."""
    if not isinstance(values, dict):
        raise LinksError(f"{where}: expected an object, not {values!r}")
    hints = get_type_hints(kind)
    for name in hints.keys() - values.keys():
        raise LinksError(f"{where}.{name}: is missing")
    for name in values.keys() - hints.keys():
        raise LinksError(f"{where}.{name}: no such field")
    for name, hint in hints.items():
        if not _fits(values[name], name, hint):
            raise LinksError(f"{where}.{name}={values[name]!r}: {_expected(name, hint)}")
    return kind(**values)


def _fits(value: Any, name: str, hint: Any) -> bool:
    if name == "collective":
        return value in COLLECTIVES
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value) and (value >= 0 if name in ("latency", "worst_error") else value > 0)
    if hint is LinkClass:
        return value in get_args(LinkClass)
    if name == "mesh":
        return isinstance(value, dict) and all(_fits(size, "size", int) for size in value.values())
    return isinstance(value, str if hint is str else tuple)


def _expected(name: str, hint: Any) -> str:
    if name == "collective":
        return f"expected one of {', '.join(COLLECTIVES)}"
    if hint is LinkClass:
        return f"expected one of {', '.join(get_args(LinkClass))}"
    words = {int: "a whole number above 0", float: "a number above 0", str: "a text"}
    return f"expected {words.get(hint, 'devices by axis' if name == 'mesh' else 'a list')}"
