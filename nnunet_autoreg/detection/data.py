"""Objects in preprocessed space, and patches with their boxes: what nnU-Net's loader is asked to
carry through its augmentation.

Ids, not components found after augmentation: cropping and rotating merge and split components
    (design, detection.md section 3).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import blosc2
import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import preprocessing_of
from nnunet_autoreg.detection.instances import Instance, ObjectClass, Rules, boxes_of_ids
from nnunet_autoreg.detection.objects import ObjectSource, in_parallel
from nnunet_autoreg.errors import ObjectsError, PlanError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import atomic_path, from_jsonable, read_json, write_json

INDEX = "boxes.json"
VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseBoxes:
    """The objects of a preprocessed case.

    Attributes:
        stamp: what they were made of; another one means making them anew.
        objects: boxes in voxel edges of the preprocessed image; ``num_voxels`` there.
        has_masks: see ``objects.CaseObjects``.
    """

    stamp: str
    objects: tuple[Instance, ...]
    has_masks: bool


@dataclass(frozen=True)
class InstanceIndex:
    """``boxes.json``: all cases of a configuration, and the rules by which their objects were
    found.
    """

    rules: Rules
    classes: tuple[ObjectClass, ...]
    cases: dict[str, CaseBoxes]
    version: int = VERSION

    @property
    def has_masks(self) -> bool:
        """Whether every object's outline is known."""
        return all(case.has_masks for case in self.cases.values())

    def sizes_vox(self) -> dict[str, list[list[float]]]:
        """Class name -> sides of its objects, ignored ones left out."""
        found: dict[str, list[list[float]]] = {kind.name: [] for kind in self.classes}
        for case in self.cases.values():
            for item in case.objects:
                if not item.ignored:
                    sides = [float(item.box_zyx[a + 3] - item.box_zyx[a]) for a in range(3)]
                    found[self.classes[item.place].name].append(sides)
        return found


def instances_folder(preprocessed: Path) -> Path:
    """Where the id maps of a folder of preprocessed cases lie: not in it, where every ``.b2nd``
    counts as a case.
    """
    return preprocessed.with_name(f"{preprocessed.name}_instances")


@dataclass(frozen=True)
class Maker:
    """Makes id maps; all it holds can be sent to another process.

    Attributes:
        preprocessed: folder of preprocessed cases.
        source: of the objects.
        transpose, target_spacing_mm, patch_size: of the configuration.
        resample_seg: nnU-Net's function for label maps.
    """

    preprocessed: Path
    source: ObjectSource
    transpose: tuple[int, int, int]
    target_spacing_mm: tuple[float, float, float]
    patch_size: Size
    resample_seg: Any

    def stamp(self, case: str, shape_vox: Size) -> str:
        """What the objects of a case depend on besides the rules."""
        try:
            files = [
                (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.source.files(case)
            ]
        except OSError as error:
            raise ObjectsError(
                f"{error.filename} cannot be read ({error.strerror}); restore it, or preprocess "
                "again"
            ) from error
        # Boxes of such readers were once taken for the reader's own, and must be made anew.
        turned = (
            " boxes of the stored array"
            if self.source.turns_images and not self.source.has_masks(case)
            else ""
        )
        return f"{shape_vox} {self.target_spacing_mm} {files}{turned}"

    def make(self, case: str) -> CaseBoxes:
        """Write the id map of a case and give its boxes."""
        _, seg, _, properties = infer_dataset_class(str(self.preprocessed))(
            str(self.preprocessed), [case]
        ).load_case(case)
        shape = as_size(seg.shape[1:])
        found = self.source.read(case)
        geometry = preprocessing_of(properties, shape, np.argsort(self.transpose).tolist())
        assert found.instances.ids_ZYX is not None
        ids = found.instances.ids_ZYX.astype(np.int16).transpose(self.transpose)
        crop = tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])
        spacing = [found.spacing_mm[a] for a in self.transpose]
        carried = np.asarray(
            self.resample_seg(ids[crop][None], shape, spacing, self.target_spacing_mm)
        )[0].astype(np.int16)
        self._write(case, carried)
        present = boxes_of_ids(carried)
        objects = []
        for item in found.instances.objects:
            box = tuple(float(v) for v in geometry.to_preprocessed(item.box_zyx))
            num_voxels = present[item.id][1] if item.id in present else 0
            objects.append(Instance(item.id, item.place, cast(Any, box), num_voxels, item.ignored))
        return CaseBoxes(self.stamp(case, shape), tuple(objects), found.has_masks)

    def _write(self, case: str, ids_ZYX: NDArray[np.int16]) -> None:
        blosc2.set_nthreads(1)
        blocks, chunks = comp_blosc2_params((1, *ids_ZYX.shape), self.patch_size, bytes_per_pixel=2)
        with atomic_path(instances_folder(self.preprocessed) / f"{case}.b2nd") as temporary:
            blosc2.asarray(
                np.ascontiguousarray(ids_ZYX),
                urlpath=str(temporary),
                chunks=chunks[1:],
                blocks=blocks[1:],
            )


