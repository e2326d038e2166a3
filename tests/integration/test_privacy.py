"""The promise to patients, on the commands that a user types: scans, headers, folders and cases
carry names, and all that the commands write or print is searched for them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
from fork_server import ForkServer
from nnunet_folders import environment_below, make_folders
from tiny_detector import write_model

from nnunet_autoreg.corpus.private import PRIVATE_NAME
from nnunet_autoreg.corpus.rows import OK, read_index

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Names of the patient, and the word that nnU-Net writes into names of its own folders.
EVERYBODY = (*planted.SECRETS, planted.LABELLED)
WITH_NAMES = (PRIVATE_NAME, "exclude.txt")
"""Files that say in their name or first line that they must not be shared."""

COPIES = ("dataset.json", "debug.json", "checkpoint_best.pth", "checkpoint_final.pth")
"""Files into which nnU-Net copies dataset.json."""

ENCODER = (
    'encoder.arguments={"embed_dim":24,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)
# A step of such a network trains in a moment, and learns too little for the checks of a collapse.
SETTINGS = [
    ENCODER,
    "sequence.crop_size_vox=16,16,16",
    "run.validate_every=1",
    "run.min_token_variance=0",
    "run.min_effective_rank=0",
]
PAIRS = ("sequence.member_crop_vox=16,16,16",)
SLABS = ("objective.slab_vox=8", "objective.slab_step_vox=4")
"""Settings of Alice and of joint clustering for such a small crop."""


class Home:
    """nnU-Net's folders with planted scans, and what the commands typed there have printed."""

    def __init__(self, root: Path):
        self.root = root
        make_folders(root)
        # nnU-Net repeats names of cases, so its output is searched for other words than ours.
        for name in ("printed", "printed_by_nnunet"):
            (root / name).mkdir()
        self.pool = planted.write_pool(root)
        self.lists = planted.write_lists(root, self.pool)
        self.dataset = planted.write_dataset(root / "nnUNet_raw")

        runner = Path(__file__).with_name("line_runner.py")
        self.server = ForkServer(runner, environment_below(root))

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results"

    @property
    def predicted(self) -> Path:
        return self.root / f"predicted_{planted.NAME}"

    def typed(self, log: str, *line: Any, **changes: str) -> None:
        """Run one command; keep both of its streams in a file."""
        is_stock = str(line[0]).startswith("nnUNetv2")
        printed = self.root / ("printed_by_nnunet" if is_stock else "printed")
        file = printed / f"{log}.txt"
        words = [str(word) for word in line]

        status = self.server.run({"line": words, "log": str(file), "env": changes})

        assert status == 0, file.read_text()[-3000:]

    def pretrain(self, name: str, *arguments: str, settings: tuple[str, ...] = ()) -> None:
        """Type a pretraining of one step; its output is kept under the name of the run."""
        line = ["autoreg_pretrain", "-i", self.pool, "-d", "77", "--name", name, "--steps", "1"]
        line += ["--encoder", "primus_tiny", "--batch", "2", "--device", "cpu", "--split-4d"]
        for option, file in self.lists.items():
            line += [f"--{option}", file]
        log = " ".join([name, *arguments])
        self.typed(log, *line, *arguments, "--set", *SETTINGS, *settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Type everything from pretraining to classification."""
    home = Home(tmp_path_factory.mktemp("privacy"))
    pretrain_and_export(home)
    segment(home)
    compare(home)
    detect(home)
    classify(home)
    yield home
    home.server.close()


def pretrain_and_export(home: Home) -> None:
    # First as a dry run, which plans and shows and trains nothing.
    home.pretrain("quiet", "--dry-run", "--show")
    home.pretrain("quiet")
    home.pretrain("pairs", "--objective", "alice", settings=PAIRS)
    home.pretrain("pictures", "--objective", "joint", settings=SLABS)

    home.typed("inspect", "autoreg_weights", "inspect", "quiet")
    exported = home.root / "exported"
    home.typed("export", "autoreg_weights", "export", "quiet", "-o", exported)
    home.typed("import", "autoreg_weights", "import", exported, "--name", "back")
    for name in ("quiet", "pairs", "pictures"):
        folder = home.root / "for_hub" / name
        line = ("autoreg_weights", "export", name, "-o", folder, "--form", "huggingface")
        home.typed(f"export {name} for Hugging Face", *line)


def segment(home: Home) -> None:
    line = ("nnUNetv2_plan_and_preprocess", "-d", "77", "-pl", "AutoregPlanner", "-c", "3d_fullres")
    home.typed("plan", *line, "-npfp", "1", "-np", "1", autoreg_weights="quiet")
    plans_file = home.root / "nnUNet_preprocessed" / home.dataset.name / "AutoregPlans.json"
    plans = json.loads(plans_file.read_text())
    # One step of one epoch.
    plans["autoreg"]["recipe"].update(num_iterations_per_epoch=1, num_val_iterations_per_epoch=1)
    plans_file.write_text(json.dumps(plans))

    on_cpu = ("-device", "cpu", "-tr", "AutoregPretrainedTrainer_1epochs", "-p", "AutoregPlans")
    home.typed("train", "nnUNetv2_train", "77", "3d_fullres", "0", *on_cpu)
    line = ("nnUNetv2_predict", "-d", "77", "-i", home.dataset / "imagesTs", "-o", home.predicted)
    once = ("-f", "0", "-c", "3d_fullres", "--save_probabilities", "-npp", "1", "-nps", "1")
    home.typed("predict", *line, *once, *on_cpu)


def compare(home: Home) -> None:
    home.typed("divide", "autoreg_benchmark", "-d", "77", "--labels", "2", "--dry-run")
    # One random network and two draws are enough for a table.
    line = ("autoreg_probe", "-d", "77", "--encoder", "primus_tiny", "--random-seeds", "1")
    home.typed("probe", *line, "--labels", "2", "--draws", "2", "--device", "cpu")


def detect(home: Home) -> None:
    # Results of detection are named after the scans, so these have harmless names.
    write_model(home.results)
    scans = home.root / f"to detect {planted.NAME}"
    planted.write_nifti(scans / "first.nii.gz", planted.noise(30))
    planted.write_dicom(scans / "series", 31, file_name="slice")
    line = ("autoreg_detect", "-d", "950", "-i", scans, "-o", home.root / "detected")
    home.typed("detect", *line, "--device", "cpu", "--csv")

    components = home.root / "components"
    line = ("autoreg_detect", "--from-seg", home.predicted, "-o", components, "--csv")
    home.typed("from seg", *line)
    figures = home.root / "evaluated" / "figures.json"
    truth = home.root / f"truth of {planted.NAME}"
    # The truth lies in a folder that names the patient, with headers that do.
    shutil.copytree(home.dataset / "labelsTs", truth)
    shutil.copy(home.dataset / "dataset.json", truth)
    line = ("autoreg_evaluate_detection", "-p", components, "-g", truth)
    home.typed("evaluate", *line, "-o", figures)


def classify(home: Home) -> None:
    trainer = "AutoregClassificationTrainer_1epochs"
    line = ("nnUNetv2_train", "77", "3d_fullres", "0", "-tr", trainer, "-p", "AutoregPlans")
    home.typed("train a classifier", *line, "-device", "cpu")

    # A ward's folder of scans with harmless names, and a table that names their patients.
    ward = home.root / f"to classify {planted.PATIENT}"
    table = ["case,patient,kind"]
    for number, kind in enumerate("ab"):
        planted.write_nifti(ward / f"scan{number}.nii.gz", planted.noise(50 + number))
        table.append(f"scan{number},{planted.PATIENT}{number},{kind}")
    truth = ward / f"{planted.NAME}.csv"
    truth.write_text("\n".join(table) + "\n")

    folder = home.root / "classified"
    line = ("autoreg_classify", "-d", "77", "-i", ward, "-o", folder, "-f", "0")
    home.typed("classify", *line, "-tr", trainer, "--device", "cpu")
    figures = home.root / "evaluated classes" / "figures.json"
    figures.parent.mkdir()
    line = ("autoreg_evaluate_classification", "-p", folder, "-g", truth, "-o", figures)
    home.typed("evaluate classes", *line, "--bootstrap", "5")

    features = home.root / "embedded" / "features.npz"
    features.parent.mkdir()
    line = ("autoreg_embed", "-w", "quiet", "-i", ward, "-o", features, "--dense")
    home.typed("embed", *line, "--device", "cpu")


def test_a_run_its_store_and_its_weights_name_nobody(home: Home) -> None:
    exported = home.root / "exported"

    assert planted.leaks(home.results / "autoreg_pretraining", EVERYBODY, WITH_NAMES) == []
    assert planted.leaks(home.root / "nnUNet_preprocessed/autoreg_store", EVERYBODY) == []
    assert planted.leaks(exported, EVERYBODY) == []
    # The search would find the names if they were there: the private file has all of them.
    private = (home.results / "autoreg_pretraining/quiet" / PRIVATE_NAME).read_text().lower()
    assert all(secret in private for secret in EVERYBODY)


def test_runs_of_every_objective_name_nobody(home: Home) -> None:
    """Alice draws pairs of patients, and joint clustering reads pictures with comments."""
    runs = home.results / "autoreg_pretraining"

    for name in ("quiet", "pairs", "pictures"):
        assert (runs / name / "report.html").is_file()
        assert (home.root / "for_hub" / name / "README.md").is_file()
    assert planted.leaks(runs, EVERYBODY, WITH_NAMES) == []
    assert planted.leaks(home.root / "for_hub", EVERYBODY) == []

    rows = read_index(runs / "pictures" / "scans.csv")
    pictures = [row for row in rows if row.is_image and row.status == OK]
    # A PNG and a JPEG of each number.
    assert len(pictures) == 2 * planted.NUM_PICTURES


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


def test_results_of_classification_and_embeddings_name_nobody(home: Home) -> None:
    for name in ("classified", "evaluated classes", "embedded"):
        assert planted.leaks(home.root / name, EVERYBODY) == []


def test_in_folders_of_nnunet_names_come_only_from_nnunet(home: Home) -> None:
    preprocessed = home.root / "nnUNet_preprocessed" / home.dataset.name
    plans = json.loads((preprocessed / "AutoregPlans.json").read_text())
    trained = home.results / home.dataset.name

    assert [s for s in EVERYBODY if s in json.dumps(plans["autoreg"]).lower()] == []
    found = planted.leaks(trained, planted.SECRETS, COPIES)
    found += planted.leaks(preprocessed, planted.SECRETS, COPIES)
    # nnU-Net copies the label maps as they are, with their headers.
    assert [leak for leak in found if not leak.startswith("gt_segmentations/")] == []
