"""Labelled crops for the frozen probe, from the label maps of a dataset among the inputs.

No label reaches training.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.fingerprint import transpose_axes
from nnunet_autoreg.corpus.grid import read_label_map
from nnunet_autoreg.corpus.places import (
    dataset_of,
    label_map_of,
    label_names,
    nonzero_box,
    subject_of,
)
from nnunet_autoreg.corpus.private import NAMES_FILES, public_dataset
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.geometry import Size, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.probe import LabelledCrop, Probe
from nnunet_autoreg.sampling.sample import Sample, collate
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]

MAX_CASES = 24
UNKNOWN = -1
SMALLEST_SHARE = 0.25
"""A structure that fills this share of a token is its label, although background may fill more."""


def labelled_crops(
    plan: Plan, rows: Sequence[ScanRow], cases: Mapping[str, StoredCase], heldout: Collection[str]
) -> list[LabelledCrop]:
    """One crop of each of up to 24 subjects, around labelled voxels; half of the subjects are for
    testing, held-out ones first.

    Of several labelled datasets the one with the most cases counts, of several channels the first.
    [] where there are not 4 subjects.

    Args:
        cases: the stored cases by scan id.
        heldout: ids of scans that pretraining does not see.
    """
    chosen = choose(rows, heldout, plan.run.seed)
    crops = []
    for number, row in enumerate(chosen):
        try:
            crops.append(_crop(plan, row, cases[row.id], number, is_test=number < len(chosen) // 2))
        except (ScanError, UsageError) as error:
            log.warning("probe: %s is left out: %s", row.id, error, extra=NAMES_FILES)
    if crops and not Probe(crops).works:
        log.warning(
            "probe: left out, as the labels of %s show fewer than two classes to fit or to test on",
            public_dataset(chosen[0].dataset),
        )
        return []
    if crops:
        dataset = public_dataset(chosen[0].dataset)
        num_test = sum(crop.is_test for crop in crops)
        log.info(
            "probe: %d labelled crops of %s, %d of them for testing", len(crops), dataset, num_test
        )
    return crops


def choose(rows: Sequence[ScanRow], heldout: Collection[str], seed: int) -> list[ScanRow]:
    """One labelled scan for each of up to 24 subjects of one dataset: held-out ones first, else by
    a hash.
    """
    first: dict[tuple[str, str], ScanRow] = {}
    for row in sorted(rows, key=lambda r: r.id):
        if label_map_of(row) is not None:
            first.setdefault((row.dataset, subject_of(row)), row)
    counts = Counter(dataset for dataset, _ in first)
    if not counts or max(counts.values()) < 4:
        return []
    dataset = min(counts, key=lambda name: (-counts[name], name))
    labelled = [row for (name, _), row in first.items() if name == dataset]

    def key(row: ScanRow) -> tuple[bool, str]:
        return row.id not in heldout, hashlib.sha256(
            f"{seed}/{subject_of(row)}".encode()
        ).hexdigest()

    return sorted(labelled, key=key)[:MAX_CASES]


def _crop(plan: Plan, row: ScanRow, case: StoredCase, number: int, is_test: bool) -> LabelledCrop:
    labels_ZYX = stored_labels(row, case.shape_vox)
    size = plan.sequence.crop_size_vox
    start = around_labels(labels_ZYX, size, rng.generator(plan.run.seed, "probe", number))
    voxels, real = case.read_padded(start, size)
    padded = np.full(size, UNKNOWN, dtype=np.int64)
    low = [max(0, a) for a in start]
    high = [min(m, a + n) for a, n, m in zip(start, size, case.shape_vox, strict=True)]
    place = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, start, strict=True))
    padded[place] = labels_ZYX[tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))]
    tokens = token_labels(padded, plan.encoder.token_size_vox)
    sample = Sample(voxels[None], real[None], np.zeros(len(tokens), dtype=np.int64), 1)
    return LabelledCrop(collate([sample]), torch.from_numpy(tokens), is_test)


def stored_labels(row: ScanRow, shape_vox: Size) -> Labels:
    """The label map of a scan on the voxels of its stored case, by nearest neighbours; values that
    name nothing become -1.

    Raises:
        ScanError: it cannot be read, or does not fit the scan.
    """
    path = label_map_of(row)
    assert path is not None and row.spacing_mm is not None, "only labelled, usable rows come here"
    labels_ZYX, grid = read_label_map(path)
    if grid.shape_vox != row.shape_vox:
        raise ScanError("geometry", f"{path} has {grid.shape_vox} voxels, its scan {row.shape_vox}")
    low, high = nonzero_box(row)
    box = labels_ZYX[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].transpose(
        transpose_axes(row.spacing_mm)
    )
    known = [0, *label_names(dataset_of(row))]
    nearest = box[np.ix_(*(nearest_index(n, m) for n, m in zip(box.shape, shape_vox, strict=True)))]
    return np.where(np.isin(nearest, known), nearest, UNKNOWN)


def nearest_index(num_source: int, num_target: int) -> Labels:
    """Which of ``num_source`` equal parts of a length the centre of each of ``num_target`` parts
    lies in.
    """
    return np.minimum(
        ((np.arange(num_target) + 0.5) * num_source / num_target).astype(np.int64), num_source - 1
    )


def around_labels(labels_ZYX: Labels, size: Size, generator: np.random.Generator) -> Size:
    """Start of a crop with a labelled voxel, drawn by structure, in its middle, as far as the case
    reaches.
    """
    values = np.unique(labels_ZYX[labels_ZYX > 0])
    middle = [n // 2 for n in labels_ZYX.shape]
    if len(values):
        voxels = np.argwhere(labels_ZYX == values[generator.integers(len(values))])
        middle = voxels[generator.integers(len(voxels))].tolist()
    wanted = (m - s // 2 for m, s in zip(middle, size, strict=True))
    bounds = (
        (min((n - s) // 2, 0), max(n - s, (n - s) // 2))
        for n, s in zip(labels_ZYX.shape, size, strict=True)
    )
    return as_size([min(max(a, low), high) for a, (low, high) in zip(wanted, bounds, strict=True)])


def token_labels(labels_ZYX: Labels, token: Size) -> Labels:
    """(T,) in raster order: the structure that fills most of a token, if at least a quarter of its
    known voxels, else 0.

    Args:
        labels_ZYX: -1 where not known; so is a token of such voxels alone.
    """
    z, y, x = grid_of(labels_ZYX.shape, token)
    cubes = (
        labels_ZYX.reshape(z, token[0], y, token[1], x, token[2])
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(z * y * x, -1)
    )
    known = (cubes >= 0).sum(axis=1)
    values = np.unique(cubes[cubes > 0])
    if not len(values):
        return np.where(known > 0, 0, UNKNOWN)
    counts = np.stack([(cubes == value).sum(axis=1) for value in values], axis=1)
    label = np.where(counts.max(axis=1) >= SMALLEST_SHARE * known, values[counts.argmax(axis=1)], 0)
    return np.where(known > 0, label, UNKNOWN)
