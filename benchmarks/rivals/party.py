"""Parties to a benchmark of ours alone, each in a process of its own: none finds memory as another left it.

For each of them the benchmark's module is started once more, and told which it is.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import About, Take, Worker, serve

ROOT = Path(__file__).parents[2]
LIMIT = 900.0
"""Seconds that making ready, or a turn, may take."""
PARTY = "--party"


def party(module: str, name: str, **told: Any) -> Worker:
    """The driver's end of one. told: what it is told, which JSON can say.

    Raises:
        WorkerError: it did not get ready.
    """
    command = [sys.executable, "-m", module, PARTY, json.dumps({"name": name, **told})]
    return Worker(name, command, folder=ROOT, limit=LIMIT)


def joins() -> dict[str, Any] | None:
    """What this process was told, its `name` among it; None where it is no party but the driver."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == [PARTY] else None


def drive_or_join(main: Callable[[], None], begin: Callable[..., tuple[About, Take]]) -> None:
    """Runs the benchmark's `main`, or takes part in it with what `begin` makes of what the process was told."""
    told = joins()
    if told is None:
        main()
    else:
        serve(partial(begin, **told))
