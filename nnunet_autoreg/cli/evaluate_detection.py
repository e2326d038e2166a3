"""``autoreg_evaluate_detection``: detections against true objects, with average precision, FROC,
sizes and pictures.
"""

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import Group, add_seed, local_path, num_resamples
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import write_json
from nnunet_autoreg.stopping import writes_at_the_end

if TYPE_CHECKING:
    from nnunet_autoreg.detection.evaluate import EvaluationSettings
    from nnunet_autoreg.detection.folders import Folders, Truth

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of the command, under the names of the parser below."""

    predictions: Path
    truth: Path
    output: Path
    ious: list[float]
    hit: str
    box_convention: str
    classes: list[str]
    duplicates: str
    max_detections: int
    fp_per_scan: list[float]
    size_edges_mm: list[float] | None
    num_resamples: int
    seed: int
    dataset_json: Path | None
    min_voxels: int | None
    connectivity: int | None
    images: Path | None
    all_scans: bool

    def settings(self) -> "EvaluationSettings":
        """Return the checked settings.

        Raises:
            UsageError: an impossible value.
        """
        from nnunet_autoreg.detection.evaluate import EvaluationSettings, check_settings
        from nnunet_autoreg.detection.matching import parse_hit_rule

        # None means thirds of the objects, an empty tuple means no strata.
        edges = None if self.size_edges_mm is None else tuple(self.size_edges_mm)
        settings = EvaluationSettings(
            ious=tuple(self.ious),
            hit=parse_hit_rule(self.hit),
            duplicates=self.duplicates,
            max_detections=self.max_detections,
            fp_per_scan=tuple(self.fp_per_scan),
            size_edges_mm=edges,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        check_settings(settings)
        if self.min_voxels is not None and self.min_voxels < 1:
            raise UsageError(
                f"--min-voxels {self.min_voxels} must be at least 1",
                code="evaluation-min-voxels",
            )
        return settings


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``EvaluationRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_evaluate_detection -p predictions -g labelsTs -o scores.json",
        ],
        prog="autoreg_evaluate_detection",
        description="Score detections against true objects. FILE.json gets every figure, FILE.csv "
        "a row per detection and missed object, FILE_froc.png the curve, FILE_scans.png some scans "
        "with true and found boxes.",
    )
    _add_input_options(p.add_argument_group("input and output"))

    group = p.add_argument_group("objects")
    group.add_argument(
        "--dataset-json",
        metavar="FILE",
        type=local_path,
        help="nnU-Net's dataset.json with names of labels (default: in GT or beside it; else the "
        "classes that PRED names)",
    )
    group.add_argument(
        "--classes",
        metavar="NAME",
        nargs="+",
        default=[],
        help="score only these classes (default: all)",
    )
    group.add_argument(
        "--min-voxels",
        metavar="N",
        type=int,
        help="smaller objects are ignored (default: dataset.json's, else 3)",
    )
    group.add_argument(
        "--connectivity",
        type=int,
        choices=[6, 18, 26],
        help="neighbours that make a component (default: dataset.json's, else 26)",
    )

    group = p.add_argument_group("scores")
    _add_matching_options(group)
    _add_summary_options(group)
    add_seed(group, " of the resamples")
    return p


def _add_input_options(group: Group) -> None:
    group.add_argument(
        "-p",
        dest="predictions",
        metavar="PRED",
        type=local_path,
        required=True,
        help="folder that autoreg_detect wrote: one JSON file per scan",
    )
    group.add_argument(
        "-g",
        dest="truth",
        metavar="GT",
        type=local_path,
        required=True,
        help="folder of the true objects, with file names as in PRED: label maps (each connected "
        "component is an object), instance maps with <scan>.json "
        '{"instances": {id: label}}, or <scan>.json with {"boxes": [{"box_zyx", "label"}]}',
    )
    group.add_argument(
        "-o",
        dest="output",
        metavar="FILE",
        type=local_path,
        required=True,
        help="where to write, e.g. scores.json; its ending is replaced",
    )
    group.add_argument(
        "--images",
        metavar="FOLDER",
        type=local_path,
        help="scans to draw the boxes on, <scan>_0000.nii.gz or <scan>.nii.gz "
        "(default: imagesTr or imagesTs beside GT; else the label map)",
    )
    group.add_argument(
        "--all-scans",
        action="store_true",
        help="scans of GT without a file in PRED count as scans without a detection (default: they "
        "are left out)",
    )


def _add_matching_options(group: Group) -> None:
    group.add_argument(
        "--iou",
        dest="ious",
        metavar="T",
        type=float,
        nargs="+",
        default=[0.1, 0.5],
        help="IoUs of the average precisions (default: 0.1 0.5); the mean over 0.1 to 0.5 is "
        "always added",
    )
    group.add_argument(
        "--hit",
        metavar="RULE",
        default="iou:0.1",
        help="rule for a hit, for FROC, sizes, CSV and pictures. iou:T: IoU of the boxes; mask:T: "
        "IoU of voxels in NAME_instances (RibFrac uses 0.2); centre: the centre of the detection "
        "is in the object; radius: it is within half the object's largest side (LUNA16); "
        "radius:MM: it is within MM (default: %(default)s)",
    )
    group.add_argument(
        "--box-convention",
        choices=["edges", "nndet"],
        default="edges",
        help="edges: boxes end where their voxels do; nndet: true and found boxes are a voxel "
        "longer on every axis, as for nnDetection's figures (default: %(default)s)",
    )
    group.add_argument(
        "--duplicates",
        choices=["false", "ignored"],
        default="false",
        help="how a second detection of one object counts. false: as a false positive; ignored: "
        "not at all, as in LUNA16 (default: %(default)s)",
    )
    group.add_argument(
        "--max-detections",
        metavar="N",
        type=int,
        default=100,
        help="use at most N detections per scan and class, those with the highest scores (default: "
        "%(default)s)",
    )


def _add_summary_options(group: Group) -> None:
    group.add_argument(
        "--fp-per-scan",
        metavar="N",
        type=float,
        nargs="+",
        default=[0.125, 0.25, 0.5, 1, 2, 4, 8],
        help="false positives per scan at which the sensitivity is reported; CPM is the mean of "
        "these sensitivities (default: 0.125 0.25 0.5 1 2 4 8)",
    )
    group.add_argument(
        "--sizes",
        dest="size_edges_mm",
        metavar="MM",
        type=float,
        nargs="*",
        help="limits between size groups, by the largest side of an object (default: three groups "
        "of equal number; without a value: no groups)",
    )
    group.add_argument(
        "--bootstrap",
        dest="num_resamples",
        metavar="N",
        type=num_resamples,
        default=1000,
        help="resamples of the scans for 95 %% intervals; 0 for no intervals (default: "
        "%(default)s)",
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Score, write, and print the main figures. Returns 0."""
    request = EvaluationRequest(**vars(parser().parse_args(argv)))
    configure_logging()
    writes_at_the_end()
    prepare_torch()
    from nnunet_autoreg.detection.evaluate import evaluate
    from nnunet_autoreg.detection.evaluation_files import write_rows
    from nnunet_autoreg.detection.evaluation_lines import lines_of
    from nnunet_autoreg.downstream.scans import facts_of

    settings = request.settings()
    if request.output.is_dir():
        raise UsageError(
            f"-o {request.output} is a folder; give a file in it, e.g. "
            f"{request.output / 'scores.json'}",
            code="evaluation-output-is-folder",
        )
    if request.images and not request.images.is_dir():
        raise UsageError(
            f"--images {request.images} is not a folder; give the folder of the scans",
            code="evaluation-no-images",
        )

    truth, folders = _read(request, settings)
    results = evaluate(folders.scans, truth.classes, settings)
    results["scans"]["without_detections"] = list(folders.undetected)
    results["scans"]["without_truth"] = list(folders.unknown)

    # What the figures depend on besides the settings, so that the file explains itself. There are
    # no paths, because they may hold names of patients.
    predictions, truth_folder = facts_of([request.predictions, request.truth])
    results["inputs"] = {
        "predictions": predictions,
        "truth": truth_folder,
        "min_voxels": truth.rules.min_voxels,
        "connectivity": truth.rules.connectivity,
        "box_convention": request.box_convention,
    }
    if len(results["absent_classes"]) == len(truth.classes):
        log.warning(
            "no scan has an object that counts, so no score can be computed; check -g, "
            "--min-voxels and --classes",
        )

    # Write the figures first, because drawing the pictures may fail.
    json_file = _beside(request.output, ".json")
    csv_file = _beside(request.output, ".csv")
    write_json(json_file, results)
    write_rows(csv_file, folders.scans, truth.classes, settings)
    for line in lines_of(results):
        print(line)

    pictures = _draw(request, settings, results, truth, folders)
    log.info("wrote %s", ", ".join(str(path) for path in (json_file, csv_file, *pictures)))
    print_next(f"look at {pictures[-1]}")
    return 0


