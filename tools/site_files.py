"""Brings what docs/ links to, and lies outside of it, into the site: a hook of mkdocs (mkdocs.yml).

A link like ../dapo/train.py works wherever the repository is read. In the site it leads to a page of its own
below repository/, which shows the file; a picture is copied. What such a page links to comes too.
"""

from __future__ import annotations

import os.path
import posixpath
import re
from pathlib import Path
from typing import Any

FOLDER = "repository"  # in the site
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")  # [text](path), not a URL and not a place on the page
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json"}


def links_of(text: str) -> list[str]:
    """Return the relative paths that a Markdown text links to; code in it links to nothing."""
    return LINK.findall(FENCE.sub("", text))


def place_of(name: str) -> str:
    """Return where the repository's file `name` is in the site: docs/a.md → a.md."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    is_itself = Path(name).suffix in {".md", *PICTURES}
    return f"{FOLDER}/{name}" + ("" if is_itself else ".md")


def target(root: Path, source: str, link: str) -> str:
    """Return the repository's file that a link in the file `source` names; a folder's is its README.md."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{name}/README.md" if (root / name).is_dir() else name


def relinked(root: Path, source: str, text: str) -> str:
    """Return a page's text with its links as the site has them."""
    here = posixpath.dirname(place_of(source))

    def moved(match: re.Match[str]) -> str:
        name = target(root, source, match[1])
        return posixpath.relpath(place_of(name), here or ".") if (root / name).is_file() else match[1]

    fences = FENCE.findall(text)
    parts = [LINK.sub(moved, part) for part in FENCE.split(text)]
    return "".join(part + fence for part, fence in zip(parts, [*fences, ""], strict=True))


def shown(root: Path, name: str) -> str:
    """Return the page that shows a file."""
    text = (root / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        return relinked(root, name, text)
    return f"# {name}\n\n````{LANGUAGES.get(Path(name).suffix, 'text')}\n{text}\n````\n"


def outside(root: Path) -> list[str]:
    """Return all files outside of docs/ that its pages link to, and those that these link to."""
    names = sorted(f"docs/{path.name}" for path in (root / "docs").glob("*.md"))
    for name in names:  # grows while it is read
        if name.endswith(".md"):
            found = (target(root, name, link) for link in links_of((root / name).read_text(encoding="utf-8")))
            names += sorted({each for each in found if (root / each).is_file()} - set(names))
    return [name for name in names if not name.startswith("docs/")]


def on_files(files: Any, config: Any) -> Any:
    """Add a page, or a picture, for each file outside of docs/ that is linked to. mkdocs calls it."""
    from mkdocs.structure.files import File

    root = Path(os.path.dirname(config.config_file_path))
    for name in outside(root):
        if Path(name).suffix in PICTURES:
            files.append(File.generated(config, place_of(name), abs_src_path=str(root / name)))
        else:
            files.append(File.generated(config, place_of(name), content=shown(root, name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page of docs/ with its links as the site has them. mkdocs calls it."""
    source = page.file.src_uri
    if source.startswith(f"{FOLDER}/"):
        return markdown
    return relinked(Path(os.path.dirname(config.config_file_path)), f"docs/{source}", markdown)
