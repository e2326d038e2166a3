"""Convert a task of nnDetection to an nnU-Net dataset, and write detections as nnDetection does.

nnDetection's classes count from 0, nnU-Net's labels from 1.

Source: nnDetection's documentation of its raw format: ``dataset.json`` with ``labels`` {"0": name}
    and ``modalities`` {"0": name}; ``raw_splitted/imagesTr/<case>_0000.nii.gz``;
    ``raw_splitted/labelsTr/<case>.nii.gz`` with ids of instances and ``<case>.json`` with
    {"instances": {"1": 0}}; results as ``<case>_boxes.pkl``.
"""

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.detection.geometry import RAS_OF_LPS
from nnunet_autoreg.detection.images import array_of, open_image
from nnunet_autoreg.detection.instances import (
    MOST_OBJECTS,
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


def write_boxes(file: Path, record: ScanFile) -> None:
    """Write the detections of a scan as nnDetection's ``<case>_boxes.pkl``.

    Boxes are z0, y0, z1, y1, x0, x1, from the voxel before the first one to the voxel after the
    last. Classes count from 0 in the order of the labels.
    """
    # nnDetection does not know labels.
    labels = sorted(record.classes.values())
    class_indices = [labels.index(box.label) for box in record.boxes]

    boxes = np.array([box.box_zyx for box in record.boxes], dtype=np.float32).reshape(-1, 6)
    voxel_before = np.array([1, 1, 0, 0, 1, 0], dtype=np.float32)

    linear = record.frame.linear
    spacing_xyz = np.linalg.norm(linear, axis=0)
    origin_lps = RAS_OF_LPS @ np.array(record.affine_ras)[:3, 3]
    direction_lps = RAS_OF_LPS @ linear / spacing_xyz
    data = {
        "pred_boxes": boxes[:, [0, 1, 3, 4, 2, 5]] - voxel_before,
        "pred_scores": np.array([box.score for box in record.boxes], dtype=np.float32),
        "pred_labels": np.array(class_indices, dtype=np.int64),
        "restore": True,
        "original_size_of_raw_data": np.array(record.shape_zyx),
        "itk_origin": tuple(origin_lps.tolist()),
        "itk_spacing": tuple(spacing_xyz.tolist()),
        "itk_direction": tuple(direction_lps.ravel().tolist()),
    }
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        pickle.dump(data, handle)


def convert_task(task: Path, dataset: Path) -> int:
    """Write an nnU-Net raw dataset with label maps and, beside them, instance maps.

    Images are linked, or copied if they cannot be linked. Test images need no maps.

    Args:
        task: nnDetection's folder of the task.
        dataset: the folder to write, such as ``nnUNet_raw/Dataset100_Lesions``; must not exist.

    Returns:
        The number of training cases.

    Raises:
        UsageError: the task has no dataset.json or no training labels, or ``dataset`` exists.
        PlanError: dataset.json has no classes or channels, or two classes share a name, or a class
            has a name that nnU-Net uses.
        ObjectsError: a map cannot be read, a map and its JSON file disagree, or an image is
            missing.
    """
    names, channels = _read_task(task)
    if dataset.exists():
        raise UsageError(
            f"{dataset} exists already; remove it, or give another number or name",
            code="convert-dataset-exists",
        )

    raw = task / "raw_splitted"
    if not _files(raw / "labelsTr"):
        raise UsageError(
            f"{raw / 'labelsTr'} holds no {ENDING} file; prepare the task as nnDetection needs it "
            "first",
            code="convert-no-labels",
        )

    classes = tuple(ObjectClass(name, label, (label,)) for label, name in names.items())

    # The dataset is written under another name, and renamed when it is whole. So a conversion that
    # fails leaves nothing that looks like a dataset.
    unfinished = dataset.with_name(f".{dataset.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        counts = {}
        for split in SPLITS:
            counts[split] = _convert_split(raw, unfinished, split, classes, len(channels))
        labels = {name: label for label, name in names.items()}
        described = {
            "channel_names": {str(i): name for i, name in enumerate(channels)},
            "labels": {"background": 0, **labels},
            "numTraining": counts["Tr"],
            "file_ending": ENDING,
            "autoreg_detection": {},
        }
        write_json(unfinished / "dataset.json", described)
        unfinished.rename(dataset)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return counts["Tr"]


def _read_task(task: Path) -> tuple[dict[int, str], list[str]]:
    """Return nnU-Net label -> name of the class, and the channels."""
    file = task / "dataset.json"
    if not file.is_file():
        hint = "give the folder of a task, e.g. Task016_Luna"
        if (task / "dataset.yaml").is_file():
            hint = "write dataset.yaml as JSON"
        raise UsageError(f"there is no {file}; {hint}", code="convert-no-task")

    data: Any = read_json(file, MEND_YOURS)
    try:
        names = {int(kind) + 1: str(name) for kind, name in data["labels"].items()}
        channels = {int(number): str(name) for number, name in data["modalities"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f'{file} must have "labels" {{"0": name}} and "modalities" {{"0": name}} ({error!r})',
            code="convert-task-format",
        ) from error

    every_name = list(names.values())
    for name in every_name:
        fault = ""
        if name in RESERVED:
            fault = "means something else to nnU-Net"
        elif every_name.count(name) > 1:
            fault = "is the name of several classes"
        if fault:
            raise PlanError(
                f"{file}: '{name}' {fault}; rename it under \"labels\", and convert again",
                code="convert-class-name",
            )

    if data.get("target_class") is not None:
        log.warning(
            "%s asks for class %s only: write its name into autoreg_detection.detect_labels of "
            "dataset.json",
            file,
            data["target_class"],
        )
    return dict(sorted(names.items())), [name for _, name in sorted(channels.items())]


def _convert_split(
    raw: Path,
    dataset: Path,
    split: str,
    classes: tuple[ObjectClass, ...],
    num_channels: int,
) -> int:
    """Convert the cases of ``Tr`` or ``Ts``, and return the number of those with a map."""
    maps = {file.name.removesuffix(ENDING): file for file in _files(raw / f"labels{split}")}
    bare = set()
    for file in _files(raw / f"images{split}"):
        named = CHANNEL_SUFFIX.match(file.name.removesuffix(ENDING))
        if named and named["case"] not in maps:
            bare.add(named["case"])

    cases = list(maps)
    without_map = sorted(bare, key=natural_key)
    if split == "Ts":
        # Test cases need no labels.
        cases += without_map
    elif without_map:
        log.warning(
            "%d training images have no map of instances and are left out (first: %s); one without "
            'objects needs a map of zeros and {"instances": {}}',
            len(without_map),
            without_map[0],
        )

    for case in cases:
        for channel in range(num_channels):
            image = raw / f"images{split}" / f"{case}_{channel:04d}{ENDING}"
            if not image.is_file():
                raise ObjectsError(
                    f"{maps.get(case, f'test case {case}')} has no image {image}; copy it again",
                    code="convert-no-image",
                )
            _link(image, dataset / f"images{split}" / image.name)

    for case, file in maps.items():
        _convert_maps(file, case, dataset, split, classes)
    return len(maps)


def _files(folder: Path) -> list[Path]:
    """Return the images in a folder, without hidden files."""
    images = [file for file in folder.glob(f"*{ENDING}") if not file.name.startswith(".")]
    return sorted(images)


def _convert_maps(
    file: Path,
    case: str,
    dataset: Path,
    split: str,
    classes: tuple[ObjectClass, ...],
) -> None:
    """Write the label map, the instance map and its JSON file of one case."""
    import SimpleITK

    image = open_image(file)
    # A file of nnDetection has classes instead of labels.
    class_of = labels_of_instances(file.with_name(f"{case}.json"))
    label_of = {number: kind + 1 for number, kind in class_of.items()}
    found = known_instances(
        array_of(image, file),
        label_of,
        classes,
        # Small objects stay objects: the rules of the new dataset decide later.
        Rules(min_voxels=1),
        str(file),
    )
    ids_ZYX = np.asarray(found.ids_ZYX)
    label_of_id = np.zeros(MOST_OBJECTS + 1, dtype=np.uint8)
    for item in found.objects:
        label_of_id[item.id] = classes[item.class_index].label

    arrays = {f"labels{split}": label_of_id[ids_ZYX], f"instances{split}": ids_ZYX}
    for folder, array in arrays.items():
        made: Any = SimpleITK.GetImageFromArray(array)
        made.CopyInformation(image)
        (dataset / folder).mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(made, str(dataset / folder / file.name), True)

    instances = {str(i): label for i, label in label_of.items()}
    write_json(dataset / f"instances{split}" / f"{case}.json", {"instances": instances})


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it if the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
