"""Objects of a segmentation by stock ``nnUNetv2_predict --save_probabilities``: the baseline that a
detector has to beat.

Every connected component of a label is an object, by the rules of dataset.json; its score is the
highest probability of its class in it.

Source: the idea of nnDetection's comparison with nnU-Net (Baumgartner et al. 2021, arXiv
    2106.00817).
"""

import logging
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from nnunet_autoreg.detection.export import Ids
from nnunet_autoreg.detection.geometry import stored_array
from nnunet_autoreg.detection.instances import (
    ObjectClass,
    Rules,
    find_instances,
    object_classes,
    read_rules,
)
from nnunet_autoreg.detection.scanfile import Detection, ScanFile, make_scan_file
from nnunet_autoreg.detection.scans import facts_of
from nnunet_autoreg.detection.validate import as_stored
from nnunet_autoreg.errors import PlanError, ScanError, UsageError
from nnunet_autoreg.io.files import check_file
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.records import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """An object found, and its number in the map of components."""

    id: int
    found: Detection


class Segmentations:
    """A folder that ``nnUNetv2_predict`` wrote; plans.json and dataset.json are in it, or in the
    model's folder around it.

    Raises:
        UsageError: no such folder, no segmentation, or no probabilities beside one.
        PlanError: a dataset.json that cannot be.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UsageError(
                f"--from-seg {folder} is no folder; give the one that nnUNetv2_predict wrote"
            )
        self.folder = folder
        self.dataset, self.plans = (
            _described(folder, name) for name in ("dataset.json", "plans.json")
        )
        self.manager = PlansManager(self.plans)
        self.rules: Rules = read_rules(self.dataset)
        self.classes = object_classes(self.dataset, self.rules)
        self.ending = str(self.dataset["file_ending"])
        names = (
            f.name.removesuffix(self.ending)
            for f in folder.iterdir()
            if f.name.endswith(self.ending) and not f.name.startswith(".")
        )
        self.names = sorted(names, key=natural_key)
        if not self.names:
            raise UsageError(f"--from-seg {folder} holds no segmentation (*{self.ending})")
        lacking = [name for name in self.names if not (folder / f"{name}.npz").is_file()]
        if lacking:
            raise UsageError(
                f"--from-seg {folder}: {len(lacking)} of {len(self.names)} segmentations lack "
                "their probabilities "
                f"({lacking[0]}.npz); run nnUNetv2_predict with --save_probabilities"
            )

    def describe(self) -> dict[str, Any]:
        """What results say of the model."""
        return {
            "dataset": self.manager.dataset_name,
            "plans": self.manager.plans_name,
            "from_seg": str(self.folder.resolve()),
        }

    def inputs(self, name: str) -> tuple[dict[str, Any], ...]:
        """The files of a case, as ``facts_of`` has them."""
        return facts_of([self.folder / f"{name}{self.ending}", self.folder / f"{name}.npz"])

    def read(
        self, name: str, min_score: float, settings: dict[str, Any]
    ) -> tuple[ScanFile, Ids, dict[str, Any]]:
        """The objects of a case: its file, the map (Z, Y, X) of their ids in it, and nnU-Net's
        properties of the image.

        Raises:
            ScanError: segmentation or probabilities cannot be read, do not belong together, or are
                no finite numbers.
        """
        seg, properties, probabilities = self._load(name)
        components, ids = objects_of(seg, probabilities, self._channels(), self.classes, self.rules)
        kept = sorted(
            (c for c in components if c.found.score >= min_score), key=lambda c: -c.found.score
        )
        table = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.uint16)
        for number, component in enumerate(kept, start=1):
            table[component.id] = number
        stored = stored_array(properties, seg.shape)
        labels = {kind.name: kind.label for kind in self.classes}
        found = as_stored([c.found for c in kept], stored)
        record = make_scan_file(
            name, stored.frame, found, labels, self.describe(), settings, self.inputs(name)
        )
        return record, table[ids], properties

    def _load(self, name: str) -> tuple[NDArray[Any], dict[str, Any], NDArray[Any]]:
        file, beside = self.folder / f"{name}{self.ending}", self.folder / f"{name}.npz"
        check_file(file)
        try:
            array, properties = self.manager.image_reader_writer_class().read_seg(str(file))
            probabilities = np.load(beside)["probabilities"]
        except (
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            AssertionError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise ScanError(
                "unreadable",
                f"{file.name} or {beside.name} cannot be read ({error}); predict it again",
            ) from error
        seg = np.asarray(array)[0]
        if probabilities.ndim != 4 or probabilities.shape[1:] != seg.shape:
            shapes = (
                f"{beside.name} has {probabilities.shape}, {file.name} has {seg.shape} voxels (z, "
                "y, x)"
            )
            raise ScanError("unreadable", f"{shapes}; predict it again")
        return seg, properties, probabilities

    def _channels(self) -> list[list[int]]:
        """By class, the channels of the probabilities whose sum is its own; a region inside another
        adds nothing to it.
        """
        labels = self.manager.get_label_manager(self.dataset)
        if labels.has_regions:
            regions = [{r} if isinstance(r, int) else set(r) for r in labels.foreground_regions]
        else:
            regions = [{int(label)} for label in labels.all_labels]
        within = [
            [(i, region) for i, region in enumerate(regions) if region <= set(kind.values)]
            for kind in self.classes
        ]
        found = [
            [i for i, region in own if not any(region < other for _, other in own)]
            for own in within
        ]
        for kind, channels in zip(self.classes, found, strict=True):
            if not channels:
                raise PlanError(
                    f"class '{kind.name}' is no union of what the segmentation predicts; change "
                    "autoreg_detection "
                    "in dataset.json"
                )
        return found


def objects_of(
    labels_ZYX: NDArray[Any],
    probabilities_CZYX: NDArray[Any],
    channels: Sequence[Sequence[int]],
    classes: Sequence[ObjectClass],
    rules: Rules,
) -> tuple[list[Component], Ids]:
    """The components of a segmentation with at least ``rules.min_voxels``, and the map of their
    numbers.

    Args:
        channels: by class; of several, the probabilities are added, to 1 at most.

    Raises:
        ScanError: probabilities that are no finite numbers.
    """
    instances = find_instances(labels_ZYX, classes, rules)
    assert instances.ids_ZYX is not None
    components = []
    for item in instances.objects:
        if item.ignored:
            continue
        kind = classes[item.place]
        place = tuple(
            slice(int(low), int(high))
            for low, high in zip(item.box_zyx[:3], item.box_zyx[3:], strict=True)
        )
        own = np.asarray(
            np.sum(
                [probabilities_CZYX[channel][place] for channel in channels[item.place]],
                axis=0,
                dtype=np.float64,
            )
        )
        score = float(own[instances.ids_ZYX[place] == item.id].max())
        if not math.isfinite(score):
            raise ScanError(
                "nonfinite",
                f"probabilities of {kind.name} are NaN or infinite in {item.box_zyx}; predict it "
                "again",
            )
        components.append(
            Component(item.id, Detection(item.box_zyx, kind.label, kind.name, min(1.0, score)))
        )
    if dropped := len(instances.objects) - len(components):
        log.info(
            "%d components below %d voxels are left out (min_voxels)", dropped, rules.min_voxels
        )
    return components, instances.ids_ZYX


def _described(folder: Path, name: str) -> dict[str, Any]:
    """A description in a folder of predictions, or above one of validation
    (``<model>/fold_0/validation``).
    """
    for place in (folder, folder.parent.parent):
        if (place / name).is_file():
            data: dict[str, Any] = read_json(place / name)
            return data
    raise UsageError(
        f"--from-seg {folder} holds no {name}; give the folder that nnUNetv2_predict wrote"
    )
