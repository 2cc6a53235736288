"""A checked bundle becomes a folder, `models/<name>/<version>/`: in full or not at all, and never over another."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.bundle import MANIFEST, NAME_PATTERN, Manifest, sha256_of

ABSOLUTE_PATH = re.compile(r"(?<![\w./:~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")


class ExportError(Exception):
    """A model that must not be published; the message says which rule it breaks, or which check failed."""


def free_version(models: Path, name: str, version: int | None = None) -> int:
    """The version asked for, or the greatest so far and one more; raises ExportError if it is taken."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ExportError(f"name: {name!r} does not match {NAME_PATTERN}")
    taken = [int(path.name) for path in (models / name).glob("*") if re.fullmatch(r"[1-9]\d*", path.name)]
    if version in taken:
        raise ExportError(f"version: {name}/{version} exists and is never overwritten; leave --version out")
    return max(taken, default=0) + 1 if version is None else version


def publish(target: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write the files and the manifest with their checksums beside `target`, then rename; all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, content in files.items():
            _write(temporary / name, content)
        sums = {name: sha256_of(temporary / name) for name in files}
        complete = manifest.model_copy(update={"files": sums})
        _write(temporary / MANIFEST, complete.model_dump_json(indent=2).encode() + b"\n")
        temporary.chmod(0o755)  # mkdtemp gives 0700, and a container serves as another user
        sync(temporary)
        _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not any(target.parent.iterdir()):
            target.parent.rmdir()
    sync(target.parent)
    return target


def without_paths(value: Any) -> Any:  # noqa: ANN401 (any JSON)
    """The same JSON with absolute paths cut down to their last part: a bundle travels, its machine does not."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return ABSOLUTE_PATH.sub("", value) if isinstance(value, str) else value


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        raise ExportError(
            f"version: {target.parent.name}/{target.name} cannot be published: {error.strerror}"
        ) from error


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cpu_kind() -> str:
    """The processor's name, e.g. "AMD EPYC (x86_64)"."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or 'unknown'} ({platform.machine()})"
