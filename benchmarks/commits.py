"""What a group commit costs the thread that makes it: alone, and beside an event loop that never rests.

The loop runs in a thread of the same process, as the service's own does: whatever the store's client does while it
holds the interpreter, and every time it lets go of it, shows here. A thread that waits for the interpreter may wait
very long beside one that lets go of it and takes it again at once: p99 is mostly that, and depends on the
switch interval.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from benchmarks.served import quantiles
from service.store.base import Applied, Commit, Generation, Head, Segment, Store

SIZES = (1, 64, 256)
SPIN_S = 300e-6
LIMIT_S = 5.0
TICK_S = 0.002
"""what the graph takes between two commits; the interpreter is free meanwhile"""


def commits_ms(store: Store, rows: int, count: int) -> dict[str, float]:
    """p50 and p99 of `count` group commits of a token for each of `rows` sessions, or as many as LIMIT_S holds."""
    heads, end = _create(store, rows), time.perf_counter() + LIMIT_S
    took: list[float] = []
    while len(took) < count and time.perf_counter() < end:
        commits = [_next(head) for head in heads]
        time.sleep(TICK_S)
        begun = time.perf_counter()
        results = store.commit(commits)
        took.append((time.perf_counter() - begun) * 1e3)
        heads = [result.head for result in results if isinstance(result, Applied)]
        if len(heads) != rows:
            raise RuntimeError("a commit was refused")
    return quantiles(took)


def _create(store: Store, rows: int) -> list[Head]:
    generation = Generation(start=0, prompt_tokens=1, max_tokens=10**6, temperature=1.0, top_k=0, top_p=1.0, seed=1)
    made = []
    for i in range(rows):
        key = ("", f"commits-{rows}-{i}-{time.monotonic_ns()}")
        epoch, branch = store.next_epoch(key), f"{time.monotonic_ns():x}"
        head = Head(*key, "shakespeare", 1, "0" * 64, epoch, 0, 1, branch, generation=generation, state_bytes=7168)
        made.append(Commit(head, None))
    return [result.head for result in store.commit(made) if isinstance(result, Applied)]


def _next(head: Head) -> Commit:
    """One more token, as a generate commits it."""
    token = Segment(head.branch, head.position, 1, "generated", b"\7\0\0\0", "0" * 64, logprobs=b"\0\0\0\0")
    return Commit(msgspec.structs.replace(head, position=head.position + 1), head.fence, (token,))


@contextmanager
def busy_loop() -> Iterator[None]:
    """An event loop in another thread that always has the next callback to run."""
    loop = asyncio.new_event_loop()

    def spin() -> None:
        end = time.perf_counter() + SPIN_S
        while time.perf_counter() < end:
            pass
        loop.call_soon(spin)

    loop.call_soon(spin)
    thread = threading.Thread(target=loop.run_forever, name="busy")
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
