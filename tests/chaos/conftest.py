"""Fixtures of the chaos suite; `--minutes` makes its storms longer, `--seed` repeats one."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import MakeServer, Server
from redis_server import RedisServer
from storm import REPORTS

FEW = ("tiny-letters", "tiny-weather")
BRIEF_S = 4.0


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The sums over all storms, as one line of JSON."""
    if REPORTS:
        total: Counter[str] = Counter()
        for report in REPORTS:
            total.update({name: value for name, value in report.items() if name not in ("storm", "seed", "clients")})
            terminalreporter.write_line(json.dumps(report))
        terminalreporter.write_line(json.dumps({"storms": len(REPORTS), **total}))


@pytest.fixture
def storm_s(request: pytest.FixtureRequest) -> float:
    """How long one storm blows."""
    minutes = float(request.config.getoption("minutes", 0.0) or 0.0)
    return max(BRIEF_S, minutes * 60 / 4)


@pytest.fixture(scope="session")
def few(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with two tiny models: a server on it starts soon."""
    folder = tmp_path_factory.mktemp("few")
    for name in FEW:
        (folder / name).symlink_to(models / name)
    return folder


@pytest.fixture
def fresh(few: Path, tmp_path: Path) -> Iterator[MakeServer]:
    """Makes servers that end with the test."""
    made: list[Server] = []

    def make(**settings: object) -> Server:
        folder = tmp_path / f"server{len(made)}"
        folder.mkdir()
        made.append(Server(**{"models": few, "folder": folder, "snapshot_every": 16, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that writes every command to its file before it answers."""
    server = RedisServer(tmp_path / "redis", append_only="always")
    yield server.start()
    server.kill()
