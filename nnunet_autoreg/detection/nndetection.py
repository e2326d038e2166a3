"""A task of nnDetection as an nnU-Net dataset, and detections as nnDetection writes them: its
classes count from 0, labels from 1.

Source: nnDetection's documentation of its raw format: ``dataset.json`` with ``labels`` {"0": name}
    and ``modalities`` {"0": name};
``raw_splitted/imagesTr/<case>_0000.nii.gz``; ``raw_splitted/labelsTr/<case>.nii.gz`` with ids of
instances and ``<case>.json`` with {"instances": {"1": 0}}; results as ``<case>_boxes.pkl``.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.detection.geometry import RAS_OF_LPS
from nnunet_autoreg.detection.images import array_of, open_image
from nnunet_autoreg.detection.instances import (
    ObjectClass,
    Rules,
    known_instances,
    labels_of_instances,
)
from nnunet_autoreg.detection.scanfile import ScanFile
from nnunet_autoreg.errors import ObjectsError, PlanError, UsageError
from nnunet_autoreg.io.names import CHANNEL_SUFFIX, natural_key
from nnunet_autoreg.records import MEND_YOURS, atomic_path, read_json, write_json

ENDING = ".nii.gz"
SPLITS = ("Tr", "Ts")
RESERVED = ("background", "ignore")

log = logging.getLogger(__name__)


def labels_from_classes(class_of: Mapping[int, int]) -> dict[int, int]:
    """Instance id -> nnU-Net label, from nnDetection's instance id -> class."""
    return {number: kind + 1 for number, kind in class_of.items()}


def write_boxes(file: Path, record: ScanFile) -> None:
    """The detections of a scan as nnDetection's ``<case>_boxes.pkl``: boxes z0, y0, z1, y1, x0, x1,
    from the voxel before the first one to the voxel after the last; classes from 0 in the order of
    the labels.
    """
    linear = np.array(record.affine_ras)
    spacing = np.linalg.norm(linear[:3, :3], axis=0)
    places = {label: place for place, label in enumerate(sorted(record.classes.values()))}
    boxes = np.array([box.box_zyx for box in record.boxes], dtype=np.float32).reshape(-1, 6)
    data = {
        "pred_boxes": boxes[:, [0, 1, 3, 4, 2, 5]] - np.array([1, 1, 0, 0, 1, 0], dtype=np.float32),
        "pred_scores": np.array([box.score for box in record.boxes], dtype=np.float32),
        "pred_labels": np.array([places[box.label] for box in record.boxes], dtype=np.int64),
        "restore": True,
        "original_size_of_raw_data": np.array(record.shape_zyx),
        "itk_origin": tuple((RAS_OF_LPS @ linear[:3, 3]).tolist()),
        "itk_spacing": tuple(spacing.tolist()),
        "itk_direction": tuple((RAS_OF_LPS @ linear[:3, :3] / spacing).ravel().tolist()),
    }
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        pickle.dump(data, handle)


def convert_task(task: Path, dataset: Path) -> int:
    """Write an nnU-Net raw dataset with label maps and, beside them, instance maps; images are
    linked, or copied where links fail. Test images come along with or without maps.

    Args:
        task: nnDetection's folder of the task.
        dataset: the folder to write, e.g. ``nnUNet_raw/Dataset100_Lesions``; must not exist.

    Returns:
        Number of training cases.

    Raises:
        UsageError: the task has no dataset.json or no training labels, or ``dataset`` is there.
        PlanError: a dataset.json without classes or channels, or whose classes share a name or have
            one of nnU-Net's own.
        ObjectsError: a map that cannot be read, a map and a JSON that disagree, or an image that is
            missing.
    """
    names, channels = _read_task(task)
    if dataset.exists():
        raise UsageError(f"{dataset} is there already; remove it, or give another number or name")
    raw = task / "raw_splitted"
    if not _files(raw / "labelsTr"):
        raise UsageError(
            f"{raw / 'labelsTr'} holds no {ENDING} file; prepare the task as nnDetection wants it "
            "before this"
        )
    classes = tuple(ObjectClass(name, label, (label,)) for label, name in names.items())
    # Written under another name, and renamed when whole: a conversion that fails leaves nothing
    # that looks like a dataset.
    unfinished = dataset.with_name(f".{dataset.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        counts = {
            split: _convert_split(raw, unfinished, split, classes, len(channels))
            for split in SPLITS
        }
        write_json(
            unfinished / "dataset.json",
            {
                "channel_names": {str(i): name for i, name in enumerate(channels)},
                "labels": {"background": 0, **{name: label for label, name in names.items()}},
                "numTraining": counts["Tr"],
                "file_ending": ENDING,
                "autoreg_detection": {},
            },
        )
        unfinished.rename(dataset)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return counts["Tr"]


