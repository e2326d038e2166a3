"""The two folders of an evaluation: what is there, as label maps, instance maps or boxes, and what was found, a file per scan."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.corpus.find import IMAGE_ENDINGS, natural_key, strip_ending
from nnunet_autoreg.corpus.read import quiet_stderr
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
from nnunet_autoreg.detection.scanfile import FileBox, ScanFile, is_scan_file, read_scan_file
from nnunet_autoreg.detection.score import mask_overlaps, scan_of_instances
from nnunet_autoreg.errors import ObjectsError, UsageError, did_you_mean
from nnunet_autoreg.records import MEND_YOURS, read_json

DATASET_FILE = "dataset.json"
SPACING_TOLERANCE = 0.01
"""Formats round voxel sizes; more than one part in a hundred is another image."""

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
class Folders:
    """Scans that both folders know, and those that only one does.

    Attributes:
        scans: what is scored, in natural order of the names.
        true_files: by scan: the image or JSON of the true objects.
        undetected: names with true objects only, and ``unknown`` with detections only.
    """

    scans: tuple[ScanBoxes, ...]
    found: dict[str, ScanFile]
    true_files: dict[str, Path]
    undetected: tuple[str, ...]
    unknown: tuple[str, ...]


def read_found(folder: Path) -> dict[str, ScanFile]:
    """Every file of detections in a folder, by name of the scan.

    Raises:
        UsageError: no folder, or none in it.
        ObjectsError: a file that is none, or files that disagree about the classes.
    """
    if not folder.is_dir():
        raise UsageError(f"-p {folder} is no folder; give the folder that autoreg_detect wrote")
    candidates = sorted((f for f in folder.glob("*.json") if not f.name.startswith(".")), key=lambda f: natural_key(f.name))
    files = [f for f in candidates if is_scan_file(f)]
    if others := [f.name for f in candidates if f not in files]:
        log.info("%d JSON files of %s are no detections and left out: %s", len(others), folder, _some(others))
    if not files:
        raise UsageError(f"-p {folder} holds no file of detections (*.json); give the folder that autoreg_detect wrote")
    found = {f.name.removesuffix(".json"): read_scan_file(f) for f in files}
    first_name, first = next(iter(found.items()))
    for name, record in found.items():
        if record.classes != first.classes:
            other = f"{first_name} has {first.classes}"
            raise ObjectsError(f"{folder}: {name} has the classes {record.classes}, {other}; detect them with one model")
    return found


def read_classes(
    folder: Path, dataset_file: Path | None, found: Mapping[str, int], wanted: Sequence[str] = (),
    min_voxels: int | None = None, connectivity: int | None = None,
) -> Truth:
    """What is scored: by dataset.json, given or beside the folder of the truth; without one, the classes that the detector knows.

    Args:
        found: name -> label of the classes that could have been found.
        wanted: names of those to score; all if empty.
        min_voxels, connectivity: instead of dataset.json's.

    Raises:
        UsageError: no such folder, or a class that is not there.
        PlanError: a dataset.json that cannot be.
    """
    if not folder.is_dir():
        raise UsageError(f"-g {folder} is no folder; give a folder of label maps, instance maps or boxes")
    places = [dataset_file] if dataset_file else [p for p in (folder / DATASET_FILE, folder.parent / DATASET_FILE) if p.is_file()]
    dataset: dict[str, Any] = read_json(places[0], MEND_YOURS) if places else {"labels": {"background": 0, **found}}
    where = str(places[0]) if places else "the detections"
    log.info("classes from %s", where)
    rules = read_rules(dataset, where)
    rules = replace(rules, min_voxels=min_voxels or rules.min_voxels, connectivity=connectivity or rules.connectivity)
    every = object_classes(dataset, rules, where)
    _compare_classes(every, found, where)
    chosen = _choose(every, wanted)
    values = {int(v) for value in dataset["labels"].values() for v in (value if isinstance(value, list) else [value])}
    ignored = ignore_value(dataset)
    others = values - {v for kind in chosen for v in kind.values} - {0, ignored}
    return Truth(folder, chosen, rules, ignored, tuple(sorted(others)))


def _compare_classes(every: Sequence[ObjectClass], found: Mapping[str, int], where: str) -> None:
    known = {kind.name: kind.label for kind in every}
    for name, label in found.items():
        if name in known and known[name] != label:
            raise ObjectsError(f"class '{name}' has label {known[name]} in {where} and {label} in the detections; give the dataset.json "
                               "they were made with")
    strangers = sorted(set(found) - set(known))
    if strangers:
        raise ObjectsError(f"the detections know a class '{strangers[0]}' that {where} does not; {did_you_mean(strangers[0], known)}")
    if missed := [name for name in known if name not in found]:
        log.warning("the detector does not know %s: every such object counts as missed; --classes leaves them out", ", ".join(missed))


def _choose(every: Sequence[ObjectClass], wanted: Sequence[str]) -> tuple[ObjectClass, ...]:
    known = {kind.name: kind for kind in every}
    for name in wanted:
        if name not in known:
            raise UsageError(f"--classes {name}: there is no such class; {did_you_mean(name, known)}")
    return tuple(kind for kind in every if not wanted or kind.name in wanted)


def gather(truth: Truth, found: Mapping[str, ScanFile], with_undetected: bool = False, masks: Path | None = None) -> Folders:
    """Read the objects of every scan and put its detections beside them.

    Args:
        with_undetected: a scan without a file of detections counts as one in which nothing was found; else it is left out.
        masks: folder with ``<scan>_instances`` of the detections, if overlaps are to be counted in voxels.

    Raises:
        UsageError: no scan is in both folders, or voxels are to be counted that are not known.
        ObjectsError: a scan whose truth cannot be read, or whose detections were made on an image of another size.
    """
    files = _true_files(truth.folder)
    both = [name for name in files if name in found]
    undetected, unknown = tuple(n for n in files if n not in found), tuple(n for n in found if n not in files)
    if not both:
        raise UsageError(f"no scan of -g {truth.folder} ({_some(files)}) has detections in -p ({_some(found)}): their names must agree")
    if undetected:
        what = "counted as nothing found" if with_undetected else "left out; --all-scans counts them as nothing found"
        log.warning("%d scans have true objects and no file of detections (%s): %s", len(undetected), _some(undetected), what)
    if unknown:
        log.warning("%d scans have detections and no truth (%s): left out", len(unknown), _some(unknown))
    names = [name for name in files if name in found or with_undetected]
    scans = tuple(_read_scan(name, files[name], truth, found.get(name), masks) for name in names)
    return Folders(scans, dict(found), {name: files[name] for name in names}, undetected, unknown)


def _true_files(folder: Path) -> dict[str, Path]:
    """Case -> its image, or its JSON where there is no image."""
    files = {f.name.removesuffix(".json"): f for f in folder.glob("*.json") if f.name != DATASET_FILE and not f.name.startswith(".")}
    files |= {strip_ending(f.name): f for f in folder.iterdir() if f.name.lower().endswith(IMAGE_ENDINGS) and not f.name.startswith(".")}
    if not files:
        raise UsageError(f"-g {folder} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor *.json")
    return {name: files[name] for name in sorted(files, key=natural_key)}


def read_array(file: Path) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """An image as stored, (Z, Y, X), and its spacing (z, y, x) in mm.

    Raises:
        ObjectsError: it cannot be read, or is not 3D.
    """
    import SimpleITK

    with quiet_stderr():
        try:
            image: Any = SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            raise ObjectsError(f"{file} cannot be read as an image; open it in a viewer, or copy it again") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ObjectsError(f"{file} is no 3D image with one value per voxel")
    x, y, z = image.GetSpacing()
    return SimpleITK.GetArrayFromImage(image), (z, y, x)


def _read_scan(name: str, file: Path, truth: Truth, found: ScanFile | None, masks: Path | None) -> ScanBoxes:
    array, spacing_mm = (None, None) if file.suffix == ".json" else read_array(file)
    if found is not None:
        spacing_mm = spacing_mm or found.spacing_mm_zyx
        if array is not None and array.shape != found.shape_zyx:
            sizes = [" x ".join(map(str, shape)) for shape in (array.shape, found.shape_zyx)]
            raise ObjectsError(f"{file} has {sizes[0]} voxels (z, y, x), the detections were made on {sizes[1]}: another image?")
        if not np.allclose(spacing_mm, found.spacing_mm_zyx, rtol=SPACING_TOLERANCE):
            listed = [", ".join(f"{s:g}" for s in spacing) for spacing in (spacing_mm, found.spacing_mm_zyx)]
            raise ObjectsError(f"{file} has voxels of {listed[0]} mm (z, y, x), the detections were made on {listed[1]} mm: another image?")
    if spacing_mm is None:
        raise ObjectsError(f"{file}: without detections the voxel size of this scan is not known; leave out --all-scans")
    instances = _instances(file, array, truth, found)
    # In an instance map the ignore label is the number of an object.
    uncounted = None if array is None or truth.ignore_label is None or _beside(file).is_file() else array == truth.ignore_label
    scan = scan_of_instances(name, spacing_mm, instances, _detections(found, truth), uncounted)
    return scan if masks is None else replace(scan, mask_overlap_DG=_mask_overlaps(scan, instances, found, truth, masks))


def _mask_overlaps(
    scan: ScanBoxes, instances: Instances, found: ScanFile | None, truth: Truth, masks: Path
) -> NDArray[np.float64]:
    """(D, G) IoU in voxels; 0 with what is no object but a region that does not count."""
    if instances.ids_ZYX is None:
        raise UsageError(f"--hit mask: the objects of {scan.name} are known as boxes only; take --hit iou:0.1")
    overlap = np.zeros((len(scan.boxes_D6), len(scan.true_boxes_G6)))
    ids = [box.id for box in _scored(found, truth)]
    if ids:
        files = [f for f in (masks / f"{scan.name}_instances{end}" for end in IMAGE_ENDINGS) if f.is_file()]
        if not files:
            raise UsageError(f"--hit mask: {masks} has no {scan.name}_instances; detect without --no-instances")
        drawn, _ = read_array(files[0])
        if drawn.shape != instances.ids_ZYX.shape:
            raise ObjectsError(f"{files[0]} has {drawn.shape} voxels (z, y, x), the labels {instances.ids_ZYX.shape}: another image?")
        overlap[:, :len(instances.objects)] = mask_overlaps(drawn, ids, instances.ids_ZYX, [o.id for o in instances.objects])
        if undrawn := len(set(ids) - set(np.unique(drawn).tolist())):
            log.warning("%s: %d of %d boxes have no voxel in %s and hit nothing; --min-score 0 draws low scores too", scan.name, undrawn,
                        len(ids), files[0].name)
    return overlap


def _instances(file: Path, array: NDArray[Any] | None, truth: Truth, found: ScanFile | None) -> Instances:
    if array is None:
        return read_true_boxes(file, truth.classes, found.shape_zyx if found else None, truth.other_labels)
    beside = _beside(file)
    if beside.is_file():
        return known_instances(array, labels_of_instances(beside), truth.classes, truth.rules, str(file), truth.other_labels)
    known = {0, truth.ignore_label, *truth.other_labels, *(v for kind in truth.classes for v in kind.values)}
    strangers = sorted(set(np.unique(array).tolist()) - known)
    if strangers:
        listed = ", ".join(f"{v:g}" for v in strangers[:5])
        raise ObjectsError(f"{file} holds the values {listed}, which are no labels; an instance map needs {beside.name} beside it")
    return find_instances(array, truth.classes, truth.rules)


def _beside(file: Path) -> Path:
    """Where the labels of an instance map's objects are."""
    return file.with_name(strip_ending(file.name) + ".json")


def _scored(found: ScanFile | None, truth: Truth) -> list[FileBox]:
    """The detections of classes that are scored."""
    names = {kind.name for kind in truth.classes}
    return [box for box in (found.boxes if found else ()) if box.name in names]


def _detections(found: ScanFile | None, truth: Truth) -> tuple[list[Any], list[int], list[float]]:
    """Their boxes, places of their classes and scores."""
    place_of = {kind.name: place for place, kind in enumerate(truth.classes)}
    boxes = _scored(found, truth)
    return [b.box_zyx for b in boxes], [place_of[b.name] for b in boxes], [b.score for b in boxes]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
