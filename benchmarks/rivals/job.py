"""What both sides of a comparison compute, and how a rival is set up. Processes are told it as JSON: nothing of JAX or
PyTorch is imported here."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

Task = Literal["train", "decode"]
Format = Literal["float32", "bfloat16"]
Device = Literal["cpu", "gpu"]
Cache = Literal["dynamic", "static"]
"""transformers' classes of caches."""
Family = Literal["HunYuanMoEV1", "Qwen2Moe", "Qwen3Moe"]
"""Models of transformers by the beginning of their classes' names."""
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Sizes:
    """Of a model with one routed expert a token and a shared one. Fields as in `moe.model.config.ModelConfig`."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    d_expert: int

    @property
    def name(self) -> str:
        """Millions of parameters, but for norms and routers."""
        attention = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        experts = 3 * self.d_expert * (self.num_experts + 1)
        embedded = 2 * self.vocab_size
        millions = self.d_model * (embedded + self.num_layers * (attention + experts)) / 1e6
        return f"{millions:,.{0 if millions >= 10 else 2}f}M"


@dataclass(frozen=True)
class Job:
    """
    task: "train" is a whole step, with AdamW. "decode" is a prefill, and then one token after the other.
    format: of the computation.
    batch: texts. length: tokens of each, in decoding of its prompt.
    answer: tokens that are decoded for each text.
    steps: of training in one turn, none of which waits for the one before.
    """

    task: Task
    format: Format
    batch: int
    length: int
    answer: int
    sizes: Sizes
    device: Device = "cpu"
    steps: int = 1

    @property
    def name(self) -> str:
        if self.task == "train":
            return f"train step, {self.sizes.name}, {self.batch} x {self.length} tokens, {self.format}"
        return f"decoding, {self.sizes.name}, batch {self.batch}, context {self.length}, {self.format}"

    @property
    def tokens(self) -> dict[str, int]:
        """Of one turn, by the parts that are timed."""
        if self.task == "train":
            return {"step": self.batch * self.length * self.steps}
        return {"prefill": self.batch * self.length, "decode": self.batch * self.answer}


@dataclass(frozen=True)
class Setting:
    """How transformers' model is run.

    experts: `experts_implementation`; and that for single tokens, in decoding.
    autocast: parameters stay in float32, and torch.autocast chooses what is computed in bfloat16; otherwise the whole
        model, gradients and AdamW's moments among it, has the job's format.
    compiled: by torch.compile, the step's forward and backward or the decoding of a token.
    """

    family: Family
    experts: Literal["eager", "grouped_mm"]
    token_experts: Literal["eager", "grouped_mm", "batched_mm"]
    autocast: bool = False
    cache: Cache = "dynamic"
    compiled: bool = False

    def name(self, task: Task) -> str:
        words: list[str] = [self.family, self.experts]
        if task == "decode":
            words += [f"then {self.token_experts}"] if self.token_experts != self.experts else []
            words += [f"{self.cache} cache"]
        words += ["autocast"] if self.autocast else []
        words += ["compiled"] if self.compiled else []
        return ", ".join(words)


def settings(job: Job, *, compiled: bool) -> list[Setting]:
    """Those that a rival may be at its best in.

    Left out are transformers' "batched_mm" for many tokens, which copies an expert's weights for each of them (18 GB a
    layer of the 158M model at 2048 tokens), and kernels for GPUs that it would fetch from elsewhere.

    Args:
        compiled: whether torch.compile is tried as well.
    """
    ways = []
    for family in FAMILIES:
        if job.task == "train":
            for autocast in (False, True) if job.format == "bfloat16" else (False,):
                ways += [Setting(family, "eager", "eager", autocast)]
                ways += [Setting(family, "grouped_mm", "grouped_mm", autocast)]
        else:
            for cache in get_args(Cache):
                ways += [Setting(family, "eager", "eager", cache=cache)]
                ways += [Setting(family, "grouped_mm", "grouped_mm", cache=cache)]
                ways += [Setting(family, "grouped_mm", "batched_mm", cache=cache)]
    if compiled:
        # Of a growing cache each token would be compiled anew.
        ways += [replace(way, compiled=True) for way in ways if job.task == "train" or way.cache == "static"]
    return ways


def told(job: Job, setting: Setting | None) -> str:
    """The argument of a process that takes part."""
    return json.dumps({"job": asdict(job), "setting": setting and asdict(setting)})


def read(text: str) -> tuple[Job, Setting | None]:
    """The inverse of `told`."""
    values: dict[str, Any] = json.loads(text)
    job, setting = values["job"], values["setting"]
    return Job(**job | {"sizes": Sizes(**job["sizes"])}), setting and Setting(**setting)


def draw_tokens(vocab_size: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BT and targets_BT, i32: the same on both sides."""
    tokens_BT, targets_BT = np.random.default_rng(0).integers(0, vocab_size, (2, batch, length)).astype(np.int32)
    return tokens_BT, targets_BT
