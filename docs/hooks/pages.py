"""Pages of the site that lie outside docs/, and links as they are written in the repository.

A link is relative to its file, so that it also works where the repository is browsed; the site has another layout.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = ("DESIGN.md", "CONTRIBUTING.md", "examples/*", "results/*/*.md", "results/*/*.png")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/, each at its path in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    folder = Path(page.file.abs_src_path).parent
    here = posixpath.dirname(page.file.src_uri)

    def in_site(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if not target.exists():  # no link, but code; or a broken one, which mkdocs reports
            return link[1]
        docs = Path(config.docs_dir)
        uri = target.relative_to(docs if target.is_relative_to(docs) else ROOT).as_posix()
        return posixpath.relpath(uri, here)

    return LINK.sub(in_site, markdown)
