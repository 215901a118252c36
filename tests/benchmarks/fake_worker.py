"""A process that takes part without a model: python -m tests.benchmarks.fake_worker WAY"""

import sys
import time

from benchmarks.rivals.protocol import About, Take, serve


def begin() -> tuple[About, Take]:
    way = sys.argv[1]
    print("a library greets")
    if way == "unready":
        raise RuntimeError("no such kernel\nand many more lines")
    taken = 0

    def take() -> tuple[dict[str, float], float]:
        nonlocal taken
        print("a library warns")
        taken += 1
        if way == "fails":
            raise ValueError("out of paper")
        if way == "dies":
            print("Killed by the weather", file=sys.stderr, flush=True)
            sys.exit(3)
        if way == "hangs":
            time.sleep(60)
        return {"step": float(taken)}, 10.0 - taken

    return {"software": "fake 1.0", "parameters": 7}, take


if __name__ == "__main__":
    serve(begin)
