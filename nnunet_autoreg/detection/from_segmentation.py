"""Make detections of segmentations that stock ``nnUNetv2_predict --save_probabilities`` wrote.

This is the baseline for a detector. Every connected component of a label is an object, by the rules
of dataset.json. Its score is the highest probability of its class in it.

Source: the idea of nnDetection's comparison with nnU-Net (Baumgartner et al. 2021, arXiv
    2106.00817).
"""

import logging
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import stored_array
from nnunet_autoreg.detection.instances import (
    Ids,
    ObjectClass,
    Rules,
    find_instances,
    object_classes,
    read_rules,
)
from nnunet_autoreg.detection.objects import labelled_cases
from nnunet_autoreg.detection.scanfile import Detection, ScanFile, make_scan_file, voxels_of
from nnunet_autoreg.detection.validate import as_stored
from nnunet_autoreg.downstream.results import FROM_SEG, public_model
from nnunet_autoreg.downstream.scans import facts_of
from nnunet_autoreg.errors import PlanError, ScanError, UsageError
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.io.files import check_file
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.records import read_object

UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    AssertionError,
    zipfile.BadZipFile,
    zlib.error,
    MemoryError,
)
"""Errors that nnU-Net's readers and NumPy raise for a damaged file."""

MOST_CHANNELS = 1024
"""Of probabilities; a segmentation has one for each label or region."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """Hold a detected component, and its number in the map of components."""

    id: int
    found: Detection


class Segmentations:
    """A folder that ``nnUNetv2_predict`` wrote.

    plans.json and dataset.json are in it, or in the model's folder around it.

    Raises:
        UsageError: no such folder, no segmentation, or no probabilities beside one.
        PlanError: an impossible dataset.json.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UsageError(
                f"--from-seg {folder} is not a folder; give the one that nnUNetv2_predict wrote",
                code="from-seg-no-folder",
            )

        self.folder = folder
        self.dataset = _read_description(folder, "dataset.json")
        self.plans = _read_description(folder, "plans.json")
        self.manager = PlansManager(self.plans)
        self.rules: Rules = read_rules(self.dataset)
        self.classes = object_classes(self.dataset, self.rules)
        self.ending = str(self.dataset["file_ending"])

        self.names = sorted(labelled_cases(folder, self.ending), key=natural_key)
        if not self.names:
            raise UsageError(
                f"--from-seg {folder} holds no segmentation (*{self.ending}); give the folder that "
                "nnUNetv2_predict wrote",
                code="from-seg-empty",
            )

        lacking = [name for name in self.names if not (folder / f"{name}.npz").is_file()]
        if lacking:
            raise UsageError(
                f"--from-seg {folder}: {len(lacking)} of {len(self.names)} segmentations have no "
                f"probabilities ({lacking[0]}.npz); run nnUNetv2_predict with --save_probabilities",
                code="from-seg-no-probabilities",
            )

    def describe(self) -> dict[str, Any]:
        """Return the description of the model for results."""
        return public_model(
            {
                "dataset": self.manager.dataset_name,
                "plans": self.manager.plans_name,
                FROM_SEG: str(self.folder.resolve()),
            },
        )

    def inputs(self, name: str) -> tuple[dict[str, Any], ...]:
        """Return the sizes and times of the files of a case (``scans.facts_of``)."""
        segmentation = self.folder / f"{name}{self.ending}"
        probabilities = self.folder / f"{name}.npz"
        return facts_of([segmentation, probabilities])

    def read(
        self,
        name: str,
        min_score: float,
        settings: dict[str, Any],
    ) -> tuple[ScanFile, Ids, dict[str, Any]]:
        """Return the objects of a case.

        Args:
            name: name of the case.
            min_score: objects with a lower score are left out.
            settings: the options, as the file states them.

        Returns:
            Its file of detections, the map (Z, Y, X) of the ids in it, and nnU-Net's properties of
            the image.

        Raises:
            ScanError: segmentation or probabilities cannot be read, do not belong together, or are
                not finite.
        """
        seg, properties, probabilities = self._load(name)
        components, ids = objects_of(seg, probabilities, self._channels(), self.classes, self.rules)
        # Ids count from the highest score down, as in all files of detections.
        kept = [c for c in components if c.found.score >= min_score]
        kept.sort(key=lambda c: -c.found.score)

        # From the number of every component to its id in the file; 0 if it is left out.
        new_id = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.uint16)
        for number, component in enumerate(kept, start=1):
            new_id[component.id] = number

        stored = stored_array(properties, seg.shape)
        record = make_scan_file(
            name,
            stored.frame,
            as_stored([c.found for c in kept], stored),
            {kind.name: kind.label for kind in self.classes},
            self.describe(),
            settings,
            self.inputs(name),
        )
        return record, new_id[ids], properties

    def _load(self, name: str) -> tuple[NDArray[Any], dict[str, Any], NDArray[Any]]:
        """Return segmentation (Z, Y, X), properties, and probabilities (C, Z, Y, X) of a case."""
        file = self.folder / f"{name}{self.ending}"
        npz_file = self.folder / f"{name}.npz"
        check_file(file)
        try:
            array, properties = self.manager.image_reader_writer_class().read_seg(str(file))
            seg = np.asarray(array)[0]
            # A small file may claim to hold any number of values, so its shape is read first.
            shape = _shape_of_probabilities(npz_file)
            has_four_axes = len(shape) == 4
            fits = has_four_axes and shape[0] <= MOST_CHANNELS and shape[1:] == seg.shape
            probabilities = np.load(npz_file)["probabilities"] if fits else None
        except UNREADABLE as error:
            raise ScanError(
                "unreadable",
                f"{file.name} or {npz_file.name} cannot be read ({error}); predict it again",
            ) from error

        if probabilities is None:
            raise ScanError(
                "unreadable",
                f"{npz_file.name} has {shape}, {file.name} has {seg.shape} voxels "
                "(z, y, x); predict it again",
            )
        return seg, properties, probabilities

    def _channels(self) -> list[list[int]]:
        """Return for each class the channels whose probabilities add up to that of the class.

        A region inside another one of the class adds nothing to it.
        """
        labels = self.manager.get_label_manager(self.dataset)
        # Label values of every channel.
        regions: list[set[int]] = []
        for region in labels.foreground_regions if labels.has_regions else labels.all_labels:
            regions.append(set(region) if isinstance(region, Iterable) else {int(region)})

        found = []
        for kind in self.classes:
            own = [i for i, region in enumerate(regions) if region <= set(kind.values)]
            outermost = []
            for i in own:
                if not any(regions[i] < regions[other] for other in own):
                    outermost.append(i)
            if not outermost:
                raise PlanError(
                    f"class '{kind.name}' is not a union of predicted labels; change "
                    "autoreg_detection in dataset.json",
                    code="from-seg-class",
                )
            found.append(outermost)
        return found


