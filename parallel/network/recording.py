"""A recording: a folder of plain files with what a node's commands and /sys printed, from which the doctor judges.

A file that could not be had is represented by NAME.missing, which says why; a recording may also be put together by
hand. What is in neither form is unknown to the doctor, and never counts as good.

| file                 | what it holds |
|---|---|
| about.txt            | `format: 1`, `host: NAME`, `taken: TIME` |
| nvidia-smi-gpus.txt  | nvidia-smi --query-gpu=index,name,pci.bus_id --format=csv,noheader |
| nvidia-smi-topo.txt  | nvidia-smi topo -m |
| infiniband.txt       | grep -H . of ports/*/{state,phys_state,rate,link_layer,gid…} and device/{numa_node,uevent} |
|                      | under /sys/class/infiniband/* |
| modules.txt          | /proc/modules |
| driver.txt           | /proc/driver/nvidia/version |
| kernel.txt           | /proc/sys/kernel/osrelease |
| cmdline.txt          | /proc/cmdline |
| iommu.txt            | grep -H . /sys/kernel/iommu_groups/*/type |
| lspci.txt            | of lspci -vvv (as root): the devices' first lines, and ACSCtl |
| machine.txt          | grep -H . /sys/class/dmi/id/{sys_vendor,product_name}, and the CPU's flag `hypervisor` |
| limits.txt           | /proc/self/limits |
| status.txt           | /proc/self/status |
| interfaces.txt       | grep -H . /sys/class/net/*/operstate |
| variables.txt        | NAME=value for each NCCL_… variable, then ~/.nccl.conf, then /etc/nccl.conf |
| nccl.log             | what NCCL printed with NCCL_DEBUG=INFO during an all-reduce |
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FORMAT = 1
FILES = (
    "about.txt",
    "nvidia-smi-gpus.txt",
    "nvidia-smi-topo.txt",
    "infiniband.txt",
    "modules.txt",
    "driver.txt",
    "kernel.txt",
    "cmdline.txt",
    "iommu.txt",
    "lspci.txt",
    "machine.txt",
    "limits.txt",
    "status.txt",
    "interfaces.txt",
    "variables.txt",
    "nccl.log",
)
_MISSING = ".missing"


class RecordingError(ValueError):
    """A folder that is no recording, or cannot become one: names the folder or file, and what would do."""


@dataclass(frozen=True)
class Recording:
    """Texts by file name; for those that could not be had, why not."""

    texts: Mapping[str, str]
    missing: Mapping[str, str] = field(default_factory=dict)

    def why_missing(self, name: str) -> str:
        """Why `name` is not among the texts."""
        return self.missing.get(name, f"{name} is not in the recording")

    def with_log(self, text: str) -> "Recording":
        """The same with another log of NCCL."""
        return dataclasses.replace(self, texts={**self.texts, "nccl.log": text})


def read_recording(folder: Path) -> Recording:
    """The recording in `folder`. Files of other names are left alone.

    Raises:
        RecordingError: no such folder, no file of a recording in it, a file that is not text, or another format.
    """
    if not folder.is_dir():
        raise RecordingError(f"{folder}: no such folder; `doctor --record {folder}` on a GPU node makes a recording")
    texts = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
    if not texts.keys() - {"about.txt"}:
        raise RecordingError(
            f"{folder}: holds no file of a recording, such as nvidia-smi-topo.txt; "
            f"`doctor --record {folder}` on a GPU node makes a recording"
        )
    wrong = [line for line in texts.get("about.txt", "").splitlines() if line.startswith("format:")]
    if wrong and wrong[0].split(":")[1].strip() != str(FORMAT):
        raise RecordingError(f"{folder}/about.txt: {wrong[0]!r}, and this program reads format {FORMAT}; record anew")
    missing = {
        name: _read(folder / (name + _MISSING)).strip()
        for name in FILES
        if name not in texts and (folder / (name + _MISSING)).is_file()
    }
    return Recording(texts, missing)


def write_recording(recording: Recording, folder: Path) -> None:
    """Writes every text and every reason into `folder`.

    Raises:
        RecordingError: the folder exists and is not empty.
    """
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in recording.texts.items():
        (folder / name).write_text(text, "utf-8")
    for name, reason in recording.missing.items():
        (folder / (name + _MISSING)).write_text(reason + "\n", "utf-8")


def check_new_folder(folder: Path) -> None:
    """That a recording may be written to `folder`.

    Raises:
        RecordingError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordingError(f"{folder}: exists and is not empty; give a new folder")


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecordingError(f"{file}: not a text file ({error.reason} at byte {error.start})") from error
