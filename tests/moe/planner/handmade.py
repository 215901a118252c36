"""A step made by hand, small enough to count in one's head, for tests of what reads one."""

from moe.planner.work import Buffer, Loop, Memory, Run, Start, Transfer, Wait, Work

GATHER = Transfer("gather", "dense", "all-gather", ("data",), 16, 16, inside=0.0, across=30e6)
DISPATCH = Transfer("dispatch", "exchange", "all-to-all", ("expert",), 4, 1, inside=60e6, across=0.0)
BACK = Transfer(
    "back", "exchange", "ragged-all-to-all", ("expert",), 4, 1, inside=20e6, across=0.0, backward=True, recomputed=True
)

WORK = Work(
    (
        Loop(
            4,
            (
                Start(GATHER),
                Run("attend", "attention", "attention", 2e12, 1e9, "bf16"),
                Wait("gather"),
                Start(DISPATCH),
                Wait("dispatch"),
                Run("up", "experts", "grouped_matmul", 8e12, 2e9, "bf16", (4, 4096, 1024, 2048)),
                Run("up.again", "experts", "grouped_matmul", 8e12, 2e9, "bf16", (4, 4096, 1024, 2048), recomputed=True),
                Start(BACK),
                Wait("back"),
            ),
        ),
        Run("logits", "head", "matmul", 4e12, 3e9, "bf16", (1, 4096, 4096, 8192)),
        Run("update", "optimizer", "elementwise", 1e9, 8e9, "f32"),
    ),
    "compiled",
)
"""76.001 TFLOP, 31 GB; 120 MB across nodes, 320 MB inside."""

MEMORY = Memory(
    parts={
        "parameters": 2 << 30, "optimizer_states": 4 << 30, "gradients": 1 << 30, "activations": 3 << 30,
        "temporaries": 1 << 30, "batch": 1 << 20,
    },
    peak=(11 << 30) + (1 << 20),
    allocated=12 << 30,
    host=0,
    largest=(
        Buffer(1 << 30, "activations", "bf16[64,4096,2048]", "fusion.7", "moe/model/block.py:41"),
        Buffer(1 << 29, "temporaries", "f32[8192,16384]", "dot.3", ""),
    ),
    over_program=((0.0, 6 << 30), (0.5, (11 << 30) + (1 << 20)), (0.75, 9 << 30), (1.0, 6 << 30)),
    origin="compiled",
)  # fmt: skip
