"""``autoreg_evaluate_detection``: detections against true objects, with average precision, FROC, sizes and pictures."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import write_json

if TYPE_CHECKING:
    from nnunet_autoreg.detection.evaluation_files import Background
    from nnunet_autoreg.detection.folders import Folders, Truth

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_evaluate_detection",
        description="Scores detections against true objects. FILE.json gets every figure, FILE.csv a row per detection and missed object, "
        "FILE_froc.png the curve, FILE_scans.png some scans with true and found boxes.",
    )
    p.add_argument("-p", metavar="PRED", type=Path, required=True, help="folder that autoreg_detect wrote: one JSON per scan")
    p.add_argument("-g", metavar="GT", type=Path, required=True,
                   help="folder of the truth, file names as in PRED: label maps (each connected component is an object), instance maps "
                   "with <scan>.json {\"instances\": {id: label}}, or <scan>.json with {\"boxes\": [{\"box_zyx\", \"label\"}]}")
    p.add_argument("-o", metavar="FILE", type=Path, required=True, help="where to write, e.g. scores.json; its ending is replaced")
    p.add_argument("--iou", metavar="T", type=float, nargs="+", default=[0.1, 0.5],
                   help="IoUs of the average precisions (default: 0.1 0.5); the mean over 0.1 to 0.5 always comes with them")
    p.add_argument("--hit", metavar="RULE", default="iou:0.1",
                   help="when a detection has found an object, for FROC, sizes, CSV and pictures: iou:T, mask:T (IoU of voxels in "
                   "NAME_instances, RibFrac's with 0.2), centre (its centre lies in the object), radius (within half the object's largest "
                   "side, as LUNA16), or radius:MM (default: iou:0.1)")
    p.add_argument("--box-convention", choices=["edges", "nndet"], default="edges",
                   help="edges: boxes end where their voxels do; nndet: true and found ones a voxel longer on every axis, as behind "
                   "nnDetection's figures (default: edges)")
    p.add_argument("--classes", metavar="NAME", nargs="+", default=[], help="score these only (default: all)")
    p.add_argument("--duplicates", choices=["false", "ignored"], default="false",
                   help="what a second detection of one object is: a false positive, or ignored as LUNA16 does (default: false)")
    p.add_argument("--max-detections", metavar="N", type=int, default=100, help="per scan and class, the highest scores (default: 100)")
    p.add_argument("--fp-per-scan", metavar="N", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1, 2, 4, 8],
                   help="operating points; the CPM is the mean sensitivity at them (default: 0.125 0.25 0.5 1 2 4 8)")
    p.add_argument("--sizes", metavar="MM", type=float, nargs="*",
                   help="borders between strata of the objects' largest side (default: thirds of the objects; none: no strata)")
    p.add_argument("--bootstrap", metavar="N", type=int, default=1000,
                   help="resamples of the scans for 95%% intervals; 0: none (default: 1000)")
    p.add_argument("--seed", metavar="N", type=int, default=0, help="of the resamples (default: 0)")
    p.add_argument("--dataset-json", metavar="FILE", type=Path,
                   help="nnU-Net's dataset.json with names of labels (default: in GT or beside it; else the classes PRED names)")
    p.add_argument("--min-voxels", metavar="N", type=int, help="smaller objects are ignored (default: dataset.json's, else 3)")
    p.add_argument("--connectivity", type=int, choices=[6, 18, 26],
                   help="neighbours that make a component (default: dataset.json's, else 26)")
    p.add_argument("--images", metavar="FOLDER", type=Path, help="scans to draw the boxes on, <scan>_0000.nii.gz or <scan>.nii.gz "
                   "(default: imagesTr or imagesTs beside GT; else the label map)")
    p.add_argument("--all-scans", action="store_true", help="scans of GT without a file in PRED count as nothing found (default: left out)")
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
    _check_output(arguments.o)
    found = read_found(arguments.p)
    known = next(iter(found.values())).classes
    truth = read_classes(arguments.g, arguments.dataset_json, known, arguments.classes, arguments.min_voxels, arguments.connectivity)
    folders = gather(truth, found, arguments.all_scans, arguments.p if settings.hit.kind == "mask" else None)
    if arguments.box_convention == "nndet":
        folders = replace(folders, scans=tuple(scan.a_voxel_longer() for scan in folders.scans))
    results = evaluate(folders.scans, truth.classes, settings)
    results["scans"] |= {"without_detections": list(folders.undetected), "without_truth": list(folders.unknown)}
    results["inputs"] = {"predictions": str(arguments.p), "truth": str(arguments.g), "min_voxels": truth.rules.min_voxels,
                         "connectivity": truth.rules.connectivity, "box_convention": arguments.box_convention}
    if len(results["absent_classes"]) == len(truth.classes):
        log.warning("no scan holds an object that counts: there is nothing to find, and no figure; look at -g, --min-voxels and --classes")
    written = _write(arguments, results, folders, truth, settings)
    for line in _table(results):
        print(line)
    print_next(f"look at {written}")
    return 0


def _settings(arguments: argparse.Namespace) -> Any:
    from nnunet_autoreg.detection.evaluate import EvaluationSettings, check_settings
    from nnunet_autoreg.detection.matching import parse_hit_rule

    sizes = None if arguments.sizes is None else tuple(arguments.sizes)
    settings = EvaluationSettings(
        tuple(arguments.iou), parse_hit_rule(arguments.hit), arguments.duplicates, arguments.max_detections, tuple(arguments.fp_per_scan),
        sizes, arguments.bootstrap, arguments.seed,
    )
    check_settings(settings)
    if arguments.min_voxels is not None and arguments.min_voxels < 1:
        raise UsageError(f"--min-voxels {arguments.min_voxels} must be at least 1")
    return settings


def _check_output(file: Path) -> None:
    if file.is_dir():
        raise UsageError(f"-o {file} is a folder; give a file in it, e.g. {file / 'scores.json'}")


def _write(arguments: argparse.Namespace, results: dict[str, Any], folders: "Folders", truth: "Truth", settings: Any) -> Path:
    """Write the four files; returns the picture to look at."""
    from nnunet_autoreg.detection import evaluation_files as files

    stem: Path = arguments.o.with_suffix("") if arguments.o.suffix in (".json", ".csv", ".png") else arguments.o
    named = {end: stem.with_name(stem.name + end) for end in (".json", ".csv", "_froc.png", "_scans.png")}
    named[".json"].parent.mkdir(parents=True, exist_ok=True)
    files.write_rows(named[".csv"], folders.scans, truth.classes, settings)
    files.draw_froc(named["_froc.png"], results)
    backgrounds = _backgrounds(arguments, folders)
    if backgrounds:
        least = files.thresholds(results, truth.classes)
        files.draw_scans(named["_scans.png"], folders.scans, backgrounds, truth.classes, settings, least)
    else:
        log.warning("no picture of scans: the truth has boxes only, and no image was found; give --images FOLDER")
        del named["_scans.png"]
    write_json(named[".json"], results)
    log.info("wrote %s", ", ".join(str(path) for path in named.values()))
    return named.get("_scans.png", named["_froc.png"])


def _backgrounds(arguments: argparse.Namespace, folders: "Folders") -> dict[str, "Background"]:
    """Arrays of the scans that are drawn: the image where there is one, else the map of the true objects."""
    from nnunet_autoreg.corpus.find import IMAGE_ENDINGS
    from nnunet_autoreg.detection.evaluation_files import background, pick_scans
    from nnunet_autoreg.detection.folders import read_array

    if arguments.images and not arguments.images.is_dir():
        raise UsageError(f"--images {arguments.images} is no folder")
    places = [arguments.images] if arguments.images else [arguments.g.parent / name for name in ("imagesTr", "imagesTs")]
    found = {}
    for scan in pick_scans(folders.scans):
        names = [f"{scan.name}{channel}{end}" for channel in ("_0000", "") for end in IMAGE_ENDINGS]
        files = [place / name for place in places for name in names if (place / name).is_file()]
        true_file = folders.true_files[scan.name]
        if arguments.images and not files:
            log.warning("--images %s has no %s: drawn on its label map, if there is one", arguments.images, names[0])
        files += [] if true_file.suffix == ".json" else [true_file]
        if files:
            array, _ = read_array(files[0])
            record = folders.found.get(scan.name)
            if record is not None and array.shape != record.shape_zyx:
                shapes = f"{array.shape} voxels (z, y, x), the detections of {scan.name} {record.shape_zyx}"
                raise UsageError(f"{files[0]} has {shapes}: another image?")
            found[scan.name] = background(array, record.frame if record else None)
    return found


def _table(results: dict[str, Any]) -> list[str]:
    """The figures by class, and what stands behind them."""
    ious = [f"{iou:g}" for iou in results["settings"]["ious"]]
    columns = [(f"AP@{iou}", results["ap"][iou]) for iou in ious]
    columns += [(f"mAP@{name.rpartition(':')[0]}", figure) for name, figure in results["map"].items()] + [("CPM", results["froc"]["cpm"])]
    scans = results["scans"]
    width = max(8, *(len(name) for name in results["classes"]))
    lines = [f"{scans['number']} scans, {scans['empty']} without objects; FROC by {results['froc']['hit']}",
             f"{'class':<{width}} {'objects':>8} {'found':>8} " + " ".join(f"{name:>11}" for name, _ in columns)]
    for name, kind in results["classes"].items():
        if name not in results["absent_classes"]:
            lines.append(f"{name:<{width}} {kind['objects']:>8} {kind['detections']:>8} "
                         + " ".join(f"{figure['per_class'][name]:>11.3f}" for _, figure in columns))
    lines.append(f"{'mean':<{width}} {'':>8} {'':>8} " + " ".join(_number(figure["mean"]) for _, figure in columns))
    if any(figure["ci95"] for _, figure in columns):
        lines.append(f"{'95 % CI':<{width}} {'':>8} {'':>8} " + " ".join(_ends(figure["ci95"]) for _, figure in columns))
    if results["absent_classes"]:
        lines.append(f"no object of: {', '.join(results['absent_classes'])} (left out of the means)")
    return lines


def _number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>11}"


def _ends(ends: list[float] | None) -> str:
    return f"{'-' if ends is None else f'{ends[0]:.3f}-{ends[1]:.3f}':>11}"
