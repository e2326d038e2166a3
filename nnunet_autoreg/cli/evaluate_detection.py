"""``autoreg_evaluate_detection``: detections against true objects, with average precision, FROC,
sizes and pictures.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.records import write_json

if TYPE_CHECKING:
    from nnunet_autoreg.detection.evaluation_files import Background
    from nnunet_autoreg.detection.folders import Folders, Truth

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_evaluate_detection",
        description="Scores detections against true objects. FILE.json gets every figure, FILE.csv "
        "a row per detection and missed object, "
        "FILE_froc.png the curve, FILE_scans.png some scans with true and found boxes.",
    )
    p.add_argument(
        "-p",
        metavar="PRED",
        type=Path,
        required=True,
        help="folder that autoreg_detect wrote: one JSON per scan",
    )
    p.add_argument(
        "-g",
        metavar="GT",
        type=Path,
        required=True,
        help="folder of the truth, file names as in PRED: label maps (each connected component is "
        "an object), instance maps "
        'with <scan>.json {"instances": {id: label}}, or <scan>.json with {"boxes": [{"box_zyx", '
        '"label"}]}',
    )
    p.add_argument(
        "-o",
        metavar="FILE",
        type=Path,
        required=True,
        help="where to write, e.g. scores.json; its ending is replaced",
    )
    p.add_argument(
        "--iou",
        metavar="T",
        type=float,
        nargs="+",
        default=[0.1, 0.5],
        help="IoUs of the average precisions (default: 0.1 0.5); the mean over 0.1 to 0.5 always "
        "comes with them",
    )
    p.add_argument(
        "--hit",
        metavar="RULE",
        default="iou:0.1",
        help="when a detection has found an object, for FROC, sizes, CSV and pictures: iou:T, "
        "mask:T (IoU of voxels in "
        "NAME_instances, RibFrac's with 0.2), centre (its centre lies in the object), radius "
        "(within half the object's largest "
        "side, as LUNA16), or radius:MM (default: iou:0.1)",
    )
    p.add_argument(
        "--box-convention",
        choices=["edges", "nndet"],
        default="edges",
        help="edges: boxes end where their voxels do; nndet: true and found ones a voxel longer on "
        "every axis, as behind "
        "nnDetection's figures (default: edges)",
    )
    p.add_argument(
        "--classes", metavar="NAME", nargs="+", default=[], help="score these only (default: all)"
    )
    p.add_argument(
        "--duplicates",
        choices=["false", "ignored"],
        default="false",
        help="what a second detection of one object is: a false positive, or ignored as LUNA16 "
        "does (default: false)",
    )
    p.add_argument(
        "--max-detections",
        metavar="N",
        type=int,
        default=100,
        help="per scan and class, the highest scores (default: 100)",
    )
    p.add_argument(
        "--fp-per-scan",
        metavar="N",
        type=float,
        nargs="+",
        default=[0.125, 0.25, 0.5, 1, 2, 4, 8],
        help="operating points; the CPM is the mean sensitivity at them (default: 0.125 0.25 0.5 1 "
        "2 4 8)",
    )
    p.add_argument(
        "--sizes",
        metavar="MM",
        type=float,
        nargs="*",
        help="borders between strata of the objects' largest side (default: thirds of the objects; "
        "none: no strata)",
    )
    p.add_argument(
        "--bootstrap",
        metavar="N",
        type=int,
        default=1000,
        help="resamples of the scans for 95%% intervals; 0: none (default: 1000)",
    )
    p.add_argument("--seed", metavar="N", type=int, default=0, help="of the resamples (default: 0)")
    p.add_argument(
        "--dataset-json",
        metavar="FILE",
        type=Path,
        help="nnU-Net's dataset.json with names of labels (default: in GT or beside it; else the "
        "classes PRED names)",
    )
    p.add_argument(
        "--min-voxels",
        metavar="N",
        type=int,
        help="smaller objects are ignored (default: dataset.json's, else 3)",
    )
    p.add_argument(
        "--connectivity",
        type=int,
        choices=[6, 18, 26],
        help="neighbours that make a component (default: dataset.json's, else 26)",
    )
    p.add_argument(
        "--images",
        metavar="FOLDER",
        type=Path,
        help="scans to draw the boxes on, <scan>_0000.nii.gz or <scan>.nii.gz "
        "(default: imagesTr or imagesTs beside GT; else the label map)",
    )
    p.add_argument(
        "--all-scans",
        action="store_true",
        help="scans of GT without a file in PRED count as nothing found (default: left out)",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Score, write, and print the figures that matter. Returns 0."""
    arguments = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    from nnunet_autoreg.detection.evaluate import evaluate
    from nnunet_autoreg.detection.folders import gather, read_classes, read_found

    settings = _settings(arguments)
    _check_places(arguments)
    found, known = read_found(arguments.p)
    truth = read_classes(
        arguments.g,
        arguments.dataset_json,
        known,
        arguments.classes,
        arguments.min_voxels,
        arguments.connectivity,
    )
    folders = gather(
        truth, found, arguments.all_scans, arguments.p if settings.hit.kind == "mask" else None
    )
    if arguments.box_convention == "nndet":
        folders = replace(folders, scans=tuple(scan.a_voxel_longer() for scan in folders.scans))
    results = evaluate(folders.scans, truth.classes, settings)
    results["scans"] |= {
        "without_detections": list(folders.undetected),
        "without_truth": list(folders.unknown),
    }
    results["inputs"] = {
        "predictions": str(arguments.p),
        "truth": str(arguments.g),
        "min_voxels": truth.rules.min_voxels,
        "connectivity": truth.rules.connectivity,
        "box_convention": arguments.box_convention,
    }
    if len(results["absent_classes"]) == len(truth.classes):
        log.warning(
            "no scan holds an object that counts: there is nothing to find, and no figure; look at "
            "-g, --min-voxels and --classes"
        )
    named = _write_figures(arguments.o, results, folders, truth, settings)
    for line in _table(results):
        print(line)
    named += _draw(arguments, results, folders, truth, settings)
    log.info("wrote %s", ", ".join(str(path) for path in named))
    print_next(f"look at {named[-1]}")
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    from nnunet_autoreg.detection.evaluate import EvaluationSettings, check_settings
    from nnunet_autoreg.detection.matching import parse_hit_rule

    sizes = None if arguments.sizes is None else tuple(arguments.sizes)
    settings = EvaluationSettings(
        tuple(arguments.iou),
        parse_hit_rule(arguments.hit),
        arguments.duplicates,
        arguments.max_detections,
        tuple(arguments.fp_per_scan),
        sizes,
        arguments.bootstrap,
        arguments.seed,
    )
    check_settings(settings)
    if arguments.min_voxels is not None and arguments.min_voxels < 1:
        raise UsageError(f"--min-voxels {arguments.min_voxels} must be at least 1")
    return settings


