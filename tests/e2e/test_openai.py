"""The openai package against the real service: completions, scoring, memory, retries."""

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import ROOT, MakeServer, Server, problem
from openai.types import Completion

from service import run
from service.app import create_app
from service.settings import Settings
from service.store.memory import MemoryStore

LETTERS = "tiny-letters"
TAGS = "tiny-tags"


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def key() -> dict[str, str]:
    return {"Idempotency-Key": secrets.token_hex(8)}


def remember(session: str) -> dict[str, str]:
    return {"session": session}


def scores(server: Server, model: str, inputs: object) -> list[float | None]:
    """What the native route says of each input: minus its surprise."""
    body = {"sequences": [inputs], "predictions": "all"}
    (found,) = server.ok(server.post(f"/v1/models/{model}/predict", body))["predictions"]
    return [-one["surprise"] if "surprise" in one else None for one in found]


def close(found: list[Any], expected: list[Any]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a is b is None or abs(a - b) < 1e-6 for a, b in pairs)


# ---------------------------------------------------------------------- the form


def test_the_form_of_an_answer(client: openai.OpenAI, server: Server) -> None:
    found = client.completions.create(model=LETTERS, prompt="abc", seed=4, user="someone")
    assert found.object == "text_completion" and found.model == LETTERS and found.id.startswith("cmpl-")
    assert abs(found.created - time.time()) < 60
    assert found.system_fingerprint is not None and found.system_fingerprint.startswith("fp_")
    (choice,) = found.choices
    assert (choice.index, choice.finish_reason, choice.logprobs, len(choice.text)) == (0, "length", None, 16)
    assert found.usage is not None
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 16,
        "total_tokens": 19,
    }


def test_the_text_is_the_native_one(client: openai.OpenAI, server: Server) -> None:
    found = client.completions.create(model=LETTERS, prompt="abc", seed=4, max_tokens=40, temperature=0.8, top_p=0.9)
    body = {"inputs": "abc", "seed": 4, "max_tokens": 40, "temperature": 0.8, "top_p": 0.9}
    native = server.ok(server.post(f"/v1/models/{LETTERS}/generate", body))
    assert found.choices[0].text == native["text"]


def test_nothing_is_kept_without_a_session(client: openai.OpenAI, server: Server, name: str) -> None:
    def kept() -> object:
        return server.metric("recurra_commits_total"), server.http.get("/v1/sessions?limit=1000").json()

    before = kept()
    client.completions.create(model=LETTERS, prompt=["abc", "de"], n=2, echo=True, logprobs=1)
    list(client.completions.create(model=LETTERS, prompt="abc", n=3, stream=True))
    assert kept() == before
    client.completions.create(model=LETTERS, prompt="abc", extra_body=remember(name))
    assert kept() != before


def test_models_have_openais_form(client: openai.OpenAI) -> None:
    listed = {one.id: one for one in client.models.list()}
    assert LETTERS in listed and {one.object for one in listed.values()} == {"model"}
    found = client.models.retrieve(LETTERS)
    assert found.owned_by == "recurra" and found.created > 10**9


def test_no_prompt_begins_at_the_start_symbol(client: openai.OpenAI, server: Server) -> None:
    found = client.completions.create(model=LETTERS, prompt="", seed=3, max_tokens=8)
    native = server.ok(server.post(f"/v1/models/{LETTERS}/generate", {"seed": 3, "max_tokens": 8}))
    assert found.choices[0].text == native["text"]
    with pytest.raises(openai.UnprocessableEntityError, match="no start symbol"):
        client.completions.create(model=TAGS, prompt="")


# ---------------------------------------------------------------------- several


def test_prompts_times_n(client: openai.OpenAI) -> None:
    found = client.completions.create(model=LETTERS, prompt=["ab", "cd"], n=3, seed=9, max_tokens=12)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == list(range(6))
    assert len(set(texts[:3])) == len(set(texts[3:])) == 3
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 72)
    for i, prompt in enumerate(("ab", "cd")):
        alone = client.completions.create(model=LETTERS, prompt=prompt, n=3, seed=9, max_tokens=12)
        assert [choice.text for choice in alone.choices] == texts[3 * i : 3 * i + 3]


def test_alike_prompts_differ_without_a_seed(client: openai.OpenAI) -> None:
    found = client.completions.create(model=LETTERS, prompt=["ab"] * 4, max_tokens=30)
    assert len({choice.text for choice in found.choices}) == 4


def test_prompts_of_ids(client: openai.OpenAI) -> None:
    def texts(prompt: Any) -> list[str]:  # noqa: ANN401 (as the package takes it)
        found = client.completions.create(model=LETTERS, prompt=prompt, seed=9, max_tokens=12)
        return [choice.text for choice in found.choices]

    ids = [2, 3, 4]  # a, b, c
    assert texts(ids) == texts("abc") == texts([ids])
    assert texts([ids, [5]]) == texts(["abc", "d"])


def test_best_of_are_the_most_likely(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": LETTERS, "prompt": ["ab", "cd"], "seed": 5, "max_tokens": 10, "logprobs": 0}
    every = client.completions.create(**asked, n=6).choices
    best = client.completions.create(**asked, n=2, best_of=6)

    def mean(choice: Any) -> float:  # noqa: ANN401 (a choice)
        return float(sum(choice.logprobs.token_logprobs))

    expected = [sorted(every[6 * i : 6 * i + 6], key=mean, reverse=True)[:2] for i in range(2)]
    assert [one.text for one in best.choices] == [one.text for two in expected for one in two]
    assert [one.index for one in best.choices] == [0, 1, 2, 3]
    assert best.usage is not None and best.usage.completion_tokens == 120


# ---------------------------------------------------------------------- stop


def test_stop_is_left_out(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": LETTERS, "prompt": "abc", "seed": 4, "max_tokens": 60}
    whole = client.completions.create(**asked).choices[0].text
    at = whole[20:23]
    expected = whole[: whole.index(at)]
    for stop in (at, [at], ["jjjjjjjj", at]):
        found = client.completions.create(**asked, stop=stop, logprobs=1).choices[0]
        assert (found.text, found.finish_reason) == (expected, "stop")
        assert found.logprobs is not None and found.logprobs.tokens is not None
        assert "".join(found.logprobs.tokens) == expected
        parts = list(client.completions.create(**asked, stop=stop, logprobs=1, stream=True))
        assert "".join(part.choices[0].text for part in parts) == expected
        assert parts[-1].choices[0].finish_reason == "stop"
        shown = [token for part in parts if (one := part.choices[0].logprobs) for token in one.tokens or []]
        assert "".join(shown) == expected


# ---------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs(echo: bool, stream: bool, client: openai.OpenAI, server: Server) -> None:
    asked: dict[str, Any] = {"model": LETTERS, "prompt": "abca", "seed": 4, "max_tokens": 9, "logprobs": 3}
    if stream:
        parts = list(client.completions.create(**asked, echo=echo, stream=True))
        text = "".join(part.choices[0].text for part in parts)
        shown = [one for part in parts if (one := part.choices[0].logprobs) is not None]
        columns = [[value for one in shown for value in getattr(one, name) or []] for name in LOGPROBS]
    else:
        (choice,) = client.completions.create(**asked, echo=echo).choices
        text, columns = choice.text, [getattr(choice.logprobs, name) for name in LOGPROBS]
    tokens, logprobs, tops, offsets = columns
    assert "".join(tokens) == text and len(tokens) == (13 if echo else 9)
    assert text.startswith("abca") or not echo
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    drawn = text[4:] if echo else text
    expected = scores(server, LETTERS, f"abca{drawn}")
    assert close(logprobs, expected if echo else expected[4:])
    for token, logprob, top in list(zip(tokens, logprobs, tops, strict=True))[1 if echo else 0 :]:
        assert top[token] == logprob and 3 <= len(top) <= 4
        assert sorted(top.values())[-1] >= logprob
    assert not echo or (logprobs[0], tops[0]) == (None, None)


LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_words_stand_apart(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TAGS, "prompt": "go left", "seed": 4, "max_tokens": 4}
    plain = client.completions.create(**asked).choices[0].text
    (choice,) = client.completions.create(**asked, echo=True, logprobs=2).choices
    assert choice.text == f"go left {plain}"
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.tokens == ["go", *(f" {word}" for word in choice.text.split()[1:])]
    assert choice.logprobs.top_logprobs is not None and choice.logprobs.text_offset is not None
    for token, top, at in zip(
        choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:], choice.logprobs.text_offset[1:], strict=True
    ):
        assert token in top and choice.text[at : at + len(token)] == token


def test_echo_alone_scores_a_text(client: openai.OpenAI, server: Server) -> None:
    text = "abcdefghij" * 30
    found = client.completions.create(model=LETTERS, prompt=text, max_tokens=0, echo=True, logprobs=1)
    (choice,) = found.choices
    assert choice.text == text and choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert close(list(choice.logprobs.token_logprobs), scores(server, LETTERS, text))
    assert found.usage is not None and found.usage.completion_tokens == 0
    plain = client.completions.create(model=LETTERS, prompt=text, max_tokens=0, echo=True).choices[0]
    assert plain.text == text and plain.logprobs is None


def test_the_harness_scores(server: Server) -> None:
    """As lm-evaluation-harness' `local-completions` sends it, and reads the answer."""
    contexts, continuations = ["abc", "jihg", "a"], ["def", "fed", "bcdefgh"]
    ids = [[LETTERS_IDS[c] for c in a + b] for a, b in zip(contexts, continuations, strict=True)]
    body = {"model": LETTERS, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answer = server.ok(server.post("/v1/completions", body | {"seed": 1234}))
    for choice, context, continuation in zip(answer["choices"], contexts, continuations, strict=True):
        shown, begin = choice["logprobs"], len(context)
        expected = scores(server, LETTERS, context + continuation)[begin:]
        assert close(shown["token_logprobs"][begin:-1], expected)
        native = server.ok(
            server.post(
                f"/v1/models/{LETTERS}/predict",
                {"sequences": [context + continuation], "predictions": "all", "alternatives": 1},
            )
        )["predictions"][0]
        likely = [one["alternatives"][0]["text"] for one in native[begin - 1 : -1]]
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(shown["token_logprobs"][begin:-1], shown["top_logprobs"][begin:-1], strict=True)
        ]
        assert greedy == [a == b for a, b in zip(likely, continuation, strict=True)]
        assert all(token in top for token, top in zip(likely, shown["top_logprobs"][begin:-1], strict=True))


LETTERS_IDS = {symbol: i for i, symbol in enumerate("\n abcdefghij.")}


# ---------------------------------------------------------------------- streams


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": LETTERS, "prompt": ["ab", "cd"], "n": 2, "seed": 8, "max_tokens": 50}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
    assert {part.id for part in parts} == {parts[0].id}
    assert all(part.usage is None for part in parts[:-1])
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage


def test_the_form_of_a_stream(server: Server) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        body = {"model": LETTERS, "prompt": "ab", "max_tokens": 3, "stream": True, **options}
        response = server.post("/v1/completions", body)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        blocks = response.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        parts = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
        assert {part["object"] for part in parts} == {"text_completion"}
        assert [("usage" in part) for part in parts] == [bool(options)] * len(parts)
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])