def _read_task(task: Path) -> tuple[dict[int, str], list[str]]:
    """nnU-Net label -> name of the class, and the channels."""
    file = task / "dataset.json"
    if not file.is_file():
        hint = (
            "write dataset.yaml as JSON"
            if (task / "dataset.yaml").is_file()
            else "give the folder of a task, e.g. Task016_Luna"
        )
        raise UsageError(f"there is no {file}; {hint}")
    data: Any = read_json(file, MEND_YOURS)
    try:
        names = {
            int(kind) + 1: str(name)
            for kind, name in sorted(data["labels"].items(), key=lambda item: int(item[0]))
        }
        channels = [
            str(name)
            for _, name in sorted(data["modalities"].items(), key=lambda item: int(item[0]))
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f'{file} must have "labels" {{"0": name}} and "modalities" {{"0": name}} ({error!r})'
        ) from error
    refused = [
        name for name in names.values() if name in RESERVED or list(names.values()).count(name) > 1
    ]
    if refused:
        what = (
            "means something else to nnU-Net"
            if refused[0] in RESERVED
            else "is the name of several classes"
        )
        raise PlanError(
            f"{file}: '{refused[0]}' {what}; rename it under \"labels\", and convert again"
        )
    if data.get("target_class") is not None:
        log.warning(
            "%s wants class %s only: put its name into autoreg_detection.detect_labels of "
            "dataset.json",
            file,
            data["target_class"],
        )
    return names, channels


def _convert_split(
    raw: Path, dataset: Path, split: str, classes: tuple[ObjectClass, ...], num_channels: int
) -> int:
    maps = {file.name.removesuffix(ENDING): file for file in _files(raw / f"labels{split}")}
    found = (
        CHANNEL_SUFFIX.match(file.name.removesuffix(ENDING))
        for file in _files(raw / f"images{split}")
    )
    bare = sorted({named["case"] for named in found if named} - set(maps), key=natural_key)
    if bare and split == "Tr":
        log.warning(
            "%d training images have no map of instances and are left out (first: %s); one without "
            "objects needs a map of zeros "
            'and {"instances": {}}',
            len(bare),
            bare[0],
        )
    for case in [*maps, *(bare if split == "Ts" else [])]:
        for channel in range(num_channels):
            image = raw / f"images{split}" / f"{case}_{channel:04d}{ENDING}"
            if not image.is_file():
                raise ObjectsError(f"{maps.get(case, f'test case {case}')} has no image {image}")
            _link(image, dataset / f"images{split}" / image.name)
    for case, file in maps.items():
        _convert_case(file, case, dataset, split, classes)
    return len(maps)


def _files(folder: Path) -> list[Path]:
    """Images in a folder; hidden files are none."""
    return sorted(file for file in folder.glob(f"*{ENDING}") if not file.name.startswith("."))


def _convert_case(
    file: Path, case: str, dataset: Path, split: str, classes: tuple[ObjectClass, ...]
) -> None:
    import SimpleITK

    image = open_image(file)
    label_of = labels_from_classes(labels_of_instances(file.with_name(f"{case}.json")))
    found = known_instances(
        array_of(image, file), label_of, classes, Rules(min_voxels=1), str(file)
    )
    ids = np.asarray(found.ids_ZYX)
    table = np.zeros(65536, dtype=np.uint8)
    for item in found.objects:
        table[item.id] = classes[item.place].label
    for folder, array in ((f"labels{split}", table[ids]), (f"instances{split}", ids)):
        made: Any = SimpleITK.GetImageFromArray(array)
        made.CopyInformation(image)
        (dataset / folder).mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(made, str(dataset / folder / file.name), True)
    write_json(
        dataset / f"instances{split}" / f"{case}.json",
        {"instances": {str(i): label for i, label in label_of.items()}},
    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