def _check_places(arguments: argparse.Namespace) -> None:
    if arguments.o.is_dir():
        raise UsageError(
            f"-o {arguments.o} is a folder; give a file in it, e.g. {arguments.o / 'scores.json'}"
        )
    if arguments.images and not arguments.images.is_dir():
        raise UsageError(f"--images {arguments.images} is no folder")


def _named(out: Path, end: str) -> Path:
    """One of the files to write."""
    stem = out.with_suffix("") if out.suffix in (".json", ".csv", ".png") else out
    return stem.with_name(stem.name + end)


def _write_figures(
    out: Path, results: dict[str, Any], folders: "Folders", truth: "Truth", settings: Any
) -> list[Path]:
    """All that is no picture: whatever is wrong with those, these are written."""
    from nnunet_autoreg.detection.evaluation_files import write_rows

    written = [_named(out, ".json"), _named(out, ".csv")]
    write_json(written[0], results)
    write_rows(written[1], folders.scans, truth.classes, settings)
    return written


def _draw(
    arguments: argparse.Namespace,
    results: dict[str, Any],
    folders: "Folders",
    truth: "Truth",
    settings: Any,
) -> list[Path]:
    """Draw the curve, and the scans if there is something to draw them on."""
    from nnunet_autoreg.detection import evaluation_files as files

    drawn = [_named(arguments.o, "_froc.png")]
    files.draw_froc(drawn[0], results)
    backgrounds = _backgrounds(arguments, folders)
    if backgrounds:
        drawn.append(_named(arguments.o, "_scans.png"))
        least = files.thresholds(results, truth.classes)
        files.draw_scans(drawn[1], folders.scans, backgrounds, truth.classes, settings, least)
    else:
        log.warning(
            "no picture of scans: there is neither an image nor a label map to draw on; give "
            "--images FOLDER"
        )
    return drawn


