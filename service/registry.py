"""The models on disk, loaded: each version with its runner and engine; what could not be loaded, and why."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from service.bundle import MANIFEST, Bundle, BundleError, load
from service.engine import Engine, Post
from service.errors import Problem, not_ready
from service.settings import Settings
from service.store.base import Head, Store, StoreError
from service.window import Served, open_runner
from service.work.base import Keeping

MAX_OUTPUT_BYTES = 16 * 2**20
MAX_SHOWN = 250_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One loaded version of a model."""

    bundle: Bundle
    runner: Served
    engine: Engine

    def most_steps(self, alternatives: int) -> int:
        """How many steps' predictions one answer may hold: bounded by the arrays, and by what is shown of them."""
        numbers = self.bundle.manifest.output_numbers
        shown = alternatives if self.bundle.manifest.task == "language-model" else numbers
        return min(MAX_OUTPUT_BYTES // (4 * max(numbers, 1)), MAX_SHOWN // max(shown, 1))


@dataclass(slots=True)
class Reloaded:
    """What a look at the models folder has changed, as name/version."""

    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """no longer in the folder, but sessions live on them"""
    skipped: dict[str, str] = field(default_factory=dict)
    """what can not be loaded, and why"""


class Registry:
    """All versions of all models that could be loaded from the models folder."""

    def __init__(self, settings: Settings, store: Store, post: Post) -> None:
        self._settings = settings
        self._store = store
        self._post = post
        self._models: dict[str, dict[int, Model]] = {}
        self.problems: dict[str, str] = {}
        self._reloading = threading.Lock()
        self._unloaded: set[tuple[str, int]] = set()
        for path in _bundle_paths(settings.models_dir):
            self._load(path)

    def reload(self) -> Reloaded:
        """Load what is new in the models folder, let go of what has left it and nobody needs."""
        with self._reloading:
            report = Reloaded()
            paths = {(p.parent.name, int(p.name)): p for p in _bundle_paths(self._settings.models_dir)}
            self.problems = {}
            self._unloaded &= paths.keys()
            for (name, version), path in paths.items():
                if (name, version) not in self._unloaded:
                    self._renew(name, version, path, report)
            for name, versions in self.versions().items():
                for version in versions:
                    if (name, version) not in paths:
                        self._let_go(name, version, report)
            report.skipped = dict(self.problems)
            return report

    def load(self, name: str) -> Reloaded:
        """Load every version of a model that lies in the models folder; raises Problem when none does."""
        with self._reloading:
            report = Reloaded()
            paths = {int(p.name): p for p in _bundle_paths(self._settings.models_dir) if p.parent.name == name}
            if not paths:
                raise Problem("model_not_found", f"there is no model {name[:64]!r} in the models folder")
            self._unloaded -= {(name, version) for version in paths}
            self.problems = {path: why for path, why in self.problems.items() if path.partition("/")[0] != name}
            for version, path in paths.items():
                self._renew(name, version, path, report)
            report.skipped = {path: why for path, why in self.problems.items() if path.partition("/")[0] == name}
            return report

    def unload(self, name: str) -> Reloaded:
        """Let go of every version of a model that no session lives on, until it is loaded again or the next start."""
        with self._reloading:
            report = Reloaded()
            self.get(name)
            for version in self.versions()[name]:
                self._let_go(name, version, report)
                if version not in self._models.get(name, {}):
                    self._unloaded.add((name, version))
            return report

    @property
    def unloaded(self) -> list[tuple[str, int]]:
        """The versions that were let go of although they lie in the models folder."""
        return sorted(self._unloaded)

    def _renew(self, name: str, version: int, path: Path, report: Reloaded) -> None:
        loaded = self._models.get(name, {}).get(version)
        if loaded is None:
            model = self._load(path)
            if model is not None:
                model.engine.start()
                report.loaded.append(f"{name}/{version}")
            return
        try:
            changed = load(path).manifest != loaded.bundle.manifest
        except (BundleError, OSError) as error:
            self._skip(f"{name}/{version}", f"{error}; the version that was loaded is still served")
            return
        if changed:
            self._skip(f"{name}/{version}", "it has changed since it was loaded: publish it as a new version")

    def _let_go(self, name: str, version: int, report: Reloaded) -> None:
        model = self._models[name][version]
        self._set(name, version, None)
        # New sessions can not be begun with it any more; those that live keep it.
        try:
            needed = self._store.lives(name, version)
        except StoreError:
            self._set(name, version, model)
            raise
        if needed:
            self._set(name, version, model)
            report.kept.append(f"{name}/{version}")
            return
        model.engine.stop()
        report.unloaded.append(f"{name}/{version}")

    def _set(self, name: str, version: int, model: Model | None) -> None:
        """Change what is served, in one assignment: others read it meanwhile."""
        versions = {v: m for v, m in self._models.get(name, {}).items() if v != version}
        if model is not None:
            versions[version] = model
        rest = {n: v for n, v in self._models.items() if n != name}
        self._models = {**rest, name: versions} if versions else rest

    def _load(self, path: Path) -> Model | None:
        name = f"{path.parent.name}/{path.name}"
        try:
            model = self._open(load(path))
        except BundleError as error:
            self._skip(name, str(error))
        except OSError as error:
            self._skip(name, f"{Path(error.filename or MANIFEST).name} can not be read: {error.strerror}")
        except Exception as error:
            # A bundle is a stranger's file: whatever is wrong with it must not keep the others from being served.
            log.exception("model_failed", model=name)
            self._skip(name, f"it can not be run: {type(error).__name__}")
        else:
            self._set(path.parent.name, int(path.name), model)
            log.info("model_loaded", model=name, batches_exactly=model.runner.batches_exactly)
            return model
        return None

    def _skip(self, name: str, reason: str) -> None:
        self.problems[name] = reason
        log.error("model_skipped", model=name, reason=reason)

    def _open(self, bundle: Bundle) -> Model:
        if bundle.manifest.task not in (
            "language-model",
            "forecaster",
            "regressor",
            "classifier",
            "multi-label",
            "raw",
        ):
            raise BundleError(f"its task {bundle.manifest.task!r} is not served by this version")
        runner = open_runner(bundle, self._settings.threads)
        s = self._settings
        retention = None if s.log_retention == "all" else s.log_retention
        keeping = Keeping(s.snapshot_every, retention)
        engine = Engine(runner, self._store, self._post, s.max_batch, s.max_queue_steps, s.max_resident, keeping)
        return Model(bundle, runner, engine)

    def __iter__(self) -> Iterator[Model]:
        return (model for versions in self._models.values() for _, model in sorted(versions.items()))

    def versions(self) -> dict[str, dict[int, Model]]:
        """Loaded versions by model name, both in order."""
        return {name: dict(sorted(versions.items())) for name, versions in sorted(self._models.items())}

    def get(self, name: str, version: int | None = None) -> Model:
        """A version of a model, by default the greatest; raises Problem naming what there is."""
        versions = self._models.get(name)
        if versions is None:
            known = ", ".join(sorted(self._models)) or "none"
            raise Problem("model_not_found", f"there is no model {name[:64]!r}; loaded: {known}")
        found = versions.get(max(versions) if version is None else version)
        if found is None:
            known = ", ".join(map(str, sorted(versions)))
            raise Problem("version_not_found", f"model {name!r} has no version {version}; loaded: {known}")
        return found

    def of(self, head: Head) -> Model:
        """The model version that a session is pinned to, by its graph's checksum."""
        model = self.find(head)
        if model is None:
            raise not_ready(f"{head.model} version {head.version}, which the session was begun with, is not loaded")
        return model

    def find(self, head: Head) -> Model | None:
        """The same, or None when it is not loaded."""
        model = self._models.get(head.model, {}).get(head.version)
        return model if model is not None and model.bundle.manifest.graph_sha256 == head.graph else None

    def with_graph(self, name: str, graph: str) -> Model:
        """The version of a model that has this graph; raises Problem when none that is loaded has."""
        for model in self._models.get(name, {}).values():
            if model.bundle.manifest.graph_sha256 == graph:
                return model
        raise Problem("state_mismatch", f"no version of {name[:64]!r} that is loaded has the graph {graph[:16]}...")

    def start(self) -> None:
        """Start every engine."""
        for model in self:
            model.engine.start()

    def stop(self) -> None:
        """Let every engine finish its queue."""
        for model in self:
            model.engine.stop()


def _bundle_paths(folder: Path) -> list[Path]:
    """Folders <name>/<version>/ that hold something, in order."""
    if not folder.is_dir():
        return []
    versions = [path for path in folder.glob("*/*") if path.name.isdecimal() and path.is_dir()]
    return sorted(
        (p for p in versions if (p / MANIFEST).exists() or any(p.iterdir())), key=lambda p: (p.parent.name, int(p.name))
    )
