"""Training and decoding beside Hugging Face's transformers on PyTorch, in one run.

    python -m benchmarks.peers [--device gpu] [--only train|decode] [--format float32|bfloat16] [--compile]

Both sides compute models of the same sizes on the same tokens, each in a process of its own: the 158M preset's, on a
GPU larger ones too. They take turns, and the one that waits takes nothing. First each setting of a rival is tried
alone; its fastest ones are then measured: ratios compare a turn with the turn beside it. Rivals run in the environment
that `make bench-setup` makes; for a GPU, give both environments a jax and a torch that compute there.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.rivals.comparison import OURS, Comparison, Entrant
from benchmarks.rivals.job import Device, Job, Setting, Sizes, settings, told
from benchmarks.rivals.pairing import Player, alternate, finalists
from benchmarks.rivals.party import ROOT
from benchmarks.rivals.protocol import Worker, WorkerError
from benchmarks.rivals.report import draw_rates, heats_table, tables, verdicts
from moe.model.presets import SPEED_158M
from moe.planner.pictures import png

RIVALS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
HEAT = 2
"""Turns of a setting alone, after one to warm up; the faster one counts."""

FULL_SIZES = Sizes(**{field.name: getattr(SPEED_158M, field.name) for field in fields(Sizes)})
TINY_SIZES = Sizes(
    vocab_size=256, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, d_expert=96
)
LARGE_SIZES = Sizes(
    vocab_size=32_000, d_model=2048, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=128, num_experts=16,
    d_expert=2048,
)  # fmt: skip
"""1.9B parameters, 416M of them active."""


@dataclass(frozen=True)
class Work:
    """
    trained: sizes, texts and tokens of each, of each step that is timed. steps: of a turn.
    decoded: sizes. context: tokens of a prompt. answer: tokens decoded after it.
    """

    trained: tuple[tuple[Sizes, int, int], ...]
    decoded: Sizes
    context: int
    answer: int
    steps: int = 1


WORK: dict[Device, Work] = {
    "cpu": Work(((FULL_SIZES, 4, 512),), FULL_SIZES, 1024, 32),
    "gpu": Work(
        ((LARGE_SIZES, 8, 2048), (FULL_SIZES, 32, 2048), (FULL_SIZES, 4, 512)), LARGE_SIZES, 1024, 128, steps=10
    ),
}
TINY_WORK = Work(((TINY_SIZES, 2, 32),), TINY_SIZES, 32, 4)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Each task in each format that was asked for."""
    device, work = options.device, TINY_WORK if options.tiny else WORK[options.device]
    for format in ("float32", "bfloat16"):
        if options.format in (None, format):
            if options.only != "decode":
                for sizes, batch, length in work.trained:
                    yield Job("train", format, batch, length, 0, sizes, device, work.steps)
            if options.only != "train":
                for texts in (1, 8):
                    yield Job("decode", format, texts, work.context, work.answer, work.decoded, device)


