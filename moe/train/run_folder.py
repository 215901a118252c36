"""The folder of one run: locked while the run lives, its configuration frozen, its environment written down."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax

LOGS = "logs"
"""Within a run's folder: what experiments.launch collects of the processes, before the run itself begins."""

BASE = "base.json"
"""Within a run's folder, where it trains adapters."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class RunFolderError(RuntimeError):
    """A run folder that cannot be used: names it, and says what would work."""


class RunFolder:
    """Where a run writes. Use as a context manager; the lock is freed at the end, and by the system if killed."""

    def __init__(self, path: Path, lock: IO[str] | None, earlier: list[str] | None = None) -> None:
        self.path = path
        self._lock = lock
        self.earlier = earlier or []
        """Fingerprints that the run had before settings changed which `open` was told may change; in process 0."""

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        frozen: dict[str, Any],
        fingerprint: str,
        process_index: int = 0,
        may_change: Collection[str] = (),
    ) -> "RunFolder":
        """Creates the folder, or takes an earlier start of the same run up again.

        Args:
            frozen: the whole configuration as nested dicts of JSON values, kept in config.json.
            fingerprint: of those settings that change the run's numbers; another one is refused.
            process_index: with several processes, only process 0 locks and writes.
            may_change: settings by dotted path that may differ from the earlier start's, though they count in the
                fingerprint.

        Raises:
            RunFolderError: a live process uses the folder, it holds another run or something else, or it cannot be
                written.
        """
        path = Path(path)
        if process_index:
            return cls(path, None)
        refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
            earlier = _freeze(path, frozen, fingerprint, may_change)
            _append_environment(path / "environment.json")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written ({error.strerror}); give another --run-dir") from error
        return cls(path, lock, earlier)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def base(self) -> Path:
        """What tells the frozen base from others (moe/train/base.py)."""
        return self.path / BASE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


def refuse_foreign(path: Path) -> None:
    """
    Raises:
        RunFolderError: the folder holds something, and it is no run.
    """
    foreign = path.is_dir() and any(file.name != LOGS for file in path.iterdir())
    if foreign and not (path / "lock").exists():
        raise RunFolderError(f"{path}: holds files of something else than a run; give an empty --run-dir")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or what stood there before, whenever the process is killed."""
    aside = path.with_name(f"{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _locked(path: Path) -> IO[str]:
    lock = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise RunFolderError(f"{path}: in use by {owner}; wait for it, stop it, or give another --run-dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
    lock.flush()
    return lock


def _freeze(path: Path, frozen: dict[str, Any], fingerprint: str, may_change: Collection[str]) -> list[str]:
    """Writes down the configuration where it is the run's, and returns the other fingerprints that the run had."""
    file = path / "config.json"
    earlier: list[str] = []
    if file.exists():
        try:
            kept = json.loads(file.read_text("utf-8"))
            known, before, earlier = kept["fingerprint"], kept["config"], kept.get("earlier", [])
        except (ValueError, KeyError, TypeError):
            raise RunFolderError(f"{file}: cannot be read; give another --run-dir, or restore the file") from None
        if known != fingerprint:
            changed = _changed(before, frozen)
            if not may_change or not changed.keys() <= set(may_change):
                told = ", ".join(f"{name}: {old} there, {new} now" for name, (old, new) in changed.items())
                on_mesh = changed and all(name.startswith("mesh.") for name in changed)
                raise RunFolderError(
                    f"{path}: holds a run of another configuration ({told}); give another --run-dir, or the settings "
                    "of that run" + (", or --remesh to go on with it on this mesh" if on_mesh else "")
                )
            earlier = [known, *(other for other in earlier if other not in (known, fingerprint))]
    text = {"fingerprint": fingerprint, "config": frozen, "earlier": earlier}
    write_atomically(file, json.dumps(text, indent=1))
    return earlier


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted path: (before, now)."""
    old, new = _flat(before), _flat(now)
    return {name: (old.get(name), new.get(name)) for name in sorted(old | new) if old.get(name) != new.get(name)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _append_environment(file: Path) -> None:
    starts = json.loads(file.read_text("utf-8")) if file.exists() else []
    starts.append(
        {
            "time": _now(),
            "command": sys.argv,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": [str(device.device_kind) for device in jax.devices()],
            "processes": jax.process_count(),
            "packages": {name: version(name) for name in _PACKAGES},
            "git": _git(),
        }
    )
    write_atomically(file, json.dumps(starts, indent=1))


def _git() -> dict[str, Any] | None:
    """The commit of the source, and whether files differ from it; None where the source is no git checkout."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
