"""The server over real sockets, with OpenAI's own client."""

import copy
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import openai
import pytest
import uvicorn

from moe.serve.engine import Engine
from moe.serve.language_model import HunyuanMoE
from moe.serve.sampling import Sampling
from moe.serve.scheduler import Scheduler
from moe.serve.server import Service, main

KEY = "a secret"
PATIENCE = 60
"""Seconds for an answer, on a machine that may be busy compiling."""
TALK = [{"role": "user", "content": "In the beginning"}]


@contextmanager
def serving(model, *, slots=3, queue=16, key=KEY, max_length=256):
    """A server on a free port: its address and its scheduler."""
    scheduler = Scheduler(
        Engine(model.weights, slots=slots, max_length=max_length), model.vocabulary, queue_limit=queue
    )
    app = Service(model, scheduler, api_key=key, max_body=20_000).app()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", scheduler
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as (address, scheduler):
        yield address, scheduler


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def endless(model, monkeypatch):
    """The model as one that never ends a text, and takes its time over it."""
    vocabulary = copy.copy(model.vocabulary)
    vocabulary.eos = frozenset()
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    return HunyuanMoE(model.weights, vocabulary, 256, "endless")


def begin(answer):
    """Waits for a streamed answer's second part, for which everything has been compiled; returns the lines to come."""
    lines = answer.iter_lines()
    for _ in range(2):
        next(line for line in lines if line)
    return lines


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_models(client, model):
    assert [each.id for each in client.models.list()] == [model.name]


def test_completion_is_what_the_model_generates(client, model):
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 5}
    answer = client.completions.create(model=model.name, prompt="In the", **options)
    assert answer.choices[0].text == model.generate("In the", **options)
    assert answer.usage.prompt_tokens == len(model.vocabulary.encode("In the"))
    assert answer.usage.completion_tokens <= 20
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_several_prompts_and_token_ids(client, model):
    options = {"max_tokens": 8, "temperature": 0.0}
    answer = client.completions.create(model="any", prompt=["In", "the word"], **options)
    assert [choice.text for choice in answer.choices] == model.generate(["In", "the word"], **options)
    ids = model.vocabulary.encode("In")
    assert client.completions.create(model="any", prompt=ids, **options).choices[0].text == answer.choices[0].text


def test_chat_streams_to_the_same_answer(client, model):
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 5}
    expected = model.chat(TALK, **options)
    whole = client.chat.completions.create(model="any", messages=TALK, **options)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    parts = list(
        client.chat.completions.create(
            model="any", messages=TALK, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage


def test_a_completion_streams_and_stops(client, model):
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 4}
    whole = model.generate("In the beginning", **options)
    stop = whole[7:10]
    parts = list(client.completions.create(model="m", prompt="In the beginning", stream=True, stop=stop, **options))
    assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_many_at_once_get_the_answers_that_they_get_alone(client, model):
    prompts = [f"{word} {number}" for number in range(4) for word in ("In", "the word", "naïve café 🙂")]
    settings = [{"max_tokens": 5 + 3 * (i % 7), "temperature": [0.0, 1.0, 2.0][i % 3], "seed": i} for i in range(12)]
    alone = [model.generate(prompt, **each) for prompt, each in zip(prompts, settings, strict=True)]

    def ask(number):
        return client.completions.create(model="m", prompt=prompts[number], **settings[number]).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone


def test_a_client_that_goes_away_frees_its_slot(endless):
    body = {"prompt": "In", "max_tokens": 250}
    with serving(endless, key=None) as (address, scheduler):
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=body | {"stream": True}, timeout=PATIENCE
        ) as answer:
            begin(answer)
            assert scheduler.busy == (1, 0)
        wait_until(lambda: scheduler.busy == (0, 0), 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
        wait_until(lambda: scheduler.busy == (0, 0), 2)


def test_a_full_queue_says_so_and_a_stopped_server_ends_what_is_open(endless):
    body = {"prompt": "In", "max_tokens": 250}
    with serving(endless, slots=1, queue=1, key=None) as (address, scheduler):
        with httpx.stream(
            "POST", f"{address}/v1/completions", json=body | {"stream": True}, timeout=PATIENCE
        ) as running:
            lines = begin(running)
            told = []
            waiting = scheduler.submit([5], Sampling(max_tokens=3), told.append)
            assert scheduler.busy == (1, 1)
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE)
            assert answer.status_code == 503
            assert "waiting already" in answer.json()["error"]["message"]
            scheduler.cancel(waiting)
            wait_until(lambda: scheduler.busy == (1, 0), 2)
            scheduler.close()
            assert "the engine stopped" in list(lines)[-2]
        assert told == []
        assert "the engine stopped" in httpx.post(f"{address}/v1/completions", json=body).json()["error"]["message"]
        assert httpx.get(f"{address}/health").status_code == 503


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", b"{", 400, "the body is not JSON"),
        ("completions", b"[]", 400, "no JSON object"),
        ("completions", {}, 400, "prompt: give a text"),
        ("completions", {"prompt": ""}, 400, "the prompt has no tokens"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt: give a text"),
        ("completions", {"prompt": [999]}, 400, "go from 999 to 999"),
        ("completions", {"prompt": "a", "max_tokens": 10_000}, 400, "together they may be at most 256"),
        ("completions", {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens='many'"),
        ("completions", {"prompt": "a", "temperature": True}, 400, "temperature=True"),
        ("completions", {"prompt": "a", "n": 2}, 400, "n=2 is not implemented"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not known here"),
        ("completions", {"prompt": "a", "stop": 3}, 400, "stop: give a text"),
        ("completions", {"prompt": "a", "stream": "yes"}, 400, "stream is true or false"),
        ("completions", {"prompt": "a" * 30_000}, 413, "longer than 20000 bytes"),
        ("chat/completions", {"messages": "hi"}, 400, "messages: give a list"),
        ("chat/completions", {"messages": []}, 400, "the last one must be the user's"),
        ("chat/completions", {"messages": TALK, "tools": [{}]}, 400, "is not implemented"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "of type text"),
    ],
)
def test_mistakes_are_named(server, path, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server[0]}/v1/{path}", content=content, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_key_is_asked_for(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}x"}):
        assert httpx.get(f"{server[0]}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{server[0]}/health").json()["slots"] == 3


def test_mistakes_before_the_server_starts(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
