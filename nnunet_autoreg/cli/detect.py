"""``autoreg_detect``: boxes of new scans from a model that AutoregDetectionTrainer made."""

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError
from nnunet_autoreg.records import differences, to_jsonable

if TYPE_CHECKING:
    from nnunet_autoreg.detection.from_segmentation import Segmentations
    from nnunet_autoreg.detection.predict import Model, Options
    from nnunet_autoreg.detection.scanfile import ScanFile
    from nnunet_autoreg.detection.scans import Scan

log = logging.getLogger(__name__)

TABLE = "detections.csv"
MOST_NAMED = 3
OF_A_MODEL = (
    "-d",
    "-i",
    "-f",
    "-tr",
    "-p",
    "-c",
    "--checkpoint",
    "--device",
    "--tta",
    "--fppi",
    "--nms-iou",
    "--max-boxes",
    "--split-4d",
)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_detect",
        description="Detect objects with a trained model, all its folds together. Per scan: "
        "NAME.json with boxes in voxels and in mm, "
        "NAME_boxes (frames, a label map), NAME_instances (segmentation inside the boxes), "
        "NAME.mrk.json (for 3D Slicer).",
    )
    add = p.add_argument
    add("-d", metavar="ID", help="the dataset the model was trained on (4 or Dataset004_Name)")
    add(
        "-i",
        metavar="FOLDER",
        help="scans: files named as nnU-Net does (case_0000.nii.gz); or, for models of one "
        "channel, "
        "any folder, file or .zip archive with DICOM, NIfTI, NRRD or MetaImage scans, searched "
        "recursively",
    )
    add(
        "--from-seg",
        metavar="FOLDER",
        type=Path,
        help="instead of -d and -i: what nnUNetv2_predict --save_probabilities wrote; every "
        "component of its segmentations becomes a detection, scored by its highest probability",
    )
    add("-o", required=True, metavar="FOLDER", help="where results go")
    add(
        "-f",
        nargs="+",
        default=[],
        metavar="FOLD",
        help="folds; default: all that are finished, except fold all, which has to be named",
    )
    add(
        "-tr",
        default="AutoregDetectionTrainer",
        metavar="TRAINER",
        help="default: AutoregDetectionTrainer",
    )
    add("-p", default="AutoregPlans", metavar="PLANS", help="default: AutoregPlans")
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: 3d_fullres")
    add(
        "--checkpoint",
        default="checkpoint_final.pth",
        metavar="FILE",
        help="default: checkpoint_final.pth",
    )
    add("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    add(
        "--tta",
        action=argparse.BooleanOptionalAction,
        help="mirror along every axis too, at eight times the time; default: on a GPU only",
    )
    add(
        "--min-score",
        type=float,
        metavar="S",
        help="leave out boxes below this score, from 0 to 1. Default: the JSON has all; drawings "
        "and the table start at 0.5",
    )
    add(
        "--fppi",
        type=float,
        metavar="N",
        help="instead: the scores that gave N false positives per scan in validation, class by "
        "class",
    )
    add(
        "--nms-iou",
        type=float,
        default=0.1,
        metavar="IOU",
        help="boxes of a class that overlap more are one object; default 0.1",
    )
    add(
        "--max-boxes",
        type=int,
        default=100,
        metavar="N",
        help="keep at most this many boxes of a scan, all classes and folds together; default 100",
    )
    add("--filled", action="store_true", help="draw solid boxes instead of frames")
    add("--no-instances", action="store_true", help="do not write NAME_instances")
    add(
        "--csv",
        action="store_true",
        help=f"also write {TABLE}, with LUNA16's columns (mm, LPS) first: the boxes from a score "
        "of 0.5, or "
        "all that --min-score or --fppi leave",
    )
    add("--nndet", action="store_true", help="also write NAME_boxes.pkl as nnDetection does")
    add(
        "--split-4d", action="store_true", help="take every volume of a 4D file or series as a scan"
    )
    add(
        "--overwrite",
        action="store_true",
        help="detect again where results are there already; default: go on with the others",
    )
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
        raise UsageError(
            "--device cuda, but torch finds no GPU; use --device cpu, or see autoreg_doctor"
        )
    folder = trained_folder(results_folder(), args.d, args.tr, args.p, args.c)
    return Model(folder, args.f, torch.device(name), args.checkpoint)


