"""The two folders of an evaluation: what is there, as label maps, instance maps or boxes, and what
was found, a file per scan.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import AS_STORED, Frame, frame_of_affine
from nnunet_autoreg.detection.images import read_array, read_onto, same_voxels
from nnunet_autoreg.detection.instances import (
    Instances,
    ObjectClass,
    Rules,
    find_instances,
    ignore_value,
    known_instances,
    labels_of_instances,
    object_classes,
    read_rules,
    read_true_boxes,
)
from nnunet_autoreg.detection.matching import ScanBoxes
from nnunet_autoreg.detection.scanfile import is_scan_file, read_scan_file
from nnunet_autoreg.detection.score import mask_overlaps, scan_of_instances
from nnunet_autoreg.errors import ObjectsError, UsageError, did_you_mean
from nnunet_autoreg.io.names import IMAGE_ENDINGS, natural_key, strip_ending
from nnunet_autoreg.records import MEND_YOURS, read_json

DATASET_FILE = "dataset.json"
MARKUP = ".mrk"
WRITTEN_BESIDE = (MARKUP, "_boxes", "_instances")
"""What autoreg_detect's other files of a scan are called after its name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """How the true objects are read.

    Attributes:
        folder: of the files.
        classes: what is scored.
        rules: how label maps become objects.
        ignore_label: value of voxels where nothing counts.
        other_labels: values that are there and not scored.
    """

    folder: Path
    classes: tuple[ObjectClass, ...]
    rules: Rules
    ignore_label: int | None
    other_labels: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The detections of a scan, as far as they are scored; their whole files would not fit into
    memory for thousands of scans.

    Attributes:
        frame: where the scan lies.
        boxes_N6, labels_N, scores_N, ids_N: voxel edges, nnU-Net's label values, scores and numbers
            in the file.
    """

    frame: Frame
    boxes_N6: NDArray[np.float64]  # noqa: N815
    labels_N: NDArray[np.int64]  # noqa: N815
    scores_N: NDArray[np.float64]  # noqa: N815
    ids_N: NDArray[np.int64]  # noqa: N815

    def only(self, labels: Sequence[int]) -> "Found":
        """Those of some labels."""
        kept = np.isin(self.labels_N, labels)
        return Found(
            self.frame,
            self.boxes_N6[kept],
            self.labels_N[kept],
            self.scores_N[kept],
            self.ids_N[kept],
        )


@dataclass(frozen=True)
class Folders:
    """Scans that both folders know, and those that only one does.

    Attributes:
        scans: what is scored, in natural order of the names.
        frames: by scan: where the array lies in which its boxes are.
        true_files: by scan: the image or JSON of the true objects.
        undetected: names with true objects only, and ``unknown`` with detections only.
    """

    scans: tuple[ScanBoxes, ...]
    frames: dict[str, Frame]
    true_files: dict[str, Path]
    undetected: tuple[str, ...]
    unknown: tuple[str, ...]


def read_found(folder: Path) -> tuple[dict[str, Found], dict[str, int]]:
    """Every file of detections in a folder, by name of the scan; and name -> label of the classes
    that could have been found.

    Raises:
        UsageError: no folder, or none in it.
        ObjectsError: a file that is none, or files that disagree about the classes.
    """
    if not folder.is_dir():
        raise UsageError(f"-p {folder} is no folder; give the folder that autoreg_detect wrote")
    candidates = (
        f
        for f in folder.glob("*.json")
        if not f.name.startswith(".") and not f.name.endswith(f"{MARKUP}.json")
    )
    found: dict[str, Found] = {}
    classes: dict[str, int] = {}
    others = []
    for file in sorted(candidates, key=lambda f: natural_key(f.name)):
        if not is_scan_file(file):
            others.append(file.name)
            continue
        record, name = read_scan_file(file), file.stem
        classes = classes or record.classes
        if record.classes != classes:
            other = f"{next(iter(found))} has {classes}"
            raise ObjectsError(
                f"{folder}: {name} has the classes {record.classes}, {other}; detect them with one "
                "model"
            )
        boxes = record.boxes
        found[name] = Found(
            record.frame,
            np.array([box.box_zyx for box in boxes], dtype=np.float64).reshape(-1, 6),
            np.array([box.label for box in boxes], dtype=np.int64),
            np.array([box.score for box in boxes]),
            np.array([box.id for box in boxes], dtype=np.int64),
        )
    if others:
        log.info(
            "%d JSON files of %s are no detections and left out: %s",
            len(others),
            folder,
            _some(others),
        )
    if not found:
        raise UsageError(
            f"-p {folder} holds no file of detections (*.json); give the folder that "
            "autoreg_detect wrote"
        )
    return found, classes


