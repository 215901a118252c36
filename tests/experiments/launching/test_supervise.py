"""Small Python programs stand for the processes of a run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments.launching.supervise import GRACE_SECONDS, Member, supervise

ROOT = Path(__file__).parent.parent.parent.parent
SLEEP = "import time; print('here', flush=True); time.sleep(60)"


def members(*programs):
    return [
        Member(i, [sys.executable, "-c", textwrap.dedent(program)], os.environ) for i, program in enumerate(programs)
    ]


def test_all_done(tmp_path):
    shown = []
    ended = supervise(
        members("print('a')", "print('[Gloo] Rank 0 is connected'); import sys; print('b', file=sys.stderr)"),
        tmp_path / "logs",
        shown.append,
    )
    assert (ended.code, ended.culprit) == (0, None)
    assert shown == ["[0] a"]
    assert (tmp_path / "logs/process-0.log").read_text().endswith("---\na\n")
    log = (tmp_path / "logs/process-1.log").read_text()
    assert "[Gloo] Rank 0" in log
    assert "\nb\n" in log


def test_a_log_goes_on_with_the_next_start(tmp_path):
    for text in ("one", "two"):
        supervise(members(f"print('{text}', end='')"), tmp_path, lambda line: None)
    lines = (tmp_path / "process-0.log").read_text().splitlines()
    assert lines[1::2] == ["one", "two"]


@pytest.mark.parametrize(
    ("program", "code", "how", "told"),
    [
        ("import os; os.kill(os.getpid(), 9)", 1, "was killed by SIGKILL", ""),
        ("import os; os.abort()", 3, "was aborted by the runtime (SIGABRT), which happens when it has lost", ""),
        ("import os; os.write(2, b'RPC: /RegisterTask\\n'); os.abort()", 3, "did not meet the others within 300 s", ""),
        ("raise SystemExit('error: no such file')", 1, "failed with exit code 1", "error: no such file"),
        (
            "import sys; print('error: mistake', file=sys.stderr); sys.exit(2)",
            2,
            "failed with exit code 2",
            "error: mist",
        ),
        ("import sys; sys.exit(3)", 3, "lost contact with another process", ""),
    ],
)
def test_when_one_dies_it_is_named_and_all_end(tmp_path, program, code, how, told, monkeypatch):
    monkeypatch.setattr("experiments.launching.supervise.GRACE_SECONDS", 0.5)
    ended = supervise(members(SLEEP, program), tmp_path, print)
    assert (ended.code, ended.culprit) == (code, 1)
    assert ended.how.startswith(how)
    assert ended.told.startswith(told)


def test_all_end_within_the_stated_time(tmp_path):
    # The sleeper ignores a polite request, as a process in the midst of a collective does.
    stuck = f"import signal; signal.signal(15, signal.SIG_IGN); {SLEEP}"
    begin = time.monotonic()
    ended = supervise(members(stuck, "import os; os.kill(os.getpid(), 9)"), tmp_path, print)
    assert GRACE_SECONDS < ended.seconds < GRACE_SECONDS + 1
    assert time.monotonic() - begin < GRACE_SECONDS + 10


def test_the_first_to_die_is_named_and_not_those_that_missed_it(tmp_path):
    files = f"""
    import fcntl, os, sys, time
    lock, taken = {str(tmp_path / "lock")!r}, {str(tmp_path / "taken")!r}
    """
    # The lock is free again when its holder is dead.
    misses_it = """
    while not os.path.exists(taken):
        time.sleep(0.01)
    fcntl.flock(open(lock), fcntl.LOCK_EX)
    sys.exit(3)
    """
    killed = """
    held = open(lock, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    open(taken, "w").close()
    os.kill(os.getpid(), 9)
    """
    programs = (textwrap.dedent(files + program) for program in (misses_it, killed))
    ended = supervise(members(*programs), tmp_path / "logs", print)
    assert (ended.culprit, ended.how) == (1, "was killed by SIGKILL")
    assert ended.seconds < GRACE_SECONDS


SAVING = "import signal, sys, time; [signal.signal(s, lambda n, f: sys.exit(128 + n)) for s in (2, 15)]; " + SLEEP


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", [SAVING, SLEEP], ids=["a run that saves", "a run that does not listen yet"])
def test_signals_are_handed_on_and_exit_codes_kept(tmp_path, number, program):
    code = f"""
    import sys
    from pathlib import Path
    from experiments.launching.supervise import supervise
    from tests.experiments.launching.test_supervise import members
    ended = supervise(members({program!r}, {program!r}), Path({str(tmp_path)!r}), lambda line: print(line, flush=True))
    sys.exit(ended.code if ended.culprit is None and ended.signal == {int(number)} else 99)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert sorted(parent.stdout.readline() for _ in range(2)) == ["[0] here\n", "[1] here\n"]
    parent.send_signal(number)
    assert parent.wait(timeout=30) == 128 + number


def test_a_program_that_is_not_there(tmp_path):
    missing = Member(1, [str(tmp_path / "nothing")], os.environ)
    with pytest.raises(FileNotFoundError, match="nothing"):
        supervise([*members(SLEEP), missing], tmp_path / "logs", print)
