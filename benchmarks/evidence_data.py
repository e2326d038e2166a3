"""The data of ``evidence.py``: datasets preprocessed by the project's store, kept whole in memory.

One set is one ``.npz`` file. Voxels are stored as 8-bit numbers with a scale and a zero point per
scan, so that the intensity 0 (background outside a normalisation mask) stays exactly 0.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.benchmark.split import Division, divide, find_patients, ordered
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.fingerprint import fingerprint
from nnunet_autoreg.corpus.index import Index, index_scans
from nnunet_autoreg.corpus.licences import stated_licences
from nnunet_autoreg.corpus.locations import label_names
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.downstream.probe import stored_labels
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.planning.pool import Pool, pool_of
from nnunet_autoreg.records import atomic_path, from_jsonable, to_jsonable
from nnunet_autoreg.store.store import Store

log = logging.getLogger("nnunet_autoreg.evidence")

FORMAT = 1
LEVELS = 255
OUTSIDE = (0.02, 99.98)
"""Percentiles of a scan between which its 255 levels lie; values beyond them are clipped."""
SMALLEST_STEP = 1 / 16
"""In standard deviations of a scan. The rounding error of 0.018 is far below the noise, and finer
levels only cost bytes."""


@dataclass(frozen=True)
class SetDefaults:
    """Settings of a dataset that are used unless the flags give others.

    Attributes:
        dataset: folder name below ``nnUNet_raw``.
        crop_vox: (z, y, x) of pretraining crops and fine-tuning patches.
        batch: crops of a step on a CPU.
    """

    dataset: str
    crop_vox: Size
    batch: int


SETS = {
    "ixi": SetDefaults("Dataset085_IXI2mm", (48, 48, 48), 2),
    "acdc": SetDefaults("Dataset028_ACDC100", (8, 128, 128), 2),
    "hippocampus": SetDefaults("Dataset004_Hippocampus", (32, 48, 32), 2),
}


@dataclass(frozen=True)
class ScanFacts:
    """Properties of one scan of a set. Of names it has only the dataset's own case names."""

    case: str
    subject: str
    modality: str
    channel: str
    shape_vox: Size
    scale: float
    zero: int


@dataclass(frozen=True)
class SetFacts:
    """Properties of a set.

    Attributes:
        classes: names of the foreground classes; class c of the label maps is ``classes[c - 1]``.
        pool: the numbers of the pretraining pool, from which the project plans.
        licence: as the dataset states it; "" if it states none.
    """

    name: str
    dataset: str
    spacing_mm: Spacing
    classes: tuple[str, ...]
    pool: Pool
    licence: str
    scans: tuple[ScanFacts, ...]
    version: int = FORMAT


