"""Checkpoints: written in the background, there entirely or not at all, and checked byte by byte before use.

A checkpoint is a folder, `checkpoints/00000100`:

    state/          the TrainState's arrays but the frozen ones, by name (Orbax, OCDBT)
    run.json        step, the run's fingerprint, the data iterator's state
    manifest.json   SHA-256 of every other file

Orbax writes the arrays into `00000100.saving`, which gets its manifest and only then its name. Of several processes
each writes what its devices keep, into one folder that all of them see; once all have written, process 0 gives the
checkpoint its manifest and its name. Restoring knows arrays and not who wrote them, so another number of processes may
do it, onto another mesh.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging

from moe.train.run_folder import write_atomically
from moe.train.state import TrainState
from parallel.together import from_first

_SAVING, _DAMAGED = ".saving", ".damaged"
_NONE = -1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: names it, and what is kept."""


class Restored(NamedTuple):
    """step: steps taken. data: the state of the data iterator."""

    step: int
    state: TrainState
    data: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, fingerprint: str, keep: int, earlier: Collection[str] = ()) -> None:
        """
        Args:
            fingerprint: of the run's configuration; checkpoints of another one are refused.
            earlier: fingerprints that the run had before it moved to another mesh.
            keep: newest checkpoints that stay; older ones are removed.
        """
        # What Orbax logs as an error it raises as well, and that is told in our own words.
        logging.set_verbosity(logging.FATAL)
        self.folder = folder.resolve()
        self._fingerprint = fingerprint
        self._accepted = {fingerprint, *earlier}
        self._keep = keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._background = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[None] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for left_over in self.folder.glob(f"*{_SAVING}"):
                shutil.rmtree(left_over)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to save; returns once the arrays are copied off the devices, so that they may be donated.

        Raises:
            CheckpointError: this or the save before it failed, for a full disk for example.
        """
        self.wait()
        about = {"step": step, "fingerprint": self._fingerprint, "data": data}
        try:
            self._checkpointer.save(
                self._saving(step) / "state", args=ocp.args.StandardSave(named(state._replace(frozen={})))
            )
        except Exception as error:
            raise self._failure(step, error) from error
        self._under_way = self._background.submit(self._finish, step, about)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: it failed.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Waits, and frees the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def restore_latest(self, abstract: TrainState, report: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that is whole, put straight where `abstract` says; None where there is none at all.

        A damaged one is named through `report`, set aside as `<step>.damaged`, and the one before it is taken.

        Raises:
            CheckpointError: all are damaged, or they belong to another configuration.
        """
        step = from_first(lambda: self._newest_whole(report))
        return None if step == _NONE else self._restore(step, abstract)

    def _newest_whole(self, report: Callable[[str], None]) -> int:
        """The step to go on from, or `_NONE`; process 0 alone looks, since it moves what is damaged."""
        steps = self.steps()
        for step in reversed(steps):
            damage = damage_of(self.path(step))
            if damage is None:
                self._check_owner(step)
                return step
            aside = self.path(step).with_name(f"{self.path(step).name}{_DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
            report(f"checkpoint {self.path(step)} is damaged ({damage}): set aside as {aside.name}")
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the {len(steps)} checkpoints is whole; "
                "start anew with another --run-dir, or put a good copy in their place"
            )
        return _NONE

    def _check_owner(self, step: int) -> None:
        found = self._about(step)["fingerprint"]
        if found not in self._accepted:
            raise CheckpointError(
                f"checkpoint {self.path(step)} belongs to a run of another configuration "
                f"({found[:12]} instead of {self._fingerprint[:12]}); give that run's settings, or another --run-dir"
            )

    def _about(self, step: int) -> dict[str, Any]:
        return json.loads((self.path(step) / "run.json").read_text("utf-8"))

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        # Where an array is said to be anywhere, Orbax would look for the devices that wrote it.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = abstract._replace(frozen={})
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here)
            for name, x in named(abstract).items()
        }
        found = self._checkpointer.restore(self.path(step) / "state", args=ocp.args.StandardRestore(wanted))
        leaves = [found[name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return Restored(step, state, self._about(step)["data"])

    def _saving(self, step: int) -> Path:
        return self.folder / f"{step:08d}{_SAVING}"

    def _finish(self, step: int, about: dict[str, Any]) -> None:
        """In the background: once Orbax has written the arrays, the checkpoint gets its manifest and its name."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                self._name(step, about)
        except Exception as error:
            raise self._failure(step, error) from error

    def _name(self, step: int, about: dict[str, Any]) -> None:
        saving = self._saving(step)
        write_atomically(saving / "run.json", json.dumps(about))
        files = {str(file.relative_to(saving)): _digest(file) for file in sorted(saving.rglob("*")) if file.is_file()}
        write_atomically(saving / "manifest.json", json.dumps(files, indent=1))
        # A checkpoint of this step can only be one that an earlier start of the run wrote with the same numbers.
        shutil.rmtree(self.path(step), ignore_errors=True)
        saving.rename(self.path(step))
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old))

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        kept = self.steps()
        which = f"the one of step {kept[-1]} is intact" if kept else "there is none before it"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return CheckpointError(f"{self.path(step)}: the checkpoint could not be written ({reason}); {which}")


def named(state: Any) -> dict[str, Any]:
    """A tree's leaves by name, such as "params.stacks.0.blocks.1.attention.w_q_DNH"."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        os.fsync(opened.fileno())
    return digest


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text("utf-8"))
        for name, digest in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest.json: {error}"
    return None
