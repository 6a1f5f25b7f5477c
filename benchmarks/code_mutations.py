"""Small changes of the program's code, one at a time: does a test fail?

    make coverage                                                    which test runs which line, and how long it takes
    python -m benchmarks.code_mutations [--count 240] [--seed 0]     writes results/code_mutations.jsonl and the page
    python -m benchmarks.code_mutations --again                      tries those again that were not noticed

A change ("mutant") is drawn at random from all that `Mutator` makes in the packages of `PACKAGES`, and the tests that
run its line are run, the shortest first, until one fails or those of `SECONDS` have passed. A change that no test
notices survives: either a test is missing, or the changed program does the same. Nothing is written into the tree:
each change has a process of its own, forked from one that has imported the libraries but not llmpruner, in which the
module is compiled from the changed syntax tree; processes that tests start see the changed program too. Which lines
such processes run is not measured, so that a change of what several processes of a run share is also tried with the
test that starts them (`ACROSS`). Results are kept, so that an interrupted run goes on where it was; delete the file
after the code has changed, or try the changes that were not noticed again with ``--again``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "code_mutations.jsonl"
PAGE = ROOT / "benchmarks" / "code_mutations.md"
COVERAGE, DURATIONS = ROOT / ".coverage", ROOT / ".coverage-tests.xml"
"""What ``make coverage`` leaves."""
PACKAGES = ("structure", "selection", "checkpoints", "engine", "models/surgery.py")
SECONDS = 40.0
"""Of tests, as long as they took when coverage was measured."""
ACROSS = "tests/unit/test_ranks.py::test_several_processes_give_the_result_of_one"
SHARED = tuple(f"engine/{name}.py" for name in ("ranks", "reduce", "journal", "inputs", "stream", "walk", "gradients"))
"""Files with what the processes of a run share."""
LIMIT = 600.0
"""Seconds after which a change counts as noticed, since the tests do not end."""
CHILDREN = """import pathlib, sys
sys.path.insert(0, {here!r})
from benchmarks import code_mutations
sys.path.remove({here!r})
code_mutations.ROOT = pathlib.Path({root!r})
sys.meta_path.insert(0, code_mutations.Finder(code_mutations.Change(**{change!r})))
"""
"""``sitecustomize.py`` of processes that tests start."""
EXPLAINED = {
    ("engine/journal.py", "1 → 2"): "indentation of a file that is compared with itself alone",
    ("engine/ranks.py", "own % here → Mult"): "runs with a GPU alone",
    ("engine/ranks.py", "if not (torch.cuda.is_available())"): "differs with a GPU alone",
    ("checkpoints/reader.py", "without: raise NotImplementedError"): "of a base class; every reader has its own",
    ("structure/scope.py", "True → False"): "forbids assignments, which nothing makes",
}
"""File and change → why no test can notice it, or none on a CPU."""
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """The ``number``-th that `Mutator` makes in ``file``."""

    file: str
    number: int
    line: int
    what: str


class Mutator(ast.NodeTransformer):
    """Makes the ``chosen``-th change of a syntax tree, and lists all. Annotations, docstrings, and what only says how
    an object is shown or why something is refused (text) stay."""

    def __init__(self, chosen: int | None = None) -> None:
        self.chosen = chosen
        self.found: list[tuple[int, str]] = []

    def change(self, node: ast.AST, new: ast.AST, what: str) -> ast.AST:
        self.found.append((node.lineno, what))  # type: ignore[attr-defined]
        return ast.copy_location(new, node) if len(self.found) - 1 == self.chosen else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.defaults = [self.visit(default) for default in node.args.defaults]
        node.args.kw_defaults = [default and self.visit(default) for default in node.args.kw_defaults]
        node.body = [self.visit(part) for part in node.body]
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return node
        self.generic_visit(node)
        negated = copy.copy(node)
        negated.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return self.change(node, negated, f"if not ({ast.unparse(node.test)})")

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return self.change(node, ast.IfExp(node.test, node.orelse, node.body), f"{ast.unparse(node)}: the other value")

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        other = COMPARISONS[type(node.ops[0])]
        new = ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)
        return self.change(node, new, f"{ast.unparse(node)} → {other.__name__}")

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = OPERATORS.get(type(node.op))
        if other is None or (isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)):
            return node
        return self.change(node, ast.BinOp(node.left, other(), node.right), f"{ast.unparse(node)} → {other.__name__}")

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        other: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return self.change(node, ast.BoolOp(other, node.values), f"{ast.unparse(node)} → {type(other).__name__}")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self.change(node, node.operand, f"{ast.unparse(node)} → {ast.unparse(node.operand)}")

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return self.change(node, ast.Constant(not node.value), f"{node.value} → {not node.value}")
        if isinstance(node.value, int | float):
            new = node.value + 1
            return self.change(node, ast.Constant(new), f"{node.value} → {new}")
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None):
            return node
        return self.change(node, ast.Return(ast.Constant(None)), f"{ast.unparse(node)} → None")

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self.change(node, ast.Pass(), f"without: {ast.unparse(node)}")

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return node
        self.generic_visit(node)
        if isinstance(node.value, ast.Yield | ast.YieldFrom | ast.Await):
            return node
        return self.change(node, ast.Pass(), f"without: {ast.unparse(node)}")

    def visit_Continue(self, node: ast.Continue) -> ast.AST:
        return self.change(node, ast.Break(), "continue → break")

    def visit_Break(self, node: ast.Break) -> ast.AST:
        return self.change(node, ast.Continue(), "break → continue")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node


def changes_of(file: str) -> list[Change]:
    mutator = Mutator()
    mutator.visit(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return [Change(file, number, line, what) for number, (line, what) in enumerate(mutator.found)]


def changed(change: Change) -> CodeType:
    tree = Mutator(change.number).visit(ast.parse((ROOT / change.file).read_text(encoding="utf-8")))
    return compile(ast.fix_missing_locations(tree), str(ROOT / change.file), "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    """Finds the changed module as the unchanged one is found, and gives it the changed code."""

    def __init__(self, change: Change) -> None:
        self.name = change.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.code = changed(change)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert isinstance(spec.loader, SourceFileLoader)
        spec.loader.get_code = lambda fullname: self.code  # type: ignore[method-assign, assignment]
        return spec


class Tests:
    """The tests that run a line, the shortest first."""

    def __init__(self) -> None:
        from coverage import CoverageData

        self.data = CoverageData(str(COVERAGE))
        self.data.read()
        self.files = {self._relative(file): file for file in self.data.measured_files()}
        self.seconds = dict(_durations())

    @staticmethod
    def _relative(file: str) -> str:
        """Below the root, of whatever copy of the tree was measured."""
        return file[file.rindex("llmpruner/") :] if "llmpruner/" in file else file

    def running(self, change: Change) -> list[str]:
        lines = self.data.contexts_by_lineno(self.files[change.file]) if change.file in self.files else {}
        here = {context.partition("|")[0] for context in lines.get(change.line, []) if context}
        if not here and "" in lines.get(change.line, []):
            # Run at import: every test of the module may notice.
            here = {context.partition("|")[0] for contexts in lines.values() for context in contexts if context}
        known = sorted((test for test in here if test in self.seconds), key=lambda test: (self.seconds[test], test))
        chosen, total = [], 0.0
        for test in known:
            total += self.seconds[test]
            if chosen and total > SECONDS:
                break
            chosen.append(test)
        return [*chosen, ACROSS] if change.file.endswith(SHARED) and ACROSS not in chosen else chosen


def _durations() -> Iterator[tuple[str, float]]:
    """Identifier and seconds of each test that passed."""
    for case in ElementTree.parse(DURATIONS).getroot().iter("testcase"):
        if len(case):  # failed or skipped
            continue
        path = case.attrib["classname"].split(".")
        inside = [path.pop()] if path[-1][:1].isupper() else []
        yield "::".join(["/".join(path) + ".py", *inside, case.attrib["name"]]), float(case.attrib["time"])


def outcome(change: Change, tests: list[str]) -> str:
    """*killed*, by a failing test or by no end; *survived*; *no test*."""
    if not tests:
        return "no test"
    with tempfile.TemporaryDirectory() as folder:
        text = CHILDREN.format(here=str(Path(__file__).parents[1]), root=str(ROOT), change=asdict(change))
        (Path(folder) / "sitecustomize.py").write_text(text, encoding="utf-8")
        child = os.fork()
        if not child:
            _child(change, tests, folder)
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "killed"


def _child(change: Change, tests: list[str], folder: str) -> None:
    """Does not return. ``folder``: of the modules that processes of the tests import first."""
    code = 70
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.environ.pop("PYTEST_ADDOPTS", None)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        sys.meta_path.insert(0, Finder(change))
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist", *tests]))
    except BaseException:
        code = 71
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="try those again that were not noticed")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    again = [row for row in done if row["outcome"] != "killed"] if options.again else []
    done = [row for row in done if row not in again]
    if not options.render:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        os.chdir(ROOT)
        if options.again:
            drawn = [Change(row["file"], row["number"], row["line"], row["what"]) for row in again]
        else:
            drawn = random.Random(options.seed).sample(everything(), options.count)
        known = {(row["file"], row["number"]) for row in done}
        tests = Tests()
        work = [(change, tests.running(change)) for change in drawn if (change.file, change.number) not in known]
        import hypothesis, peft, pytest, torch, transformers.models.llama.modeling_llama  # noqa: E401, F401, I001

        torch.set_num_threads(1)
        # Threads only wait for their children.
        with ThreadPoolExecutor(options.workers) as pool:
            for (change, chosen), found in zip(work, pool.map(lambda pair: outcome(*pair), work), strict=True):
                done.append({**asdict(change), "tests": len(chosen), "outcome": found})
                RESULTS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done))
                print(found, change.file, change.line, change.what[:100], flush=True)
    PAGE.write_text(page(done), encoding="utf-8")


def everything() -> list[Change]:
    found = []
    for package in PACKAGES:
        place = ROOT / "llmpruner" / package
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found += changes_of(str(file.relative_to(ROOT)))
    return found


def page(done: list[dict[str, Any]]) -> str:
    counts: dict[str, Counter[str]] = {}
    for row in done:
        package = row["file"].removeprefix("llmpruner/").rpartition("/")[0]
        counts.setdefault(package, Counter())[row["outcome"]] += 1
    total = sum(counts.values(), Counter())
    lines = [
        "# Changes of the code that tests notice", "",
        "<!-- Written by benchmarks/code_mutations.py; do not edit. -->", "",
        f"`python -m benchmarks.code_mutations --count {len(done)}`: {len(done)} of {len(everything())} changes, drawn "
        f"at random. *Killed*: a test that runs the line fails. *Survived*: none of those that take {SECONDS:.0f} "
        "seconds in all does, the shortest first.", "",
        "| package | changes | killed | survived | run by no test |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for package, count in [*sorted(counts.items()), ("all", total)]:
        share = f"{count['killed'] / count.total():.0%}"
        lines.append(f"| {package} | {count.total()} | {share} | {count['survived']} | {count['no test']} |")
    lines += ["", "Those that were not noticed:", ""]
    for row in done:
        if row["outcome"] != "killed":
            why = EXPLAINED.get((row["file"].removeprefix("llmpruner/"), row["what"]), "not explained")
            lines.append(f"- `{row['file']}`, line {row['line']}: `{row['what']}` ({row['outcome']}): {why}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
