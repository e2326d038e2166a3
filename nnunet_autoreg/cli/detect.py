"""``autoreg_detect``: boxes of new scans from a model that AutoregDetectionTrainer made."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError

if TYPE_CHECKING:
    from nnunet_autoreg.detection.from_segmentation import Segmentations
    from nnunet_autoreg.detection.predict import Model, Options
    from nnunet_autoreg.detection.scanfile import ScanFile
    from nnunet_autoreg.detection.scans import Scan

log = logging.getLogger(__name__)

TABLE = "detections.csv"
OF_A_MODEL = ("-d", "-i", "-f", "-tr", "-p", "-c", "--checkpoint", "--device", "--tta", "--fppi", "--nms-iou", "--split-4d")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_detect",
        description="Detect objects with a trained model, all its folds together. Per scan: NAME.json with boxes in voxels and in mm, "
        "NAME_boxes (frames, a label map), NAME_instances (segmentation inside the boxes), NAME.mrk.json (for 3D Slicer).",
    )
    add = p.add_argument
    add("-d", metavar="ID", help="the dataset the model was trained on (4 or Dataset004_Name)")
    add("-i", metavar="FOLDER", help="scans: files named as nnU-Net does (case_0000.nii.gz); or, for models of one channel, "
        "any folder, file or .zip archive with DICOM, NIfTI, NRRD or MetaImage scans, searched recursively")
    add("--from-seg", metavar="FOLDER", type=Path, help="instead of -d and -i: what nnUNetv2_predict --save_probabilities wrote; every "
        "component of its segmentations becomes a detection, scored by its highest probability")
    add("-o", required=True, metavar="FOLDER", help="where results go")
    add("-f", nargs="+", default=[], metavar="FOLD", help="folds; default: all that are finished")
    add("-tr", default="AutoregDetectionTrainer", metavar="TRAINER", help="default: AutoregDetectionTrainer")
    add("-p", default="AutoregPlans", metavar="PLANS", help="default: AutoregPlans")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: 3d_fullres")
    add("--checkpoint", default="checkpoint_final.pth", metavar="FILE", help="default: checkpoint_final.pth")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    add("--tta", action=argparse.BooleanOptionalAction, help="mirror along every axis too, at eight times the time; default: on a GPU only")
    add("--min-score", type=float, metavar="S", help="leave out boxes below this score, from 0 to 1. Default: the JSON has all; drawings "
        "and the table start at 0.5")
    add("--fppi", type=float, metavar="N", help="instead: the scores that gave N false positives per scan in validation, class by class")
    add("--nms-iou", type=float, default=0.1, metavar="IOU", help="boxes of a class that overlap more are one object; default 0.1")
    add("--filled", action="store_true", help="draw solid boxes instead of frames")
    add("--no-instances", action="store_true", help="do not write NAME_instances")
    add("--csv", action="store_true", help=f"also write all boxes into {TABLE}, with LUNA16's columns (mm, LPS) first")
    add("--nndet", action="store_true", help="also write NAME_boxes.pkl as nnDetection does")
    add("--split-4d", action="store_true", help="take every volume of a 4D file or series as a scan")
    add("--overwrite", action="store_true", help="detect again where results are there already; default: go on with the others")
    return p


def model_of(args: argparse.Namespace) -> "Model":
    """The trained model that a line names.

    Raises:
        UsageError: there is none, or no such dataset.
    """
    import torch

    from nnunet_autoreg.detection.predict import Model, trained_folder
    from nnunet_autoreg.nnunet_api import results_folder

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no GPU; use --device cpu, or see autoreg_doctor")
    folder = trained_folder(results_folder(), args.d, args.tr, args.p, args.c)
    return Model(folder, args.f, torch.device(name), args.checkpoint)


def options_of(args: argparse.Namespace, model: "Model") -> "Options":
    """What was typed, checked.

    Raises:
        UsageError: a value that cannot be.
    """
    from nnunet_autoreg.detection.infer import Thinning
    from nnunet_autoreg.detection.predict import Options, num_mirrorings

    if args.min_score is not None and args.fppi is not None:
        raise UsageError("--min-score and --fppi exclude each other; give one")
    _check_score(args)
    if args.fppi is not None and not args.fppi > 0:
        raise UsageError(f"--fppi {args.fppi:g} must be greater than 0")
    if not 0 <= args.nms_iou < 1:
        raise UsageError(f"--nms-iou {args.nms_iou:g} must lie in [0, 1)")
    mirror = model.device.type == "cuda" if args.tta is None else args.tta
    options = Options(mirror, Thinning(voter_iou=args.nms_iou), args.min_score, args.filled, not args.no_instances, args.nndet)
    return options if args.fppi is None else replace(options, min_score=model.thresholds(args.fppi, num_mirrorings(model, options)))


def _check_score(args: argparse.Namespace) -> None:
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score:g} must lie in [0, 1]")


def detect_all(args: argparse.Namespace) -> int:
    """Detect in every scan; one that cannot be read is named and the others go on."""
    from nnunet_autoreg.detection.predict import settings_of
    from nnunet_autoreg.detection.scans import find

    if args.d is None or args.i is None:
        raise UsageError("-d and -i are needed (the dataset the model was trained on, and the scans), or --from-seg")
    model = model_of(args)
    options = options_of(args, model)
    scans = find(Path(args.i), model.file_ending, model.num_channels, args.split_4d)
    folder = Path(args.o)
    folder.mkdir(parents=True, exist_ok=True)
    done = {} if args.overwrite else results_there(folder, [s.name for s in scans], model.describe(), settings_of(model, options))
    return finish(args, options, [done.get(scan.name) or detect_one(model, scan, options, folder) for scan in scans])


def detect_from_segmentations(args: argparse.Namespace) -> int:
    """The components of segmentations; one that cannot be read is named and the others go on."""
    from nnunet_autoreg.detection.from_segmentation import Segmentations
    from nnunet_autoreg.detection.predict import Options

    untouched = parser()
    for flag in OF_A_MODEL:
        name = flag.strip("-").replace("-", "_")
        if getattr(args, name) != untouched.get_default(name):
            raise UsageError(f"{flag} has no meaning with --from-seg; leave it out")
    _check_score(args)
    if Path(args.o).resolve() == args.from_seg.resolve():
        raise UsageError(f"-o {args.o} is the folder of --from-seg, whose images are all taken for segmentations; give another one")
    source = Segmentations(args.from_seg)
    options = Options(min_score=args.min_score, filled=args.filled, with_instances=not args.no_instances, for_nndetection=args.nndet)
    settings = {"min_score": args.min_score, "min_voxels": source.rules.min_voxels, "connectivity": source.rules.connectivity}
    folder = Path(args.o)
    folder.mkdir(parents=True, exist_ok=True)
    done = {} if args.overwrite else results_there(folder, source.names, source.describe(), settings)
    return finish(args, options, [done.get(name) or segmented_one(source, name, options, settings, folder) for name in source.names])


def finish(args: argparse.Namespace, options: "Options", found: "list[ScanFile | None]") -> int:
    """Write the table of all scans, None standing for one that could not be read, and what was asked for of scans done before.

    Returns:
        1 if one could not be read, else 0.

    Raises:
        AutoregError: none could be read.
    """
    from nnunet_autoreg.detection.export import write_table
    from nnunet_autoreg.detection.nndetection import write_boxes
    from nnunet_autoreg.detection.predict import DRAWN_FROM

    records = [record for record in found if record is not None]
    if not records:
        raise AutoregError(f"none of the {len(found)} scans of {args.from_seg or args.i} could be read")
    for record in records if options.for_nndetection else ():
        if not (file := Path(args.o) / f"{record.scan}_boxes.pkl").is_file():
            write_boxes(file, record)
    if args.csv:
        write_table(Path(args.o) / TABLE, records, DRAWN_FROM if options.min_score is None else 0.0)
    print_next(f"autoreg_evaluate_detection -p {args.o} -g FOLDER_OF_LABELS -o FILE; or open NAME.mrk.json over the scan in 3D Slicer")
    return 0 if len(records) == len(found) else 1


def results_there(folder: Path, names: list[str], model: dict[str, Any], settings: dict[str, Any]) -> dict[str, "ScanFile"]:
    """The scans whose results are there from an earlier run of the same line.

    Raises:
        UsageError: results of another model or other options.
    """
    from nnunet_autoreg.detection.scanfile import read_scan_file

    done = {name: read_scan_file(folder / f"{name}.json") for name in names if (folder / f"{name}.json").is_file()}
    for name, record in done.items():
        if (record.model, record.settings) != (model, settings):
            raise UsageError(f"{folder / name}.json was made by another model or with other options; give another -o, or --overwrite")
    if done:
        print(f"{len(done)} of {len(names)} scans were done before")
    return done


def detect_one(model: "Model", scan: "Scan", options: "Options", folder: Path) -> "ScanFile | None":
    """Detect in one scan and write its files; None if it cannot be read."""
    from nnunet_autoreg.detection.predict import detect, write

    try:
        found = detect(model, scan, options)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", scan.name, error.status, error)
        return None
    write(model, found, folder, options)
    _tell(found.record)
    return found.record


def segmented_one(
    source: "Segmentations", name: str, options: "Options", settings: dict[str, Any], folder: Path
) -> "ScanFile | None":
    """Write the files of one segmentation's components; None if it cannot be read."""
    from nnunet_autoreg.detection.predict import write_record

    try:
        record, ids, properties = source.read(name, settings["min_score"] or 0.0, settings)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", name, error.status, error)
        return None
    writer = source.manager.image_reader_writer_class()
    write_record(record, ids if options.with_instances else None, writer, source.ending, properties, folder, options)
    _tell(record)
    return record


def _tell(record: "ScanFile") -> None:
    from nnunet_autoreg.detection.predict import DRAWN_FROM

    strong = sum(box.score >= DRAWN_FROM for box in record.boxes)
    print(f"{record.scan}: {len(record.boxes)} boxes, {strong} of them with a score of {DRAWN_FROM} or more", flush=True)


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``autoreg_detect``."""
    args = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    return detect_all(args) if args.from_seg is None else detect_from_segmentations(args)
