"""The messages of the troubleshooting page are messages of the source code."""

import ast
import re

import pytest
from helpers.documents import DOCS, ROOT

PAGE = DOCS / "troubleshooting.md"
VARIABLE = "…"
ROWS = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def source_texts() -> list[str]:
    """All texts of the source code, with a zero character for each value in an f-string."""
    texts = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def occurs(message: str, texts: list[str]) -> bool:
    parts = [re.escape(part.strip()) for part in message.split(VARIABLE)]
    return any(re.search(".*".join(parts), text, re.DOTALL) for text in texts)


@pytest.mark.parametrize("message", [message for message, _, _ in ROWS])
def test_quoted_message_is_in_the_source(message, source_texts):
    # Enough words that the message cannot be found by accident.
    assert len(re.findall(r"[A-Za-z]{2,}", message)) >= 2
    assert occurs(message, source_texts)


def test_message_that_is_not_in_the_source_is_not_found(source_texts):
    assert not occurs("There is no split … in the moon", source_texts)


def test_each_row_of_the_page_is_checked():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| message |")]
    assert len(rows) == len(ROWS) > 50