def options_of(args: argparse.Namespace, model: "Model") -> "Options":
    """What was typed, checked.

    Raises:
        UsageError: a value that cannot be.
    """
    from nnunet_autoreg.detection.infer import MOST_CANDIDATES, USUAL, Thinning
    from nnunet_autoreg.detection.predict import Options, num_mirrorings

    if args.min_score is not None and args.fppi is not None:
        raise UsageError("--min-score and --fppi exclude each other; give one")
    _check_score(args)
    if args.fppi is not None and not args.fppi > 0:
        raise UsageError(f"--fppi {args.fppi:g} must be greater than 0")
    if not 0 <= args.nms_iou < 1:
        raise UsageError(f"--nms-iou {args.nms_iou:g} must lie in [0, 1)")
    if not 1 <= args.max_boxes <= MOST_CANDIDATES:
        raise UsageError(f"--max-boxes {args.max_boxes} must lie in 1 to {MOST_CANDIDATES}")
    mirror = model.device.type == "cuda" if args.tta is None else args.tta
    # A tile that holds all of the scan must be able to give as many.
    thinning = Thinning(
        voter_iou=args.nms_iou,
        most_per_tile=max(USUAL.most_per_tile, args.max_boxes),
        most_boxes=args.max_boxes,
    )
    options = Options(
        mirror, thinning, args.min_score, args.filled, not args.no_instances, args.nndet
    )
    if args.fppi is None:
        return options
    if thinning != USUAL:
        log.warning(
            "--fppi: its scores come from a validation with --nms-iou %g and --max-boxes %d; with "
            "others the number of false "
            "positives is another one",
            USUAL.voter_iou,
            USUAL.most_boxes,
        )
    return replace(options, min_score=model.thresholds(args.fppi, num_mirrorings(model, options)))


def _check_score(args: argparse.Namespace) -> None:
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score:g} must lie in [0, 1]")


def detect_all(args: argparse.Namespace) -> int:
    """Detect in every scan; one that cannot be read is named and the others go on."""
    from nnunet_autoreg.detection.predict import settings_of
    from nnunet_autoreg.detection.scans import find

    if args.d is None or args.i is None:
        raise UsageError(
            "-d and -i are needed (the dataset the model was trained on, and the scans), or "
            "--from-seg"
        )
    model = model_of(args)
    options = options_of(args, model)
    scans = find(Path(args.i), model.file_ending, model.num_channels, args.split_4d, Path(args.o))
    inputs = {scan.name: scan.inputs() for scan in scans}
    done = start(args, inputs, model.describe(), settings_of(model, options))
    folder = Path(args.o)
    names = [
        scan.name for scan in scans if scan.name in done or detect_one(model, scan, options, folder)
    ]
    return finish(args, options, names, len(scans))


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
        raise UsageError(
            f"-o {args.o} is the folder of --from-seg, whose images are all taken for "
            "segmentations; give another one"
        )
    source = Segmentations(args.from_seg)
    options = Options(
        min_score=args.min_score,
        filled=args.filled,
        with_instances=not args.no_instances,
        for_nndetection=args.nndet,
    )
    settings = {
        "min_score": args.min_score,
        **to_jsonable(source.rules),
        "filled": options.filled,
        "instances": options.with_instances,
    }
    done = start(
        args, {name: source.inputs(name) for name in source.names}, source.describe(), settings
    )
    folder = Path(args.o)
    names = [
        name
        for name in source.names
        if name in done or segmented_one(source, name, options, settings, folder)
    ]
    return finish(args, options, names, len(source.names))


