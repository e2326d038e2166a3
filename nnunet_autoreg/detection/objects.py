"""The objects of a labelled dataset, case by case, in the original images: from an instance map,
boxes, or the label map.

``instancesTr/<case>`` with its JSON comes first, then ``boxesTr/<case>.json``, both optional and
beside ``labelsTr`` in the raw dataset; else every connected component of the label map is an
object.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import StoredArray, stored_array
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
    with_ellipsoids,
)
from nnunet_autoreg.errors import ObjectsError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.records import atomic_path

INSTANCES, BOXES = "instancesTr", "boxesTr"
RAW_VARIABLE = "nnUNet_raw"
FEWEST_PER_PROCESS = 8
MOST_CARRIED = 32767
"""nnU-Net's loader carries maps as 16-bit integers with a sign."""


@dataclass(frozen=True)
class CaseObjects:
    """The objects of one case, in its original image.

    Attributes:
        instances: with their map.
        shape_vox, spacing_mm: (z, y, x) of the image.
        has_masks: False where only boxes are known: the map holds ellipsoids then.
        uncounted_ZYX: voxels with nnU-Net's ignore label; None without one.
    """

    instances: Instances
    shape_vox: Size
    spacing_mm: Spacing
    has_masks: bool
    uncounted_ZYX: NDArray[np.bool_] | None = None  # noqa: N815


@dataclass(frozen=True)
class ObjectSource:
    """Where a dataset's objects come from.

    Attributes:
        labels: folder of the label maps, ``<case><file_ending>``.
        raw: the folder in which ``instancesTr`` and ``boxesTr`` are looked for: the raw dataset, or
            the copies of ``keep``.
        dataset: parsed dataset.json.
        reader: nnU-Net's class that reads the images.
    """

    labels: Path
    raw: Path
    dataset: Mapping[str, Any]
    reader: Any

    @classmethod
    def of_dataset(
        cls, labels: Path, dataset_name: str, dataset: Mapping[str, Any], reader: Any
    ) -> "ObjectSource":
        """With the raw dataset where ``nnUNet_raw`` has it, else with what ``keep`` copied:
        preprocessed data alone will do.
        """
        raw = Path(os.environ.get(RAW_VARIABLE) or os.devnull) / dataset_name
        return cls(labels, raw if raw.is_dir() else labels.parent, dataset, reader)

    def keep(self) -> None:
        """Copy ``instancesTr`` and ``boxesTr`` beside the folder of label maps, as nnU-Net copies
        those: without them, where the raw dataset is missing, touching objects would silently
        become one.
        """
        if self.raw != self.labels.parent:
            for name in (INSTANCES, BOXES):
                _mirror(self.raw / name, self.labels.parent / name)

    @cached_property
    def rules(self) -> Rules:
        """How labels become objects."""
        return read_rules(self.dataset)

    @cached_property
    def classes(self) -> tuple[ObjectClass, ...]:
        """What is detected."""
        return object_classes(self.dataset, self.rules)

    @cached_property
    def other_labels(self) -> tuple[int, ...]:
        """Label values that are there and not detected."""
        listed = [
            v
            for value in self.dataset["labels"].values()
            for v in (value if isinstance(value, (list, tuple)) else [value])
        ]
        chosen = {v for kind in self.classes for v in kind.values}
        return tuple(sorted({int(v) for v in listed} - chosen - {0, ignore_value(self.dataset)}))

    def files(self, case: str) -> list[Path]:
        """What ``read`` reads of a case."""
        label = self.labels / f"{case}{self.dataset['file_ending']}"
        known, boxes = self._known(case), self._boxes(case)
        if known is not None:
            return [label, known, _json_of(known, self.dataset["file_ending"])]
        return [label, boxes] if boxes is not None else [label]

    def has_masks(self, case: str) -> bool:
        """Whether more than boxes is known of a case."""
        return self._known(case) is not None or self._boxes(case) is None

    def read(self, case: str) -> CaseObjects:
        """The objects of a case.

        Raises:
            ObjectsError: a file is missing or damaged, or two of them contradict each other.
        """
        label = self.labels / f"{case}{self.dataset['file_ending']}"
        array, properties = self._array(label)
        spacing_mm = as_spacing(properties["spacing"])
        shape = as_size(array.shape)
        known, boxes = self._known(case), self._boxes(case)
        if known is not None:
            ids, _ = self._array(known)
            if ids.shape != array.shape:
                raise ObjectsError(
                    f"{known} has {ids.shape} voxels (z, y, x), the labels of the case have "
                    f"{array.shape}; export it anew"
                )
            labels = labels_of_instances(_json_of(known, self.dataset["file_ending"]))
            found = known_instances(
                ids, labels, self.classes, self.rules, str(known), self.other_labels
            )
        elif boxes is not None:
            stored = stored_array(properties, shape)
            known_boxes = read_true_boxes(
                boxes, self.classes, stored.frame.shape_vox, self.other_labels
            )
            found = with_ellipsoids(in_readers_array(known_boxes, stored), shape)
        else:
            found = find_instances(array, self.classes, self.rules, str(label))
        if any(o.id > MOST_CARRIED for o in found.objects):
            raise ObjectsError(
                f"{known or label}: ids above {MOST_CARRIED} cannot be carried through training; "
                "number the objects from 1"
            )
        ignored = ignore_value(self.dataset)
        return CaseObjects(
            found,
            shape,
            spacing_mm,
            self.has_masks(case),
            None if ignored is None else array == ignored,
        )

    def _known(self, case: str) -> Path | None:
        file = self.raw / INSTANCES / f"{case}{self.dataset['file_ending']}"
        return file if file.is_file() else None

    def _boxes(self, case: str) -> Path | None:
        file = self.raw / BOXES / f"{case}.json"
        return file if file.is_file() else None

    @property
    def turns_images(self) -> bool:
        """Whether the reader turns images, so that its arrays are not those of the files."""
        return "Reorient" in getattr(self.reader, "__name__", "")

    def _array(self, file: Path) -> tuple[Any, dict[str, Any]]:
        try:
            array, properties = self.reader().read_seg(str(file))
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            what = "does not exist" if not file.is_file() else f"cannot be read ({error})"
            raise ObjectsError(f"{file} {what}; restore it") from error
        return np.asarray(array)[0], properties


