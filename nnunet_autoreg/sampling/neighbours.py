"""Places that look alike, where nobody says where structures lie: nearest neighbours by a fixed
descriptor of a few places per scan.

The descriptor is the coarse pattern of a crop (4 x 4 x 4 means, brightness and contrast taken out)
and where in the scan it lies. It is
computed once, before training, from stored voxels: features of the encoder in training would be as
    good as noise at the start and
would have to be computed again and again, and what is drawn would depend on how training went.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.groups import contrast_word
from nnunet_autoreg.corpus.places import KnownPlace, subject_of
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)

ALIKE = "alike "
"""How the names of such structures begin."""
SIDE = 4
TRIED, KEPT = 24, 6
"""Places looked at in each scan, and those of them with most contrast that are kept."""
POSITION_WEIGHT = 2.0
MAX_PLACES = 20_000
MOST_ALIKE = 0.5
"""Share of the places that make a structure: those whose neighbours are nearest."""


def descriptor(voxels_ZYX: NDArray[np.float32], where: Sequence[float]) -> NDArray[np.float32]:
    """(67,): the crop's 4 x 4 x 4 means, of mean 0 and length 1, and its place in the scan (shares,
    z y x), weighted.
    """
    pieces = [np.array_split(np.arange(n), SIDE) for n in voxels_ZYX.shape]
    means = np.array(
        [
            voxels_ZYX[np.ix_(z, y, x)].mean()
            for z in pieces[0]
            for y in pieces[1]
            for x in pieces[2]
        ]
    )
    means = means - means.mean()
    return np.concatenate(
        [means / max(float(np.linalg.norm(means)), 1e-6), POSITION_WEIGHT * np.array(where)]
    ).astype(np.float32)


def places_alike(
    rows: Sequence[ScanRow], cases: Mapping[str, StoredCase], crop: Size, num_subjects: int
) -> list[KnownPlace]:
    """Structures named "alike N": a place and, in each of ``num_subjects`` - 1 other subjects, the
    place most like it.

    Only scans of one contrast and one spacing are compared.

    Args:
        cases: by id of the row.
        crop: (z, y, x) voxels that the descriptor sees.
    """
    by_kind: dict[tuple[str, ...], list[ScanRow]] = {}
    for row in rows:
        spacing = tuple(f"{s:.3f}" for s in cases[row.id].spacing_mm)
        by_kind.setdefault((row.modality, contrast_word(row), *spacing), []).append(row)
    found: list[KnownPlace] = []
    for alike in by_kind.values():
        if len({subject_of(row) for row in alike}) >= num_subjects:
            found += _among(alike, cases, crop, num_subjects, len(found))
    return found


def _among(
    rows: Sequence[ScanRow],
    cases: Mapping[str, StoredCase],
    crop: Size,
    num_subjects: int,
    first: int,
) -> list[KnownPlace]:
    if len(rows) * KEPT > MAX_PLACES:
        log.info("likeness: %d of %d scans are compared", MAX_PLACES // KEPT, len(rows))
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MAX_PLACES // KEPT).astype(int)]
    owners, centres, descriptors = [], [], []
    for number, row in enumerate(rows):
        for where, described in _contrasty(cases[row.id], crop, number):
            owners.append(number)
            centres.append(where)
            descriptors.append(described)
    subjects = np.unique([subject_of(rows[o]) for o in owners], return_inverse=True)[1]
    neighbours, farthest = _nearest(np.stack(descriptors), subjects, num_subjects - 1)
    chosen = np.argsort(farthest, kind="stable")[: max(1, round(MOST_ALIKE * len(owners)))]
    return [
        KnownPlace(
            rows[owners[i]].id, subject_of(rows[owners[i]]), f"{ALIKE}{first + n}", centres[i]
        )
        for n, query in enumerate(chosen.tolist())
        for i in (query, *neighbours[query].tolist())
    ]


def _contrasty(
    case: StoredCase, crop: Size, number: int
) -> list[tuple[tuple[float, float, float], NDArray[np.float32]]]:
    """The places with most contrast among some at random: (share of the scan, descriptor)."""
    generator = rng.generator(0, "places alike", number)
    size = as_size([min(c, n) for c, n in zip(crop, case.shape_vox, strict=True)])
    looked = []
    for _ in range(TRIED):
        start = as_size(
            [int(generator.integers(n - c + 1)) for n, c in zip(case.shape_vox, size, strict=True)]
        )
        voxels = case.read(start, size)[0]
        z, y, x = ((a + c / 2) / n for a, c, n in zip(start, size, case.shape_vox, strict=True))
        looked.append((float(voxels.std()), (z, y, x), descriptor(voxels, (z, y, x))))
    looked.sort(key=lambda item: -item[0])
    return [(where, described) for _, where, described in looked[:KEPT]]


def _nearest(
    descriptors: NDArray[np.float32], subjects: NDArray[np.int64], num_others: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Per place the nearest place of each of the ``num_others`` nearest other subjects, and the
    distance of the last of these.
    """
    neighbours = np.empty((len(descriptors), num_others), dtype=np.int64)
    farthest = np.empty(len(descriptors), dtype=np.float32)
    lengths = np.square(descriptors).sum(axis=1)
    for i, described in enumerate(descriptors):
        distances = lengths - 2 * (descriptors @ described)
        distances[subjects == subjects[i]] = np.inf
        order = np.argsort(distances, kind="stable")
        _, first = np.unique(subjects[order], return_index=True)
        best = order[np.sort(first)][:num_others]
        neighbours[i], farthest[i] = best, distances[best[-1]] + lengths[i]
    return neighbours, farthest
