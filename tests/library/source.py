"""Transformers' own tests: fetched from its source distribution, by pip, and made importable.

Run as a script, this file fetches them; imported, it only looks for them. None of them is committed.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "transformers_tests"
FOLDER = ROOT / ".cache" / f"transformers-{transformers.__version__}"
# What the distribution leaves out, although its tests import it.
LEFT_OUT = (
    "distributed_testing_utils",
    "exporters.test_export",
    "generation.test_utils",
    "utils.test_configuration_utils",
)


def fetch() -> None:
    """Download the source distribution of the installed release, without building it, and unpack its tests."""
    package = FOLDER / PACKAGE
    if not (package / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as folder:
            what = ["--no-deps", "--no-binary=:all:", f"transformers=={transformers.__version__}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *what], check=True)
            unpack(next(Path(folder).glob("*.tar.gz")), package)
    for name in LEFT_OUT:
        path = (package / name.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("from library.left_out import *\n")


def unpack(archive: Path, package: Path) -> None:
    """Copy the modules of the archive's `tests` folder to `package`."""
    package.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(member.name)
            if path.match("*/tests/*.py") and len(path.parts) == 3:
                (package / path.name).write_bytes(files.extractfile(member).read())
    (package / "__init__.py").touch()  # last: an interrupted fetch is not taken for a whole one


def load(name: str):
    """Return a module of the library's tests, such as "test_modeling_common"."""
    if not (FOLDER / PACKAGE / "__init__.py").exists():
        raise RuntimeError(f"{FOLDER} is missing: run `make test-transformers`, which fetches it.")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # multiprocessing hands the path on to processes that it spawns
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    fetch()