def prepare_instances(maker: Maker, cases: Sequence[str], num_processes: int = 1) -> InstanceIndex:
    """The objects of all cases: those made before are kept, the others made; ``boxes.json`` is
    written last.

    Raises:
        ObjectsError: labels that are missing, damaged, or contradict each other.
    """
    file = instances_folder(maker.preprocessed) / INDEX
    source = maker.source
    source.keep()
    old = _read_index(file, source)
    stock = infer_dataset_class(str(maker.preprocessed))(str(maker.preprocessed), list(cases))
    stamps = {
        case: maker.stamp(case, as_size(stock.load_case(case)[1].shape[1:])) for case in cases
    }
    kept = {
        c: old[c]
        for c in cases
        if c in old and old[c].stamp == stamps[c] and (file.parent / f"{c}.b2nd").is_file()
    }
    wanted = [case for case in cases if case not in kept]
    if wanted:
        log.info("objects of %d cases are found in their labels; this is done once", len(wanted))
    made = dict(zip(wanted, in_parallel(partial(_make, maker), wanted, num_processes), strict=True))
    index = InstanceIndex(
        source.rules, source.classes, {case: kept.get(case) or made[case] for case in cases}
    )
    if made:
        write_json(file, index)
        _tell(index)
    return index


def _make(maker: Maker, case: str) -> CaseBoxes:
    return maker.make(case)


def _read_index(file: Path, source: ObjectSource) -> dict[str, CaseBoxes]:
    """Cases made before by the same rules; none if there are none, or the file cannot be used."""
    if not file.is_file():
        return {}
    try:
        index = from_jsonable(InstanceIndex, read_json(file), str(file))
    except PlanError as error:
        log.warning("%s; the objects are looked for anew", error)
        return {}
    same = (index.version, index.rules, index.classes) == (VERSION, source.rules, source.classes)
    return index.cases if same else {}


def _tell(index: InstanceIndex) -> None:
    number = {kind.name: 0 for kind in index.classes}
    ignored = vanished = empty = 0
    for case in index.cases.values():
        empty += not case.objects
        for item in case.objects:
            number[index.classes[item.place].name] += not item.ignored
            ignored += item.ignored
            vanished += not item.num_voxels and not item.ignored
    told = ", ".join(f"{n} {name}" for name, n in number.items())
    log.info(
        "%d cases, %d of them without an object: %s; %d smaller than %d voxels are ignored",
        len(index.cases),
        empty,
        told,
        ignored,
        index.rules.min_voxels,
    )
    if vanished:
        log.warning(
            "%d objects vanish at the target spacing or lie outside of the image's content, and "
            "cannot be learned; use a finer "
            "spacing",
            vanished,
        )


