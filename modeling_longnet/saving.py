"""Write files and folders whole or not at all: after a kill or on a full disk the former ones are still there.

A killed process may leave a folder whose name begins with a dot. Nothing reads it; it can be deleted.
"""

import filecmp
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

logger = logging.getLogger(__name__)
# A variant's name follows "model" in weights, and "index" in their index.
_WEIGHTS = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(\..+)?\.json)?")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield where to write a new file or folder; it replaces `path`, or what that links to, unless the block raises."""
    path = Path(path).resolve()
    with _scratch(path, path.parent) as scratch:
        yield scratch / path.name
        os.replace(scratch / path.name, path)


@contextmanager
def merging(folder: Path) -> Iterator[Path]:
    """Yield a folder to save a model to; its files replace those of `folder` unless the block raises.

    Weights of the former save in other shards are removed: Transformers would prefer one file to shards. Where one
    rename cannot replace the model, there are no weights for an instant: a mixture of two models must not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    before = stamp(config)
    with _scratch(folder, folder) as scratch:
        yield scratch
        with _locked(folder):
            if stamp(config) != before:
                logger.warning("Another process saved to %s at the same time; its files are replaced.", folder)
            names = sorted(os.listdir(scratch), key=_loading_order)
            kinds = {_weights(name) for name in names} - {None}
            former = [name for name in os.listdir(folder) if _weights(name) in kinds]
            weights = [name for name in names if _weights(name)]
            if len(weights) > 1 or former != weights or not _is_same(config, scratch / config.name):
                for name in sorted(former, key=_loading_order, reverse=True):
                    (folder / name).unlink()
            for name in names:
                os.replace(scratch / name, folder / name)


@contextmanager
def _scratch(target: Path, folder: Path) -> Iterator[Path]:
    """Yield a new folder inside `folder`; raise OSError with the target's name if writing fails."""
    try:
        with TemporaryDirectory(dir=folder, prefix=f".{target.name}-") as scratch:
            yield Path(scratch)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {target}: {error}") from error


def stamp(path: Path) -> tuple[int, ...] | None:
    """Return values that change when the file is replaced; None if there is no file."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _is_same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and filecmp.cmp(first, second, shallow=False)


def _loading_order(name: str) -> tuple[bool, bool]:
    """Return a sort key that puts last the file without which no weights load."""
    return _weights(name) is not None, name.endswith(".json")


def _weights(name: str) -> str | None:
    """Return which weights a file is a part of: "model", "model.VARIANT", "adapter_model"; None for other files."""
    match = _WEIGHTS.fullmatch(name)
    return match and match[1] + (match[2] or "")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from moving files into the folder."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
