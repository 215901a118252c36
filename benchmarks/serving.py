"""What the key-value cache and continuous batching are worth: python -m benchmarks.serving

One more token at a context of 2048 with the cache and by recomputing the text; then tokens a second of the HTTP server
for one client and for eight at once; and bytes of cache per token for each way to share keys and values. Random
weights of the 158M preset: the work does not depend on their values.
"""

import http.client
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.spread import asked_repeats, machine, spread
from moe import HunyuanMoE
from moe.model.cache import empty_cache
from moe.model.execution import Execution
from moe.model.hf.convert import export_trained
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE, SPEED_158M
from moe.model.transformer import Transformer
from moe.serve.engine import Engine
from moe.serve.sampling import Sampling
from moe.serve.scheduler import Scheduler
from moe.serve.server import Service
from moe.train.tokenizer import train_tokenizer
from moe.train.trained import ArraySource
from parallel.malloc import use_large_pages

CONTEXT = 2048
ANSWER = 64
"""Tokens that a client of the server asks for."""
PROMPT = list(range(16))

SHARING = {"MHA": (80, 1), "GQA": (8, 1), "MQA": (1, 1), "CLA": (80, 2), "GQA + CLA": (8, 2)}
"""Key-value heads and layers that share them, of Hunyuan-Large's 80 query heads and 64 layers."""


def cache_table() -> Table:
    """Bytes of a token in the arrays that generation would use."""
    table = Table("Hunyuan-Large's cache, bfloat16", "key-value heads", "layers of a group", "KiB per token", box=None)
    for name, (heads, factor) in SHARING.items():
        config = replace(HUNYUAN_LARGE, num_kv_heads=heads, cla_factor=factor)
        bytes_per_token = empty_cache(config, batch=1, num_slots=2, dtype=jnp.bfloat16).bytes_per_token
        table.add_row(name, str(heads), str(factor), f"{bytes_per_token / 1024:.0f}")
    return table


def small_model(folder: Path) -> HunyuanMoE:
    """The 158M preset with random weights and a tokenizer."""
    tokenizer = train_tokenizer(["a text to learn from " * 20], 270)
    model = Transformer(SPEED_158M, Precision(), Execution(), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    export_trained(ArraySource(params), SPEED_158M, folder, lambda count: None)
    tokenizer.save(folder / "tokenizer.json")
    return HunyuanMoE.from_hf(folder)


def decoders(model: HunyuanMoE) -> dict[str, Callable[[], object]]:
    """One more token at the end of the context, in two ways."""
    engine = Engine(model.weights, slots=1, max_length=CONTEXT + 64)
    engine.admit([([1] * CONTEXT, Sampling(max_tokens=64))])
    text_BT = np.ones((1, CONTEXT), np.int32)
    return {
        "with the cache": engine.step,
        "recomputed": lambda: jax.block_until_ready(model(text_BT)[:, -1].argmax(-1)),
    }


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class LocalServer:
    """The server on a free port of this machine, in a thread."""

    def __init__(self, model: HunyuanMoE, slots: int) -> None:
        # Without an end token all answers have the length that was asked for.
        model.vocabulary.eos = frozenset()
        engine = Engine(model.weights, slots=slots, max_length=256)
        engine.warm_up()
        scheduler = Scheduler(engine, model.vocabulary, queue_limit=64)
        app = Service(model, scheduler, api_key=None, max_body=100_000).app()
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "LocalServer":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def ask(self) -> None:
        """One client's request, whole."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": ANSWER}))
        answer = json.load(connection.getresponse())
        assert answer["usage"]["completion_tokens"] == ANSWER, answer

    def rate(self, clients: int) -> float:
        """Generated tokens a second of `clients` that ask at the same time."""
        threads = [threading.Thread(target=self.ask) for _ in range(clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clients * ANSWER / (time.perf_counter() - begin)


def main() -> None:
    repeats = asked_repeats("benchmarks.serving", __doc__, 5, "turns of each")
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}, {repeats} turns: median (least to most)")
    console.print(cache_table(), "")
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder) / "model")
    contenders = decoders(model)
    for work in contenders.values():
        work()
    turns = [{name: seconds_of(work) for name, work in contenders.items()} for _ in range(repeats)]
    table = Table(f"batch 1, context {CONTEXT}", "tokens/s", box=None)
    for name in contenders:
        table.add_row(name, spread([1 / turn[name] for turn in turns], 2))
    console.print(table)
    console.print(f"ratio {spread([turn['recomputed'] / turn['with the cache'] for turn in turns])}\n")

    with LocalServer(model, slots=8) as server:
        server.rate(1)
        rates = [{clients: server.rate(clients) for clients in (1, 8)} for _ in range(repeats)]
    table = Table("HTTP server, 8 slots", "generated tokens/s", box=None)
    for clients in (1, 8):
        table.add_row(f"{clients} at once", spread([turn[clients] for turn in rates]))
    console.print(table)
    console.print(f"ratio {spread([turn[8] / turn[1] for turn in rates])}")


if __name__ == "__main__":
    use_large_pages()
    main()
