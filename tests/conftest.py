"""Fixtures of every layer: the tiny bundles, built once a run, and engines on them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs import Inbox, MakeRig, Rig
from tiny import SHIPPED, build_tiny, newest, shipped

from service.engine import Engine, Post
from service.runner import Runner
from service.store.base import Store
from service.store.memory import MemoryStore


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=0.0, help="how long what is random goes on")
    parser.addoption("--seed", type=int, default=None, help="the seed that a failed run printed")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Decides what is random in a test; printed, so that a failed run can be repeated."""
    given = request.config.getoption("seed")
    chosen = given if given is not None else random.SystemRandom().randrange(10**6)
    print(f"--seed {chosen}")
    return int(chosen)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the tiny bundles, and links to the shipped ones."""
    folder = tmp_path_factory.mktemp("bundles") / "models"
    build_tiny(folder)
    for name in shipped():
        (folder / name).symlink_to(SHIPPED / name)
    return folder


@pytest.fixture
def rig(models: Path) -> Iterator[MakeRig]:
    """Makes engines of tiny models that are stopped at the end of the test."""
    running: list[Engine] = []

    def make(
        name: str = "tiny-letters",
        store: Store | None = None,
        post: Post | None = None,
        start: bool = True,
        max_batch: int = 128,
        max_queue_steps: int = 1_000_000,
        max_resident: int = 1000,
        wrap: Callable[[Runner], Any] | None = None,
    ) -> Rig:
        runner = Runner(newest(models, name), threads=1)
        store = store if store is not None else MemoryStore()
        served = wrap(runner) if wrap is not None else runner
        engine = Engine(served, store, post or Inbox(), max_batch, max_queue_steps, max_resident)
        made = Rig(engine, store, runner, running)
        if start:
            made.start()
        return made

    yield make
    for engine in running:
        engine.stop()
