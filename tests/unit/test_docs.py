"""What the documents tell people to type can be typed, and what they link to exists."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = {
    "autoreg_pretrain": "pretrain",
    "autoreg_doctor": "doctor",
    "autoreg_demo": "demo",
    "autoreg_benchmark": "benchmark",
    "autoreg_probe": "probe",
    "autoreg_weights": "weights",
    "autoreg_evaluate_detection": "evaluate_detection",
    "autoreg_detect": "detect",
    "autoreg_boxes_to_labels": "boxes_to_labels",
    "autoreg_convert_nndetection": "convert_nndetection",
}


def lines_to_type(document: Path) -> Iterator[list[str]]:
    """The command lines in a document's fenced blocks, without comments, prompts and environment
    assignments.
    """
    for block in re.findall(
        r"^```[a-z]*\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        for line in block.replace("\\\n", " ").splitlines():
            words = (
                shlex.split(line.removeprefix("$ "), comments=True)
                if re.match(r"(\$ )?(autoreg_|nnUNetv2_)\w+( |$)", line)
                else []
            )
            if words:
                yield words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_in_the_documents_can_be_typed(document: Path) -> None:
    stock = {point.name for point in entry_points(group="console_scripts")}
    for program, *arguments in lines_to_type(document):
        if program in OURS:
            import_module(f"nnunet_autoreg.cli.{OURS[program]}").parser().parse_args(arguments)
        else:
            assert program in stock, f"{document.name}: {program}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


def test_the_documents_hold_command_lines_to_check() -> None:
    assert sum(1 for document in DOCUMENTS for _ in lines_to_type(document)) >= 6