def test_a_stream_that_is_left_is_dropped(client: openai.OpenAI, server: Server) -> None:
    with client.completions.create(model=LETTERS, prompt="ab", max_tokens=20_000, stream=True) as stream:
        for _ in range(3):
            next(iter(stream))
    end = time.monotonic() + 20
    while server.metric("recurra_queued_steps") and time.monotonic() < end:
        time.sleep(0.02)
    assert server.metric("recurra_queued_steps") == 0


def test_the_async_client(server: Server, name: str) -> None:
    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked: dict[str, Any] = {"model": LETTERS, "max_tokens": 20}
            found = await asyncio.gather(
                *(client.completions.create(prompt=one, seed=i, **asked) for i, one in enumerate("abcdefgh"))
            )
            stream = await client.completions.create(
                prompt="abc", stream=True, seed=1, extra_body=remember(name), **asked
            )
            return [one.choices[0].text for one in found], "".join([part.choices[0].text async for part in stream])

    texts, streamed = asyncio.run(ask())
    for i, (prompt, text) in enumerate(zip("abcdefgh", texts, strict=True)):
        body = {"inputs": prompt, "seed": i, "max_tokens": 20}
        assert server.ok(server.post(f"/v1/models/{LETTERS}/generate", body))["text"] == text
    assert len(streamed) == 20 and server.position(name) == 23


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_remembers(stream: bool, client: openai.OpenAI, server: Server, name: str) -> None:
    def complete(prompt: str, **more: Any) -> str:  # noqa: ANN401 (fields of the request)
        asked = {"model": LETTERS, "prompt": prompt, "max_tokens": 10, "extra_body": remember(name), **more}
        if stream:
            return "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True))
        return str(client.completions.create(**asked).choices[0].text)

    server.create(LETTERS, f"{name}-native", seed=5)
    texts = [complete("abc", seed=5), complete("de", seed=6), complete("", seed=7)]
    native = [
        server.generate(f"{name}-native", max_tokens=10, seed=5 + i, **({"inputs": one} if one else {}))["text"]
        for i, one in enumerate(("abc", "de", ""))
    ]
    assert texts == native
    assert server.position(name) == 35
    assert server.state(name) == server.state(f"{name}-native")
    alone = client.completions.create(model=LETTERS, prompt="de", max_tokens=10, seed=6)
    assert alone.choices[0].text != texts[1]


