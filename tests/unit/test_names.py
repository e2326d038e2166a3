"""Names of files and folders that are not text, or that a terminal has no characters for."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest
from refusals import refused

from nnunet_autoreg.cli.common import command
from nnunet_autoreg.cli.options import local_path
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.nnunet_api import results_folder
from nnunet_autoreg.pretrain.request import logged_to
from nnunet_autoreg.records import read_json, write_json

# A name in Latin-1, as an old archive unpacks it: not valid UTF-8.
NO_TEXT = os.fsdecode(b"sch\xe4del")


def test_an_option_that_is_not_utf8_is_refused_with_its_remedy() -> None:
    assert local_path("schädel") == Path("schädel")

    with refused(UsageError, "usage-name", "not valid UTF-8", "rename"):
        local_path(NO_TEXT)


def test_in_an_ascii_shell_the_remedy_is_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")

    assert local_path("skull") == Path("skull")
    with refused(UsageError, "usage-name", "export PYTHONUTF8=1"):
        local_path("schädel")


def test_a_folder_that_is_not_utf8_is_refused_by_its_variable(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / NO_TEXT
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    monkeypatch.setenv("nnUNet_results", str(folder))

    with refused(UsageError, "usage-name", "nnUNet_results", "not valid UTF-8"):
        results_folder()


def test_a_log_file_takes_any_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Such a name once gave "Logging error" and a traceback.
    root = logging.getLogger("nnunet_autoreg")
    # Without those that other tests have left.
    monkeypatch.setattr(root, "handlers", [])
    # pytest keeps what reaches its own handler, and its processes exchange text that is UTF-8 only.
    monkeypatch.setattr(root, "propagate", False)
    logger = logging.getLogger("nnunet_autoreg.names")

    with logged_to(tmp_path):
        logger.warning("in %s", NO_TEXT)

    (file,) = tmp_path.iterdir()
    assert "in sch\\udce4del" in file.read_text(encoding="utf-8")
    assert "Logging error" not in capsys.readouterr().err


def test_a_name_that_is_not_text_survives_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": NO_TEXT, "other": "schädel"})

    assert read_json(tmp_path / "x.json") == {"name": NO_TEXT, "other": "schädel"}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_command_prints_any_name(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A terminal without a character that is printed once gave a traceback.
    shown = io.BytesIO()
    # A terminal of an ASCII shell cannot show the 3 of mm3; no encoding has the odd byte of the
    # name.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, errors="strict"))

    def main(argv: list[str] | None) -> int:
        print(f"wrote 3 mm³ to {NO_TEXT}")
        return 0

    assert command(main)([]) == 0

    text = shown.getvalue().decode(encoding)
    unit = {"ascii": "mm\\xb3", "utf-8": "mm³"}[encoding]
    assert text == f"wrote 3 {unit} to sch\\udce4del\n"


def test_a_command_prints_no_character_that_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: list[str] | None) -> int:
        # A sequence that changes the colour, a carriage return, and a control character above
        # ASCII.
        print("column \x1b[31mred\r\x9b: not a task\tµm")
        print("second line")
        return 0

    assert command(main)([]) == 0

    out = capsys.readouterr().out
    assert out == "column \\x1b[31mred\\r\\x9b: not a task\tµm\nsecond line\n"