def read_classes(
    folder: Path,
    dataset_file: Path | None,
    found: Mapping[str, int],
    wanted: Sequence[str] = (),
    min_voxels: int | None = None,
    connectivity: int | None = None,
) -> Truth:
    """What is scored: by dataset.json, given or beside the folder of the truth; without one, the
    classes that the detector knows.

    Args:
        found: name -> label of the classes that could have been found.
        wanted: names of those to score; all if empty.
        min_voxels, connectivity: instead of dataset.json's.

    Raises:
        UsageError: no such folder, or a class that is not there.
        PlanError: a dataset.json that cannot be.
    """
    if not folder.is_dir():
        raise UsageError(
            f"-g {folder} is no folder; give a folder of label maps, instance maps or boxes"
        )
    places = (
        [dataset_file]
        if dataset_file
        else [p for p in (folder / DATASET_FILE, folder.parent / DATASET_FILE) if p.is_file()]
    )
    dataset: dict[str, Any] = (
        read_json(places[0], MEND_YOURS) if places else {"labels": {"background": 0, **found}}
    )
    where = str(places[0]) if places else "the detections"
    log.info("classes from %s", where)
    rules = read_rules(dataset, where)
    rules = replace(
        rules,
        min_voxels=min_voxels or rules.min_voxels,
        connectivity=connectivity or rules.connectivity,
    )
    every = object_classes(dataset, rules, where)
    _compare_classes(every, found, where)
    chosen = _choose(every, wanted)
    values = {
        int(v)
        for value in dataset["labels"].values()
        for v in (value if isinstance(value, list) else [value])
    }
    ignored = ignore_value(dataset)
    others = values - {v for kind in chosen for v in kind.values} - {0, ignored}
    return Truth(folder, chosen, rules, ignored, tuple(sorted(others)))


def _compare_classes(every: Sequence[ObjectClass], found: Mapping[str, int], where: str) -> None:
    known = {kind.name: kind.label for kind in every}
    for name, label in found.items():
        if name in known and known[name] != label:
            raise ObjectsError(
                f"class '{name}' has label {known[name]} in {where} and {label} in the detections; "
                "give the dataset.json "
                "they were made with"
            )
    strangers = sorted(set(found) - set(known))
    if strangers:
        raise ObjectsError(
            f"the detections know a class '{strangers[0]}' that {where} does not; "
            f"{did_you_mean(strangers[0], known)}"
        )
    if missed := [name for name in known if name not in found]:
        log.warning(
            "the detector does not know %s: every such object counts as missed; --classes leaves "
            "them out",
            ", ".join(missed),
        )


def _choose(every: Sequence[ObjectClass], wanted: Sequence[str]) -> tuple[ObjectClass, ...]:
    known = {kind.name: kind for kind in every}
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--classes {name}: there is no such class; {did_you_mean(name, known)}"
            )
    return tuple(kind for kind in every if not wanted or kind.name in wanted)


def gather(
    truth: Truth,
    found: Mapping[str, Found],
    with_undetected: bool = False,
    masks: Path | None = None,
) -> Folders:
    """Read the objects of every scan and put its detections beside them.

    Args:
        with_undetected: a scan without a file of detections counts as one in which nothing was
            found; else it is left out.
        masks: folder with ``<scan>_instances`` of the detections, if overlaps are to be counted in
            voxels.

    Raises:
        UsageError: no scan is in both folders, or voxels are to be counted that are not known.
        ObjectsError: a scan whose truth cannot be read, or whose detections were made on an image
            of another size or place.
    """
    files = _true_files(truth.folder)
    both = [name for name in files if name in found]
    undetected, unknown = (
        tuple(n for n in files if n not in found),
        tuple(n for n in found if n not in files),
    )
    if not both:
        raise UsageError(
            f"no scan of -g {truth.folder} ({_some(files)}) has detections in -p ({_some(found)}): "
            "their names must agree"
        )
    if undetected:
        what = (
            "counted as nothing found"
            if with_undetected
            else "left out; --all-scans counts them as nothing found"
        )
        log.warning(
            "%d scans have true objects and no file of detections (%s): %s",
            len(undetected),
            _some(undetected),
            what,
        )
    if unknown:
        log.warning(
            "%d scans have detections and no truth (%s): left out", len(unknown), _some(unknown)
        )
    names = [name for name in files if name in found or with_undetected]
    read = {name: _read_scan(name, files[name], truth, found.get(name), masks) for name in names}
    frames = {name: frame for name, (_, frame) in read.items()}
    return Folders(
        tuple(scan for scan, _ in read.values()),
        frames,
        {name: files[name] for name in names},
        undetected,
        unknown,
    )


def _true_files(folder: Path) -> dict[str, Path]:
    """Case -> its image, or its JSON where there is no image; without what autoreg_detect writes
    beside a file of detections.
    """
    files = {
        f.name.removesuffix(".json"): f
        for f in folder.glob("*.json")
        if f.name != DATASET_FILE and not f.name.startswith(".")
    }
    files |= {
        strip_ending(f.name): f
        for f in folder.iterdir()
        if f.name.lower().endswith(IMAGE_ENDINGS) and not f.name.startswith(".")
    }
    if not files:
        raise UsageError(
            f"-g {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor *.json"
        )
    drawn = [
        name
        for name in files
        if any(
            _is_detections(folder / f"{name.removesuffix(end)}.json")
            for end in WRITTEN_BESIDE
            if name.endswith(end)
        )
    ]
    if drawn:
        log.info(
            "-g %s: %d files that autoreg_detect wrote beside its detections are left out: %s",
            folder,
            len(drawn),
            _some(drawn),
        )
    return {name: files[name] for name in sorted(set(files) - set(drawn), key=natural_key)}