def test_a_prompt_is_scored_with_the_memory(client: openai.OpenAI, server: Server, name: str) -> None:
    server.steps(name, "abcabc", model=LETTERS)
    for prompt, tokens in (("abca", 5), ("bcd", 0), ("j", 1)):
        before = server.position(name)
        logged = "".join(one["input"] for one in server.log_of(name))
        found = client.completions.create(
            model=LETTERS, prompt=prompt, max_tokens=tokens, echo=True, logprobs=2, extra_body=remember(name)
        )
        (choice,) = found.choices
        assert choice.text.startswith(prompt) and choice.logprobs is not None
        assert close(list(choice.logprobs.token_logprobs or []), scores(server, LETTERS, logged + choice.text)[before:])
        assert choice.logprobs.top_logprobs is not None and None not in choice.logprobs.top_logprobs
        assert server.position(name) == before + len(prompt) + tokens
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), tokens)


@pytest.mark.parametrize("more", [{"n": 2}, {"best_of": 2}, {"prompt": ["ab", "cd"]}])
def test_a_session_takes_one(more: dict[str, Any], server: Server, name: str) -> None:
    body = {"model": LETTERS, "prompt": "ab", "session": name, **more}
    found = problem(server.post("/v1/completions", body), 422, "invalid_input")
    assert found["error"]["param"] == "session"
    problem(server.http.get(f"/v1/sessions/{name}"), 404, "session_not_found")


# ---------------------------------------------------------------------- keys and retries


KEYED: list[dict[str, Any]] = [
    {"max_tokens": 30},
    {"max_tokens": 30, "logprobs": 2, "echo": True},
    {"max_tokens": 0, "echo": True, "logprobs": 1},
    {"max_tokens": 3000},
]


