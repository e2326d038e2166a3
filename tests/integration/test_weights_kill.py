"""Test ``autoreg_weights import`` and ``export`` after a kill -9 at named points.

Nothing incomplete may pass as whole, and the same line typed again must succeed.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from refusals import refused

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.finetune.resolve import locate
from nnunet_autoreg.model.card import read_card, verify_weights
from nnunet_autoreg.safe_load import load_plain

pytestmark = pytest.mark.integration

RUNNER = Path(__file__).with_name("weights_kill_runner.py")
EXPORTED = ["adaptation_plan.json", "checkpoint_final.pth", "config.json"]
IMPORT_POINTS = {
    # Point -> whether the run is whole when the process is killed there.
    "while the tensors are written": False,
    "before the tensors are renamed": False,
    "between tensors and card": False,
    "while the card is written": False,
    "before the folder is renamed": False,
    "after the folder is renamed": True,
}
EXPORT_POINTS = {
    "while the plan is written": False,
    "after the plan": False,
    "while the checkpoint is written": False,
    "before the checkpoint is renamed": False,
    "after the checkpoint": True,
}


class Runner:
    """Hold a process that runs ``autoreg_weights`` lines, and the folder they work in."""

    def __init__(self, root: Path):
        self.root = root
        self.server = ForkServer(RUNNER, os.environ)

    def run(self, results: Path, *argv: str, point: str | None = None) -> int:
        """Type the line, to be killed at ``point``; return the exit status."""
        request = {
            "argv": argv,
            "point": point,
            "log": str(self.root / "log.txt"),
            "env": {"nnUNet_results": str(results)},
        }
        return int(self.server.run(request))

    def log(self) -> str:
        return (self.root / "log.txt").read_text()


@pytest.fixture(scope="module")
def runner(tmp_path_factory, write_run):
    """A runner whose folder holds a pretraining run, and its export made without disturbance."""
    runner = Runner(tmp_path_factory.mktemp("weights_kill"))
    write_run(runner.root, "pretrained")
    assert runner.run(runner.root, "export", "pretrained", "-o", str(runner.root / "whole")) == 0
    yield runner
    runner.server.close()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("point", IMPORT_POINTS)
def test_an_import_killed_at_this_point_is_completed_by_the_same_line(runner, tmp_path, point):
    line = ("import", str(runner.root / "whole"), "--name", "imported")
    runs = tmp_path / "autoreg_pretraining"

    assert runner.run(tmp_path, *line, point=point) == -signal.SIGKILL, runner.log()
    # Not whole, so no command may find it by its name.
    if not IMPORT_POINTS[point]:
        with refused(WeightsError, "weights-not-found", "imported"):
            locate(tmp_path, "imported")

    assert runner.run(tmp_path, *line) == 0, runner.log()
    assert names_in(runs) == ["imported"]
    # No temporary file is left.
    assert names_in(runs / "imported") == ["encoder.json", "encoder.safetensors"]
    weights = runs / "imported" / "encoder.safetensors"
    verify_weights(weights, read_card(runs / "imported").sha256)
    original = read_tensors(runner.root / "autoreg_pretraining/pretrained/encoder.safetensors")
    assert_same_tensors(read_tensors(weights), original)


@pytest.mark.parametrize("point", EXPORT_POINTS)
def test_an_export_killed_at_this_point_is_completed_by_the_same_line(runner, tmp_path, point):
    folder = tmp_path / "exported"
    line = ("export", "pretrained", "-o", str(folder))
    checkpoint = folder / "checkpoint_final.pth"

    assert runner.run(runner.root, *line, point=point) == -signal.SIGKILL, runner.log()
    # The checkpoint is the last file of an export.
    assert checkpoint.exists() == EXPORT_POINTS[point]

    assert runner.run(runner.root, *line) == 0, runner.log()
    assert names_in(folder) == EXPORTED
    for name in ("adaptation_plan.json", "config.json"):
        assert (folder / name).read_bytes() == (runner.root / "whole" / name).read_bytes()
    found = load_plain(checkpoint)
    expected = load_plain(runner.root / "whole" / "checkpoint_final.pth")
    assert found.keys() == expected.keys()
    assert_same_tensors(found["network_weights"], expected["network_weights"])


def test_an_import_over_a_run_of_other_weights_is_refused_after_a_kill_too(
    runner,
    tmp_path,
    write_run,
):
    line = ("import", str(runner.root / "whole"), "--name", "imported")

    runner.run(tmp_path, *line, point="before the folder is renamed")
    # Another run has taken the name meanwhile.
    other = write_run(tmp_path, "imported")
    before = (other / "encoder.json").read_bytes()

    assert runner.run(tmp_path, *line) == 1

    assert names_in(tmp_path / "autoreg_pretraining") == ["imported"]
    assert (other / "encoder.json").read_bytes() == before
    assert "--name imported" in runner.log().splitlines()[-1]
