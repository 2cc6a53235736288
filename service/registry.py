"""The models on disk, loaded: each version with its runner and engine; what could not be loaded, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import structlog

from service.bundle import MANIFEST, Bundle, BundleError, Window, load
from service.engine import Engine, Post
from service.errors import Problem, not_ready
from service.runner import Runner
from service.settings import Settings
from service.store.base import Head, Store

MAX_OUTPUT_BYTES = 16 * 2**20
MAX_SHOWN = 250_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """One loaded version of a model."""

    bundle: Bundle
    runner: Runner
    engine: Engine

    def most_steps(self, alternatives: int) -> int:
        """How many steps' predictions one answer may hold: bounded by the arrays, and by what is shown of them."""
        widths = (spec.shape[2:] for spec in self.bundle.manifest.outputs)
        numbers = sum(prod(axis for axis in shape if isinstance(axis, int)) for shape in widths)
        shown = alternatives if self.bundle.manifest.task == "language-model" else numbers
        return min(MAX_OUTPUT_BYTES // (4 * max(numbers, 1)), MAX_SHOWN // max(shown, 1))


class Registry:
    """All versions of all models that could be loaded from the models folder."""

    def __init__(self, settings: Settings, store: Store, post: Post) -> None:
        self._settings = settings
        self._store = store
        self._post = post
        self._models: dict[str, dict[int, Model]] = {}
        self.problems: dict[str, str] = {}
        for path in _bundle_paths(settings.models_dir):
            self._load(path)

    def _load(self, path: Path) -> None:
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
            self._models.setdefault(path.parent.name, {})[int(path.name)] = model
            log.info("model_loaded", model=name, batches_exactly=model.runner.batches_exactly)

    def _skip(self, name: str, reason: str) -> None:
        self.problems[name] = reason
        log.error("model_skipped", model=name, reason=reason)

    def _open(self, bundle: Bundle) -> Model:
        if isinstance(bundle.manifest.memory, Window):
            raise BundleError("its memory is a window, which this version does not serve")
        if bundle.manifest.task not in ("language-model", "forecaster", "classifier"):
            raise BundleError(f"its task {bundle.manifest.task!r} is not served by this version")
        runner = Runner(bundle, self._settings.threads)
        s = self._settings
        engine = Engine(runner, self._store, self._post, s.max_batch, s.max_queue_steps, s.max_resident)
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
        if not self.has(head):
            raise not_ready(f"{head.model} version {head.version}, which the session was begun with, is not loaded")
        return self._models[head.model][head.version]

    def has(self, head: Head) -> bool:
        """Whether the model version that a session is pinned to is loaded."""
        model = self._models.get(head.model, {}).get(head.version)
        return model is not None and model.bundle.manifest.graph_sha256 == head.graph

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
