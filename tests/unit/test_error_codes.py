"""Codes of errors: stable names that tests and programs rely on instead of sentences."""

import ast
import pickle
import re
from pathlib import Path

from nnunet_autoreg.errors import AutoregError, PlanError, ScanError, UsageError

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("nnunet_autoreg", "trainers", "planners")


def codes_in_source() -> dict[str, set[str]]:
    """Return every code that is given where an error is made, with the classes that have it."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in sorted((REPO / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                if not node.func.id.endswith("Error"):
                    continue
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        found.setdefault(keyword.value.value, set()).add(node.func.id)
    return found


def test_codes_are_lower_case_words_joined_by_hyphens() -> None:
    codes = codes_in_source()
    wrong = [code for code in codes if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)]

    # A search that finds nothing would find nothing wrong.
    assert "plan-unknown-key" in codes
    assert not wrong


def test_a_code_belongs_to_one_class_of_errors() -> None:
    shared = {code: classes for code, classes in codes_in_source().items() if len(classes) > 1}

    assert not shared


def test_an_error_has_its_own_code_or_that_of_its_class() -> None:
    assert AutoregError("x").code == "error"
    assert UsageError("x").code == "usage"
    assert PlanError("x").code == "plan"
    assert PlanError("x", code="plan-unknown-key").code == "plan-unknown-key"
    # The code of a ScanError ends with the reason for which a scan is skipped.
    assert ScanError("unreadable", "x").code == "scan-unreadable"


def test_a_code_survives_the_way_from_one_process_to_another() -> None:
    # Workers of a pool hand their errors to the main process by pickle.
    error = pickle.loads(pickle.dumps(PlanError("x", code="plan-unknown-key")))

    assert (str(error), error.code) == ("x", "plan-unknown-key")
