"""A model over HTTP, as OpenAI's clients speak: python -m moe.serve.server CHECKPOINT

    curl localhost:8000/v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 50}'

/v1/models, /v1/completions and /v1/chat/completions, both with streaming; /health. Exit codes: 0 stopped · 1 the system
failed · 2 a mistake in the arguments or files.
"""

import argparse
import asyncio
import hmac
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moe.model.config import ConfigError
from moe.model.tensor_files import WeightsError
from moe.serve.chat import ChatError
from moe.serve.engine import ContextError, Engine
from moe.serve.formats import add_formats, formats_of
from moe.serve.language_model import HunyuanMoE
from moe.serve.openai_api import Answers, ApiError, Asked, understand
from moe.serve.sampling import SamplingError
from moe.serve.scheduler import BusyError, Event, Request, Scheduler, StoppedError
from moe.train.checkpoint import CheckpointError
from parallel.layout import LayoutError
from parallel.malloc import use_large_pages
from parallel.mesh import MeshError, parse_mesh
from parallel.program_cache import keep_programs

KEY_VARIABLE = "LEVERAGE_API_KEY"
CLIENT_CLOSED_REQUEST = 499
"""Status in the log of a request whose client did not wait for the answer; nobody receives it."""


class Service:
    """What the routes share."""

    def __init__(self, model: HunyuanMoE, scheduler: Scheduler, *, api_key: str | None, max_body: int) -> None:
        self.model, self.scheduler, self.api_key, self.max_body = model, scheduler, api_key, max_body

    def app(self) -> Starlette:
        """The application; its end closes the scheduler."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self.scheduler.close()

        def guarded(
            answer: Callable[[HttpRequest], Awaitable[Response]],
        ) -> Callable[[HttpRequest], Awaitable[Response]]:
            async def endpoint(request: HttpRequest) -> Response:
                try:
                    self._authorize(request)
                    return await answer(request)
                except ApiError as error:
                    return JSONResponse(error.body(), error.status)
                except BusyError as error:
                    return JSONResponse(ApiError(503, str(error)).body(), 503, headers={"Retry-After": "1"})
                except StoppedError as error:
                    return JSONResponse(ApiError(500, str(error)).body(), 500)
                except (ChatError, SamplingError, ContextError, ConfigError) as error:
                    return JSONResponse(ApiError(400, str(error)).body(), 400)

            return endpoint

        complete, chat = guarded(partial(self._complete, chat=False)), guarded(partial(self._complete, chat=True))
        routes = [
            Route("/health", self._health),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def _authorize(self, request: HttpRequest) -> None:
        given = request.headers.get("authorization", "")
        if self.api_key and not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise ApiError(401, "give the server's key as `Authorization: Bearer KEY`")

    async def _health(self, _: HttpRequest) -> Response:
        running, waiting = self.scheduler.busy
        told = {"slots": self.scheduler.engine.num_slots, "running": running, "waiting": waiting}
        return JSONResponse(told, 200 if self.scheduler.alive else 503)

    async def _models(self, _: HttpRequest) -> Response:
        model = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "leverage"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _body(self, request: HttpRequest) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise ApiError(413, f"the body is longer than {self.max_body} bytes")
        return body

    async def _complete(self, request: HttpRequest, *, chat: bool) -> Response:
        asked = understand(await self._body(request), self.model.vocabulary, chat=chat)
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        requests = self._submit(asked, events)
        answers = Answers(asked, self.model.name)
        if asked.stream:
            parts = self._stream(asked, answers, requests, events)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(request, answers, requests, events)

    def _submit(self, asked: Asked, events: asyncio.Queue[tuple[int, Event]]) -> list[Request]:
        loop = asyncio.get_running_loop()
        requests: list[Request] = []
        try:
            for number, prompt in enumerate(asked.prompts):
                deliver = _deliver_to(loop, events, number)
                requests.append(self.scheduler.submit(prompt, asked.sampling, deliver))
        except Exception:
            self._cancel(requests)
            raise
        return requests

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.cancel(request)

    async def _whole(
        self, http: HttpRequest, answers: Answers, requests: list[Request], events: asyncio.Queue[tuple[int, Event]]
    ) -> Response:
        collected = asyncio.ensure_future(self._collect(len(requests), events))
        gone = asyncio.ensure_future(_client_gone(http))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            texts, finish = collected.result()
        finally:
            collected.cancel()
            gone.cancel()
            self._cancel(requests)
        return JSONResponse(answers.whole(texts, finish, sum(request.tokens for request in requests)))

    async def _collect(self, count: int, events: asyncio.Queue[tuple[int, Event]]) -> tuple[list[str], list[str]]:
        """The texts of `count` answers, and why each ended."""
        texts, finish = [""] * count, [""] * count
        while not all(finish):
            number, event = await events.get()
            if event.finish == "error":
                raise ApiError(500, "the engine stopped; see the server's log")
            texts[number] += event.text
            finish[number] = event.finish or ""
        return texts, finish

    async def _stream(
        self, asked: Asked, answers: Answers, requests: list[Request], events: asyncio.Queue[tuple[int, Event]]
    ) -> AsyncIterator[str]:
        open_choices = set(range(len(requests)))
        try:
            if asked.chat:
                yield _sse(answers.chunk(0, "", None, first=True))
            while open_choices:
                number, event = await events.get()
                if event.finish == "error":
                    yield _sse(ApiError(500, "the engine stopped; see the server's log").body())
                    return
                yield _sse(answers.chunk(number, event.text, event.finish))
                if event.finish:
                    open_choices.discard(number)
            if asked.include_usage:
                yield _sse(answers.usage_chunk(sum(request.tokens for request in requests)))
            yield "data: [DONE]\n\n"
        finally:
            self._cancel(requests)


async def _client_gone(http: HttpRequest) -> None:
    """Returns when the client has closed its connection. The request's body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _deliver_to(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], number: int
) -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
        # The loop is closed where the server stops before its scheduler does: nobody listens any more.
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (number, event))

    return deliver


def _sse(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    keep_programs()
    try:
        mesh = parse_mesh(options.mesh) if options.mesh else None
        print(f"loading {options.model} …", file=sys.stderr)
        model = HunyuanMoE.from_hf(options.model, mesh=mesh, adapters=options.adapters, **formats_of(options))
        max_length = min(options.max_length, model.max_length)
        engine = Engine(model.weights, slots=options.slots, max_length=max_length)
        print("compiling …", file=sys.stderr)
        engine.warm_up()
        scheduler = Scheduler(engine, model.vocabulary, queue_limit=options.queue)
    except (ConfigError, WeightsError, MeshError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    print(
        f"{model.name} on http://{options.host}:{options.port}/v1: {engine.num_slots} slots of {max_length} tokens, "
        f"{engine.bytes_per_token:,} bytes of cache a token, "
        f"{'with' if key else 'without'} an API key",
        flush=True,
    )
    app = Service(model, scheduler, api_key=key, max_body=options.max_body).app()
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=5)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.serve.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint, a model folder, or the folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="texts that are computed at once (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="most tokens of prompt and answer together (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, help="requests that may wait for a slot (default: %(default)s)"
    )
    parser.add_argument("--max-body", type=int, default=1_000_000, help="bytes of a request (default: %(default)s)")
    parser.add_argument("--api-key", help=f"ask clients for this key; also from {KEY_VARIABLE}")
    parser.add_argument("--mesh", metavar="AXIS=N,…", help="devices to use, such as data=2,expert=4; by default one")
    parser.add_argument(
        "--adapters", type=Path, metavar="FOLDER", help="LoRA adapters to merge in: a run that trained some, or PEFT's"
    )
    add_formats(parser)
    return parser


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
