"""The documentation: commands can be typed, links lead somewhere, generated text is up to date."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
SHELVES = ("getting-started", "how-to", "reference", "explanation")

FENCED_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND_LINE = re.compile(r"(\$ )?(autoreg_|nnUNetv2_)\w+( |$)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCE_FILE = re.compile(r"`(?:python )?([a-z0-9_/]+\.py)\b")
EMPTY_MEANING = re.compile(r"^\| `([^`]+)` \|(?:.*\|)?\s*\|$", re.MULTILINE)


def name_of(path: Path) -> str:
    """Return the name of a test's document: its path in the repository."""
    return str(path.relative_to(ROOT))


def fenced_blocks(document: Path) -> list[str]:
    """Return the content of a document's fenced blocks."""
    return FENCED_BLOCK.findall(document.read_text(encoding="utf-8"))


def command_lines(document: Path) -> Iterator[list[str]]:
    """Return the words of every command of ours and of nnU-Net in a document's fenced blocks."""
    for block in fenced_blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            if COMMAND_LINE.match(line):
                yield shlex.split(line.removeprefix("$ "), comments=True)


def headings(document: Path) -> set[str]:
    """Return the anchors of a document, as GitHub makes them from headings."""
    text = FENCED_BLOCK.sub("", document.read_text(encoding="utf-8"))
    anchors = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


def script(path: Path) -> ModuleType:
    """Return a script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_line_can_be_typed(document: Path) -> None:
    # Names that are not installed are mistakes; our own commands must also know every option.
    programs = {point.name: point.module for point in entry_points(group="console_scripts")}

    for program, *arguments in command_lines(document):
        assert program in programs, f"{document.name}: {program}"
        if program.startswith("autoreg_"):
            import_module(programs[program]).parser().parse_args(arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    missing = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = document.parent / path if path else document
        # A link without a path leads to a heading of the same page.
        is_there = target.exists() and (not anchor or anchor in headings(target))
        if not is_there:
            missing.append(link)

    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_source_file_that_a_document_names_exists(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("the changelog names files of earlier versions")

    named = SOURCE_FILE.findall(document.read_text(encoding="utf-8"))

    folders = (ROOT, ROOT / "nnunet_autoreg", document.parent)
    assert [name for name in named if not any((top / name).exists() for top in folders)] == []


def test_every_page_is_on_the_index_of_the_four_shelves() -> None:
    index = DOCS / "README.md"
    decisions = DOCS / "explanation" / "decisions"
    linked = set()
    for page in (index, decisions / "README.md"):
        links = LINK.findall(page.read_text(encoding="utf-8"))
        linked |= {(page.parent / link).resolve() for link in links}

    pages = set(DOCS.rglob("*.md")) - {index}

    assert pages <= linked
    assert {page.relative_to(DOCS).parts[0] for page in pages} == set(SHELVES)


def test_the_documents_hold_command_lines_to_check() -> None:
    # If the pattern of commands stopped matching, the test above would pass without a check.
    assert sum(1 for document in DOCUMENTS for _ in command_lines(document)) >= 6


@pytest.mark.parametrize("page", REFERENCE, ids=name_of)
def test_a_page_of_the_reference_is_what_the_code_generates(page: Path) -> None:
    committed = page.read_text(encoding="utf-8")

    generated = script(DOCS / "generate_reference.py").fill(committed)

    assert generated == committed, "type: python docs/generate_reference.py"


@pytest.mark.parametrize("page", REFERENCE, ids=name_of)
def test_every_option_and_value_of_the_reference_has_a_meaning(page: Path) -> None:
    assert EMPTY_MEANING.findall(page.read_text(encoding="utf-8")) == []


def test_every_command_of_the_package_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    ours = []
    for point in entry_points(group="console_scripts"):
        if point.module.startswith("nnunet_autoreg."):
            ours.append(point.name)

    assert ours
    assert [name for name in ours if f"generated from: {name} " not in page] == []


def test_readme_fits_on_one_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= 90


def test_contributing_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("## Test it\n")
    block = FENCED_BLOCK.search(section)
    assert block is not None
    # Installing is described in another section of CONTRIBUTING.md.
    checks = [line for line in block[1].splitlines() if not line.startswith("pip ")]

    assert "\n".join(checks) in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_command_of_the_tutorial_shows_its_output() -> None:
    tutorial = script(DOCS / "getting-started" / "run_tutorial.py")
    page = tutorial.PAGE.read_text(encoding="utf-8")

    blocks = list(tutorial.BLOCK.finditer(page))

    assert len(blocks) == page.count("```console")
    # sed prints nothing.
    silent = [
        block["command"]
        for block in blocks
        if not block["output"].strip() and not block["command"].startswith("sed ")
    ]
    assert silent == []


def test_running_the_tutorial_again_replaces_outputs_and_keeps_the_text() -> None:
    # The first block shows one line of the new output, the second has no marker and stays.
    tutorial = script(DOCS / "getting-started" / "run_tutorial.py")
    first = "<!-- show: ^a -->\n```console\n$ one\nold\n```\n"
    page = f"Text.\n\n{first}\n```console\n$ two\nold\n```\n"

    shown = tutorial.with_outputs(page, ["a 1\nb\n"], {})

    assert shown == page.replace("$ one\nold", "$ one\na 1\n...")


def test_the_tutorial_shows_selected_lines_and_marks_the_gaps() -> None:
    tutorial = script(DOCS / "getting-started" / "run_tutorial.py")
    # A progress bar is dropped, and the long path is abbreviated before lines are compared.
    output = "ok one\n 50%|##| 1/2 [00:01<00:01]\nskipped /long/path\nskipped\nnext: /long/path/x\n"

    lines = tutorial.clean(output, {"/long/path": "~"})
    shown = tutorial.select(lines, ["^ok", "^next:"])

    assert lines == ["ok one", "skipped ~", "skipped", "next: ~/x"]
    assert shown == ["ok one", "...", "next: ~/x"]


def test_long_lines_of_the_tutorial_are_wrapped_and_keep_their_end() -> None:
    tutorial = script(DOCS / "getting-started" / "run_tutorial.py")
    line = "next: " + "~/a/path/to/look/at " * 20 + "then"

    shown = tutorial.select([line], ["^next:"])

    assert " ".join(part.strip() for part in shown) == line
    assert max(map(len, shown)) <= tutorial.MAX_COLUMNS


def test_every_test_that_the_page_of_robustness_names_exists() -> None:
    page = (DOCS / "explanation" / "robustness.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))

    existing: set[str] = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        existing.update(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M))

    assert len(named) > 40
    assert named <= existing, sorted(named - existing)


def test_every_class_to_know_first_is_in_the_file_that_the_page_names() -> None:
    page = (DOCS / "explanation/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z]\w+)` \| `([\w/]+\.py)` \|", page, re.MULTILINE)

    assert len(rows) == 15
    for name, file in rows:
        source = (ROOT / "nnunet_autoreg" / file).read_text(encoding="utf-8")
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), f"{name} in {file}"