def in_readers_array(instances: Instances, stored: StoredArray) -> Instances:
    """Return objects that are known as boxes of the stored array with the boxes of the reader's
    array.
    """
    objects = []
    for item in instances.objects:
        z0, y0, x0, z1, y1, x1 = (float(v) for v in stored.to_reader(item.box_zyx))
        objects.append(replace(item, box_zyx=(z0, y0, x0, z1, y1, x1)))
    return Instances(tuple(objects), None)


def _json_of(map_file: Path, file_ending: str) -> Path:
    return map_file.with_name(f"{map_file.name.removesuffix(file_ending)}.json")


def _mirror(source: Path, target: Path) -> None:
    """Give ``target`` the files of ``source``, with their times: by them a case tells whether it
    must be made anew.
    """
    wanted = (
        {f.name: f for f in source.iterdir() if f.is_file() and not f.name.startswith(".")}
        if source.is_dir()
        else {}
    )
    for old in target.iterdir() if target.is_dir() else ():
        if old.name not in wanted:
            old.unlink()
    for name, file in wanted.items():
        new, copy = file.stat(), target / name
        if not copy.is_file() or (copy.stat().st_size, copy.stat().st_mtime_ns) != (
            new.st_size,
            new.st_mtime_ns,
        ):
            with atomic_path(copy) as temporary:
                shutil.copy2(file, temporary)


def in_parallel(function: Any, items: Sequence[Any], num_processes: int) -> list[Any]:
    """``function`` of every item, in order; in this process where another one would take longer to
    start than it saves.
    """
    workers = min(num_processes, len(items) // FEWEST_PER_PROCESS)
    if workers < 2:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, items))


def sizes_of(
    objects: CaseObjects,
    num_classes: int,
    target_spacing_mm: Sequence[float],
    transpose: Sequence[int],
) -> list[list[Spacing]]:
    """By class, the sides (z, y, x) that objects have once transposed and resampled, in voxels;
    ignored ones left out.
    """
    found: list[list[Spacing]] = [[] for _ in range(num_classes)]
    for item in objects.instances.objects:
        if not item.ignored:
            sides = [
                (item.box_zyx[a + 3] - item.box_zyx[a]) * objects.spacing_mm[a] for a in transpose
            ]
            found[item.place].append(
                as_spacing([s / t for s, t in zip(sides, target_spacing_mm, strict=True)])
            )
    return found
