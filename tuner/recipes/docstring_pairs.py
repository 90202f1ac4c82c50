"""Text that is on every machine: first sentences of docstrings, and the rest of each."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Pair:
    """A docstring's first paragraph, and the rest of it."""

    query: str
    document: str


STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


def docstring_pairs(*roots: Path) -> list[Pair]:
    """Return the pairs below folders of sources, each text once, in a fixed random order.

    Without a folder they are those of the standard library.
    """
    queries: dict[str, Pair] = {}
    documents: dict[str, Pair] = {}
    for root in roots or (STANDARD_LIBRARY,):
        for pair in _all_pairs(root):
            if pair.query not in queries and pair.document not in documents:
                queries[pair.query] = documents[pair.document] = pair
    return sorted(queries.values(), key=lambda pair: hashlib.sha256(pair.query.encode()).digest())


def _all_pairs(root: Path) -> Iterator[Pair]:
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            for docstring in _docstrings(path):
                query, _, document = docstring.partition("\n\n")
                query, document = " ".join(query.split()), " ".join(document.split())
                if 4 <= len(query.split()) <= 30 and len(document.split()) >= 15:
                    yield Pair(query, document)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a file for a newer Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield ast.get_docstring(node) or ""
