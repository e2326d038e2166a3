"""Prepare the objects in preprocessed images, and load patches with their boxes.

Augmentation carries a map of object ids. Components are not searched for after augmentation,
because cropping and rotating merge and split them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import as_box, preprocessing_of
from nnunet_autoreg.detection.instances import Instance, ObjectClass, Rules, boxes_of_ids
from nnunet_autoreg.detection.objects import ObjectSource, in_parallel
from nnunet_autoreg.errors import ObjectsError, PlanError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import atomic_path, from_jsonable, read_json, to_jsonable, write_json

INDEX = "boxes.json"
VERSION = 1
CLASS_KEY = "place"
"""Key of the index of an object's class in ``boxes.json``."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseBoxes:
    """Hold the objects of a preprocessed case.

    Attributes:
        stamp: description of their inputs. If it changes, they are made again.
        objects: boxes in voxel edges of the preprocessed image; ``num_voxels`` there.
        has_masks: see ``objects.CaseObjects``.
    """

    stamp: str
    objects: tuple[Instance, ...]
    has_masks: bool


@dataclass(frozen=True)
class InstanceIndex:
    """Hold ``boxes.json``: all cases of a configuration, and the rules for their objects."""

    rules: Rules
    classes: tuple[ObjectClass, ...]
    cases: dict[str, CaseBoxes]
    version: int = VERSION

    @property
    def has_masks(self) -> bool:
        """Return whether every object's outline is known."""
        return all(case.has_masks for case in self.cases.values())

    def sizes_vox(self) -> dict[str, list[list[float]]]:
        """Return class name -> sides (z, y, x) of its objects; ignored objects are left out."""
        found: dict[str, list[list[float]]] = {kind.name: [] for kind in self.classes}
        for case in self.cases.values():
            for item in case.objects:
                if not item.ignored:
                    sides = np.subtract(item.box_zyx[3:], item.box_zyx[:3]).tolist()
                    found[self.classes[item.class_index].name].append(sides)
        return found


def write_index(file: Path, index: InstanceIndex) -> None:
    """Write ``boxes.json``."""
    data = to_jsonable(index)
    for case in data["cases"].values():
        for item in case["objects"]:
            item[CLASS_KEY] = item.pop("class_index")
    write_json(file, data)


def read_index(file: Path) -> InstanceIndex:
    """Read ``boxes.json``.

    Raises:
        PlanError: it cannot be read, or is of another format.
    """
    data = read_json(file)
    try:
        for case in data["cases"].values():
            for item in case["objects"]:
                item["class_index"] = item.pop(CLASS_KEY)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{file} does not list the objects of cases ({error!r})",
            code="detection-index-format",
        ) from error
    return from_jsonable(InstanceIndex, data, str(file))


def instances_folder(preprocessed: Path) -> Path:
    """Return the folder of the id maps of a folder of preprocessed cases.

    It lies beside that folder and not inside, where every ``.b2nd`` counts as a case.
    """
    return preprocessed.with_name(f"{preprocessed.name}_instances")


@dataclass(frozen=True)
class IdMapMaker:
    """Make id maps; it can be sent to another process.

    Attributes:
        preprocessed: folder of preprocessed cases.
        source: source of the objects.
        transpose: axis i of the preprocessed image is axis ``transpose[i]`` of the original.
        target_spacing_mm, patch_size: values of the configuration, axes transposed.
        resample_seg: nnU-Net's function that resamples label maps.
    """

    preprocessed: Path
    source: ObjectSource
    transpose: tuple[int, int, int]
    target_spacing_mm: tuple[float, float, float]
    patch_size: Size
    resample_seg: Any

    def stamp(self, case: str, shape_vox: Size) -> str:
        """Return a description of the inputs of a case's objects, apart from the rules.

        Raises:
            ObjectsError: a file is missing.
        """
        files = []
        try:
            for file in self.source.files(case):
                status = file.stat()
                files.append((file.name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise ObjectsError(
                f"{error.filename} cannot be read ({error.strerror}); restore it, or preprocess "
                "again",
                code="objects-unreadable",
            ) from error

        # An earlier version took boxes for those of the reader's array. If the reader turns images,
        # those were wrong and must be made again, so the stamp of right ones differs.
        uses_stored_boxes = self.source.turns_images and not self.source.has_masks(case)
        suffix = " boxes of the stored array" if uses_stored_boxes else ""
        return f"{shape_vox} {self.target_spacing_mm} {files}{suffix}"

    def make(self, case: str) -> CaseBoxes:
        """Write the id map of a case and return its boxes.

        Raises:
            ObjectsError: labels that are missing, damaged, or contradict each other.
        """
        dataset_class = infer_dataset_class(str(self.preprocessed))
        dataset = dataset_class(str(self.preprocessed), [case])
        _, seg, _, properties = dataset.load_case(case)
        shape = as_size(seg.shape[1:])
        found = self.source.read(case)
        geometry = preprocessing_of(properties, shape, np.argsort(self.transpose).tolist())

        # As nnU-Net makes the label map: transpose, crop, resample.
        assert found.instances.ids_ZYX is not None
        ids = found.instances.ids_ZYX.astype(np.int16).transpose(self.transpose)
        crop = tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])
        spacing = [found.spacing_mm[axis] for axis in self.transpose]
        resampled = self.resample_seg(ids[crop][None], shape, spacing, self.target_spacing_mm)
        ids_ZYX = np.asarray(resampled)[0].astype(np.int16)

        # Several processes write at the same time; each uses one thread.
        blosc2.set_nthreads(1)
        blocks, chunks = comp_blosc2_params((1, *ids_ZYX.shape), self.patch_size, bytes_per_pixel=2)
        with atomic_path(instances_folder(self.preprocessed) / f"{case}.b2nd") as temporary:
            blosc2.asarray(
                np.ascontiguousarray(ids_ZYX),
                urlpath=str(temporary),
                chunks=chunks[1:],
                blocks=blocks[1:],
            )

        # Boxes are transformed and not measured, because the map has only whole voxels.
        present = boxes_of_ids(ids_ZYX)
        objects = []
        for item in found.instances.objects:
            box = as_box(geometry.to_preprocessed(item.box_zyx))
            num_voxels = present[item.id][1] if item.id in present else 0
            objects.append(replace(item, box_zyx=box, num_voxels=num_voxels))
        return CaseBoxes(self.stamp(case, shape), tuple(objects), found.has_masks)


