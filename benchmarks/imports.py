"""The state of the import graph: circles of files, and imports inside functions.

    python -m benchmarks.imports [CHECKOUT]

Counts every import that the source holds, those inside functions included, except under ``if TYPE_CHECKING``. Exits
with 1 when two files import each other, directly or through others. `lint-imports` holds the layers.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def main(checkout: Path) -> None:
    for folder in ("llmpruner", "plugins"):
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (checkout / folder).rglob("*.py")]
        inner = sum(len(list(inside_functions(tree))) for tree in trees)
        print(f"{folder}: {len(trees)} files, {inner} imports inside functions")
    try:
        TopologicalSorter(graph_of(checkout / "llmpruner")).prepare()
    except CycleError as error:
        sys.exit("a circle: " + " ← ".join(error.args[1]))
    print("llmpruner: no circle of files")


def inside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Every import statement that is inside a function, once."""
    seen: set[int] = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in seen:
                    seen.add(id(node))
                    yield node


def graph_of(root: Path) -> dict[str, set[str]]:
    """Module → the modules of the same package that it imports anywhere."""
    files = {_name(file, root): file for file in root.rglob("*.py")}
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_types = {id(n) for i in ast.walk(tree) if _is_type_checking(i) for n in ast.walk(i)}
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
                parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                names = [".".join([*parts, alias.name]) for alias in node.names]
                graph[module] |= {name if name in files else ".".join(parts) for name in names} - {module}
    return graph


def _name(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
