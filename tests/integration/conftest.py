"""A clinic: nnU-Net's folders, one real scan, one finished pretraining run, and the lines that its
users type.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from few_cases import copy_cases
from nnunet_folders import environment_below, make_folders

# fork_server.py and phantom_runs.py are shared by the tests of kills and stops.
sys.path.insert(0, str(Path(__file__).parent))

DATASET = "Dataset004_Hippocampus"
# A network of two narrow blocks: a step takes a fraction of a second.
ENCODER = (
    'encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":2,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)
SMALL = [
    ENCODER,
    "sequence.crop_size_vox=16,24,16",
    "run.checkpoint_every=1",
    "run.validate_every=1000",
    "run.log_every=1",
]
# Four steps with a checkpoint after each.
STEPS = "4"
NUM_CASES = 5


@dataclass(frozen=True)
class Clinic:
    """Everything below ``root``; its methods type a line and return the result."""

    root: Path
    dataset: str = DATASET

    def environment(self, **changes):
        """The three folders below ``root``; a change to None removes a variable."""
        return environment_below(self.root, **changes)

    def program(self, name):
        return str(Path(sys.executable).with_name(name))

    def typed(self, command, **changes):
        return subprocess.run(
            command,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            check=False,
        )

    def line(self, name, *arguments, settings=(), scans=None, steps=STEPS):
        """The arguments of one run on the one scan."""
        return [
            self.program("autoreg_pretrain"),
            "-i",
            str(scans or self.root / "größere Klinik"),
            "--name",
            name,
            "--steps",
            steps,
            "--encoder",
            "primus_tiny",
            "--batch",
            "2",
            "--device",
            "cpu",
            *arguments,
            "--set",
            *SMALL,
            *settings,
        ]

    def pretrain(self, name, *arguments, settings=(), scans=None, steps=STEPS, **changes):
        return self.typed(
            self.line(name, *arguments, settings=settings, scans=scans, steps=steps),
            **changes,
        )

    def train(self, *arguments, trainer="AutoregPretrainedTrainer", plans="AutoregPlans"):
        command = [
            self.program("nnUNetv2_train"),
            "4",
            "3d_fullres",
            "0",
            "-tr",
            trainer,
            "-device",
            "cpu",
            *arguments,
        ]
        return self.typed([*command, "-p", plans] if plans else command)

    def plan_again(self, weights):
        command = [self.program("nnUNetv2_plan_experiment"), "-d", "4", "-pl", "AutoregPlanner"]
        return self.typed(command, autoreg_weights=weights)

    def started(self, command, log, until):
        """Start a command in a separate process group, and wait until ``until(text of stderr)``."""
        process = subprocess.Popen(
            command,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=log.open("w"),
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not until(log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.02)
        return process

    def folder(self, name="base"):
        return self.root / "nnUNet_results/autoreg_pretraining" / name

    def bytes_of(self, path):
        """Content of every file of a run except the lock and the logs, by name."""
        return {
            p.name: p.read_bytes()
            for p in path.iterdir()
            if p.is_file() and not p.name.startswith((".lock", "training_log"))
        }

    def refused(self, done, code, *said):
        """Check the exit code and the last line on stderr: it holds all of ``said``.

        Nothing else of the error may be shown.
        """
        assert done.returncode == code, done.stderr[-2000:]
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(("autoreg_pretrain: ", "error: ")), done.stderr[-2000:]
        for words in said:
            assert words in last
        # An error that also says what to do next would contradict itself.
        assert "next:" not in done.stdout
        return last

    def with_card(self, target, weights, **changes):
        """``encoder.safetensors`` with any content, and a card that vouches for it."""
        target.mkdir()
        (target / "encoder.safetensors").write_bytes(weights)
        card = json.loads((self.folder() / "encoder.json").read_text())
        # The hash is right, so that only the content of the file can be wrong.
        card.update(sha256=hashlib.sha256(weights).hexdigest(), **changes)
        (target / "encoder.json").write_text(json.dumps(card))
        return str(target / "encoder.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared_data):
    """A clinic with one real scan in a folder with a space and an umlaut, and the finished run
    'base' on it.
    """
    clinic = Clinic(tmp_path_factory.mktemp("bad input"))
    make_folders(clinic.root)
    (clinic.root / "größere Klinik").mkdir()
    image = min((shared_data / "nnUNet_raw" / DATASET / "imagesTr").glob("*.nii.gz"))
    # A name with blanks and umlauts is the hard case for paths on a command line.
    shutil.copy(image, clinic.root / "größere Klinik" / "Kopf groß 1.nii.gz")
    done = clinic.pretrain("base")
    assert done.returncode == 0, done.stderr
    return clinic


@pytest.fixture
def base(home):
    """The folder of the finished run; the test may damage it."""
    # Kept in memory, because a run takes half a minute and a copy a moment.
    kept = home.bytes_of(home.folder())
    yield home.folder()
    for path in home.folder().iterdir():
        is_log = path.name.startswith((".lock", "training_log"))
        if path.is_file() and path.name not in kept and not is_log:
            path.unlink()
    for name, content in kept.items():
        (home.folder() / name).write_bytes(content)


def add_labelled_scans(clinic, shared_data):
    """A small labelled dataset among nnU-Net's raw ones."""
    copy_cases(
        shared_data / "nnUNet_raw" / DATASET,
        clinic.root / "nnUNet_raw" / DATASET,
        NUM_CASES,
    )


@pytest.fixture(scope="module")
def unpretrained(tmp_path_factory, shared_data):
    """A clinic with a small labelled dataset and no run."""
    clinic = Clinic(tmp_path_factory.mktemp("unpretrained"))
    make_folders(clinic.root)
    add_labelled_scans(clinic, shared_data)
    return clinic


@pytest.fixture(scope="module")
def planned(home, shared_data):
    """A small labelled dataset, planned for the weights of 'base'; gives the plans file."""
    add_labelled_scans(home, shared_data)
    command = [
        "nnUNetv2_plan_and_preprocess",
        "-d",
        "4",
        "-pl",
        "AutoregPlanner",
        "-c",
        "3d_fullres",
        "-npfp",
        "1",
        "-np",
        "1",
    ]
    done = home.typed([home.program(command[0]), *command[1:]], autoreg_weights="base")
    assert done.returncode == 0, done.stderr
    file = home.root / "nnUNet_preprocessed" / DATASET / "AutoregPlans.json"
    plans = json.loads(file.read_text())
    # Two epochs of one step: long enough to be continued.
    plans["autoreg"]["recipe"].update(
        num_epochs=2,
        num_iterations_per_epoch=1,
        num_val_iterations_per_epoch=1,
    )
    file.write_text(json.dumps(plans))
    return file


@pytest.fixture
def plans(planned):
    """The plans file; the test may damage it."""
    kept = planned.read_bytes()
    yield planned
    planned.write_bytes(kept)