def _read(request: EvaluationRequest, settings: "EvaluationSettings") -> "tuple[Truth, Folders]":
    """Return what is scored, and the scans with their true and found objects.

    Raises:
        UsageError, PlanError: a folder or file of the two cannot be used.
    """
    from nnunet_autoreg.detection.folders import gather, read_classes, read_found

    found, known = read_found(request.predictions)
    truth = read_classes(
        request.truth,
        request.dataset_json,
        known,
        request.classes,
        request.min_voxels,
        request.connectivity,
    )

    # Only this rule counts voxels, and reading them takes long.
    masks = request.predictions if settings.hit.kind == "mask" else None
    folders = gather(truth, found, request.all_scans, masks)
    if request.box_convention == "nndet":
        # The table and the pictures show the longer boxes too.
        longer = [scan.a_voxel_longer() for scan in folders.scans]
        folders = replace(folders, scans=tuple(longer))
    return truth, folders


def _draw(
    request: EvaluationRequest,
    settings: "EvaluationSettings",
    results: dict[str, Any],
    truth: "Truth",
    folders: "Folders",
) -> list[Path]:
    """Draw the FROC curve, and some scans if there are images to draw on; return the files."""
    from nnunet_autoreg.detection.evaluation_backgrounds import find_backgrounds
    from nnunet_autoreg.detection.evaluation_files import draw_froc, draw_scans, thresholds

    curve = _beside(request.output, "_froc.png")
    draw_froc(curve, results)

    backgrounds = find_backgrounds(folders, request.truth, request.images)
    if not backgrounds:
        log.warning(
            "no picture of scans, because there is neither an image nor a label map to draw on; "
            "give --images FOLDER",
        )
        return [curve]

    picture = _beside(request.output, "_scans.png")
    least_scores = thresholds(results, truth.classes)
    draw_scans(picture, folders.scans, backgrounds, truth.classes, settings, least_scores)
    return [curve, picture]


def _beside(output: Path, end: str) -> Path:
    """Return the name of one of the files to write."""
    stem = output.with_suffix("") if output.suffix in (".json", ".csv", ".png") else output
    return stem.with_name(stem.name + end)
