"""The recordings of the tests, and changed copies of them.

They were composed after the formats of real outputs (public issues, NCCL's sources), not captured on hardware: none was
at hand. A recording of a real node that the doctor judges wrongly belongs beside them.
"""

import dataclasses
from pathlib import Path

from parallel.network.recording import Recording, read_recording

FOLDER = Path(__file__).parent / "recordings"


def recorded(name: str) -> Recording:
    return read_recording(FOLDER / name)


def changed(name: str, /, **texts: str | None) -> Recording:
    """A recording with other texts (modules=… for modules.txt); None takes the file away without a word."""
    recording = recorded(name)
    files = {_file(key): text for key, text in texts.items()}
    kept = {file: text for file, text in recording.texts.items() if file not in files}
    return dataclasses.replace(recording, texts=kept | {file: text for file, text in files.items() if text is not None})


def replaced(name: str, key: str, old: str, new: str) -> Recording:
    """A recording with `old` replaced by `new` in one file."""
    text = recorded(name).texts[_file(key)]
    assert old in text
    return changed(name, **{key: text.replace(old, new)})


def _file(key: str) -> str:
    return "nccl.log" if key == "nccl_log" else key.replace("_", "-") + ".txt"
