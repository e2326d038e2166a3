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
"""Percentiles of a scan between which its 255 levels lie; what is beyond is clipped."""
SMALLEST_STEP = 1 / 16
"""In standard deviations of a scan. The rounding error of 0.018 is far below the noise, and finer
levels only cost bytes."""


@dataclass(frozen=True)
class SetDefaults:
    """What the harness does with a dataset unless its flags say otherwise.

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
    """What is known of one scan of a set; of names only the dataset's own case names."""

    case: str
    subject: str
    modality: str
    channel: str
    shape_vox: Size
    scale: float
    zero: int


@dataclass(frozen=True)
class SetFacts:
    """What is known of a set.

    Attributes:
        classes: names of the foreground classes; class c of the label maps is ``classes[c - 1]``.
        pool: the numbers of the pretraining pool, from which the project plans.
        licence: as the dataset states it; "" where it states none.
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
        inside = [slice(a, a + n) for a, n in zip(start_zyx, size_zyx, strict=True)]
        crop: NDArray[np.float32] = self.voxels_ZYX[tuple(inside)]
        return crop[None]

    def read_padded(
        self,
        start_zyx: Sequence[int],
        size_zyx: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return a crop, zero where it reaches beyond the scan, and where it lies inside.

        Returns:
            float32 (1, Z, Y, X) and bool (Z, Y, X), True inside the scan.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        crop = np.zeros((1, *size), dtype=np.float32)
        inside = np.zeros(size, dtype=bool)

        low = [max(0, first) for first in start]
        high = [min(n, first + s) for first, s, n in zip(start, size, self.shape_vox, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return crop, inside

        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(
            slice(a - first, b - first) for a, b, first in zip(low, high, start, strict=True)
        )
        crop[0][target] = self.voxels_ZYX[source]
        inside[target] = True
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
        return [
            DeviceScan(
                case,
                torch.from_numpy(self.images[case])[None, None].to(device),
                torch.from_numpy(self.labels[case])[None, None].to(device),
            )
            for case in cases
        ]

    def pool_rows(self) -> tuple[ScanRow, ...]:
        """Return the pool as rows of an index, with what an encoder's card says of the scans."""
        return tuple(
            self._row(scan) for scan in self.facts.scans if scan.case in self.division.pool
        )

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

    Returns what a line of the results keeps.

    The target spacing is the median of the pool's scans, one for all of the set.

    Args:
        raw: the folder that holds the nnU-Net raw datasets.
        work: where the store and the set's file go.

    Raises:
        UsageError: the dataset is not there.
        AutoregError: a scan cannot be used; a set is all of its scans or none.
    """
    folder = raw / SETS[name].dataset
    if not folder.is_dir():
        raise UsageError(
            f"--raw {raw}: there is no {SETS[name].dataset} in it; give the folder of nnU-Net's "
            "raw datasets",
        )
    # The project finds datasets by nnU-Net's own variable.
    os.environ["nnUNet_raw"] = str(raw)  # noqa: SIM112
    index = index_scans(find_scans([folder.name], []), set(), num_workers)
    # The folder of label maps is a row of its own, which is no scan.
    lost = [
        row
        for row in index.rows
        if row.status != "ok" and Path(row.source).parent.name == "imagesTr"
    ]
    if lost:
        raise AutoregError(
            f"{lost[0].source} cannot be used: {lost[0].reason}; mend it, or restore the dataset",
        )

    rows = sorted(index.usable, key=lambda row: row.case)
    subject_of = find_patients(folder, [row.case for row in rows]).patient_of
    pool_names = set(divide(subject_of).pool)
    pool_index = Index(tuple(row for row in rows if row.case in pool_names), index.ct_samples_hu)
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
        voxels_ZYX = case.read((0, 0, 0), case.shape_vox)[0]
        packed, scale, zero = pack(voxels_ZYX)
        # A value that names nothing counts as background.
        truth = stored_labels(row, case.shape_vox).clip(min=0).astype(np.uint8)
        scans.append(
            ScanFacts(
                row.case,
                subject_of[row.case],
                row.modality,
                row.channel,
                case.shape_vox,
                scale,
                zero,
            ),
        )
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


def pack(voxels_ZYX: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, int]:
    """Return voxels as levels with scale and zero: value = (level - zero) * scale."""
    low, high = (float(v) for v in np.percentile(voxels_ZYX, OUTSIDE))
    low, high = min(low, 0.0), max(high, 0.0)
    # One level is kept back, so that rounding the zero point pushes nothing over the edge.
    scale = max((high - low) / (LEVELS - 1), SMALLEST_STEP)
    zero = round(-low / scale)
    levels = np.round(voxels_ZYX / scale) + zero
    return levels.clip(0, LEVELS).astype(np.uint8), scale, zero


def unpack(levels: NDArray[np.uint8], scale: float, zero: int) -> NDArray[np.float32]:
    """Return the intensities of packed voxels."""
    return (levels.astype(np.float32) - np.float32(zero)) * np.float32(scale)


def write_set(
    path: Path,
    facts: SetFacts,
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[NDArray[np.uint8]],
) -> None:
    """Write a set as one file, whole or not at all."""
    described = np.frombuffer(json.dumps(to_jsonable(facts)).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            facts=described,
            # Differences of neighbours along x (modulo 256) are small, and so compress better.
            images=np.concatenate(
                [np.diff(image, axis=2, prepend=np.uint8(0)).ravel() for image in images],
            ),
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
        levels = np.cumsum(all_images[start:stop].reshape(scan.shape_vox), axis=2, dtype=np.uint8)
        images[scan.case] = unpack(levels, scan.scale, scan.zero)
        labels[scan.case] = all_labels[start:stop].reshape(scan.shape_vox)
        start = stop
    return ResidentSet(facts, images, labels)


def set_path(work: Path, name: str) -> Path:
    """The file of a prepared set."""
    return work / f"{name}.npz"


def labelled_patients(data: ResidentSet, num_patients: int, draw: int) -> tuple[str, ...]:
    """Return the cases of the patients that are labelled in a draw.

    The patients of the pool are put into an order by the draw's number, and the first ones are
    taken: so the sets of one draw are nested, and all scans of a patient come together.

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
