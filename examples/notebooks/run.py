"""Run notebooks from top to bottom and keep their outputs; all of them, or those named.

    python -m examples.notebooks.run [own_data ...]

Progress bars, warnings and times are left out, so that a new run changes what is new.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def main() -> None:
    """Run the command line; a cell that raises ends it and leaves its notebook as it was."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names, choices=names)
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for the kernels, and what they start
    for name in parser.parse_args().names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, 4)
        NotebookClient(notebook, timeout=None, record_timing=False).execute()
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"Written: {path}", flush=True)


if __name__ == "__main__":
    main()