@pytest.mark.parametrize("more", KEYED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_sent_again(stream: bool, more: dict[str, Any], mortal: Server, name: str) -> None:
    body = {"model": LETTERS, "prompt": "abc", "session": name, **more}
    first = mortal.post("/v1/completions", body, "key")
    assert first.status_code == 200 and "idempotent-replayed" not in first.headers
    memory = mortal.session(name), mortal.log_of(name)

    def again() -> None:
        found = mortal.post("/v1/completions", {**body, "stream": stream}, "key")
        assert found.headers["idempotent-replayed"] == "true", found.text
        assert found.content == first.content or stream
        blocks = [json.loads(b[6:]) for b in found.text.split("\n\n")[:-2]] if stream else [found.json()]
        choice = first.json()["choices"][0]
        assert "".join(block["choices"][0]["text"] for block in blocks) == choice["text"]
        shown = [one for block in blocks if (one := block["choices"][0]["logprobs"]) is not None]
        for column, expected in (choice["logprobs"] or {}).items():
            assert [value for one in shown for value in one[column]] == expected
        assert (mortal.session(name), mortal.log_of(name)) == memory

    again()
    mortal.restart()
    again()
    problem(mortal.post("/v1/completions", {**body, "max_tokens": 7}, "key"), 422, "idempotency_key_reused")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_that_was_cut_goes_on_with_its_key(stream: bool, server: Server, name: str) -> None:
    body = {"model": LETTERS, "prompt": "abc", "session": name, "max_tokens": 3000, "seed": 2, "stream": True}
    whole = server.ok(server.post("/v1/completions", body | {"session": f"{name}-whole", "stream": False}))
    headers = {"Idempotency-Key": name}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        for _, line in zip(range(5), response.iter_lines(), strict=False):
            assert line.startswith("data: ") or not line
    again = server.post("/v1/completions", {**body, "stream": stream}, name)
    blocks = [json.loads(b[6:]) for b in again.text.split("\n\n")[:-2]] if stream else [again.json()]
    assert "".join(block["choices"][0]["text"] for block in blocks) == whole["choices"][0]["text"]
    assert server.position(name) == 3003


def test_without_a_session_a_key_gives_the_same_again(client: openai.OpenAI) -> None:
    for tokens in (20, 8000):
        headers = key()
        asked: dict[str, Any] = {"model": LETTERS, "prompt": "abc", "max_tokens": tokens, "n": 2}
        first, again = (client.completions.create(**asked, extra_headers=headers) for _ in range(2))
        assert [one.text for one in first.choices] == [one.text for one in again.choices] and first.id == again.id


def test_choices_are_read_at_the_same_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that waited until the one before it was whole would be suspended, as one that nobody reads."""
    monkeypatch.setattr(run, "UNREAD_S", 0.05)

    async def complete() -> httpx.Response:
        app = create_app(Settings(models_dir=models, store="memory"), MemoryStore())
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as http,
        ):
            asked = {"model": LETTERS, "prompt": "abc", "max_tokens": 3 * run.MAX_UNREAD, "n": 2}
            return await http.post("/v1/completions", json=asked)

    answer = asyncio.run(complete())
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 6 * run.MAX_UNREAD


class Dropper:
    """A proxy that closes the first connections when their request was sent, or when their answer began."""

    def __init__(self, upstream: int, drops: int, answered: bool) -> None:
        self._upstream = upstream
        self._answered = answered
        self.left = drops
        self.requests = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                self._forward(client)

    def _forward(self, client: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        (length,) = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while len(body) < length:
            body += client.recv(65536)
        self.requests += 1
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:"))
        with socket.create_connection(("127.0.0.1", self._upstream)) as server:
            server.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            if self.left:
                self.left -= 1
                if self._answered:
                    server.recv(1)
                return
            while part := server.recv(65536):
                client.sendall(part)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@pytest.fixture
def dropper(server: Server) -> Iterator[Callable[..., tuple[Dropper, openai.OpenAI]]]:
    made: list[Dropper] = []
    clients: list[openai.OpenAI] = []

    def make(drops: int, answered: bool) -> tuple[Dropper, openai.OpenAI]:
        made.append(Dropper(int(str(server.settings["port"])), drops, answered))
        clients.append(openai.OpenAI(base_url=f"http://127.0.0.1:{made[-1].port}/v1", api_key="none", max_retries=2))
        return made[-1], clients[-1]

    yield make
    for client in clients:
        client.close()
    for one in made:
        one.close()


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("drops", [1, 2])
@pytest.mark.parametrize("tokens", [25, 0])
def test_the_packages_retries_double_no_step(
    tokens: int,
    drops: int,
    answered: bool,
    dropper: Callable[..., tuple[Dropper, openai.OpenAI]],
    server: Server,
    name: str,
) -> None:
    proxy, client = dropper(drops, answered)
    server.create(LETTERS, name, seed=3)
    found = client.completions.create(
        model=LETTERS, prompt="abcd", max_tokens=tokens, echo=True, extra_body=remember(name), extra_headers=key()
    )
    assert proxy.requests == drops + 1
    assert server.position(name) == 4 + tokens
    assert "".join(one["input"] for one in server.log_of(name)) == found.choices[0].text


@pytest.mark.parametrize("drops", [1, 2])
def test_the_packages_retry_of_a_stream_doubles_no_step(
    drops: int, dropper: Callable[..., tuple[Dropper, openai.OpenAI]], server: Server, name: str
) -> None:
    proxy, client = dropper(drops, True)
    stream = client.completions.create(
        model=LETTERS, prompt="abcd", max_tokens=25, stream=True, extra_body=remember(name), extra_headers=key()
    )
    text = "".join(part.choices[0].text for part in stream)
    assert proxy.requests == drops + 1 and server.position(name) == 29
    assert "".join(one["input"] for one in server.log_of(name)) == f"abcd{text}"


def test_a_retry_without_a_key_moves_no_session(
    dropper: Callable[..., tuple[Dropper, openai.OpenAI]], server: Server, name: str
) -> None:
    proxy, client = dropper(1, True)
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        client.completions.create(model=LETTERS, prompt="abcd", max_tokens=5, extra_body=remember(name))
    assert proxy.requests == 2
    assert server.suspended(name) <= 9
    again, client = dropper(1, True)  # nothing can be doubled that is not kept
    assert client.completions.create(model=LETTERS, prompt="abcd").choices[0].text
    assert again.requests == 2


# ---------------------------------------------------------------------- refusals


def counting(server: Server) -> tuple[openai.OpenAI, list[httpx.Request]]:
    """A client that tries again, and the POSTs that it sent."""
    import httpx2

    sent: list[httpx.Request] = []
    http = httpx2.Client(event_hooks={"request": [sent.append]})
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2, http_client=http), sent


def test_errors_have_the_packages_classes(server: Server, name: str) -> None:
    server.steps(name, "abc", model=LETTERS)
    client, sent = counting(server)
    refused: list[tuple[type[openai.APIStatusError], str, dict[str, Any]]] = [
        (openai.NotFoundError, "model_not_found", {"model": "nobody"}),
        (openai.ConflictError, "model_mismatch", {"model": TAGS, "prompt": "go", "extra_body": remember(name)}),
        (openai.UnprocessableEntityError, "unknown_symbol", {"prompt": "abcX"}),
        (openai.UnprocessableEntityError, "unknown_symbol", {"prompt": "X", "extra_body": remember(name)}),
        (openai.UnprocessableEntityError, "task_mismatch", {"model": "tiny-people"}),
        (
            openai.UnprocessableEntityError,
            "task_mismatch",
            {"model": "tiny-people", "prompt": "anna", "max_tokens": 0, "extra_body": remember(f"{name}-p")},
        ),
        (openai.UnprocessableEntityError, "invalid_input", {"presence_penalty": 0.5}),
        (openai.UnprocessableEntityError, "invalid_input", {"extra_body": {"nonsense": 1}}),
    ]
    for kind, code, more in refused:
        before = len(sent)
        with pytest.raises(kind) as raised:
            client.completions.create(**{"model": LETTERS, "prompt": "abc", **more})
        assert len(sent) == before + 1, "it was tried again"
        assert raised.value.code == code and raised.value.type == "invalid_request_error"
        told: Any = raised.value.response.json()
        assert told["status"] == raised.value.status_code and told["code"] == code
        assert told["error"]["message"] == told["detail"]
        assert raised.value.response.headers["content-type"] == "application/problem+json"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    client.close()
    assert server.position(name) == 3
    problem(server.http.get(f"/v1/sessions/{name}-p"), 404, "session_not_found")


def test_a_conflict_says_that_a_retry_is_of_no_use(server: Server, name: str) -> None:
    server.steps(name, "abc", model=LETTERS)
    for given in (None, "key"):
        response = server.post("/v1/completions", {"model": TAGS, "prompt": "go", "session": name}, given)
        problem(response, 409, "model_mismatch")
        assert response.headers["x-should-retry"] == "false"


REFUSED: dict[str, dict[str, Any]] = {
    "frequency_penalty": {"frequency_penalty": -1},
    "presence_penalty": {"presence_penalty": 0.1},
    "logit_bias": {"logit_bias": {"3": 5}},
    "suffix": {"suffix": "and so on"},
    "best_of": {"n": 3, "best_of": 2},
    "stream_options": {"stream_options": {"include_usage": True}},
    "logprobs": {"logprobs": 6},
    "n": {"n": 129},
    "stop": {"stop": list("abcde")},
    "temperature": {"temperature": 2.1},
    "top_p": {"top_p": 1.5},
    "max_tokens": {"max_tokens": -1},
    "prompt": {"prompt": [1, "a"]},
    "session": {"session": "no/slash"},
    "seed": {"seed": 2**63},
    "user": {"user": "u" * 2000},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_can_not_be_done_is_refused(field: str, server: Server) -> None:
    response = server.post("/v1/completions", {"model": LETTERS, "prompt": "abc", **REFUSED[field]})
    found = problem(response, 422, "invalid_input")
    assert found["error"]["param"] == field and found["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": []},
        {"prompt": 3},
        {"prompt": {"a": 1}},
        {"prompt": [[["a"]]]},
        {"prompt": [True]},
        {"prompt": [[True]]},
        {"prompt": [99]},
        {"prompt": [-1]},
        {"prompt": ["ab", None]},
        {"prompt": ["a"] * 2049},
        {"prompt": ["a"] * 100, "n": 100, "max_tokens": 3},
        {"max_tokens": 10**9},
        {"max_tokens": 20_000, "n": 2},
        {"best_of": 2, "stream": True},
        {"stop": ""},
        {"stop": ["a", ""]},
    ],
)
def test_hostile_input_is_refused(more: dict[str, Any], server: Server) -> None:
    response = server.post("/v1/completions", {"model": LETTERS, "prompt": "abc", **more})
    assert response.status_code in (413, 422), response.text
    assert response.json()["error"]["message"]


def test_long_prompts_times_n_are_refused(server: Server) -> None:
    body = {"model": LETTERS, "prompt": "a" * 20_000, "n": 100, "max_tokens": 0}
    problem(server.post("/v1/completions", body), 413, "payload_too_large")


def test_neutral_values_are_taken(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "suffix": "",
        "best_of": 1,
        "n": 1,
        "stop": None,
        "logprobs": None,
        "echo": False,
        "user": "",
        "stream_options": None,
        "top_p": 1,
        "temperature": 1,
    }
    plain = client.completions.create(model=LETTERS, prompt="abc", seed=-7)
    assert client.completions.create(model=LETTERS, prompt="abc", seed=-7, **neutral).choices == plain.choices
    greedy = [
        client.completions.create(model=LETTERS, prompt="abc", **one) for one in ({"temperature": 0}, {"top_p": 0})
    ]
    assert greedy[0].choices == greedy[1].choices


def test_errors_of_routes_that_are_not_there(server: Server) -> None:
    found = problem(server.http.get("/v1/completions"), 405, "method_not_allowed")
    assert found["error"]["code"] == "method_not_allowed"
    response = server.http.post("/v1/completions", content=b"{}")
    assert problem(response, 415, "unsupported_media_type")["error"]["param"] is None
    response = server.http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert problem(response, 400, "bad_request")["error"]["message"]
    assert "error" not in server.http.get("/v1/sessions/nobody").json()


def test_a_failure_within_a_stream_is_told(fresh: MakeServer, name: str) -> None:
    one = fresh().start()
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model=LETTERS, prompt="ab", max_tokens=90_000, stream=True, extra_body=remember(name), extra_headers=key()
        )
        with pytest.raises(openai.APIError, match="suspended") as raised:
            for i, part in enumerate(stream):
                assert isinstance(part, Completion)
                if i == 3:
                    assert one.process is not None
                    one.process.terminate()
        assert raised.value.code == "not_ready" and raised.value.type == "server_error"
    assert one.terminate_wait() == 0


def test_the_openapi_page_describes_it(server: Server) -> None:
    page = server.http.get("/openapi.json").json()
    described = page["paths"]["/v1/completions"]["post"]
    assert "session" in described["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"200", "404", "409", "422"} <= set(described["responses"])


def test_the_readmes_example(server: Server, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = (ROOT / "README.md").read_text().partition("```python\nimport uuid")[2].partition("```")[0]
    assert '"balcony"' in code and "http://127.0.0.1:8000" in code
    exec(f"import uuid{code}".replace("http://127.0.0.1:8000", server.url).replace('"balcony"', f'"{name}"'), {})
    assert len(capsys.readouterr().out) >= 80 and server.position(name) == 21 + 20 + 80
