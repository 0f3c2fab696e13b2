"""Run notebooks from top to bottom and keep their outputs; all of them, or those named.

    python -m examples.notebooks.run [own_data ...]

Progress bars, warnings and times are left out, so that a new run changes only what is new.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def main() -> None:
    """Run the command line; a cell that raises ends it and leaves its notebook as it was."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names, choices=names)
    for name in parser.parse_args().names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, 4)
        NotebookClient(notebook, timeout=None, record_timing=False).execute()
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
        nbformat.write(notebook, path)
        print(f"Written: {path}", flush=True)


if __name__ == "__main__":
    main()
