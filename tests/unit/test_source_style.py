"""What CONTRIBUTING asks of the source, as far as a program can see it."""

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = ("nnunet_autoreg", "trainers", "planners")
LONGEST_FUNCTION = 70

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@cache
def modules_of(folder: str) -> tuple[tuple[Path, ast.Module], ...]:
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    return tuple(
        (path.relative_to(REPOSITORY), ast.parse(path.read_text(encoding="utf-8")))
        for path in paths
    )


def modules(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        yield from modules_of(folder)


def functions(*folders: str) -> Iterator[tuple[str, Function]]:
    for path, tree in modules(*folders):
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def section(docstring: str, title: str) -> list[str]:
    """Return the names before the colons in a section of a docstring, such as ``Args:``."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    if found is None:
        return []
    # Further lines of an entry are indented more deeply.
    entries = re.findall(r"^    (\S[^:]*):", found[1], re.MULTILINE)
    return [name.strip().lstrip("*") for entry in entries for name in entry.split(",")]


def parameters_of(node: Function) -> set[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return {argument.arg for argument in named}


def test_a_section_of_a_docstring_is_read_by_its_names() -> None:
    docstring = "Do it.\n\nArgs:\n    a, b: two\n        lines: of text.\n    c: one.\n\nRaises:\n"

    assert section(docstring, "Args") == ["a", "b", "c"]
    assert section(docstring, "Raises") == []


def test_a_docstring_describes_only_arguments_that_exist() -> None:
    wrong = {}
    for name, node in functions(*PACKAGE, "benchmarks"):
        described = section(ast.get_docstring(node) or "", "Args")
        unknown = set(described) - parameters_of(node)
        if unknown:
            wrong[name] = unknown

    assert wrong == {}


def test_a_docstring_names_only_exceptions_that_exist() -> None:
    classes = set()
    for _, tree in modules(*PACKAGE, "benchmarks"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)

    wrong = {}
    for name, function in functions(*PACKAGE, "benchmarks"):
        raised = section(ast.get_docstring(function) or "", "Raises")
        unknown = [error for error in raised if not (error in classes or hasattr(builtins, error))]
        if unknown:
            wrong[name] = unknown

    assert wrong == {}


def test_no_function_is_longer_than_its_limit() -> None:
    lengths = {}
    for name, node in functions(*PACKAGE, "tests", "benchmarks"):
        assert node.end_lineno is not None
        lengths[name] = node.end_lineno - node.lineno + 1

    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_no_comprehension_contains_another() -> None:
    nested = []
    for path, tree in modules(*PACKAGE):
        for node in ast.walk(tree):
            if not isinstance(node, COMPREHENSIONS):
                continue
            inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            if len(inner) > 1:
                nested.append(f"{path}:{node.lineno}")

    assert nested == []


def test_a_call_that_does_not_fit_has_one_argument_per_line() -> None:
    # ruff cannot have this rule beside its formatter without a warning, so that it is asked here.
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--select", "COM812", "--no-cache", "."]

    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout
