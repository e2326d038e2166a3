"""The objects of a labelled dataset, case by case, in the original images.

``instancesTr/<case>`` with its JSON file comes first, then ``boxesTr/<case>.json``. Both are
optional and lie beside ``labelsTr`` in the raw dataset. Without them, every connected component of
the label map is an object. ``write_box_labels`` makes label maps for datasets that have only boxes,
because nnU-Net prepares no case without one.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.corpus.parallel import parallel_map
from nnunet_autoreg.detection.geometry import StoredArray, as_box, stored_array
from nnunet_autoreg.detection.images import open_image
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
    with_ellipsoids,
)
from nnunet_autoreg.downstream.label_maps import LABELS, first_channels, write_label_map
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.records import MEND_YOURS, atomic_path, read_object, remove_temporary

INSTANCES, BOXES = "instancesTr", "boxesTr"
RAW_VARIABLE = "nnUNet_raw"
FEWEST_PER_PROCESS = 8
MOST_CARRIED = 32767
"""nnU-Net's loader carries maps as 16-bit integers with a sign."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseObjects:
    """Hold the objects of one case, in its original image.

    Attributes:
        instances: with their map.
        shape_vox, spacing_mm: (z, y, x) of the image.
        has_masks: whether the outlines of the objects are known. If only boxes are known, the map
            holds ellipsoids.
        uncounted_ZYX: voxels with nnU-Net's ignore label; None without one.
    """

    instances: Instances
    shape_vox: Size
    spacing_mm: Spacing
    has_masks: bool
    uncounted_ZYX: NDArray[np.bool_] | None = None  # noqa: N815


@dataclass(frozen=True)
class ObjectSource:
    """Read the objects of a dataset.

    Attributes:
        labels: folder of the label maps, ``<case><file_ending>``.
        raw: the folder with ``instancesTr`` and ``boxesTr``: the raw dataset, or the copies that
            ``keep`` made.
        dataset: parsed dataset.json.
        reader: nnU-Net's class that reads the images.
    """

    labels: Path
    raw: Path
    dataset: Mapping[str, Any]
    reader: Any

    @classmethod
    def of_dataset(
        cls,
        labels: Path,
        dataset_name: str,
        dataset: Mapping[str, Any],
        reader: Any,
    ) -> "ObjectSource":
        """Return the source of a dataset, which may exist only in preprocessed form.

        If ``nnUNet_raw`` does not have the raw dataset, the copies that ``keep`` made are used.
        """
        raw = Path(os.environ.get(RAW_VARIABLE) or os.devnull) / dataset_name
        if not raw.is_dir():
            raw = labels.parent
        return cls(labels, raw, dataset, reader)

    def keep(self) -> None:
        """Copy ``instancesTr`` and ``boxesTr`` beside the folder of label maps.

        nnU-Net copies the label maps in the same way. Without the copies, touching objects would
        silently become one if the raw dataset is missing.
        """
        if self.raw != self.labels.parent:
            for name in (INSTANCES, BOXES):
                _mirror(self.raw / name, self.labels.parent / name)

    @cached_property
    def rules(self) -> Rules:
        """Return how labels become objects."""
        return read_rules(self.dataset)

    @cached_property
    def classes(self) -> tuple[ObjectClass, ...]:
        """Return the classes that are detected."""
        return object_classes(self.dataset, self.rules)

    @cached_property
    def other_labels(self) -> tuple[int, ...]:
        """Return the label values that exist and are not detected."""
        return other_label_values(self.dataset, self.classes)

    @property
    def turns_images(self) -> bool:
        """Return whether the reader turns images, so that its arrays are not those of the files."""
        return "Reorient" in getattr(self.reader, "__name__", "")

    def files(self, case: str) -> list[Path]:
        """Return the files that ``read`` reads for a case."""
        files = [self._label_map(case)]
        instance_map = self._instance_map(case)
        boxes = self._boxes(case)
        if instance_map is not None:
            files += [instance_map, self._json_of(instance_map)]
        elif boxes is not None:
            files.append(boxes)
        return files

    def has_masks(self, case: str) -> bool:
        """Return whether the outlines of a case's objects are known, and not only boxes."""
        return self._instance_map(case) is not None or self._boxes(case) is None

    def read(self, case: str) -> CaseObjects:
        """Read the objects of a case.

        Raises:
            ObjectsError: a file is missing or damaged, or two of them contradict each other.
        """
        label = self._label_map(case)
        array, properties = self._array(label)
        shape = as_size(array.shape)
        instance_map = self._instance_map(case)
        boxes = self._boxes(case)

        if instance_map is not None:
            ids, _ = self._array(instance_map)
            if ids.shape != array.shape:
                raise ObjectsError(
                    f"{instance_map} has {ids.shape} voxels (z, y, x), the labels of the case have "
                    f"{array.shape}; export it again",
                    code="objects-map-size",
                )
            label_of = labels_of_instances(self._json_of(instance_map))
            found = known_instances(
                ids,
                label_of,
                self.classes,
                self.rules,
                str(instance_map),
                self.other_labels,
            )
        elif boxes is not None:
            stored = stored_array(properties, shape)
            true_boxes = read_true_boxes(
                boxes,
                self.classes,
                stored.frame.shape_vox,
                self.other_labels,
            )
            found = with_ellipsoids(in_readers_array(true_boxes, stored), shape)
        else:
            found = find_instances(array, self.classes, self.rules, str(label))

        if any(item.id > MOST_CARRIED for item in found.objects):
            raise ObjectsError(
                f"{instance_map or label}: ids above {MOST_CARRIED} cannot be carried through "
                "training; number the objects from 1",
                code="objects-large-id",
            )

        ignored = ignore_value(self.dataset)
        return CaseObjects(
            instances=found,
            shape_vox=shape,
            spacing_mm=as_spacing(properties["spacing"]),
            has_masks=self.has_masks(case),
            uncounted_ZYX=None if ignored is None else array == ignored,
        )

    def _label_map(self, case: str) -> Path:
        return self.labels / f"{case}{self.dataset['file_ending']}"

    def _instance_map(self, case: str) -> Path | None:
        file = self.raw / INSTANCES / f"{case}{self.dataset['file_ending']}"
        return file if file.is_file() else None

    def _boxes(self, case: str) -> Path | None:
        file = self.raw / BOXES / f"{case}.json"
        return file if file.is_file() else None

    def _json_of(self, map_file: Path) -> Path:
        case = map_file.name.removesuffix(self.dataset["file_ending"])
        return map_file.with_name(f"{case}.json")

    def _array(self, file: Path) -> tuple[Any, dict[str, Any]]:
        """Return a label or instance map (Z, Y, X), and its properties."""
        try:
            array, properties = self.reader().read_seg(str(file))
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            fault = f"cannot be read ({error})" if file.is_file() else "does not exist"
            raise ObjectsError(f"{file} {fault}; restore it", code="objects-unreadable") from error
        return np.asarray(array)[0], properties


