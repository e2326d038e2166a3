"""Files and names from strangers: one line each, memory bounded, nothing that a terminal or a
spreadsheet obeys.
"""

import json
import logging
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from nnunet_autoreg.cli.common import _LevelFormatter, print_next
from nnunet_autoreg.cli.weights import main as weights_main
from nnunet_autoreg.convert.source import read_content
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.errors import PlanError, UsageError, WeightsError, printable, shell_quoted
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.model.card import CARD_NAME, read_card
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.nnunet_api import raw_folder
from nnunet_autoreg.pretrain.request import Request, check_inputs
from nnunet_autoreg.records import from_cell, read_json, to_cell

TINY = encoder_size("primus_tiny")
# A card as a finished run writes it; the tests below change one value each.
CARD = {
    "name": "x",
    "encoder": "primus_tiny",
    "class_path": TINY.class_path,
    "arguments": dict(TINY.arguments),
    "token_size_vox": list(TINY.token_size),
    "crop_size_vox": [32, 32, 32],
    "spacing_mm": [1.0, 1.0, 1.0],
    "modalities": ["CT"],
    "channel_names": ["CT"],
    "ct_window": None,
    "num_input_channels": 1,
    "adaptation": {
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": [],
        "key_to_lpe": None,
    },
    "objective": "autoregressive",
    "licences": {},
    "num_scans": 1,
    "num_steps": 1,
    "finished_at": "2026-01-01T00:00:00+00:00",
    "sha256": "0" * 64,
}