def finish(
    args: argparse.Namespace, options: "Options", names: Sequence[str], num_scans: int
) -> int:
    """Write the table of all scans, and what was asked for of scans done before, from their files:
    no scan is held in memory.

    Args:
        names: of the scans whose files are there.
        num_scans: with those that could not be read.

    Returns:
        1 if one could not be read, else 0.

    Raises:
        AutoregError: none could be read.
    """
    from nnunet_autoreg.detection.export import write_table
    from nnunet_autoreg.detection.nndetection import write_boxes
    from nnunet_autoreg.detection.predict import DRAWN_FROM
    from nnunet_autoreg.detection.scanfile import read_scan_file

    if not names:
        raise AutoregError(
            f"none of the {num_scans} scans of {args.from_seg or args.i} could be read"
        )
    folder = Path(args.o)
    for name in names if options.for_nndetection else ():
        if not (file := folder / f"{name}_boxes.pkl").is_file():
            write_boxes(file, read_scan_file(folder / f"{name}.json"))
    if args.csv:
        records = (read_scan_file(folder / f"{name}.json") for name in names)
        write_table(folder / TABLE, records, DRAWN_FROM if options.min_score is None else 0.0)
    results = shlex.quote(args.o)
    print_next(
        f"autoreg_evaluate_detection -p {results} -g FOLDER_OF_LABELS -o FILE; or open "
        "NAME.mrk.json over the scan in 3D Slicer"
    )
    return 0 if len(names) == num_scans else 1


def start(
    args: argparse.Namespace,
    inputs: Mapping[str, Sequence[dict[str, Any]]],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> set[str]:
    """Make the folder of results; the scans that need not be done, since an earlier run of the same
    line did them.

    Args:
        inputs: name of the scan -> its files.

    Raises:
        UsageError: results of another model, of another input, or with other options.
    """
    folder = Path(args.o)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"-o {folder} cannot be made ({error.strerror or error}); give a folder that you may "
            "write to"
        ) from error
    there = (
        [] if args.overwrite else [name for name in inputs if (folder / f"{name}.json").is_file()]
    )
    done = {
        name
        for name in there
        if _is_done(
            folder / f"{name}.json", {"model": model, "settings": settings, "inputs": inputs[name]}
        )
    }
    if done:
        print(f"{len(done)} of {len(inputs)} scans were done before")
    if len(done) < len(there):
        print(
            f"{len(there) - len(done)} scans were done before, but are to be drawn in another way, "
            "and are done again"
        )
    return done


def _is_done(file: Path, wanted: dict[str, Any]) -> bool:
    """Whether the results of a scan are those of this line; False if only what is drawn is not."""
    from nnunet_autoreg.detection.predict import DRAWING
    from nnunet_autoreg.detection.scanfile import read_scan_file

    record = read_scan_file(file)
    there = {"model": record.model, "settings": record.settings, "inputs": record.inputs}
    of_drawing = tuple(f"settings.{name}: " for name in DRAWING)
    changes = [change for change in differences(there, wanted) if not change.startswith(of_drawing)]
    if changes:
        what = "; ".join(changes[:MOST_NAMED])
        raise UsageError(
            f"{file} was made by another model, of another input or with other options ({what}); "
            "give another -o, or "
            "--overwrite, or remove that file to have the scan done again"
        )
    old, new = record.settings, wanted["settings"]
    # A segmentation that is there, and not asked for now, does no harm.
    return old.get("filled") == new["filled"] and bool(old.get("instances") or not new["instances"])


def detect_one(model: "Model", scan: "Scan", options: "Options", folder: Path) -> bool:
    """Detect in one scan and write its files; False if it cannot be read."""
    from nnunet_autoreg.detection.predict import detect, write

    try:
        found = detect(model, scan, options)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", scan.name, error.status, error)
        return False
    write(model, found, folder, options)
    _tell(found.record)
    return True


def segmented_one(
    source: "Segmentations", name: str, options: "Options", settings: dict[str, Any], folder: Path
) -> bool:
    """Write the files of one segmentation's components; False if it cannot be read."""
    from nnunet_autoreg.detection.predict import write_record

    try:
        record, ids, properties = source.read(name, settings["min_score"] or 0.0, settings)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", name, error.status, error)
        return False
    writer = source.manager.image_reader_writer_class()
    write_record(
        record,
        ids if options.with_instances else None,
        writer,
        source.ending,
        properties,
        folder,
        options,
    )
    _tell(record)
    return True


def _tell(record: "ScanFile") -> None:
    from nnunet_autoreg.detection.predict import DRAWN_FROM

    strong = sum(box.score >= DRAWN_FROM for box in record.boxes)
    print(
        f"{record.scan}: {len(record.boxes)} boxes, {strong} of them with a score of {DRAWN_FROM} "
        "or more",
        flush=True,
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``autoreg_detect``."""
    args = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    return detect_all(args) if args.from_seg is None else detect_from_segmentations(args)
