"""Pages of the documentation, their fenced blocks and the commands in them."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "finetune.ipynb"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: Path of the page, relative to the repository.
        language: Language after the fence, `""` for none.
        text: Text between the fences.
    """

    page: str
    language: str
    text: str


def notebook_cells(cell_type: str) -> list[dict]:
    """Return the cells of the notebook of this type, with their source as one string."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == cell_type]


def page_texts() -> dict[str, str]:
    """Return the Markdown of each page, by its path. That of the notebook is in its Markdown cells."""
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
    notebook = "\n\n".join(cell["source"] for cell in notebook_cells("markdown"))
    return texts | {NOTEBOOK.relative_to(ROOT).as_posix(): notebook}


def fenced_blocks(*languages: str) -> list[Block]:
    """Return the blocks in these languages on all pages, in order."""
    return [
        Block(page, language, text)
        for page, content in page_texts().items()
        for language, text in _BLOCK.findall(content)
        if language in languages
    ]


def split_commands(block: str) -> list[list[str]]:
    """Return the words of each command of a bash block, without comments."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            position = words.index("&&")
            commands.append(words[:position])
            words = words[position + 1 :]
        commands.append(words)
    return [words for words in commands if words]
