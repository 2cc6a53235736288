"""Settings come from the environment; a wrong one is named."""

import os
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, load


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RECURRA_")]:
        monkeypatch.delenv(name)


def test_the_defaults() -> None:
    found = load()
    assert (found.host, found.port) == ("127.0.0.1", 8000)
    assert (found.models_dir, found.data_dir) == (Path("models"), Path("var"))
    assert (found.store, found.durability, found.session_ttl_s) == ("sqlite", "commit", 0)
    assert (found.api_keys_file, found.cors_origins) == (None, "")


def test_every_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "HOST": "0.0.0.0",
        "PORT": "1234",
        "MODELS_DIR": "/m",
        "DATA_DIR": "/d",
        "STORE": "memory",
        "DURABILITY": "fsync",
        "THREADS": "3",
        "MAX_BATCH": "7",
        "MAX_QUEUE_STEPS": "99",
        "SESSION_TTL_S": "60",
        "MAX_BODY_BYTES": "4096",
        "LOG_LEVEL": "debug",
    }
    for name, value in told.items():
        monkeypatch.setenv(f"RECURRA_{name}", value)
    found = load()
    assert {name: str(getattr(found, name.lower())) for name in told} == told


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in ("models_dir", "data_dir")])
def test_a_wrong_value_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"RECURRA_{name.upper()}", "" if name == "host" else "-1")
    with pytest.raises(SettingsError, match=f"RECURRA_{name.upper()}"):
        load()


def test_an_unknown_setting_is_told_and_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECURRA_PROT", "1")
    assert load().port == 8000
    assert "RECURRA_PROT" in capsys.readouterr().err


def test_settings_without_the_prefix_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    assert load().port == 8000
