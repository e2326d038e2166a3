"""Test the command lines: options are fields of the request, and their help shows the defaults."""

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from nnunet_autoreg.cli.common import options_for

PARSERS = ("benchmark", "demo", "doctor", "pretrain", "probe", "weights")


def parser_of(command: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f"nnunet_autoreg.cli.{command}")
    parser: argparse.ArgumentParser = module.parser()
    return parser


def parsers_of(command: str) -> list[argparse.ArgumentParser]:
    """Return a command's parser and those of its actions."""
    parser = parser_of(command)
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def request_class(command: str) -> Any:
    if command == "pretrain":
        from nnunet_autoreg.cli.pretrain import request_of

        args = parser_of(command).parse_args(["-i", ".", "--name", "x"])
        return type(request_of(args))

    from nnunet_autoreg.benchmark.protocol import BenchmarkRequest

    return BenchmarkRequest


@pytest.mark.parametrize("command", ["pretrain", "benchmark"])
def test_the_defaults_of_options_are_those_of_the_request(command: str) -> None:
    parser = parser_of(command)

    for field in dataclasses.fields(request_class(command)):
        if field.default is dataclasses.MISSING:
            continue
        default = parser.get_default(field.name)
        # argparse collects values in lists, the request holds tuples.
        if isinstance(default, list):
            default = tuple(default)
        assert default == field.default, field.name


def test_options_become_the_fields_of_the_request(tmp_path: Path) -> None:
    from nnunet_autoreg.cli.pretrain import request_of

    line = ["-d", "4", "7", "-i", str(tmp_path), "--name", "brain", "--batch", "6", "--seed", "3"]
    line += ["--steps", "50", "--gpu-memory", "12", "--set", "optim.lr=1e-3", "--set", "a=1", "b=2"]
    line += ["--exclude", "leave_out.txt", "--split-4d", "--sequences", "spatial", "contrast=0.5"]

    request = request_of(parser_of("pretrain").parse_args(line))

    assert (request.datasets, request.folders) == (("4", "7"), (str(tmp_path.resolve()),))
    assert (request.name, request.batch_size, request.seed) == ("brain", 6, 3)
    assert (request.num_steps, request.gpu_memory_gib) == (50, 12.0)
    # --set may be repeated, and may take several settings at once.
    assert request.settings == ("optim.lr=1e-3", "a=1", "b=2")
    # A relative path would mean another file if a run is resumed from another folder.
    assert request.exclude == str(Path("leave_out.txt").resolve())
    assert (request.split_4d, request.sequences) == (True, ("spatial", "contrast=0.5"))
    assert (request.num_hours, request.init, request.manifest) == (None, None, None)


def test_import_options_are_fields_too() -> None:
    from nnunet_autoreg.convert.imported import ImportOptions

    line = ["import", "x.pth", "--name", "a", "--heads", "4", "--patch-size", "8", "16", "24"]
    line += ["--spacing", "1", "1.5", "2", "--modality", "CT", "MR", "--token-order", "keep"]

    args = parser_of("weights").parse_args(line)
    options = ImportOptions(**options_for(ImportOptions, args))

    assert options == ImportOptions(
        token_order="keep",
        num_heads=4,
        patch_size_vox=(8, 16, 24),
        spacing_mm=(1.0, 1.5, 2.0),
        modalities=("CT", "MR"),
    )


def test_a_field_without_an_option_is_an_error() -> None:
    @dataclasses.dataclass
    class Wanted:
        name: str
        colour: str

    with pytest.raises(AttributeError) as caught:
        options_for(Wanted, argparse.Namespace(name="x"))

    assert "colour" in str(caught.value)


@pytest.mark.parametrize("command", PARSERS)
def test_the_help_of_every_option_with_a_value_shows_its_default(command: str) -> None:
    for parser in parsers_of(command):
        for action in parser._actions:
            has_value = action.nargs != 0 and bool(action.option_strings)
            if has_value and not action.required:
                assert "(default: " in str(action.help), action.option_strings


@pytest.mark.parametrize("command", PARSERS)
def test_numbers_in_the_help_are_the_real_defaults(command: str) -> None:
    for parser in parsers_of(command):
        for action in parser._actions:
            # bool is a subclass of int; switches have no number to show.
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                shown = str(action.help) % {"default": action.default}
                assert f"(default: {action.default})" in shown, action.option_strings


def test_the_help_of_pretraining_is_in_groups() -> None:
    parser = parser_of("pretrain")
    titles = [group.title for group in parser._action_groups if group._group_actions]

    assert titles[-4:] == ["input", "training", "compute", "steps and output"]
    # A "%" in a help text is a format sign of argparse; a single one makes --help fail.
    assert "75 %" in parser.format_help()


@pytest.mark.parametrize("command", PARSERS)
def test_the_help_can_be_printed(command: str) -> None:
    # Formatting fills in the defaults, so a wrong placeholder raises an error here.
    for parser in parsers_of(command):
        assert parser.prog in parser.format_help()
