"""The SQLite store: the embedded default, one process a data folder; `store` says how it works."""

from service.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