def _shape_of_probabilities(npz_file: Path) -> tuple[int, ...]:
    """Return the shape of the probabilities in a file, without unpacking them.

    Raises:
        ValueError: the file holds values of another type, or is of a newer format.
    """
    with zipfile.ZipFile(npz_file) as archive, archive.open("probabilities.npy") as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"format {version} of NumPy is not known")
        shape, _, dtype = readers[version](stream)
    if dtype.kind != "f":
        raise ValueError(f"values of type {str(dtype)[:40]} instead of probabilities")
    return tuple(shape)


def objects_of(
    labels_ZYX: NDArray[Any],
    probabilities_CZYX: NDArray[Any],
    channels: Sequence[Sequence[int]],
    classes: Sequence[ObjectClass],
    rules: Rules,
) -> tuple[list[Component], Ids]:
    """Return the components of a segmentation with at least ``rules.min_voxels``.

    Args:
        labels_ZYX: the segmentation.
        probabilities_CZYX: one channel for each label or region.
        channels: channels of each class; the probabilities of several are added, up to 1.

    Returns:
        The components, and the map (Z, Y, X) of their numbers.

    Raises:
        ScanError: probabilities that are not finite.
    """
    instances = find_instances(labels_ZYX, classes, rules)
    assert instances.ids_ZYX is not None
    components = []
    for item in instances.objects:
        if item.ignored:
            continue
        kind = classes[item.class_index]
        region = voxels_of(item.box_zyx, as_size(labels_ZYX.shape))
        of_channels = [probabilities_CZYX[c][region] for c in channels[item.class_index]]
        # Probabilities may be in half precision, in which sums would be rounded.
        own_ZYX = np.asarray(np.sum(of_channels, axis=0, dtype=np.float64))
        is_inside = instances.ids_ZYX[region] == item.id

        score = float(own_ZYX[is_inside].max())
        if not math.isfinite(score):
            raise ScanError(
                "nonfinite",
                f"probabilities of {kind.name} are NaN or infinite in {item.box_zyx}; predict it "
                "again",
            )
        found = Detection(item.box_zyx, kind.label, kind.name, min(1.0, score))
        components.append(Component(item.id, found))

    num_left_out = len(instances.objects) - len(components)
    if num_left_out:
        log.info(
            "%d components of fewer than %d voxels are left out (min_voxels)",
            num_left_out,
            rules.min_voxels,
        )
    return components, instances.ids_ZYX


def _read_description(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file that lies in a folder of predictions, or two folders above it.

    The second is the case for ``<model>/fold_0/validation``.
    """
    for candidate in (folder, folder.parent.parent):
        if (candidate / name).is_file():
            return read_object(candidate / name)
    raise UsageError(
        f"--from-seg {folder} holds no {name}; give the folder that nnUNetv2_predict wrote",
        code="from-seg-no-description",
    )
