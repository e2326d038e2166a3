"""The promise to patients, on the commands that a user types: scans, headers, folders and cases
carry names, and all that the commands write or print is searched for them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
from tiny_detector import write_model

from nnunet_autoreg.corpus.private import PRIVATE_NAME

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVERYBODY = (*planted.SECRETS, planted.LABELLED)
WITH_NAMES = (PRIVATE_NAME, "exclude.txt")
"""Files that say in their name or first line that they must not be shared."""

COPIES = ("dataset.json", "debug.json", "checkpoint_best.pth", "checkpoint_final.pth")
"""Files into which nnU-Net copies dataset.json."""

ENCODER = (
    'encoder.arguments={"embed_dim":24,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)
SETTINGS = [
    ENCODER,
    "sequence.crop_size_vox=16,16,16",
    "run.validate_every=1",
    "run.min_token_variance=0",
    "run.min_effective_rank=0",
]


class Home:
    """nnU-Net's folders with planted scans, and what the commands typed there have printed."""

    def __init__(self, root: Path):
        self.root = root
        for name in (
            "nnUNet_raw",
            "nnUNet_preprocessed",
            "nnUNet_results",
            "printed",
            "printed_by_nnunet",
        ):
            (root / name).mkdir()
        self.pool = planted.write_pool(root)
        self.lists = planted.write_lists(root, self.pool)
        self.dataset = planted.write_dataset(root / "nnUNet_raw")

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"

    def typed(self, log: str, *line: Any, expect: int = 0, **changes: str) -> None:
        """Run one command; keep both of its streams in a file."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("autoreg_")}
        folders = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        settings = {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
        environment = {**clean, **settings, **{name: str(self.root / name) for name in folders}}

        done = subprocess.run(
            [Path(sys.executable).with_name(line[0]), *map(str, line[1:])],
            env={**environment, **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == expect, done.stdout[-3000:]
        folder = "printed_by_nnunet" if line[0].startswith("nnUNetv2") else "printed"
        (self.root / folder / f"{log}.txt").write_text(done.stdout)

    def pretrain(self, log: str, *arguments: str) -> None:
        line = ["autoreg_pretrain", "-i", self.pool, "-d", "77", "--name", "quiet", "--steps", "2"]
        line += ["--encoder", "primus_tiny", "--batch", "2", "--device", "cpu", "--split-4d"]
        for name, file in self.lists.items():
            line += [f"--{name}", file]
        self.typed(log, *line, *arguments, "--set", *SETTINGS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Type everything from pretraining to detection."""
    home = Home(tmp_path_factory.mktemp("privacy"))
    on_cpu = ("-device", "cpu", "-tr", "AutoregPretrainedTrainer_1epochs", "-p", "AutoregPlans")

    home.pretrain("dry run", "--dry-run", "--show")
    home.pretrain("pretrain")
    home.typed("inspect", "autoreg_weights", "inspect", "quiet")
    exported = home.root / "exported"
    home.typed("export", "autoreg_weights", "export", "quiet", "-o", exported)
    home.typed("import", "autoreg_weights", "import", exported, "--name", "back")
    for_hub = home.root / "for_hub"
    line = ("autoreg_weights", "export", "quiet", "-o", for_hub, "--form", "huggingface")
    home.typed("export for Hugging Face", *line)

    processes = ("-npfp", "1", "-np", "1")
    line = ("nnUNetv2_plan_and_preprocess", "-d", "77", "-pl", "AutoregPlanner", "-c", "3d_fullres")
    home.typed("plan", *line, *processes, autoreg_weights="quiet")
    plans_file = home.root / "nnUNet_preprocessed" / home.dataset.name / "AutoregPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["autoreg"]["recipe"].update(num_iterations_per_epoch=1, num_val_iterations_per_epoch=1)
    plans_file.write_text(json.dumps(plans))

    home.typed("train", "nnUNetv2_train", "77", "3d_fullres", "0", *on_cpu)
    predicted = home.root / f"predicted_{planted.NAME}"
    line = ("nnUNetv2_predict", "-d", "77", "-i", home.dataset / "imagesTs", "-o", predicted)
    once = ("-f", "0", "-c", "3d_fullres", "--save_probabilities", "-npp", "1", "-nps", "1")
    home.typed("predict", *line, *once, *on_cpu)

    home.typed("divide", "autoreg_benchmark", "-d", "77", "--labels", "2", "--dry-run")
    line = ("autoreg_probe", "-d", "77", "--encoder", "primus_tiny", "--random-seeds", "1")
    home.typed("probe", *line, "--labels", "2", "--draws", "2", "--device", "cpu")

    # Results of detection are named after the scans, so these have names of nobody.
    write_model(home.results)
    scans = home.root / f"to detect {planted.NAME}"
    planted.write_nifti(scans / "first.nii.gz", planted.noise(30))
    planted.write_dicom(scans / "series", 31, file_name="slice")
    line = ("autoreg_detect", "-d", "950", "-i", scans, "-o", home.root / "detected")
    home.typed("detect", *line, "--device", "cpu", "--csv")
    components = home.root / "components"
    home.typed("from seg", "autoreg_detect", "--from-seg", predicted, "-o", components, "--csv")
    figures = home.root / "evaluated" / "figures.json"
    line = ("autoreg_evaluate_detection", "-p", components, "-g", home.dataset / "labelsTs")
    home.typed("evaluate", *line, "-o", figures)
    return home


