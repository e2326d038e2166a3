"""What commands show: bars without pauses, lines above bars, verbosity, and close matches."""

import io
import logging
import re
import shlex
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

import pytest

from nnunet_autoreg import bridge
from nnunet_autoreg.cli import common
from nnunet_autoreg.terminal import (
    NORMAL,
    QUIET,
    VERBOSE,
    TerminalHandler,
    progress_bar,
    set_verbosity,
    verbosity,
)


class Screen(io.StringIO):
    """A terminal whose text can be read."""

    def isatty(self):
        return True


@pytest.fixture
def usual_verbosity():
    set_verbosity(NORMAL)
    yield
    set_verbosity(NORMAL)


def new_screen(monkeypatch):
    """Return a terminal that is stderr until the test ends.

    A fixture cannot do this: pytest replaces stderr between a test's fixtures and the test.
    """
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def test_no_bar_is_shown_without_a_terminal(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)

    with progress_bar(3, "reading", "scan") as bar:
        bar.update(3)

    assert written.getvalue() == ""


def test_quiet_commands_show_no_bar(monkeypatch, usual_verbosity):
    screen = new_screen(monkeypatch)
    set_verbosity(QUIET)

    with progress_bar(3, "reading", "scan") as bar:
        bar.update(3)

    assert screen.getvalue() == ""


def test_the_time_left_does_not_count_pauses(monkeypatch, usual_verbosity):
    new_screen(monkeypatch)
    with progress_bar(100, "brain", "step") as bar:
        # 50 steps in 10 s, of which a validation took 9 s.
        bar.start_t -= 10
        bar.last_print_t -= 10
        bar.exclude(9)
        bar.update(50)

        text = str(bar)

    left = re.search(r"50 of 100 steps, about ([\d.]+) s left", text)
    assert left is not None, text
    # 50 steps took 1 s without the validation, so the other 50 will take 1 s; the test itself takes
    # some time.
    assert float(left[1]) == pytest.approx(1.0, abs=0.2)


def test_a_line_of_the_log_never_runs_into_a_bar(monkeypatch, usual_verbosity):
    screen = new_screen(monkeypatch)
    handler = TerminalHandler(screen)
    record = logging.LogRecord("x", logging.INFO, "", 0, "a line", (), None)

    with progress_bar(100, "brain", "step") as bar:
        bar.update(10)
        bar.refresh()
        handler.emit(record)

    before = screen.getvalue().partition("a line\n")[0]
    assert "brain" in before
    # The bar was wiped out by blanks, and the cursor is at the start of the line.
    last = before.rpartition("\r")
    assert last[2] == ""
    assert last[0].rpartition("\r")[2].strip() == ""


COMMANDS = sorted(
    point.name
    for point in entry_points(group="console_scripts")
    if point.name.startswith("autoreg_")
)


def parser_of(name):
    (point,) = entry_points(group="console_scripts", name=name)
    return import_module(point.module).parser()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name):
    parser = parser_of(name)

    assert parser.examples
    for example in parser.examples:
        command, *words = shlex.split(example)
        assert command == name
        parser.parse_args(words)
        assert example in parser.format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_version(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(name).parse_args(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("nnunet-autoreg 0.")


def test_v_and_q_set_what_is_shown_and_are_not_values():
    parser = parser_of("autoreg_doctor")

    loud = vars(parser.parse_args(["-v"]))
    level_of_v = verbosity()
    quiet = vars(parser.parse_args(["-q"]))
    level_of_q = verbosity()
    parser.parse_args([])

    assert (level_of_v, level_of_q, verbosity()) == (VERBOSE, QUIET, NORMAL)
    # A request is compared with that of an earlier run: how much was shown makes no difference.
    assert loud == quiet == vars(parser.parse_args([]))


def test_details_reach_files_but_not_the_terminal(monkeypatch, usual_verbosity, caplog):
    screen = new_screen(monkeypatch)
    common.configure_logging()
    log = logging.getLogger("nnunet_autoreg.test")

    log.debug("a detail")
    log.info("a line")

    assert screen.getvalue() == "a line\n"
    assert "a detail" in caplog.text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--name x --encoder resnc_l", ("'resnc_l'", "resenc_l")),
        ("--name x --device cuad", ("'cuad'", "cuda")),
        ("--name x --encodr resenc_l", ("--encodr", "--encoder")),
    ],
)
def test_a_mistyped_value_or_option_gets_a_close_match(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of("autoreg_pretrain").parse_args(line.split())

    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words), message


def hooked_look_up():
    """Return the bridge's look-up around a stock one that finds nothing."""
    module = ModuleType("stock")
    module.recursive_find_python_class = lambda folder, class_name, current: None
    bridge._wrap_lookup(module)
    return module.recursive_find_python_class


@pytest.mark.parametrize(
    ("room", "name", "close"),
    [
        (bridge.TRAINERS_ROOM, "AutoregPretrainTrainer", "AutoregPretrainedTrainer"),
        (bridge.TRAINERS_ROOM, "AutoregScratchTrainer_05epochs", "AutoregScratchTrainer_20epochs"),
        (bridge.PLANNERS_ROOM, "AutoRegPlaner", "AutoregPlanner"),
    ],
)
def test_nnunets_look_up_suggests_our_closest_name(room, name, close, capsys, monkeypatch):
    monkeypatch.setattr(bridge, "_suggested", set())
    look_up = hooked_look_up()

    found = [look_up("", name, room), look_up("", name, room)]

    # nnU-Net asks for a class in several folders; one suggestion is enough.
    assert found == [None, None]
    assert capsys.readouterr().err.count(close) == 1


def test_names_of_others_get_no_suggestion(capsys):
    look_up = hooked_look_up()

    assert look_up("", "nnUNetTrainerX", bridge.TRAINERS_ROOM) is None
    assert look_up("", "AutoregPlaner", "nnunetv2.inference") is None
    assert capsys.readouterr().err == ""
