"""Write files and folders whole or not at all: after an error or on a full disk the former ones are still there.

A kill may leave a hidden folder. That of `replacing` can be deleted. That of `merging`, `.NAME-XXXXXXXX.saving`, goes
at the next save of these weights to the same place, if the disk has locks. It is needed only if the target has no
weights: the kill fell between renames. Move the files in its `new` to the target to finish the save, those in `former`
to undo it.
"""

import filecmp
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

logger = logging.getLogger(__name__)
_SCRATCH = ".saving"
# A variant's name follows "model" in weights, and "index" in their index.
_WEIGHTS = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(\..+)?\.json)?")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield where to write a new file or folder; it replaces `path`, or what that links to, unless the block raises."""
    path = Path(path).resolve()
    with _naming(path), TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        yield Path(scratch, path.name)
        os.replace(Path(scratch, path.name), path)


@contextmanager
def merging(folder: Path) -> Iterator[Path]:
    """Yield a folder to save a model to; its files replace those of `folder` unless the block or a rename raises.

    Weights of the former save in other shards are removed: Transformers would prefer one file to shards. Where one
    rename cannot replace the model, there are no weights for an instant: a mixture of two models must not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = stamp(folder / "config.json")
    with _naming(folder), ExitStack() as stack:
        with _locked(folder):  # another save could take the scratch folder for a killed one's before it is locked
            scratch = Path(mkdtemp(_SCRATCH, f".{folder.name}-", folder))
            stack.callback(lambda: (scratch / "former").exists() or shutil.rmtree(scratch, ignore_errors=True))
            stack.enter_context(_locked(scratch))
        (scratch / "new").mkdir()
        yield scratch / "new"
        with _locked(folder):
            if stamp(folder / "config.json") != before:
                logger.warning("Another process saved to %s at the same time; its files are replaced.", folder)
            _move(scratch / "new", scratch / "former", folder)


def _move(new: Path, former: Path, folder: Path) -> None:
    """Move files into the folder, and former weights out of it; after an error all are new or all the former ones."""
    names = sorted(os.listdir(new), key=_loading_order)
    weights = [x for x in names if _weights(x)]
    kinds = {_weights(x) for x in weights}
    leaving = [x for x in os.listdir(folder) if _weights(x) in kinds and not (folder / x).is_dir()]
    if len(weights) == 1 and leaving == weights and _is_same(folder / "config.json", new / "config.json"):
        leaving = []
    steps = [(shutil.copy2, folder / x, former / x) for x in names if not _weights(x) and (folder / x).exists()]
    steps += [(os.replace, new / x, folder / x) for x in names if not any(_loading_order(x))]
    steps += [(os.replace, folder / x, former / x) for x in sorted(leaving, key=_loading_order, reverse=True)]
    steps += [(os.replace, new / x, folder / x) for x in names if any(_loading_order(x))]
    former.mkdir()
    try:
        for step, source, target in steps:
            step(source, target)
    except BaseException:
        for _, source, target in reversed(steps if os.listdir(new) else []):  # with none left, all are new
            if not os.path.lexists(source):
                os.replace(target, source)
        shutil.rmtree(former, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)
    for scratch in folder.glob(f".*{_SCRATCH}"):  # of killed saves; other weights may have their only copy there
        held = {_weights(path.name) for path in scratch.glob("*/*") if (scratch / "former").exists()}
        with _locked(scratch, wait=False) as is_free:
            if is_free and held <= {None, *kinds}:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Raise OSError with the target's name if writing fails."""
    try:
        yield
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
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from moving files into the folder; yield False where it cannot be locked."""
    with ExitStack() as stack:
        is_locked = False
        with suppress(OSError):  # some network file systems have no locks
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
        yield is_locked