def test_a_run_its_store_and_its_weights_name_nobody(home: Home) -> None:
    exported = home.root / "exported"

    assert planted.leaks(home.results / "autoreg_pretraining", EVERYBODY, WITH_NAMES) == []
    assert planted.leaks(home.root / "nnUNet_preprocessed/autoreg_store", EVERYBODY) == []
    assert planted.leaks(exported, EVERYBODY) == []
    assert (home.root / "for_hub" / "README.md").is_file()
    assert planted.leaks(home.root / "for_hub", EVERYBODY) == []

    private = (home.results / "autoreg_pretraining/quiet" / PRIVATE_NAME).read_text().lower()
    assert all(secret in private for secret in EVERYBODY)


def test_what_commands_print_names_nobody(home: Home) -> None:
    """Only the path of -o is repeated, which has no name here."""
    assert planted.leaks(home.root / "printed", planted.SECRETS) == []
    assert planted.leaks(home.root / "printed_by_nnunet", planted.SECRETS) == []


def test_results_of_benchmark_and_probe_name_nobody(home: Home) -> None:
    for name in ("autoreg_benchmark", "autoreg_probe"):
        assert planted.leaks(home.results / name, EVERYBODY, WITH_NAMES) == []
        exclude = home.results / name / "Dataset077" / "exclude.txt"
        assert not exclude.exists() or "Do not share" in exclude.read_text().splitlines()[0]


def test_results_of_detection_hold_no_folder_and_nothing_of_headers(home: Home) -> None:
    assert planted.leaks(home.root / "detected", EVERYBODY) == []
    for name in ("components", "evaluated"):
        assert planted.leaks(home.root / name, planted.SECRETS) == []


def test_in_folders_of_nnunet_names_come_from_nnunet_alone(home: Home) -> None:
    preprocessed = home.root / "nnUNet_preprocessed" / home.dataset.name
    plans = json.loads((preprocessed / "AutoregPlans.json").read_text())
    trained = home.results / home.dataset.name

    assert [s for s in EVERYBODY if s in json.dumps(plans["autoreg"]).lower()] == []
    found = planted.leaks(trained, planted.SECRETS, COPIES)
    found += planted.leaks(preprocessed, planted.SECRETS, COPIES)
    # nnU-Net copies the label maps as they are, with their headers.
    assert [leak for leak in found if not leak.startswith("gt_segmentations/")] == []