def _backgrounds(arguments: argparse.Namespace, folders: "Folders") -> dict[str, "Background"]:
    """Arrays of the scans that are drawn: the image where there is one that can be used, else the
    map of the true objects.
    """
    from nnunet_autoreg.detection.evaluation_files import background, pick_scans
    from nnunet_autoreg.detection.images import read_onto
    from nnunet_autoreg.io.names import IMAGE_ENDINGS

    places = (
        [arguments.images]
        if arguments.images
        else [arguments.g.parent / name for name in ("imagesTr", "imagesTs")]
    )
    found = {}
    for scan in pick_scans(folders.scans):
        names = [f"{scan.name}{channel}{end}" for channel in ("_0000", "") for end in IMAGE_ENDINGS]
        files = [place / name for place in places for name in names if (place / name).is_file()]
        true_file, frame = folders.true_files[scan.name], folders.frames[scan.name]
        if arguments.images and not files:
            log.warning(
                "--images %s has no %s: drawn on its label map, if there is one",
                arguments.images,
                names[0],
            )
        for file in files + ([] if true_file.suffix == ".json" else [true_file]):
            try:
                found[scan.name] = background(read_onto(file, frame), frame)
                break
            except ObjectsError as error:
                log.warning("%s is not drawn on this image: %s", scan.name, error)
    return found


def _table(results: dict[str, Any]) -> list[str]:
    """The figures by class, and what stands behind them."""
    ious = [f"{iou:g}" for iou in results["settings"]["ious"]]
    columns = [(f"AP@{iou}", results["ap"][iou]) for iou in ious]
    columns += [
        (f"mAP@{name.rpartition(':')[0]}", figure) for name, figure in results["map"].items()
    ] + [("CPM", results["froc"]["cpm"])]
    scans = results["scans"]
    width = max(8, *(len(name) for name in results["classes"]))
    lines = [
        f"{scans['number']} scans, {scans['empty']} without objects; FROC by "
        f"{results['froc']['hit']}",
        f"{'class':<{width}} {'objects':>8} {'found':>8} "
        + " ".join(f"{name:>11}" for name, _ in columns),
    ]
    for name, kind in results["classes"].items():
        if name not in results["absent_classes"]:
            lines.append(
                f"{name:<{width}} {kind['objects']:>8} {kind['detections']:>8} "
                + " ".join(f"{figure['per_class'][name]:>11.3f}" for _, figure in columns)
            )
    lines.append(
        f"{'mean':<{width}} {'':>8} {'':>8} "
        + " ".join(_number(figure["mean"]) for _, figure in columns)
    )
    if any(figure["ci95"] for _, figure in columns):
        lines.append(
            f"{'95 % CI':<{width}} {'':>8} {'':>8} "
            + " ".join(_ends(figure["ci95"]) for _, figure in columns)
        )
    if results["absent_classes"]:
        lines.append(
            f"no object of: {', '.join(results['absent_classes'])} (left out of the means)"
        )
    return lines


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>11}"


def _ends(ends: list[float] | None) -> str:
    return f"{'-' if ends is None else f'{ends[0]:.3f}-{ends[1]:.3f}':>11}"
