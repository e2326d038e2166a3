"""Read the two folders of an evaluation: true objects, and detections.

True objects are label maps, instance maps or boxes; detections are one file per scan.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.corpus.private import terminal_only
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
    other_label_values,
    read_rules,
    read_true_boxes,
)
from nnunet_autoreg.detection.matching import ScanBoxes, mask_overlaps, scan_of_instances
from nnunet_autoreg.detection.scanfile import is_scan_file, read_scan_file
from nnunet_autoreg.errors import ObjectsError, UsageError, did_you_mean
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.io.names import IMAGE_ENDINGS, natural_key, strip_ending
from nnunet_autoreg.records import MEND_YOURS, read_object

DATASET_FILE = "dataset.json"
MARKUP = ".mrk"
OTHER_RESULTS = (MARKUP, "_boxes", "_instances")
"""Suffixes of a scan's name in the names of autoreg_detect's other files."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """Define how the true objects are read.

    Attributes:
        folder: folder of the files.
        classes: classes that are scored.
        rules: how label maps become objects.
        ignore_label: value of voxels in which nothing counts; None if there is no such value.
        other_labels: label values that exist and are not scored.
    """

    folder: Path
    classes: tuple[ObjectClass, ...]
    rules: Rules
    ignore_label: int | None
    other_labels: tuple[int, ...]


@dataclass(frozen=True)
class ScanDetections:
    """Hold the detections of a scan, as far as they are scored.

    Their whole files would not fit into memory for thousands of scans.

    Attributes:
        frame: position of the scan in the world.
        boxes_N6: in voxel edges.
        labels_N: nnU-Net's label values.
        scores_N: in [0, 1].
        ids_N: ids in the file.
    """

    frame: Frame
    boxes_N6: NDArray[np.float64]  # noqa: N815
    labels_N: NDArray[np.int64]  # noqa: N815
    scores_N: NDArray[np.float64]  # noqa: N815
    ids_N: NDArray[np.int64]  # noqa: N815

    def only(self, labels: Sequence[int]) -> "ScanDetections":
        """Return the detections of some labels."""
        kept = np.isin(self.labels_N, labels)
        return ScanDetections(
            self.frame,
            self.boxes_N6[kept],
            self.labels_N[kept],
            self.scores_N[kept],
            self.ids_N[kept],
        )


@dataclass(frozen=True)
class Folders:
    """Hold the scans that both folders have, and the names of those that only one has.

    Attributes:
        scans: the scans that are scored, in natural order of their names.
        frames: position in the world of each scan's array, in which its boxes are.
        true_files: the image or JSON file of each scan's true objects.
        undetected: names of scans that have only true objects.
        unknown: names of scans that have only detections.
    """

    scans: tuple[ScanBoxes, ...]
    frames: dict[str, Frame]
    true_files: dict[str, Path]
    undetected: tuple[str, ...]
    unknown: tuple[str, ...]


def read_found(folder: Path) -> tuple[dict[str, ScanDetections], dict[str, int]]:
    """Read every file of detections in a folder.

    Returns:
        The detections by name of the scan, and name -> label of the detector's classes.

    Raises:
        UsageError: there is no such folder, or no file of detections in it.
        ObjectsError: a file is damaged, or two files disagree about the classes.
    """
    if not folder.is_dir():
        raise UsageError(
            f"-p {folder} is not a folder; give the folder that autoreg_detect wrote",
            code="detections-no-folder",
        )

    found: dict[str, ScanDetections] = {}
    classes: dict[str, int] = {}
    others = []
    for file in sorted(folder.glob("*.json"), key=lambda f: natural_key(f.name)):
        if file.name.startswith(".") or file.name.endswith(f"{MARKUP}.json"):
            continue
        if not is_scan_file(file):
            others.append(file.name)
            continue
        record = read_scan_file(file)
        name = file.stem
        # The first file decides which classes there are.
        classes = classes or record.classes
        if record.classes != classes:
            raise ObjectsError(
                f"{folder}: {name} has the classes {record.classes}, {next(iter(found))} has "
                f"{classes}; detect them with one model",
                code="detections-other-classes",
            )
        boxes = record.boxes
        found[name] = ScanDetections(
            frame=record.frame,
            boxes_N6=np.array([box.box_zyx for box in boxes], dtype=np.float64).reshape(-1, 6),
            labels_N=np.array([box.label for box in boxes], dtype=np.int64),
            scores_N=np.array([box.score for box in boxes]),
            ids_N=np.array([box.id for box in boxes], dtype=np.int64),
        )

    if others:
        log.info(
            "%d JSON files of -p are not detections and are left out: %s",
            len(others),
            names_text(others),
        )

    if not found:
        raise UsageError(
            f"-p {folder} holds no file of detections (*.json); give the folder that "
            "autoreg_detect wrote",
            code="detections-none",
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
    """Return the classes to score, from a dataset.json.

    Without ``dataset_file``, the dataset.json in the folder or beside it is read. If there is none,
    the detector's classes are scored.

    Args:
        folder: folder of the true objects.
        found: name -> label of the detector's classes.
        wanted: names of the classes to score; all if empty.
        min_voxels, connectivity: values to use instead of those in dataset.json.

    Raises:
        UsageError: there is no such folder, or no class of a name.
        PlanError: dataset.json has impossible values.
    """
    if not folder.is_dir():
        raise UsageError(
            f"-g {folder} is not a folder; give a folder of label maps, instance maps or boxes",
            code="truth-no-folder",
        )

    dataset, where = _describing_dataset(folder, dataset_file, found)
    rules = read_rules(dataset, where)
    rules = replace(
        rules,
        min_voxels=min_voxels or rules.min_voxels,
        connectivity=connectivity or rules.connectivity,
    )
    every = object_classes(dataset, rules, where)
    _compare_classes(every, found, where)

    known = [kind.name for kind in every]
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--classes {name}: there is no such class; {did_you_mean(name, known)}",
                code="evaluation-unknown-class",
            )

    chosen = tuple(kind for kind in every if not wanted or kind.name in wanted)
    others = other_label_values(dataset, chosen, where)
    return Truth(folder, chosen, rules, ignore_value(dataset), others)


def _describing_dataset(
    folder: Path,
    dataset_file: Path | None,
    found: Mapping[str, int],
) -> tuple[dict[str, Any], str]:
    """Return the content of the dataset.json that describes the truth, and its name for messages.

    Folders that have only boxes have none; the detector's classes are then used.
    """
    if dataset_file is None:
        candidates = (folder / DATASET_FILE, folder.parent / DATASET_FILE)
        dataset_file = next((file for file in candidates if file.is_file()), None)
    if dataset_file is None:
        log.info("classes from the detections")
        return {"labels": {"background": 0, **found}}, "the detections"

    dataset = read_object(dataset_file, ("labels",), MEND_YOURS)
    # The folder's name may be a person's name.
    folder_line = f" in {dataset_file.parent}"
    log.info("classes from %s", dataset_file.name, extra=terminal_only(folder_line))
    return dataset, str(dataset_file)


def _compare_classes(every: Sequence[ObjectClass], found: Mapping[str, int], where: str) -> None:
    """Refuse detections of other classes than the truth has, and warn about classes they lack."""
    known = {kind.name: kind.label for kind in every}
    for name, label in found.items():
        if name in known and known[name] != label:
            raise ObjectsError(
                f"class '{name}' has label {known[name]} in {where} and {label} in the detections; "
                "give the dataset.json they were made with",
                code="detections-other-label",
            )

    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ObjectsError(
            f"the detections have a class '{unknown[0]}' that {where} does not have; "
            f"{did_you_mean(unknown[0], known)}",
            code="detections-unknown-class",
        )

    missed = [name for name in known if name not in found]
    if missed:
        log.warning(
            "the detector does not know %s, so that every such object counts as missed; leave them "
            "out with --classes",
            ", ".join(missed),
        )


def gather(
    truth: Truth,
    found: Mapping[str, ScanDetections],
    with_undetected: bool = False,
    masks: Path | None = None,
) -> Folders:
    """Read the objects of every scan and combine them with its detections.

    Args:
        found: name of the scan -> its detections.
        with_undetected: a scan without a file of detections counts as a scan in which nothing was
            detected; otherwise it is left out.
        masks: folder with ``<scan>_instances`` of the detections, if overlaps are counted in
            voxels.

    Raises:
        UsageError: no scan is in both folders, or the voxels to count are not known.
        ObjectsError: the truth of a scan cannot be read, or its detections were made on an image
            of another size or location.
    """
    files = _true_files(truth.folder)
    if not any(name in found for name in files):
        raise UsageError(
            f"no scan of -g {truth.folder} ({names_text(files)}) has detections in -p "
            f"({names_text(found)}): their names must agree",
            code="evaluation-no-common-scan",
        )

    undetected = [name for name in files if name not in found]
    unknown = [name for name in found if name not in files]
    if undetected:
        consequence = "left out; --all-scans counts them as scans without a detection"
        if with_undetected:
            consequence = "counted as scans without a detection"
        log.warning(
            "%d scans have true objects but no file of detections (%s): %s",
            len(undetected),
            names_text(undetected),
            consequence,
        )

    if unknown:
        log.warning(
            "%d scans have detections but no true objects (%s): left out",
            len(unknown),
            names_text(unknown),
        )

    scans = []
    frames = {}
    true_files = {}
    for name, file in files.items():
        if name in found or with_undetected:
            scan, frames[name] = _read_scan(name, file, truth, found.get(name), masks)
            scans.append(scan)
            true_files[name] = file
    return Folders(tuple(scans), frames, true_files, tuple(undetected), tuple(unknown))


def _true_files(folder: Path) -> dict[str, Path]:
    """Return case -> its image, or its JSON file if there is no image.

    The other files that autoreg_detect writes beside a file of detections are left out.
    """
    files = {}
    images = {}
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue
        if file.suffix == ".json" and file.name != DATASET_FILE:
            files[file.name.removesuffix(".json")] = file
        elif file.name.lower().endswith(IMAGE_ENDINGS):
            images[strip_ending(file.name)] = file

    # An instance map has a JSON file of the same name, and counts as an image.
    files |= images
    if not files:
        raise UsageError(
            f"-g {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor *.json; give the "
            "folder of the true objects",
            code="truth-empty",
        )

    drawn = []
    for name in files:
        for end in OTHER_RESULTS:
            detections = folder / f"{name.removesuffix(end)}.json"
            if name.endswith(end) and detections.is_file() and is_scan_file(detections):
                drawn.append(name)
                break

    if drawn:
        log.info(
            "-g: %d files that autoreg_detect wrote beside its detections are left out: %s",
            len(drawn),
            names_text(drawn),
        )
    left = sorted(set(files) - set(drawn), key=natural_key)
    return {name: files[name] for name in left}


def _read_scan(
    name: str,
    file: Path,
    truth: Truth,
    found: ScanDetections | None,
    masks: Path | None,
) -> tuple[ScanBoxes, Frame]:
    """Return a scan in the array of its detections, and where that lies.

    Without a file of detections, it is the array as stored.
    """
    array = None
    has_image = file.suffix != ".json"
    if found is not None:
        frame = found.frame
        if has_image:
            array = read_onto(file, frame)
    elif has_image:
        array, frame = read_array(file)
    else:
        raise ObjectsError(
            f"{file}: the voxel size of this scan is not known without detections; leave out "
            "--all-scans",
            code="truth-without-spacing",
        )

    instances = _instances(file, array, truth, frame)
    # In an instance map the ignore label is the number of an object.
    is_label_map = array is not None and not _json_beside(file).is_file()
    uncounted = None
    if is_label_map and truth.ignore_label is not None:
        uncounted = np.asarray(array == truth.ignore_label)

    if found is None:
        no_ids = np.zeros(0, np.int64)
        found = ScanDetections(frame, np.zeros((0, 6)), no_ids, np.zeros(0), no_ids)
    scored = found.only([kind.label for kind in truth.classes])
    # Files have labels, the evaluation counts classes from 0.
    index_of = {kind.label: index for index, kind in enumerate(truth.classes)}
    class_indices = [index_of[label] for label in scored.labels_N.tolist()]
    scan = scan_of_instances(
        name,
        frame.spacing_mm,
        instances,
        (scored.boxes_N6, class_indices, scored.scores_N),
        uncounted,
    )
    if masks is not None:
        overlap = _mask_overlaps(scan, instances, scored, masks)
        scan = replace(scan, mask_overlap_DG=overlap)
    return scan, frame


def _mask_overlaps(
    scan: ScanBoxes,
    instances: Instances,
    scored: ScanDetections,
    masks: Path,
) -> NDArray[np.float64]:
    """Return the IoU (D, G) in voxels; it is 0 with a region in which nothing counts."""
    if instances.ids_ZYX is None:
        raise UsageError(
            f"--hit mask: the objects of {scan.name} are known as boxes only; use --hit iou:0.1",
            code="mask-boxes-only",
        )

    overlap = np.zeros((len(scan.boxes_D6), len(scan.true_boxes_G6)))
    ids = scored.ids_N.tolist()
    if not ids:
        return overlap

    candidates = [masks / f"{scan.name}_instances{end}" for end in IMAGE_ENDINGS]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise UsageError(
            f"--hit mask: {masks} has no {scan.name}_instances; detect without --no-instances",
            code="mask-no-instances",
        )

    drawn = read_onto(files[0], scored.frame)
    true_ids = [item.id for item in instances.objects]
    # Regions that do not count come after the objects, and have no id.
    overlap[:, : len(true_ids)] = mask_overlaps(drawn, ids, instances.ids_ZYX, true_ids)

    drawn_ids = np.unique(drawn[drawn != 0])
    num_undrawn = len(set(ids) - set(drawn_ids.tolist()))
    if num_undrawn:
        log.warning(
            "%s: %d of %d boxes have no voxel in %s and hit nothing; detect with --min-score 0 to "
            "draw low scores too",
            scan.name,
            num_undrawn,
            len(ids),
            files[0].name,
        )
    return overlap


def _instances(file: Path, array: NDArray[Any] | None, truth: Truth, frame: Frame) -> Instances:
    """Return the true objects of a scan; ``array`` is None if there are only boxes."""
    if array is None:
        boxes = read_true_boxes(file, truth.classes, frame.shape_vox, truth.other_labels)
        # A file of detections says where its image lies, and then it must be the same image.
        data = read_object(file, advice=MEND_YOURS)
        if {"affine_ras", "shape_zyx"} <= set(data):
            try:
                affine = np.reshape(data["affine_ras"], (4, 4))
                own_frame = frame_of_affine(affine, data["shape_zyx"])
            except (TypeError, ValueError) as error:
                raise ObjectsError(
                    f"{file}: affine_ras must be 4 rows of 4 numbers, and shape_zyx 3 numbers "
                    f"({error})",
                    code="truth-affine",
                ) from error
            # An image could be turned, but boxes in a file are left as they are.
            if same_voxels(file, own_frame, frame) != AS_STORED:
                raise ObjectsError(
                    f"{file}: the axes of its image differ from those of the detections' image; "
                    "give boxes for that image",
                    code="truth-other-axes",
                )
        return boxes

    json_file = _json_beside(file)
    if json_file.is_file():
        label_of = labels_of_instances(json_file)
        return known_instances(
            array,
            label_of,
            truth.classes,
            truth.rules,
            str(file),
            truth.other_labels,
        )

    known = {0, truth.ignore_label, *truth.other_labels}
    for kind in truth.classes:
        known.update(kind.values)

    unknown = sorted(set(np.unique(array).tolist()) - known)
    if unknown:
        listed = ", ".join(f"{v:g}" for v in unknown[:5])
        raise ObjectsError(
            f"{file} holds the values {listed}, which are not labels; an instance map needs "
            f"{json_file.name} beside it",
            code="truth-unknown-values",
        )
    return find_instances(array, truth.classes, truth.rules, str(file))


def _json_beside(file: Path) -> Path:
    """Return the file with the labels of an instance map's objects."""
    return file.with_name(strip_ending(file.name) + ".json")
