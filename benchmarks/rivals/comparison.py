"""What a run of `benchmarks.peers` found: of each job, us beside each rival."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.rivals.job import Job, Setting
from benchmarks.rivals.pairing import Pair, best, ratios
from benchmarks.rivals.protocol import About, Turn

OURS = "Leverage"


@dataclass(frozen=True)
class Entrant:
    """A rival that was measured, in turns with us."""

    setting: Setting
    about: About
    pairs: list[Pair]


@dataclass(frozen=True)
class Comparison:
    """
    heats: seconds by part of each setting that was tried, alone: which were measured follows from them.
    failures: sentences on settings, or entrants, that failed.
    """

    job: Job
    ours: About
    heats: dict[Setting, dict[str, float]]
    failures: list[str]
    entrants: list[Entrant]

    def best(self, part: str) -> Entrant:
        """The strongest rival in a part."""
        return self.entrants[best(((i, entrant.pairs) for i, entrant in enumerate(self.entrants)), part)]

    def our_turns(self) -> list[Turn]:
        return [pair.ours for entrant in self.entrants for pair in entrant.pairs]

    def turns(self) -> Iterator[tuple[str, About, list[Turn]]]:
        """Ours, and each rival's."""
        if self.entrants:
            yield OURS, self.ours, self.our_turns()
        for entrant in self.entrants:
            yield entrant.setting.name(self.job.task), entrant.about, [pair.rival for pair in entrant.pairs]

    def rates(self, part: str, turns: list[Turn]) -> list[float]:
        """Tokens a second."""
        return [self.job.tokens[part] / turn.seconds[part] for turn in turns]

    def idle(self) -> float:
        """The largest share of a core that a process took while it waited."""
        shares = (sum(turn.idle for turn in turns) / sum(turn.waited for turn in turns) for _, _, turns in self.turns())
        return max(shares, default=0.0)

    def to_json(self) -> dict[str, Any]:
        task = self.job.task
        return {
            "job": {"name": self.job.name} | asdict(self.job),
            "ours": self.ours,
            "heats": [{"name": key.name(task)} | asdict(key) | {"seconds": s} for key, s in self.heats.items()],
            "failures": self.failures,
            "rivals": [
                {
                    "name": entrant.setting.name(task),
                    "setting": asdict(entrant.setting),
                    "about": entrant.about,
                    "ratios": {part: ratios(entrant.pairs, part) for part in self.job.tokens},
                    "pairs": [{"ours": asdict(pair.ours), "rival": asdict(pair.rival)} for pair in entrant.pairs],
                }
                for entrant in self.entrants
            ],
        }