class InstanceDataset:
    """nnU-Net's dataset with the id map of each case where the loader expects the segmentation of
    an earlier stage.
    """

    def __init__(self, stock: Any, preprocessed: Path, index: InstanceIndex):
        self.stock, self.folder, self.index = stock, instances_folder(preprocessed), index
        self.identifiers: list[str] = stock.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Image (C, Z, Y, X), segmentation (1, Z, Y, X), ids (Z, Y, X), properties."""
        data, seg, _, properties = self.stock.load_case(identifier)
        options = getattr(self.stock, "mmap_kwargs", {})
        return (
            data,
            seg,
            blosc2.open(urlpath=str(self.folder / f"{identifier}.b2nd"), mode="r", **options),
            properties,
        )


class InstanceLoader(nnUNetDataLoader):  # type: ignore[misc]
    """nnU-Net's loader; a share of each batch is drawn around an object, every object of the fold
    as likely as any other.

    A batch has ``objects`` besides: for each sample the boxes (G, 6) in voxel edges of the patch,
        places of classes, and which are
    ignored.
    """

    def __init__(self, data: InstanceDataset, *args: Any, **kwargs: Any):
        super().__init__(data, *args, **kwargs)
        cases = data.index.cases
        every = [(name, item) for name in data.identifiers for item in cases[name].objects]
        self.around = [
            (name, item.box_zyx) for name, item in every if item.num_voxels and not item.ignored
        ]
        self.known = {
            name: {item.id: item for item in cases[name].objects} for name in data.identifiers
        }
        self.min_voxels = data.index.rules.min_voxels
        self.wanted: list[Any] = []

    def get_indices(self) -> list[str]:
        """The cases of a batch; which object each sample is drawn around is kept for
        ``get_bbox``.
        """
        names, self.wanted = [], []
        for number in range(self.batch_size):
            if self.around and self.get_do_oversample(number):
                name, box = self.around[np.random.randint(len(self.around))]
            else:
                name, box = self.indices[np.random.randint(len(self.indices))], None
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
        """Where a patch lies: anywhere, or so that the wanted object is whole in what remains of it
        after augmentation.
        """
        box = self.wanted.pop(0)
        place = place_around(
            box, as_size(data_shape), as_size(self.patch_size), as_size(self.final_patch_size)
        )
        return place, [p + s for p, s in zip(place, self.patch_size, strict=True)]

    def generate_train_batch(self) -> dict[str, Any]:
        """nnU-Net's batch, its id map turned into boxes."""
        batch: dict[str, Any] = super().generate_train_batch()
        ids = batch["target"][:, 1].numpy()
        batch["target"] = batch["target"][:, :1].contiguous()
        batch["objects"] = [
            objects_of_patch(i, self.known[name], self.min_voxels)
            for i, name in zip(ids, batch["keys"], strict=True)
        ]
        return batch


def place_around(
    box_zyx: Sequence[float] | None, shape: Size, patch: Size, final: Size
) -> list[int]:
    """Start of a patch that augmentation cuts to its middle ``final`` voxels.

    With a box, a place at random where the box is whole in that middle - or the middle whole in a
    larger box -, as near as the image's borders allow; without, a place anywhere. The middle stays
    in the image; an image that is smaller is padded on both sides.
    """
    start = []
    for axis in range(3):
        margin = (patch[axis] - final[axis]) // 2
        lowest, highest = 0, shape[axis] - final[axis]
        if highest < 0:
            lowest = highest = highest // 2
        low, high = lowest, highest
        if box_zyx is not None:
            ends = sorted(
                (int(np.floor(box_zyx[axis])), int(np.ceil(box_zyx[axis + 3])) - final[axis])
            )
            low, high = (min(max(end, lowest), highest) for end in ends)
        start.append(int(np.random.randint(low, high + 1)) - margin)
    return start


def objects_of_patch(
    ids_ZYX: NDArray[Any], known: Mapping[int, Instance], min_voxels: int
) -> dict[str, NDArray[Any]]:
    """Boxes of what is left of each object in a patch; remains below ``min_voxels`` are ignored."""
    found = [
        (box, count, known[i])
        for i, (box, count) in boxes_of_ids(np.maximum(ids_ZYX, 0)).items()
        if i in known
    ]
    return {
        "boxes": np.array([box for box, _, _ in found], dtype=np.float32).reshape(-1, 6),
        "labels": np.array([item.place for _, _, item in found], dtype=np.int64),
        "ignored": np.array(
            [item.ignored or count < min_voxels for _, count, item in found], dtype=bool
        ),
    }
