"""Servers for the end-to-end tests: one that all share, and fresh ones for tests that kill theirs."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import MakeServer, Server


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that tests share; whoever stops it starts a fresh one instead."""
    shared = Server(models, tmp_path_factory.mktemp("shared"), max_body_bytes=100_000, max_tokens=20_000)
    try:
        yield shared.start()
        assert shared.process is not None and shared.process.poll() is None, shared.output()
    finally:
        shared.close()


@pytest.fixture
def fresh(models: Path, tmp_path: Path) -> Iterator[MakeServer]:
    """Makes servers that end with the test."""
    made: list[Server] = []

    def make(**settings: object) -> Server:
        folder = tmp_path / f"server{len(made)}"
        folder.mkdir()
        one = Server(**{"models": models, "folder": folder, **settings})
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def _mortal(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(models, tmp_path_factory.mktemp("mortal"))
    yield one
    one.close()


@pytest.fixture
def mortal(_mortal: Server) -> Server:
    """A running server that tests may kill, one after another."""
    return _mortal if _mortal.process is not None else _mortal.start()


@pytest.fixture
def name() -> str:
    """A session id that no other test uses."""
    return secrets.token_hex(6)