def prepare_instances(
    maker: IdMapMaker,
    cases: Sequence[str],
    num_processes: int = 1,
) -> InstanceIndex:
    """Return the objects of all cases; those that were made before are kept.

    ``boxes.json`` is written last.

    Args:
        cases: names of the preprocessed cases.
        num_processes: largest number of processes.

    Raises:
        ObjectsError: labels that are missing, damaged, or contradict each other.
    """
    folder = instances_folder(maker.preprocessed)
    source = maker.source
    # The raw dataset may be gone when training is continued elsewhere.
    source.keep()

    # What was made before by the same rules.
    old: dict[str, CaseBoxes] = {}
    rules = (VERSION, source.rules, source.classes)
    if (folder / INDEX).is_file():
        try:
            index = read_index(folder / INDEX)
            if (index.version, index.rules, index.classes) == rules:
                old = index.cases
        except PlanError as error:
            log.warning("%s; the objects are searched for again", error)

    # An equal stamp says that neither labels nor spacing nor size have changed.
    dataset = infer_dataset_class(str(maker.preprocessed))(str(maker.preprocessed), list(cases))
    kept = {}
    for case in cases:
        _, seg, _, _ = dataset.load_case(case)
        stamp = maker.stamp(case, as_size(seg.shape[1:]))
        is_same = case in old and old[case].stamp == stamp
        if is_same and (folder / f"{case}.b2nd").is_file():
            kept[case] = old[case]

    wanted = [case for case in cases if case not in kept]
    if wanted:
        log.info("finding the objects of %d cases (only once)", len(wanted))
    results = in_parallel(maker.make, wanted, num_processes)
    made = dict(zip(wanted, results, strict=True))
    # In the order of ``cases``, regardless of which were kept.
    by_case = {case: kept.get(case) or made[case] for case in cases}
    index = InstanceIndex(source.rules, source.classes, by_case)
    if made:
        write_index(folder / INDEX, index)
        _log_numbers(index)
    return index


def _log_numbers(index: InstanceIndex) -> None:
    """Log how many objects of each class there are, and warn about those that vanish."""
    num_of_class = {kind.name: 0 for kind in index.classes}
    num_ignored = 0
    num_vanished = 0
    num_empty = 0
    for case in index.cases.values():
        num_empty += not case.objects
        for item in case.objects:
            if item.ignored:
                num_ignored += 1
                continue
            num_of_class[index.classes[item.class_index].name] += 1
            num_vanished += not item.num_voxels

    log.info(
        "%d cases, %d of them without an object: %s; %d objects smaller than %d voxels are ignored",
        len(index.cases),
        num_empty,
        ", ".join(f"{number} {name}" for name, number in num_of_class.items()),
        num_ignored,
        index.rules.min_voxels,
    )
    if num_vanished:
        log.warning(
            "%d objects vanish at the target spacing or lie outside the non-zero part of the "
            "image, and cannot be learned; use a finer spacing",
            num_vanished,
        )


