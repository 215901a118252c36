"""A Slurm of one machine, brought up by hand and without a system manager, for tests."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_PROGRAMS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "slurmctld", "slurmd", "munged")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmUser=root
SlurmdUser=root
SlurmdPidFile={folder}/slurmd.pid
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def absent() -> str:
    """Why there can be no Slurm here, or nothing."""
    missing = [name for name in _PROGRAMS if _which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Gives the environment in which Slurm's commands reach it; ends its daemons afterwards."""
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, folder=folder, ports=_free_ports(2), cpus=os.cpu_count()))
    for name in ("spool", "state"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    munge = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    environment = os.environ | {"SLURM_CONF": str(conf)}
    with ExitStack() as daemons:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={munge['socket']}",
             f"--pid-file={munge['pid']}", f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf)],
        ):  # fmt: skip
            program = str(_which(command[0]))
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            daemon = daemons.enter_context(subprocess.Popen([program, *command[1:]], env=environment, **quiet))
            daemons.callback(daemon.terminate)
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in ask(environment, "sinfo", "--noheader"):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment


def ask(environment: dict[str, str], *command: str) -> str:
    """What one of Slurm's commands says."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