@dataclass(frozen=True)
class ResidentCase:
    """A scan in memory with the part of ``StoredCase`` that the project's samplers use."""

    name: str
    voxels_ZYX: NDArray[np.float32]  # noqa: N815
    shape_vox: Size
    spacing_mm: Spacing

    def read(self, start_zyx: Sequence[int], size_zyx: Sequence[int]) -> NDArray[np.float32]:
        """Return a crop inside the scan, (1, Z, Y, X)."""
        ends = zip(start_zyx, size_zyx, strict=True)
        inside = [slice(first, first + length) for first, length in ends]
        crop: NDArray[np.float32] = self.voxels_ZYX[tuple(inside)]
        return crop[None]

    def read_padded(
        self,
        start_zyx: Sequence[int],
        size_zyx: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return a crop that is zero beyond the scan, and a mask of the scan in it.

        Returns:
            float32 (1, Z, Y, X) and bool (Z, Y, X), True inside the scan.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        crop = np.zeros((1, *size), dtype=np.float32)
        inside = np.zeros(size, dtype=bool)

        source, target = [], []
        for first, length, extent in zip(start, size, self.shape_vox, strict=True):
            low, high = max(0, first), min(extent, first + length)
            if low >= high:
                return crop, inside
            source.append(slice(low, high))
            target.append(slice(low - first, high - first))
        crop[0][tuple(target)] = self.voxels_ZYX[tuple(source)]
        inside[tuple(target)] = True
        return crop, inside


class ResidentSet:
    """A prepared set in memory, and the division of its patients.

    Attributes:
        images, labels: case -> array (Z, Y, X); float32 intensities, uint8 classes.
        division: cases of the pool, of development and of the test.
    """

    def __init__(
        self,
        facts: SetFacts,
        images: Mapping[str, NDArray[np.float32]],
        labels: Mapping[str, NDArray[np.uint8]],
    ):
        self.facts = facts
        self.images = dict(images)
        self.labels = dict(labels)
        self.subject_of = {scan.case: scan.subject for scan in facts.scans}
        self.division: Division = divide(self.subject_of)

    @property
    def num_classes(self) -> int:
        """Classes of a segmentation, background included."""
        return len(self.facts.classes) + 1

    def pool_cases(self) -> dict[str, ResidentCase]:
        """Return the scans that pretraining may see, by the ids of ``pool_rows``."""
        return {self._id(case): self._resident(case) for case in self.division.pool}

    def scans_on(self, cases: Sequence[str], device: torch.device) -> "list[DeviceScan]":
        """Copy scans and their labels to the device, where augmentation cuts its crops."""
        scans = []
        for case in cases:
            image = torch.from_numpy(self.images[case])[None, None].to(device)
            labels = torch.from_numpy(self.labels[case])[None, None].to(device)
            scans.append(DeviceScan(case, image, labels))
        return scans

    def pool_rows(self) -> tuple[ScanRow, ...]:
        """Return the pool as rows of an index, with the values that an encoder's card needs."""
        in_pool = [scan for scan in self.facts.scans if scan.case in self.division.pool]
        return tuple(self._row(scan) for scan in in_pool)

    def _row(self, scan: ScanFacts) -> ScanRow:
        return ScanRow(
            id=self._id(scan.case),
            dataset=self.facts.dataset,
            case=scan.case,
            channel=scan.channel,
            modality=scan.modality,
            source="",
            shape_vox=scan.shape_vox,
            spacing_mm=self.facts.spacing_mm,
            cropped_shape_vox=scan.shape_vox,
            content_hash="",
            status="ok",
            reason="",
        )

    def _id(self, case: str) -> str:
        return f"{self.facts.dataset}/{case}"

    def _resident(self, case: str) -> ResidentCase:
        voxels = self.images[case]
        return ResidentCase(case, voxels, as_size(voxels.shape), self.facts.spacing_mm)


@dataclass(frozen=True)
class DeviceScan:
    """A scan on the device: image float32 and labels uint8, both (1, 1, Z, Y, X)."""

    case: str
    image: Tensor
    labels: Tensor


def prepare(name: str, raw: Path, work: Path, num_workers: int) -> dict[str, Any]:
    """Preprocess a dataset by the project's store and write it as one file.

    All scans get one target spacing, the median of the pool's scans.

    Args:
        raw: the folder that holds the nnU-Net raw datasets.
        work: folder of the store and of the set's file.

    Returns:
        the values for the line of results.

    Raises:
        UsageError: the dataset is not there.
        AutoregError: a scan cannot be used; no scan of a set is left out.
    """
    folder = raw / SETS[name].dataset
    index = _index_of(folder, num_workers)
    rows = sorted(index.usable, key=lambda row: row.case)

    # The target spacing and the plans follow from the pretraining pool only.
    subject_of = find_patients(folder, [row.case for row in rows]).patient_of
    pool_names = set(divide(subject_of).pool)
    pool_rows = tuple(row for row in rows if row.case in pool_names)
    pool_index = Index(pool_rows, index.ct_samples_hu)
    spacing_mm = fingerprint(pool_index).spacing_mm
    pool = pool_of(fingerprint(pool_index, spacing_mm))

    store = Store(work / "store")
    keys = store.ensure(rows, spacing_mm, pool.ct_window, num_workers)
    if store.failures:
        raise AutoregError(
            f"{len(store.failures)} scans of {folder} could not be preprocessed; the lines above "
            "say why",
        )

    scans, images, labels = [], [], []
    for row in rows:
        case = store.open(keys[row.id])
        shape = case.shape_vox
        packed, scale, zero = pack(case.read((0, 0, 0), shape)[0])
        # A value that is not a label counts as background.
        truth = stored_labels(row, shape).clip(min=0).astype(np.uint8)
        patient = subject_of[row.case]
        scans.append(ScanFacts(row.case, patient, row.modality, row.channel, shape, scale, zero))
        images.append(packed)
        labels.append(truth)

    names = label_names(folder)
    facts = SetFacts(
        name=name,
        dataset=folder.name,
        spacing_mm=as_spacing(spacing_mm),
        classes=tuple(names[value] for value in sorted(names)),
        pool=pool,
        licence=stated_licences(rows).get(folder.name, ""),
        scans=tuple(scans),
    )
    path = set_path(work, name)
    write_set(path, facts, images, labels)
    return {
        "scans": len(scans),
        "patients": len(set(subject_of.values())),
        "spacing_mm": list(facts.spacing_mm),
        "median_shape_vox": list(pool.median_shape_vox),
        "megabytes": round(path.stat().st_size / 1e6, 2),
    }


def _index_of(folder: Path, num_workers: int) -> Index:
    """Return the index of a raw dataset.

    Raises:
        UsageError: the dataset is not there.
        AutoregError: a scan cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--raw {folder.parent} has no folder {folder.name}; give the folder of nnU-Net's raw "
            "datasets",
        )
    # The project finds datasets by nnU-Net's own variable.
    os.environ["nnUNet_raw"] = str(folder.parent)  # noqa: SIM112
    index = index_scans(find_scans([folder.name], []), set(), num_workers)

    for row in index.rows:
        # Label maps have rows as well, which are never usable.
        is_image = Path(row.source).parent.name == "imagesTr"
        if is_image and row.status != "ok":
            raise AutoregError(
                f"{row.source} cannot be used: {row.reason}; repair it, or restore the dataset",
            )
    return index


def pack(voxels_ZYX: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, int]:
    """Return voxels as levels with scale and zero: value = (level - zero) * scale."""
    lowest, highest = np.percentile(voxels_ZYX, OUTSIDE)
    low, high = min(float(lowest), 0.0), max(float(highest), 0.0)
    # One level is not used, so that rounding the zero point moves no value beyond the last level.
    scale = max((high - low) / (LEVELS - 1), SMALLEST_STEP)
    zero = round(-low / scale)
    levels = np.round(voxels_ZYX / scale) + zero
    return levels.clip(0, LEVELS).astype(np.uint8), scale, zero


def unpack(levels: NDArray[np.uint8], scale: float, zero: int) -> NDArray[np.float32]:
    """Return the intensities of packed voxels."""
    from_zero = levels.astype(np.float32) - np.float32(zero)
    return from_zero * np.float32(scale)


def write_set(
    path: Path,
    facts: SetFacts,
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[NDArray[np.uint8]],
) -> None:
    """Write a set as one file, whole or not at all."""
    text = json.dumps(to_jsonable(facts))
    # Differences of neighbours along x (modulo 256) are small, so that they compress better.
    differences = [np.diff(image, axis=2, prepend=np.uint8(0)).ravel() for image in images]
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            facts=np.frombuffer(text.encode(), dtype=np.uint8),
            images=np.concatenate(differences),
            labels=np.concatenate([label.ravel() for label in labels]),
        )


def load_set(work: Path, name: str) -> ResidentSet:
    """Read a prepared set.

    Raises:
        UsageError: it has not been prepared.
    """
    path = set_path(work, name)
    if not path.is_file():
        raise UsageError(
            f"{path} is missing; type: python benchmarks/evidence.py prepare --data {name} "
            "--raw FOLDER",
        )
    with np.load(path) as stored:
        facts = from_jsonable(SetFacts, json.loads(stored["facts"].tobytes()), str(path))
        all_images, all_labels = stored["images"], stored["labels"]

    images, labels = {}, {}
    start = 0
    for scan in facts.scans:
        stop = start + int(np.prod(scan.shape_vox))
        stored_image = all_images[start:stop].reshape(scan.shape_vox)
        levels = np.cumsum(stored_image, axis=2, dtype=np.uint8)
        images[scan.case] = unpack(levels, scan.scale, scan.zero)
        labels[scan.case] = all_labels[start:stop].reshape(scan.shape_vox)
        start = stop
    return ResidentSet(facts, images, labels)


def set_path(work: Path, name: str) -> Path:
    """Return the file of a prepared set."""
    return work / f"{name}.npz"


def labelled_patients(data: ResidentSet, num_patients: int, draw: int) -> tuple[str, ...]:
    """Return the cases of the patients that are labelled in a draw.

    The draw's number decides the order of the pool's patients, and the first ones are labelled. So
    the sets of one draw are nested, and all scans of a patient are labelled together.

    Raises:
        UsageError: the pool has fewer patients.
    """
    pool = {data.subject_of[case] for case in data.division.pool}
    if not 0 < num_patients <= len(pool):
        raise UsageError(
            f"--labels {num_patients}: the pool of {data.facts.name} has {len(pool)} patients",
        )
    chosen = set(ordered(pool, f"{draw}/")[:num_patients])
    return tuple(case for case in data.division.pool if data.subject_of[case] in chosen)