class InstanceDataset:
    """nnU-Net's dataset, with each case's id map in the place of an earlier stage's segmentation.

    The loader carries that segmentation through augmentation with the labels.
    """

    def __init__(self, stock: Any, preprocessed: Path, index: InstanceIndex):
        self.stock = stock
        self.folder = instances_folder(preprocessed)
        self.index = index
        self.identifiers: list[str] = stock.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return image (C, Z, Y, X), segmentation (1, Z, Y, X), ids (Z, Y, X), properties."""
        data, seg, _, properties = self.stock.load_case(identifier)
        options = getattr(self.stock, "mmap_kwargs", {})
        ids = blosc2.open(urlpath=str(self.folder / f"{identifier}.b2nd"), mode="r", **options)
        return data, seg, ids, properties


class InstanceLoader(nnUNetDataLoader):  # type: ignore[misc]
    """nnU-Net's loader, which draws a share of each batch around an object.

    Every object of the fold is equally likely. A batch also has ``objects``: for each sample the
    boxes (G, 6) in voxel edges of the patch, the class indices, and which are ignored.
    """

    def __init__(self, data: InstanceDataset, *args: Any, **kwargs: Any):
        super().__init__(data, *args, **kwargs)
        # (case, box) of every object that a patch can be drawn around.
        self.centre_boxes: list[Any] = []
        self.objects_of_case: dict[str, dict[int, Instance]] = {}
        for name in data.identifiers:
            objects = data.index.cases[name].objects
            self.objects_of_case[name] = {item.id: item for item in objects}
            for item in objects:
                if item.num_voxels and not item.ignored:
                    self.centre_boxes.append((name, item.box_zyx))
        self.min_voxels = data.index.rules.min_voxels
        self.wanted: list[Any] = []

    def get_indices(self) -> list[str]:
        """Return the cases of a batch.

        The box that each sample is drawn around is kept for ``get_bbox``.
        """
        names = []
        self.wanted = []
        for number in range(self.batch_size):
            # nnU-Net decides which samples of a batch are drawn around foreground.
            if self.centre_boxes and self.get_do_oversample(number):
                name, box = self.centre_boxes[np.random.randint(len(self.centre_boxes))]
            else:
                name = self.indices[np.random.randint(len(self.indices))]
                box = None
            names.append(name)
            self.wanted.append(box)
        return names

    def get_bbox(
        self,
        data_shape: Any,
        force_fg: bool,
        class_locations: Any,
        overwrite_class: Any = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Return the start and the end (z, y, x) of a patch: anywhere, or around the wanted object.

        That object is whole in the part of the patch that augmentation keeps.
        """
        start = patch_start(
            self.wanted.pop(0),
            as_size(data_shape),
            as_size(self.patch_size),
            as_size(self.final_patch_size),
        )
        end = [low + size for low, size in zip(start, self.patch_size, strict=True)]
        return start, end

    def generate_train_batch(self) -> dict[str, Any]:
        """Return nnU-Net's batch, with its id map turned into boxes."""
        batch: dict[str, Any] = super().generate_train_batch()
        # The target's channels are the labels and the ids.
        ids_BZYX = batch["target"][:, 1].numpy()
        # The steps after the loader expect only labels.
        batch["target"] = batch["target"][:, :1].contiguous()
        objects = []
        for ids_ZYX, name in zip(ids_BZYX, batch["keys"], strict=True):
            known = self.objects_of_case[name]
            objects.append(objects_of_patch(ids_ZYX, known, self.min_voxels))
        batch["objects"] = objects
        return batch


def patch_start(
    box_zyx: Sequence[float] | None,
    shape: Size,
    patch: Size,
    final: Size,
) -> list[int]:
    """Return the start of a patch that augmentation cuts to its middle ``final`` voxels.

    Without a box, the start is drawn anywhere. With a box, it is drawn so that the box is whole in
    that middle. If the box is larger, the middle is whole in the box. The middle stays in the
    image, even if the box lies at its border. An image that is smaller is padded on both sides.

    Args:
        box_zyx: voxel edges of an object; None for none.
        shape: shape of the image, (z, y, x).
        patch: size of the patch, (z, y, x).
        final: size of its middle, (z, y, x).
    """
    starts = []
    for axis in range(3):
        margin = (patch[axis] - final[axis]) // 2
        lowest = 0
        highest = shape[axis] - final[axis]
        # The image is smaller than the middle: put it into the centre.
        if highest < 0:
            lowest = highest = highest // 2

        low = lowest
        high = highest
        if box_zyx is not None:
            box_start = int(np.floor(box_zyx[axis]))
            box_end = int(np.ceil(box_zyx[axis + 3]))
            # Both ends are allowed starts; they change places for a box larger than the middle.
            ends = sorted((box_start, box_end - final[axis]))
            low, high = (min(max(end, lowest), highest) for end in ends)
        starts.append(int(np.random.randint(low, high + 1)) - margin)
    return starts


def objects_of_patch(
    ids_ZYX: NDArray[Any],
    known: Mapping[int, Instance],
    min_voxels: int,
) -> dict[str, NDArray[Any]]:
    """Return the boxes of the parts of objects that are in a patch.

    Parts of fewer than ``min_voxels`` are ignored.

    Args:
        ids_ZYX: the patch's map of ids.
        known: id -> object of the case.

    Returns:
        ``boxes`` (G, 6) in voxel edges of the patch, ``labels`` (G,) with the class indices, and
        ``ignored`` (G,).
    """
    boxes = []
    labels = []
    ignored = []
    # Augmentation fills with -1, which is not an object either.
    for i, (box, count) in boxes_of_ids(np.maximum(ids_ZYX, 0)).items():
        if i not in known:
            continue
        boxes.append(box)
        labels.append(known[i].class_index)
        ignored.append(known[i].ignored or count < min_voxels)

    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 6),
        "labels": np.array(labels, dtype=np.int64),
        "ignored": np.array(ignored, dtype=bool),
    }
