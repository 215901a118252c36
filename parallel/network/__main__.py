"""The GPU network, looked after: python -m parallel.network --help"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from parallel.network.collect import collect
from parallel.network.diagnose import diagnose
from parallel.network.recording import Recording, RecordingError, read_recording, write_recording
from parallel.network.report import as_json, print_diagnosis

_DOCTOR_CODES = {"yes": 0, "partly": 1, "no": 1, "unknown": 4}
_NO_GPU = 3
_DOCTOR = """\
Tells whether GPUDirect RDMA will be used on this node, and if not, why not and what to do: network cards that read and
write the GPUs' memory themselves, with no copy through the host. It reads nvidia-smi, /sys, /proc and NCCL's variables,
and where there are two GPUs runs a small all-reduce for NCCL's own log. Nothing is changed.
"""
_DOCTOR_EPILOG = """\
examples:
  python -m parallel.network doctor
  python -m parallel.network doctor --record node17           # keep what was read, to send it to someone
  python -m parallel.network doctor --from node17 --json
  python -m parallel.network doctor --nccl-log job.log        # proof from a run of your own, with NCCL_DEBUG=INFO

exit codes: 0 it will be used for all GPUs · 1 not, or only for some · 2 a mistake in arguments or recording ·
3 there is no GPU here · 4 it cannot be told
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except RecordingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _doctor(options: argparse.Namespace) -> int:
    recording = _recording(options)
    diagnosis = diagnose(recording)
    code = _DOCTOR_CODES[diagnosis.verdict] if diagnosis.gpus else _NO_GPU
    if options.json:
        print(as_json(diagnosis, code))
    else:
        # Where the output is no terminal, rich would break lines at 80 columns.
        print_diagnosis(diagnosis, Console(highlight=False, width=None if sys.stdout.isatty() else 140))
    return code


def _recording(options: argparse.Namespace) -> Recording:
    if options.folder is not None:
        recording = read_recording(options.folder)
        if options.nccl_log is not None:
            texts = dict(recording.texts) | {"nccl.log": options.nccl_log.read_text("utf-8", "replace")}
            recording = Recording(texts, recording.missing, recording.origin)
        return recording
    print("reading the node; a small all-reduce may take a minute", file=sys.stderr)
    recording = collect(options.nccl_log)
    if options.record is not None:
        write_recording(recording, options.record)
        print(f"recorded in {options.record}", file=sys.stderr)
    return recording


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.network",
        description="The GPU network: is GPUDirect RDMA used, which settings use it well, how fast is it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "doctor", help="whether GPUDirect RDMA will be used on this node, and why not", description=_DOCTOR,
        epilog=_DOCTOR_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    source = command.add_mutually_exclusive_group()
    source.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="judge a recording, not this node")
    source.add_argument("--record", type=Path, metavar="FOLDER", help="also keep what was read in a new folder")
    command.add_argument("--nccl-log", type=Path, metavar="FILE", help="what NCCL printed in a run of your own")
    command.add_argument("--json", action="store_true", help="the answer as JSON, for programs")
    command.set_defaults(run=_doctor)


if __name__ == "__main__":
    sys.exit(main())