def in_readers_array(instances: Instances, stored: StoredArray) -> Instances:
    """Return objects known as boxes of the stored array with the boxes of the reader's array."""
    objects = []
    for item in instances.objects:
        box = as_box(stored.to_reader(item.box_zyx))
        objects.append(replace(item, box_zyx=box))
    return Instances(tuple(objects), None)


def _mirror(source: Path, target: Path) -> None:
    """Give the folder ``target`` the files of ``source``, with their times.

    A case is made again later if the size or the time of a file has changed.
    """
    wanted: dict[str, Path] = {}
    if source.is_dir():
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith("."):
                wanted[file.name] = file

    for old in target.iterdir() if target.is_dir() else ():
        if old.name not in wanted:
            old.unlink()
    for name, file in wanted.items():
        copy = target / name
        if not copy.is_file() or _size_and_time(copy) != _size_and_time(file):
            with atomic_path(copy) as temporary:
                shutil.copy2(file, temporary)


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def in_parallel(function: Any, items: Sequence[Any], num_processes: int) -> list[Any]:
    """Return ``function`` of every item, in order.

    A few items are computed in this process, because others would take longer to start than they
    save. The other processes end with this one, also if it is killed.

    Args:
        function, items: may be sent to another process.
        num_processes: largest number of processes.
    """
    # A process needs seconds to import torch and nnU-Net.
    workers = min(num_processes, len(items) // FEWEST_PER_PROCESS)
    if workers < 2:
        return [function(item) for item in items]
    return list(parallel_map(function, items, workers, "reading the objects of labelled scans"))


def sizes_of(
    objects: CaseObjects,
    num_classes: int,
    target_spacing_mm: Sequence[float],
    transpose: Sequence[int],
) -> list[list[Spacing]]:
    """Return for each class the sides of its objects in the preprocessed image, in voxels.

    Ignored objects are left out.

    Args:
        target_spacing_mm: spacing of the preprocessed image, with transposed axes.
        transpose: axis i of the preprocessed image is axis ``transpose[i]`` of the original.
    """
    found: list[list[Spacing]] = [[] for _ in range(num_classes)]
    for item in objects.instances.objects:
        if item.ignored:
            continue
        sides_vox = []
        for axis, target_mm in zip(transpose, target_spacing_mm, strict=True):
            side_vox = item.box_zyx[axis + 3] - item.box_zyx[axis]
            side_mm = side_vox * objects.spacing_mm[axis]
            sides_vox.append(side_mm / target_mm)
        found[item.class_index].append(as_spacing(sides_vox))
    return found


def labelled_cases(labels: Path, file_ending: str) -> list[str]:
    """Return the cases of a folder of label maps.

    Hidden files (macOS writes ``._case.nii.gz``) are not cases.
    """
    cases = []
    for file in labels.iterdir():
        if file.name.endswith(file_ending) and not file.name.startswith("."):
            cases.append(file.name.removesuffix(file_ending))
    return sorted(cases)


def has_only_boxes(dataset: Path) -> bool:
    """Return whether a raw dataset has boxes but no label maps."""
    return (dataset / BOXES).is_dir() and not (dataset / LABELS).is_dir()


def write_box_labels(dataset: Path) -> list[str]:
    """Write ``labelsTr/<case>`` with an ellipsoid in every box of ``boxesTr/<case>.json``.

    Cases that have a label map are left as they are. Boxes that do not count, and those of labels
    that are not detected, are not drawn. Training uses the boxes themselves; the ellipsoids only
    show where the foreground is, and no segmentation is learned from them.

    Returns:
        The cases written.

    Raises:
        UsageError: there is no ``boxesTr``, or an image has neither boxes nor labels.
        ObjectsError: an image or boxes that cannot be read, or contradict each other.
    """
    described = read_object(dataset / "dataset.json", ("labels", "file_ending"), MEND_YOURS)
    ending = str(described["file_ending"])
    folder = dataset / BOXES
    labels = dataset / LABELS
    if not folder.is_dir():
        raise UsageError(
            f"{dataset} has no folder {BOXES} with <case>.json files",
            code="boxes-no-folder",
        )

    images = first_channels(dataset, ending)
    wanted = [case for case in images if not (labels / f"{case}{ending}").is_file()]
    bare = [case for case in wanted if not (folder / f"{case}.json").is_file()]
    if bare:
        raise UsageError(
            f"{len(bare)} cases of {dataset} have neither labels nor boxes (first: {bare[0]}); for "
            f'a scan without objects write {BOXES}/{bare[0]}.json with {{"boxes": []}}',
            code="boxes-missing",
        )

    # Left behind by a run that was killed.
    remove_temporary(labels)

    source = ObjectSource(labels, dataset, described, reader=None)
    for case in wanted:
        boxes = folder / f"{case}.json"
        _write_label_map(images[case], boxes, labels / f"{case}{ending}", source)

    log.info("wrote %d label maps; %d existed", len(wanted), len(images) - len(wanted))
    return wanted


def _write_label_map(image_file: Path, boxes: Path, target: Path, source: ObjectSource) -> None:
    """Write the label map of a case, with the geometry of its image."""
    image = open_image(image_file)
    if image.GetDimension() != 3:
        raise ObjectsError(
            f"{image_file} is not a 3D image; detection needs one",
            code="objects-image-not-3d",
        )

    shape = as_size(image.GetSize()[::-1])
    known = read_true_boxes(boxes, source.classes, shape, source.other_labels)

    # A box that does not count is not foreground either: its content is not known.
    counted = [item for item in known.objects if not item.ignored]
    found = with_ellipsoids(replace(known, objects=tuple(counted)), shape)
    largest_id = max((item.id for item in found.objects), default=0)
    label_of_id = np.zeros(largest_id + 1, np.uint8)
    for item in found.objects:
        label_of_id[item.id] = source.classes[item.class_index].label

    assert found.ids_ZYX is not None
    write_label_map(label_of_id[found.ids_ZYX], image, target)
