"""The demo: its steps are counted, and an interruption says what remains."""

import pytest
from refusals import refused

from nnunet_autoreg.cli import demo
from nnunet_autoreg.errors import AutoregError, InterruptedRunError


@pytest.fixture
def quiet_scans(monkeypatch):
    """No scans are generated, and nothing is drawn."""
    monkeypatch.setattr(demo, "generate", lambda demo: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name, path: f"/bin/{name}")


def test_as_many_commands_run_as_are_announced(quiet_scans, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    one = demo.Demo(tmp_path / "out", "cpu")

    def run(line, environment, handle):
        if "nnUNetv2_evaluate_folder" in line[0]:
            path = line[line.index("-o") + 1]
            demo.write_json(demo.Path(path), {"foreground_mean": {"Dice": 0.5}})
        return 0

    monkeypatch.setattr(demo, "run_guarded", run)
    monkeypatch.setattr(demo, "shorten_recipe", lambda plans_file: None)

    dice = demo.run_chain(one)

    assert dice == {"pretrained": 0.5, "scratch": 0.5}
    assert one.num_done == demo.NUM_STEPS
    shown = capsys.readouterr().out
    assert f"step {demo.NUM_STEPS} of {demo.NUM_STEPS}: " in shown
    assert "--encoder" not in shown


def test_an_interruption_names_the_step_and_the_folder(quiet_scans, monkeypatch, tmp_path, capsys):
    def stop(line, environment, handle):
        raise InterruptedRunError("stopped")

    monkeypatch.setattr(demo, "run_guarded", stop)
    folder = tmp_path / "out"

    code = demo.main(["--out", str(folder), "--device", "cpu"])

    assert code == InterruptedRunError.exit_code
    message = capsys.readouterr().err
    values = (f"step 1 of {demo.NUM_STEPS}", str(folder), "demo.log")
    assert [value for value in values if value not in message] == []


def test_a_failed_command_shows_the_end_of_its_output(quiet_scans, monkeypatch, tmp_path, capsys):
    def fail(line, environment, handle):
        handle.write("its last line\n")
        return 1

    monkeypatch.setattr(demo, "run_guarded", fail)

    with refused(AutoregError, "demo-command-failed", "nnUNetv2_train", "demo.log"):
        demo.Demo(tmp_path, "cpu").run("train", "nnUNetv2_train", "901")

    assert "its last line" in capsys.readouterr().err