def card_with(folder: Path, **changes: Any) -> Path:
    arguments = {**TINY.arguments, **changes.pop("arguments", {})}
    (folder / CARD_NAME).write_text(json.dumps({**CARD, **changes, "arguments": arguments}))
    return folder


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_an_honest_card_is_read(tmp_path: Path) -> None:
    assert read_card(card_with(tmp_path)).encoder == "primus_tiny"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_input_channels": 10**9},
        {"num_input_channels": 10**30},
        {"arguments": {"embed_dim": 10**9}},
        {"arguments": {"embed_dim": 90_000, "eva_depth": 90_000}},
        {"arguments": {"eva_depth": -(10**9)}},
        {"arguments": {"init_values": float("nan")}},
        {"arguments": {"init_values": float("inf")}},
        {"arguments": {"more": list(range(20_000))}},
        {"arguments": {"more": nested(400)}},
        {"crop_size_vox": [8 * 10**9, 32, 32]},
        {"spacing_mm": [float("inf"), 1.0, 1.0]},
        {"spacing_mm": [10**400, 1.0, 1.0]},
        {"licences": [1] * 100_000},
    ],
)
def test_numbers_that_no_encoder_has_are_refused_by_name(
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    # Numbers of a stranger's card once took all memory.
    key = next(iter(changes))

    with pytest.raises(WeightsError) as caught:
        read_card(card_with(tmp_path, **changes))

    # A value is refused while it is read, or when the numbers of the card are checked.
    assert caught.value.code in ("card-unreadable", "card-huge")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    # An error that prints the value would fill the terminal.
    assert len(str(caught.value)) < 1000


def test_json_of_many_levels_pipes_and_huge_files_are_refused(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    pipe = tmp_path / "pipe.json"
    large = tmp_path / "large.json"
    deep.write_text("[" * 200_000)
    os.mkfifo(pipe)
    with large.open("wb") as handle:
        # A sparse file of 1 TiB takes no room on disk.
        handle.truncate(2**40)

    with refused(PlanError, "json-too-deep", deep):
        read_json(deep)
    with refused(PlanError, "json-unreadable", pipe):
        read_json(pipe)
    with refused(PlanError, "json-too-large", large):
        read_json(large)


@pytest.mark.parametrize("flag", ["exclude", "manifest", "init", "boxes"])
def test_a_pipe_given_as_an_option_is_refused_and_not_waited_for(tmp_path: Path, flag: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    with refused(UsageError, "request-path-kind", f"--{flag}", pipe):
        check_inputs(Request("x", folders=(str(tmp_path),), **{flag: str(pipe)}))


def test_weights_that_are_pipes_end_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("x.pth", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        assert weights_main(["inspect", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_kinds_of_numbers_that_cannot_be_computed_with_are_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(8, 8).to(getattr(torch, kind))}, file)

    with refused(WeightsError, "weights-kind", "a.weight", kind):
        read_tensors(file)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    from nnunet_autoreg.finetune.floats import as_float

    file = tmp_path / "x.pth"
    # One number in the file, 2^40 when it is written out.
    torch.save({"a": torch.zeros(1).expand(2**40)}, file)

    with refused(WeightsError, "weights-kind", "'a'"):
        as_float(read_content(file), file)


def test_lists_that_hold_one_another_many_times_are_refused(tmp_path: Path) -> None:
    value: Any = [1]
    # 60 lists in the file, 2^60 numbers for whoever walks through them.
    for _ in range(60):
        value = [value, value]
    torch.save({"a": torch.zeros(1), "more": value}, tmp_path / "x.pth")

    with pytest.raises(WeightsError):
        read_content(tmp_path / "x.pth")


def test_a_damaged_header_of_safetensors_ends_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    # Nothing, a length beyond any file, and a shape of 2^60 numbers in four bytes.
    header = json.dumps({"a": {"dtype": "F4", "shape": [2**60], "data_offsets": [0, 4]}}).encode()
    for content in (b"", b"\xff" * 8, len(header).to_bytes(8, "little") + header + b"\0" * 4):
        file.write_bytes(content)
        with pytest.raises(WeightsError):
            read_tensors(file)


def test_what_is_to_be_typed_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Copied into a shell without quotes, this name would run a command.
    folder = tmp_path / "a b; touch $(sprung)"
    folder.mkdir()
    torch.save({"network_weights": {"encoder.a": torch.ones(2)}}, folder / "x.pth")

    assert weights_main(["inspect", str(folder / "x.pth")]) == 0

    typed = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert str(folder / "x.pth") in typed


@pytest.mark.parametrize("text", ["a", "a b", "it's", "$(x);`y`", "\x1b[2J\n'\\", "r\udce4", "ä\t"])
def test_a_quoted_name_is_one_printable_word_of_the_shell(text: str) -> None:
    quoted = shell_quoted(text)

    printed = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"],
        capture_output=True,
        check=True,
    ).stdout

    assert quoted.isprintable()
    assert printed == os.fsencode(text)


def test_the_folder_to_make_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "/none/it's; touch x"
    monkeypatch.setenv("nnUNet_raw", folder)

    with refused(UsageError, "usage-no-folder", f"mkdir -p {shlex.quote(folder)}"):
        raw_folder()


def test_the_terminal_gets_no_character_that_it_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    # A sequence that clears the screen, a line break, a carriage return, a bell, half a character,
    # and one that reverses the direction of writing.
    name = "a\x1b[2Jb\nc\r\x07\udcff\u202e"

    def record_of(text: str, *values: object) -> logging.LogRecord:
        return logging.LogRecord("n", logging.WARNING, "", 0, text, values, None)

    record = record_of("%s and %s has %d voxels\nnext line", name, Path(name), 3)
    error = record_of("%s", ValueError(name))

    assert _LevelFormatter(is_terminal=True).format(record).splitlines()[1:] == ["next line"]
    for text in (_LevelFormatter(is_terminal=True).format(error), printable(name)):
        assert text.isprintable()
        assert "a" in text
        assert "c" in text
    print_next(name)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+a", "-cmd", "@SUM(A1)", "\t=1", "'=1", "''", "'", "it's"],
)
def test_a_cell_is_not_a_formula_and_comes_back_as_it_was(text: str) -> None:
    # With these characters in front a spreadsheet computes or drops a cell.
    assert to_cell(text)[0] not in "=+-@\t\r"
    assert from_cell(to_cell(text)) == text


@pytest.mark.parametrize("text", ["-1.5", "+3", "1e-3", "-inf", "", "a=b"])
def test_numbers_and_other_cells_stay_as_they_are(text: str) -> None:
    assert to_cell(text) == text == from_cell(text)


def test_formulas_and_line_breaks_in_names_are_harmless_in_the_index(tmp_path: Path) -> None:
    source = "/d/=cmd\n|calc.nii.gz"
    row = ScanRow(
        "0a1b",
        "=d",
        "=cmd\n|calc",
        "",
        "CT",
        source,
        None,
        None,
        None,
        "",
        "unreadable",
        "=1+1\nx",
        label_class="@a",
        name="=n\n",
    )

    write_index(tmp_path / "scans.csv", [row])

    lines = (tmp_path / "scans.csv").read_text().splitlines()
    assert len(lines) == 2
    assert not [cell for cell in lines[1].split(",") if cell.startswith(("=", "+", "-", "@"))]
    found = read_index(tmp_path / "scans.csv")[0]
    assert (found.source, found.case) == (source, row.case)
    assert (found.name, found.label_class) == (row.name, "@a")
