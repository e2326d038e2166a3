"""The demo: its steps are counted, and an interruption says what remains."""

import json
import time

import pytest
from refusals import refused

from nnunet_autoreg.cli import demo
from nnunet_autoreg.errors import AutoregError, InterruptedRunError


def probe_lines():
    """Return lines of the probe: two draws, two levels of features, two random networks."""
    lines = []
    for draw in (1, 0):
        raw = {"encoder": "raw voxels", "seed": None, "levels": "all levels"}
        lines.append({**raw, "draw": draw, "dice": 0.1 + draw})
        # The second set of levels holds the first.
        for levels, gain in (("encoder", 0.1), ("encoder + decoder", 0.2)):
            pretrained = {"encoder": "demo", "seed": None, "levels": levels}
            lines.append({**pretrained, "draw": draw, "dice": 0.5 + gain + draw})
            for seed in (0, 1):
                random = {"encoder": "random", "seed": seed, "levels": levels}
                lines.append({**random, "draw": draw, "dice": 0.4 + 0.2 * seed + draw})
    return lines


@pytest.fixture
def quiet_scans(monkeypatch):
    """No scans are generated, and nothing is drawn."""
    monkeypatch.setattr(demo, "generate", lambda demo: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name, path: f"/bin/{name}")


def test_as_many_commands_run_as_are_announced(quiet_scans, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    one = demo.Demo(tmp_path / "out", "cpu")

    # Only the files that later steps read are written.
    def run(line, environment, handle):
        if "nnUNetv2_evaluate_folder" in line[0]:
            path = line[line.index("-o") + 1]
            demo.write_json(demo.Path(path), {"foreground_mean": {"Dice": 0.5}})
        if "autoreg_probe" in line[0]:
            folder = demo.Path(line[line.index("-o") + 1])
            folder.mkdir()
            lines = [json.dumps(line) for line in probe_lines()]
            (folder / "probe.jsonl").write_text("\n".join(lines))
        return 0

    monkeypatch.setattr(demo, "run_guarded", run)
    monkeypatch.setattr(demo, "shorten_recipe", lambda plans_file: None)

    features, dice = demo.run_chain(one)

    assert dice == 0.5
    assert features.gain.mean == pytest.approx(0.2)
    assert one.num_done == demo.NUM_STEPS
    shown = capsys.readouterr().out
    # The last line of progress counts to the number that was announced.
    assert f"step {demo.NUM_STEPS} of {demo.NUM_STEPS}: " in shown
    pretraining = next(line for line in shown.splitlines() if "$ autoreg_pretrain" in line)
    assert "--encoder" not in pretraining


def test_the_probe_is_read_draw_by_draw_over_the_seeds():

    features = demo.read_probe(probe_lines())

    # 0.1 for draw 0 and 1.1 for draw 1. The two random networks have 0.4 and 0.6, on average 0.5.
    assert features.raw_voxels == pytest.approx([0.1, 1.1])
    assert features.random == pytest.approx([0.5, 1.5])
    # The set of levels that holds all levels counts: 0.5 + 0.2.
    assert features.pretrained == pytest.approx([0.7, 1.7])
    assert features.gain.low == pytest.approx(0.2)


# A signal may reach the demo itself or the command that it runs, which then ends with the code of
# an interruption.
@pytest.mark.parametrize("is_child", [False, True], ids=["the demo", "its command"])
def test_an_interruption_names_the_step_and_what_remains(
    quiet_scans,
    monkeypatch,
    tmp_path,
    capsys,
    is_child,
):
    folder = tmp_path / "out"

    def stop(line, environment, handle):
        (folder / "unlabelled").mkdir()
        if not is_child:
            raise InterruptedRunError("stopped")
        return InterruptedRunError.exit_code

    monkeypatch.setattr(demo, "run_guarded", stop)

    code = demo.main(["--out", str(folder), "--device", "cpu"])

    assert code == InterruptedRunError.exit_code
    message = capsys.readouterr().err
    # What was made so far is listed with its size; what is not there is not listed.
    values = (f"step 1 of {demo.NUM_STEPS}", str(folder), "unlabelled (", ", demo.log (")
    assert [value for value in values if value not in message] == []
    assert "nnUNet_raw" not in message


def test_the_progress_of_a_step_is_shown_while_it_runs(quiet_scans, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "PROGRESS_EVERY_S", 0.01)

    def run(line, environment, handle):
        # Waits until the line is shown; if it is never shown, the test does not end.
        shown = ""
        for number in (1, 2):
            handle.write(f"training, step {number} of 2\n")
            handle.flush()
            while f"step {number} of 2" not in shown:
                time.sleep(0.01)
                shown += capsys.readouterr().out
        return 0

    monkeypatch.setattr(demo, "run_guarded", run)

    demo.Demo(tmp_path, "cpu").run("train", "nnUNetv2_train", "901")


def test_a_failed_command_shows_the_end_of_its_output(quiet_scans, monkeypatch, tmp_path, capsys):
    def fail(line, environment, handle):
        handle.write("its last line\n")
        return 1

    monkeypatch.setattr(demo, "run_guarded", fail)

    with refused(AutoregError, "demo-command-failed", "nnUNetv2_train", "demo.log"):
        demo.Demo(tmp_path, "cpu").run("train", "nnUNetv2_train", "901")

    assert "its last line" in capsys.readouterr().err