class Run:
    """Comparisons with the same options, and their progress on standard error.

    Args:
        rival: what settings are tried: those whose name has this in it.
    """

    def __init__(self, repeats: int, limit: float, compiled: bool, rival: str = "") -> None:
        self.repeats, self.limit, self.compiled, self.rival = repeats, limit, compiled, rival
        self.progress = Console(stderr=True, highlight=False)

    def compare(self, job: Job) -> Comparison:
        """
        Raises:
            WorkerError: our process failed. Of rivals' failures the comparison tells.
        """
        failures: list[str] = []
        heats = self.heats(job, failures)
        entrants: list[Entrant] = []
        self.progress.print(f"{job.name}: {OURS} makes ready")
        with self.worker(job, None) as ours:
            for setting in finalists(heats, lambda setting: (setting.family, setting.autocast)):
                self.progress.print(f"{job.name}: {setting.name(job.task)} ", end="")
                try:
                    entrants.append(self.measure(job, setting, ours))
                except WorkerError as error:
                    if error.worker == OURS:
                        raise
                    failures.append(str(error))
                self.progress.print()
            return Comparison(job, ours.about, heats, failures, entrants)

    def heats(self, job: Job, failures: list[str]) -> dict[Setting, dict[str, float]]:
        """The least seconds by part of each setting, alone; sentences on others are added to `failures`."""
        found = {}
        for setting in settings(job, compiled=self.compiled):
            if self.rival not in setting.name(job.task):
                continue
            self.progress.print(f"{job.name}: trying {setting.name(job.task)} ", end="")
            try:
                with self.worker(job, setting) as rival:
                    rival.turn()
                    turns = [rival.turn().seconds for _ in range(HEAT)]
                found[setting] = {part: min(turn[part] for turn in turns) for part in job.tokens}
                self.progress.print(*(f"{part} {seconds:.2f} s" for part, seconds in found[setting].items()))
            except WorkerError as error:
                failures.append(str(error))
                self.progress.print("failed")
        return found

    def measure(self, job: Job, setting: Setting, ours: Player) -> Entrant:
        with self.worker(job, setting) as rival:
            dot = partial(self.progress.print, ".", end="")
            return Entrant(setting, rival.about, alternate(ours, rival, self.repeats, dot))

    def worker(self, job: Job, setting: Setting | None) -> Worker:
        """Ours where there is no setting."""
        if setting is None:
            python, module, name = sys.executable, "our_worker", OURS
        else:
            python, module, name = str(RIVALS_PYTHON), "torch_worker", setting.name(job.task)
        command = [python, "-m", f"benchmarks.rivals.{module}", told(job, setting)]
        return Worker(name, command, folder=ROOT, limit=self.limit)


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=about)
    parser.add_argument("--device", choices=tuple(WORK), default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--only", choices=("train", "decode"), help="one task; both otherwise")
    parser.add_argument("--format", choices=("float32", "bfloat16"), help="one format; both otherwise")
    parser.add_argument("--compile", action="store_true", help="try torch.compile too, which takes minutes")
    parser.add_argument("--rival", default="", metavar="TEXT",
                        help="only settings with this in their name, such as 'HunYuanMoEV1, grouped_mm'")  # fmt: skip
    parser.add_argument("--limit", type=float, default=600, help="seconds a turn may take (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "peers.json", metavar="FILE",
                        help="for all turns, with the picture beside it (default: build/peers.json)")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a small model and short texts, to see that all works")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give 1 or more")
    if not RIVALS_PYTHON.exists():
        parser.exit(1, f"{RIVALS_PYTHON}: the rivals' environment is absent; make it with `make bench-setup`\n")

    console = Console(width=160, highlight=False)
    run = Run(options.repeats, options.limit, options.compile, options.rival)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    for job in jobs(options):
        comparisons.append(run.compare(job))
        found = {"device": comparisons[0].ours["device"], "comparisons": [each.to_json() for each in comparisons]}
        options.json.write_text(json.dumps(found, indent=1), "utf-8")
        show(comparisons[-1], console)
    picture = options.json.with_suffix(".png")
    if any(each.entrants for each in comparisons):
        png(draw_rates(comparisons), picture)
    console.print(f"{comparisons[0].ours['device']}, {options.repeats} turns: median (least to most); "
                  f"{options.json}, {picture}\n", soft_wrap=True)  # fmt: skip
    for each in comparisons:
        for sentence in verdicts(each):
            console.print(sentence, soft_wrap=True)


def show(comparison: Comparison, console: Console) -> None:
    """Prints all but the verdicts."""
    console.print(heats_table(comparison), "")
    for failure in comparison.failures:
        console.print(f"not measured: {failure}", soft_wrap=True)
    for table in tables(comparison):
        console.print(table, "")
    rivals = {entrant.about["software"] for entrant in comparison.entrants}
    console.print(f"{comparison.ours['software']} beside {', '.join(rivals)}; a process that waited took at most "
                  f"{comparison.idle():.1%} of a core\n", soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    main()
