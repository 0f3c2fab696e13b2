"""MkDocs hook: pages of the repository that are not in docs/, and links that hold on the site as in the checkout.

Pages link to files by their place in the repository. A link to a page or picture of the site is rewritten, one to any
other file becomes plain text, and one to nothing is left for MkDocs to refuse.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Where a file of the repository goes on the site.
PLACES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks/index.md"}
OTHERS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "examples/paper/results/full/*.md",
    "examples/paper/results/full/*.png",
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# GitHub begins a list right below a line of text, Python-Markdown only below an empty line.
LIST_BELOW_TEXT = re.compile(r"^(?![-*] |\d+\. |[|#>])(\S.*\n)(?=- |\d+\. )", re.MULTILINE)


def on_files(files: Files, config) -> Files:
    """Add the pages and pictures from outside of docs/."""
    places = dict(PLACES)
    for pattern in OTHERS:
        places |= {name: name for name in (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern)))}
    for source, place in places.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite the links of one page, outside of its code blocks."""
    places = {Path(file.abs_src_path).relative_to(ROOT).as_posix(): file.src_uri for file in files if _is_ours(file)}
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    here = posixpath.dirname(page.file.src_uri)
    parts[::2] = [LINK.sub(lambda link: _rewrite(link, source, here, places), part) for part in parts[::2]]
    parts[::2] = [LIST_BELOW_TEXT.sub(r"\1\n", part) for part in parts[::2]]
    return "".join(parts)


def _is_ours(file: File) -> bool:
    return file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(ROOT)


def _rewrite(link: re.Match, source: str, here: str, places: dict[str, str]) -> str:
    """Return one link as the site needs it, given the folders of the page in the repository and on the site."""
    bang, label, target = link.groups()
    path, mark, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return link[0]
    found = posixpath.normpath(posixpath.join(source, path))
    if found in places:
        return f"{bang}[{label}]({posixpath.relpath(places[found], here or '.')}{mark}{anchor})"
    return label if (ROOT / found).exists() and not bang else link[0]
