"""A model to use: `HunyuanMoE.from_hf(path)`, then call it, let it write, or talk to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe.model.config import ConfigError
from moe.model.precision import Format, Precision
from moe.ops.quantize import Quantized
from moe.serve.chat import chat_tokens
from moe.serve.engine import Engine, Served, Weights
from moe.serve.sampling import Sampling
from moe.serve.text_stream import TextStream
from moe.serve.vocabulary import Vocabulary, open_vocabulary
from moe.train.pretrained import open_pretrained
from parallel.blocks import EightBit
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh


@dataclass(frozen=True)
class Answer:
    """
    tokens: generated ones, the end token left out.
    text: of them, up to a stop text.
    finish: "stop" where the model ended it or a stop text came, "length" where max_tokens did.
    """

    tokens: list[int]
    text: str
    finish: str


class HunyuanMoE:
    """A pretrained mixture of experts with its tokenizer.

        model = HunyuanMoE.from_hf("Hunyuan-Large", mesh=MeshConfig(data=2, expert=4))
        logits_BTV = model(tokens_BT)
        print(model.generate("Once upon a time", max_tokens=100, temperature=0.7))

    Attributes:
        weights: configuration, precision, layout and parameters.
        max_length: most tokens of a text, prompt and answer together.
    """

    def __init__(self, weights: Weights, vocabulary: Vocabulary | None, max_length: int, name: str) -> None:
        self.weights, self._vocabulary, self.max_length, self.name = weights, vocabulary, max_length, name

    @classmethod
    def from_hf(
        cls,
        path: Path | str,
        *,
        mesh: MeshConfig | Mesh | None = None,
        compute: Format | None = None,
        weights: Quantized | None = None,
        activations: EightBit | None = None,
        cache: EightBit | None = None,
        adapters: Path | str | None = None,
        max_length: int | None = None,
    ) -> "HunyuanMoE":
        """Loads a checkpoint folder straight onto the mesh; a model folder or the folder of a run serve as well.

        Args:
            mesh: devices to use; None for one.
            compute: number format of the computation; None as the parameters are stored.
            weights: format to which the matrices of attention, experts and dense layers are quantized, piece by piece
                as they are read (moe/ops/quantize.py); None to leave them, or for a checkpoint that is quantized.
            activations: the weights' format, "int8" or "fp8", in which prompts are multiplied with them (W8A8); None to
                widen them.
            cache: format in which keys and values are kept, with scales; None for that of the computation.
            adapters: folder of LoRA adapters to merge into the weights as they are read, before these are quantized:
                of a run that trained some, or one that PEFT wrote.
            max_length: None for the checkpoint's max_position_embeddings, or 2048 where it does not say.

        Raises:
            ConfigError, WeightsError, CheckpointError: nothing usable stands at `path`.
            MeshError, LayoutError: the mesh does not fit the devices, or the model does not fit the mesh.
        """
        folder = Path(path).expanduser()
        pretrained = open_pretrained(folder, None if adapters is None else Path(adapters).expanduser())
        if isinstance(mesh, MeshConfig):
            mesh = make_mesh(mesh) if mesh.num_devices > 1 else None
        layout = SINGLE_DEVICE if mesh is None else Layout(mesh)
        layout.refuse_stages("generation")
        stored: Format = "float32" if pretrained.dtype == jnp.float32 else "bfloat16"
        compute = compute or stored
        precision = Precision(
            parameters=stored,
            compute=compute,
            gradients="float32",
            exchange=compute,
            frozen=weights or pretrained.quantized,
            activations=activations,
            cache=cache,
        )
        params, balance = pretrained.load_unrolled(layout, weights)
        loaded = Weights(Served(pretrained.config, precision, layout, unrolled=True), params, balance)
        loaded.narrow()
        loaded.move_as_bits()
        try:
            vocabulary = open_vocabulary(folder, pretrained.settings)
        except ConfigError:
            if any((folder / name).exists() for name in ("tokenizer.json", "hy.tiktoken")):
                raise
            vocabulary = None
        length = max_length or pretrained.settings.get("max_position_embeddings") or 2048
        return cls(loaded, vocabulary, length, folder.resolve().name)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer.

        Raises:
            ConfigError: none stands beside the weights.
        """
        if self._vocabulary is None:
            raise ConfigError(
                f"{self.name}: no tokenizer.json and no hy.tiktoken stands beside the weights; "
                "put one there, or give token ids"
            )
        return self._vocabulary

    def __call__(self, tokens_BT: Any) -> jax.Array:
        """logits_BTV, f32, of token ids [B, T]."""
        tokens_BT = np.asarray(tokens_BT, np.int32)
        batch = len(tokens_BT)
        padded_BT = np.pad(tokens_BT, ((0, -batch % self.weights.served.layout.batch_shards), (0, 0)))
        valid_BT = np.zeros(padded_BT.shape, np.int32)
        valid_BT[:batch] = 1
        logits_BTV = _logits(*self.weights, padded_BT, valid_BT)
        return logits_BTV[:batch]

    def generate(self, prompts: str | Sequence[Any], **sampling: Any) -> Any:
        """The text that follows a prompt; for a list of prompts a list of texts, computed together.

        Args:
            prompts: texts, or lists of token ids, whose answers then are lists of token ids.
            sampling: fields of `Sampling`: max_tokens, temperature, top_k, top_p, seed, stop.

        Raises:
            ContextError, SamplingError: a prompt or a setting that does not fit.
        """
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.vocabulary.encode(p) if isinstance(p, str) else [int(token) for token in p] for p in many]
        answers = self.answer(ids, Sampling(**sampling))
        found = [a.text if isinstance(p, str) else a.tokens for p, a in zip(many, answers, strict=True)]
        return found[0] if isinstance(prompts, str) else found

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """The text that follows, in parts as they come."""
        yield from self.stream_tokens(self.vocabulary.encode(prompt), Sampling(**sampling))

    def chat(self, messages: Sequence[Mapping[str, str]], **sampling: Any) -> str:
        """The answer to a conversation: [{"role": "user", "content": "…"}, …].

        Raises:
            ChatError: a message out of turn.
        """
        tokens = chat_tokens(messages, self.vocabulary)
        return self.answer([tokens], Sampling(**sampling))[0].text

    def stream_tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """As `stream`, from token ids."""
        stream = TextStream(self.vocabulary, sampling.stop)
        engine = self._engine([prompt], sampling)
        ((_, token),) = engine.admit([(prompt, sampling)])
        for count in range(1, sampling.max_tokens + 1):
            if token in self.vocabulary.eos:
                break
            text = stream.push(token)
            if text:
                yield text
            if stream.stopped or count == sampling.max_tokens:
                break
            ((_, token),) = engine.step()
        rest = stream.finish()
        if rest:
            yield rest

    def answer(self, prompts: list[list[int]], sampling: Sampling) -> list[Answer]:
        """What follows each prompt. Without a tokenizer the answers' texts are empty and only max_tokens ends them."""
        if not prompts:
            return []
        engine = self._engine(prompts, sampling)
        vocabulary = self._vocabulary
        streams = [TextStream(vocabulary, sampling.stop) if vocabulary else None for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        texts, finish = ["" for _ in prompts], ["length" for _ in prompts]
        place = {}
        arrived = engine.admit([(prompt, sampling) for prompt in prompts])
        for number, (slot, _) in enumerate(arrived):
            place[slot] = number
        while arrived:
            for slot, token in arrived:
                number = place[slot]
                stream = streams[number]
                if vocabulary and token in vocabulary.eos:
                    finish[number] = "stop"
                    engine.release(slot)
                    continue
                tokens[number].append(token)
                if stream is not None:
                    texts[number] += stream.push(token)
                    finish[number] = "stop" if stream.stopped else "length"
                if finish[number] == "stop" or len(tokens[number]) == sampling.max_tokens:
                    engine.release(slot)
            arrived = engine.step()
        for number, stream in enumerate(streams):
            texts[number] += stream.finish() if stream else ""
        return [Answer(*each) for each in zip(tokens, texts, finish, strict=True)]

    def _engine(self, prompts: list[list[int]], sampling: Sampling) -> Engine:
        # Rounded up, so that the next call with a text of about this length compiles nothing.
        needed = max((len(prompt) for prompt in prompts), default=0) + sampling.max_tokens
        length = min(-(-needed // 128) * 128, self.max_length)
        return Engine(self.weights, slots=len(prompts), max_length=length)


@partial(jax.jit, static_argnums=0)
def _logits(
    served: Served,
    params: dict[str, Any],
    balance: dict[str, Any],
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
) -> jax.Array:
    model, layout = served.model(params, balance), served.layout
    return model.logits(model(tokens_BT, None, valid_BT, layout=layout).hidden_BTD, layout)
