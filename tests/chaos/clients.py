"""Clients that ask again until they are answered, and keep account of what they were told."""

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
from ledger import Entry, Ledger
from live import SseEvent, events_of
from tiny import LETTERS

PATIENCE_S = 90.0
FORKS = 1
AGAIN = {"session_busy", "overloaded", "not_ready", "commit_unknown"}
TEXT = "tiny-letters"

Json = dict[str, Any]


class Unexpected(Exception):
    """An answer that a client must never get."""


class Client(threading.Thread):
    """One client: operations at random on its sessions, each repeated until it is answered.

    A keyed client sends an Idempotency-Key with every POST. One that is not fences with the position instead; it
    must be alone with its sessions. `urls` are replicas: when one does not answer, the next is asked.
    """

    def __init__(
        self, urls: list[str], own: list[Ledger], shared: list[Ledger], seed: int, keyed: bool, forks: bool = True
    ) -> None:
        super().__init__(daemon=True, name=f"client-{seed}")
        self.urls, self.own, self.shared = urls, own, shared
        self.rng = random.Random(seed)
        self.keyed = keyed
        self.forks_left = FORKS if forks else 0
        self.stop = threading.Event()
        self.count: Counter[str] = Counter()
        self.failure: str | None = None
        self._at = seed % len(urls)
        self._keys = 0
        self._last: tuple[Ledger, str, Json, str, Json] | None = None
        self._http = httpx.Client(timeout=20.0, verify=False)

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self._operate()
        except Exception:
            self.failure = f"{self.name}: {traceback.format_exc()}"
        finally:
            self._http.close()

    def _operate(self) -> None:
        ledger = self.rng.choice(self.own + self.shared)
        choices: list[tuple[int, Callable[[Ledger], None]]] = [(8, self._steps), (2, self._rewind)]
        if ledger.model == TEXT:
            choices += [(3, self._generate), (3, self._stream)]
        if ledger in self.own:
            choices += [(1, self._look), (1, self._fork)]
        if self._last is not None:
            choices += [(1, self._repeat)]
        weights, operations = zip(*choices, strict=True)
        self.rng.choices(operations, weights)[0](ledger)
        self.count["operations"] += 1

    # ------------------------------------------------------------------ operations

    def _steps(self, ledger: Ledger) -> None:
        inputs = self._inputs(ledger.model)
        entries: list[Entry] = [("fed", value) for value in inputs]
        shown = self.rng.choice(["last", "last", "all", "none"])
        body = {"model": ledger.model, "inputs": inputs, "predictions": shown, **self._fence(ledger)}
        answer = self._answer(ledger, "steps", body)
        if answer is None:
            return
        if answer.get("created"):
            ledger.begin(answer["epoch"], 0)
        ledger.fed(answer["epoch"], answer["position"], entries)

    def _generate(self, ledger: Ledger) -> None:
        fence, body = self._generate_body(ledger)
        answer = self._answer(ledger, "generate", body | fence, lambda: self._read_stream(ledger, body, None, fence))
        if answer is not None:
            self._note_generate(ledger, body, answer)

    def _stream(self, ledger: Ledger) -> None:
        fence, body = self._generate_body(ledger)
        body |= {"stream": True}
        self._note_generate(ledger, body, self._read_stream(ledger, body, self._key(), fence))

    def _rewind(self, ledger: Ledger) -> None:
        position = ledger.position
        if position < 2:
            return
        target = max(1, position - self.rng.randint(0, 20))
        answer = self._answer(ledger, "rewind", {"position": target})
        if answer is not None:
            ledger.begin(answer["epoch"], answer["position"])

    def _fork(self, ledger: Ledger) -> None:
        position = ledger.position
        if not self.forks_left or not self.keyed or position < 1:
            return
        self.forks_left -= 1
        target = self.rng.randint(1, position)
        child = Ledger(f"{ledger.session}-{self.forks_left}", ledger.model, ledger.line()[0][:target])
        answer = self._answer(ledger, "fork", {"id": child.session, "position": target})
        if answer is not None:
            _must(answer["position"] == target, answer)
            child.begin(answer["epoch"], target)
            self.own.append(child)

    def _look(self, ledger: Ledger) -> None:
        """A session of one's own stands exactly where its client was told that it stands."""
        if not ledger.epoch:
            return
        found = self._until_answered(lambda url: self._http.get(f"{url}/v1/sessions/{ledger.session}"))
        if self._is_rolled_back(ledger, found.json()):
            return
        _must(found.status_code == 200 and found.json()["position"] == ledger.position, found.text, ledger.position)

    def _repeat(self, _: Ledger) -> None:
        """A request that was answered is sent once more: the same answer, and nothing changes."""
        assert self._last is not None
        ledger, path, body, key, answer = self._last
        found = self._until_answered(lambda url: self._post(url + path, body, key))
        if self._is_rolled_back(ledger, found.json()):
            return
        _must(found.is_success and found.json() == answer, found.text, answer)
        _must(found.headers.get("idempotent-replayed") == "true", path)

    # ------------------------------------------------------------------ asking

    def _answer(self, ledger: Ledger, what: str, body: Json, recover: Callable[[], Json] | None = None) -> Json | None:
        """The answer to a POST; None when it is known that it was not, and will not be, executed."""
        path, key = f"/v1/sessions/{ledger.session}/{what}", self._key()
        asked = self.count["requests"]
        while True:
            found = self._until_answered(lambda url: self._post(url + path, body, key))
            answer: Json = found.json()
            if not self._is_rolled_back(ledger, answer):
                break
        if found.is_success:
            if key is not None:
                self._last = (ledger, path, body, key, answer)
            return answer
        problem = answer
        if problem.get("code") in ("session_not_found", "position_mismatch") and what in ("rewind", "fork"):
            return None  # somebody else has rewound it, or the store has lost it
        _must(key is None and problem.get("code") == "position_mismatch", found.text, body, ledger.position)
        _must(self.count["requests"] > asked + 1, "refused at the first try", found.text, ledger.position)
        return recover() if recover is not None else self._was_fed(ledger, body, problem)

    @staticmethod
    def _was_fed(ledger: Ledger, body: Json, problem: Json) -> Json:
        """The answer that was lost: the session stands where it must after the feed."""
        _must(problem["position"] == body["position"] + len(body["inputs"]), problem, body)
        return {**problem, "created": not ledger.epoch}

    def _until_answered(self, send: Callable[[str], httpx.Response]) -> httpx.Response:
        end = time.monotonic() + PATIENCE_S
        while True:
            self.count["requests"] += 1
            with suppress(httpx.TransportError):
                found = send(self.urls[self._at])
                if found.status_code < 429 or found.json()["code"] not in AGAIN:
                    self.count["replays"] += "idempotent-replayed" in found.headers
                    return found
            self._wait(end)

    def _wait(self, end: float) -> None:
        if time.monotonic() > end:
            raise Unexpected(f"no answer in {PATIENCE_S} s")
        self.count["retries"] += 1
        self._at = (self._at + 1) % len(self.urls)
        time.sleep(self.rng.uniform(0.02, 0.25))

    def _post(self, url: str, body: Json, key: str | None) -> httpx.Response:
        return self._http.post(url, json=body, headers={"Idempotency-Key": key} if key is not None else {})

    def _is_rolled_back(self, ledger: Ledger, answer: Json) -> bool:
        """Whether the store came back older; then what it tells is true from now on."""
        if answer.get("code") != "rolled_back":
            return False
        self.count["rolled_back_sessions"] += 1
        self.count["rolled_back_entries"] += ledger.roll_back(answer["found"])
        self._last = None
        return True

    # ------------------------------------------------------------------ streams

    def _read_stream(self, ledger: Ledger, body: Json, key: str | None, fence: Json) -> Json:
        """The answer of a streamed generate, pieced together from as many streams as it takes."""
        seen: dict[int, SseEvent] = {}
        end, lost = time.monotonic() + PATIENCE_S, "stream" not in body
        while True:
            resumable = seen and (key is None or (ledger in self.own and self.rng.random() < 0.5))
            after = seen[max(seen)].id if resumable else None
            if lost and after is None:
                after = f"{ledger.epoch or 1}.{fence['position']}"
            self.count["requests"] += 1
            with suppress(httpx.TransportError):
                done, refused = self._one_stream(ledger, body | fence, key, after, seen)
                if done is not None:
                    return done
                if self._is_rolled_back(ledger, refused):
                    seen.clear()
                    continue
                if refused.get("code") == "position_mismatch" and key is None:
                    lost = True
                    continue
                _must(refused.get("code") in {*AGAIN, None}, refused, body, fence)
            self._wait(end)

    def _one_stream(
        self, ledger: Ledger, body: Json, key: str | None, after: str | None, seen: dict[int, SseEvent]
    ) -> tuple[Json | None, Json]:
        """Read one stream; (the answer at its end or None, the problem if it was refused)."""
        url = f"{self.urls[self._at]}/v1/sessions/{ledger.session}"
        if after is not None:
            opened = self._http.stream("GET", f"{url}/events", headers={"Last-Event-ID": after})
        else:
            headers = {"Idempotency-Key": key} if key is not None else {}
            opened = self._http.stream("POST", f"{url}/generate", json=body, headers=headers)
        with opened as response:
            if response.status_code != 200:
                response.read()
                _must(response.status_code != 204, "nothing to resume", after)
                return None, response.json()
            self.count["replays"] += "idempotent-replayed" in response.headers
            for event in _events(response):
                match event.event:
                    case "token":
                        position = event.data["position"]
                        known = seen.setdefault(position, event)
                        _must((known.id, known.data) == (event.id, event.data), known.data, event.data)
                    case "done":
                        return _streamed(event.data, seen), {}
                    case _:
                        return None, event.data
        return None, {}

    def _note_generate(self, ledger: Ledger, body: Json, answer: Json) -> None:
        epoch, end, tokens = answer["epoch"], answer["position"], answer["tokens"]
        prompted = answer["usage"]["prompt_tokens"]
        given = body.get("inputs", [])
        start = end - len(tokens)
        _must(prompted in (len(given), 0 if not tokens else len(given or "\n")), answer, body)
        if start == prompted and not ledger.epoch:
            ledger.begin(epoch, 0)
        ledger.fed(epoch, start, [("fed", letter) for letter in given or "\n" * prompted][:prompted])
        ledger.fed(epoch, end, [("generated", LETTERS[token]) for token in tokens])

    # ------------------------------------------------------------------ bodies

    def _key(self) -> str | None:
        if not self.keyed:
            return None
        self._keys += 1
        return f"{self.name}-{self._keys}"

    def _fence(self, ledger: Ledger) -> Json:
        return {} if self.keyed else {"position": ledger.position}

    def _inputs(self, model: str) -> list[Any]:
        count = self.rng.choice([1, 1, 2, 5, 20])
        if model == TEXT:
            return self.rng.choices(LETTERS, k=count)
        return [[self.rng.randrange(-80, 240) / 8, self.rng.randrange(24)] for _ in range(count)]

    def _generate_body(self, ledger: Ledger) -> tuple[Json, Json]:
        body: Json = {"model": ledger.model, "max_tokens": self.rng.choice([1, 5, 20, 60])}
        if self.rng.random() < 0.5:
            body["inputs"] = "".join(self.rng.choices(LETTERS, k=self.rng.randint(1, 6)))
        return self._fence(ledger), body


def _events(response: httpx.Response) -> Iterator[SseEvent]:
    """Events until the stream ends, be it within one."""
    with suppress(AssertionError):
        yield from events_of(response)


def _streamed(done: Json, seen: dict[int, SseEvent]) -> Json:
    """What a JSON answer would have said."""
    tokens = [seen[position].data["token"] for position in sorted(seen)]
    _must(sorted(seen) == list(range(done["position"] - len(tokens) + 1, done["position"] + 1)), done, sorted(seen))
    _must(done["usage"]["completion_tokens"] == len(tokens), done, len(tokens))
    return {**done, "tokens": tokens}


def _must(held: bool, *seen: object) -> None:
    if not held:
        raise Unexpected(*seen)