def _is_detections(file: Path) -> bool:
    return file.is_file() and is_scan_file(file)


def _read_scan(
    name: str, file: Path, truth: Truth, found: Found | None, masks: Path | None
) -> tuple[ScanBoxes, Frame]:
    """The scan in the array of its detections, and where that lies; as stored, where there is no
    file of detections.
    """
    array, frame = None, found.frame if found else None
    if file.suffix != ".json":
        array, frame = read_array(file) if frame is None else (read_onto(file, frame), frame)
    if frame is None:
        raise ObjectsError(
            f"{file}: without detections the voxel size of this scan is not known; leave out "
            "--all-scans"
        )
    instances = _instances(file, array, truth, frame)
    # In an instance map the ignore label is the number of an object.
    uncounted = (
        None
        if array is None or truth.ignore_label is None or _beside(file).is_file()
        else array == truth.ignore_label
    )
    scored = (found or _nothing(frame)).only([kind.label for kind in truth.classes])
    scan = scan_of_instances(
        name,
        frame.spacing_mm,
        instances,
        (scored.boxes_N6, _places(scored, truth), scored.scores_N),
        uncounted,
    )
    return (
        scan
        if masks is None
        else replace(scan, mask_overlap_DG=_mask_overlaps(scan, instances, scored, masks))
    ), frame


def _mask_overlaps(
    scan: ScanBoxes, instances: Instances, scored: Found, masks: Path
) -> NDArray[np.float64]:
    """(D, G) IoU in voxels; 0 with what is no object but a region that does not count."""
    if instances.ids_ZYX is None:
        raise UsageError(
            f"--hit mask: the objects of {scan.name} are known as boxes only; take --hit iou:0.1"
        )
    overlap = np.zeros((len(scan.boxes_D6), len(scan.true_boxes_G6)))
    ids = scored.ids_N.tolist()
    if ids:
        files = [
            f
            for f in (masks / f"{scan.name}_instances{end}" for end in IMAGE_ENDINGS)
            if f.is_file()
        ]
        if not files:
            raise UsageError(
                f"--hit mask: {masks} has no {scan.name}_instances; detect without --no-instances"
            )
        drawn = read_onto(files[0], scored.frame)
        overlap[:, : len(instances.objects)] = mask_overlaps(
            drawn, ids, instances.ids_ZYX, [o.id for o in instances.objects]
        )
        if undrawn := len(set(ids) - set(np.unique(drawn[drawn != 0]).tolist())):
            log.warning(
                "%s: %d of %d boxes have no voxel in %s and hit nothing; --min-score 0 draws low "
                "scores too",
                scan.name,
                undrawn,
                len(ids),
                files[0].name,
            )
    return overlap


def _instances(file: Path, array: NDArray[Any] | None, truth: Truth, frame: Frame) -> Instances:
    if array is None:
        boxes = read_true_boxes(file, truth.classes, frame.shape_vox, truth.other_labels)
        _check_place(file, frame)
        return boxes
    beside = _beside(file)
    if beside.is_file():
        return known_instances(
            array,
            labels_of_instances(beside),
            truth.classes,
            truth.rules,
            str(file),
            truth.other_labels,
        )
    known = {
        0,
        truth.ignore_label,
        *truth.other_labels,
        *(v for kind in truth.classes for v in kind.values),
    }
    strangers = sorted(set(np.unique(array).tolist()) - known)
    if strangers:
        listed = ", ".join(f"{v:g}" for v in strangers[:5])
        raise ObjectsError(
            f"{file} holds the values {listed}, which are no labels; an instance map needs "
            f"{beside.name} beside it"
        )
    return find_instances(array, truth.classes, truth.rules, str(file))


def _check_place(file: Path, onto: Frame) -> None:
    """Check that true boxes which say where their image lies, as a file of detections does, are of
    the image that was searched.
    """
    data = read_json(file, MEND_YOURS)
    if not {"affine_ras", "shape_zyx"} <= set(data):
        return
    try:
        frame = frame_of_affine(np.reshape(data["affine_ras"], (4, 4)), data["shape_zyx"])
    except (TypeError, ValueError) as error:
        raise ObjectsError(
            f"{file}: affine_ras must be 4 rows of 4 numbers, and shape_zyx 3 numbers ({error})"
        ) from error
    if same_voxels(file, frame, onto) != AS_STORED:
        raise ObjectsError(
            f"{file}: the axes of its image run otherwise than those of the detections' image; "
            "give boxes of that one"
        )


def _beside(file: Path) -> Path:
    """Where the labels of an instance map's objects are."""
    return file.with_name(strip_ending(file.name) + ".json")


def _nothing(frame: Frame) -> Found:
    """No detections."""
    return Found(frame, np.zeros((0, 6)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))


def _places(found: Found, truth: Truth) -> list[int]:
    """Of the classes of detections."""
    place_of = {kind.label: place for place, kind in enumerate(truth.classes)}
    return [place_of[label] for label in found.labels_N.tolist()]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
