"""Similar positions in different scans, for semantic sequences without labels.

They are nearest neighbours by a fixed descriptor of a few places per scan. The descriptor is the
coarse pattern of a crop (4 x 4 x 4 means, without brightness and contrast) and its position in the
scan. It is computed once, before training, from stored voxels. Features of the encoder in training
would be as good as noise at the start, would have to be computed again and again, and would make
the samples depend on the course of the training.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.groups import contrast_word
from nnunet_autoreg.corpus.locations import StructureLocation, subject_of
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.geometry import Size, as_size, smaller_of
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)

ALIKE = "alike "
"""First word of the names of such structures."""
SIDE = 4
TRIED, KEPT = 24, 6
"""Number of positions tried in each scan, and of those with most contrast that are kept."""
POSITION_WEIGHT = 2.0
MAX_PLACES = 20_000
MOST_ALIKE = 0.5
"""Share of the places that make a structure: those whose neighbours are nearest."""


def descriptor(voxels_ZYX: NDArray[np.float32], position: Sequence[float]) -> NDArray[np.float32]:
    """Return the descriptor of a crop, (67,).

    It is the crop's 4 x 4 x 4 means, of mean 0 and length 1, and its weighted position.

    Args:
        position: of the crop's middle in the scan, as shares of its axes (z, y, x).
    """
    indices = [np.arange(length) for length in voxels_ZYX.shape]
    pieces_z, pieces_y, pieces_x = (np.array_split(of_axis, SIDE) for of_axis in indices)
    means = np.empty((SIDE, SIDE, SIDE), dtype=np.float32)
    for z, y, x in np.ndindex(means.shape):
        piece = np.ix_(pieces_z[z], pieces_y[y], pieces_x[x])
        means[z, y, x] = voxels_ZYX[piece].mean()

    pattern = means.reshape(-1) - means.mean()  # (64,)
    length = max(float(np.linalg.norm(pattern)), 1e-6)
    weighted_position = POSITION_WEIGHT * np.array(position)  # (3,)
    described = np.concatenate([pattern / length, weighted_position])  # (67,)
    return described.astype(np.float32)


def places_alike(
    rows: Sequence[ScanRow],
    cases: Mapping[str, StoredCase],
    crop: Size,
    num_subjects: int,
) -> list[StructureLocation]:
    """Return structures named "alike N": a place, and the places most like it in other subjects.

    Each structure has a place in ``num_subjects`` subjects. Only scans of one contrast and one
    spacing are compared.

    Args:
        cases: by id of the row.
        crop: (z, y, x) voxels that the descriptor sees.
    """
    by_kind: dict[tuple[str, ...], list[ScanRow]] = {}
    for row in rows:
        # Spacings that differ only in the last digits are equal.
        spacing = tuple(f"{s:.3f}" for s in cases[row.id].spacing_mm)
        kind = (row.modality, contrast_word(row), *spacing)
        by_kind.setdefault(kind, []).append(row)

    found: list[StructureLocation] = []
    for alike in by_kind.values():
        subjects = {subject_of(row) for row in alike}
        if len(subjects) >= num_subjects:
            found += _structures_among(alike, cases, crop, num_subjects, len(found))
    return found


def _structures_among(
    rows: Sequence[ScanRow],
    cases: Mapping[str, StoredCase],
    crop: Size,
    num_subjects: int,
    first: int,
) -> list[StructureLocation]:
    """Return the structures of scans that may be compared; the first is named "alike ``first``"."""
    max_scans = MAX_PLACES // KEPT
    if len(rows) > max_scans:
        log.info("similar positions: comparing %d of %d scans", max_scans, len(rows))
        evenly = np.linspace(0, len(rows) - 1, max_scans).astype(int)
        rows = [rows[i] for i in evenly]

    # One entry per place: its scan, its centre, its descriptor.
    owners, centres, descriptors = [], [], []
    for number, row in enumerate(rows):
        for centre, described in _places_with_contrast(cases[row.id], crop, number):
            owners.append(row)
            centres.append(centre)
            descriptors.append(described)

    names = [subject_of(row) for row in owners]
    _, subjects = np.unique(names, return_inverse=True)  # (N,), a number per subject
    neighbours, farthest = _nearest(np.stack(descriptors), subjects, num_subjects - 1)

    # The places whose neighbours are most like them.
    num_chosen = max(1, round(MOST_ALIKE * len(owners)))
    chosen = np.argsort(farthest, kind="stable")[:num_chosen]

    found = []
    for number, query in enumerate(chosen.tolist()):
        structure = f"{ALIKE}{first + number}"
        for place in (query, *neighbours[query].tolist()):
            scan, subject, centre = owners[place].id, names[place], centres[place]
            found.append(StructureLocation(scan, subject, structure, centre))
    return found


def _places_with_contrast(
    case: StoredCase,
    crop: Size,
    number: int,
) -> list[tuple[tuple[float, float, float], NDArray[np.float32]]]:
    """Return the places with most contrast among some random ones: (centre, descriptor).

    Centres are shares of the scan's axes (z, y, x).
    """
    generator = rng.generator(0, "places alike", number)
    shape = case.shape_vox
    size = smaller_of(crop, shape)
    room = [n - c + 1 for n, c in zip(shape, size, strict=True)]

    tried = []
    for _ in range(TRIED):
        start = as_size([int(generator.integers(side)) for side in room])
        voxels = case.read(start, size)[0]  # (Z, Y, X)
        middle = np.add(start, np.divide(size, 2))
        z, y, x = (middle / shape).tolist()
        centre = (z, y, x)
        contrast = float(voxels.std())
        tried.append((contrast, centre, descriptor(voxels, centre)))

    tried.sort(key=lambda item: -item[0])
    return [(centre, described) for _, centre, described in tried[:KEPT]]


def _nearest(
    descriptors: NDArray[np.float32],
    subjects: NDArray[np.int64],
    num_others: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return, for every place, the nearest places of the nearest other subjects.

    Args:
        descriptors: (N, 67).
        subjects: (N,), number of the subject of every place.

    Returns:
        (N, num_others), one place of each of the ``num_others`` nearest other subjects; and (N,),
        the squared distance of the last of these.
    """
    neighbours = np.empty((len(descriptors), num_others), dtype=np.int64)
    farthest = np.empty(len(descriptors), dtype=np.float32)
    squared_lengths = np.square(descriptors).sum(axis=1)  # (N,)

    for i, described in enumerate(descriptors):
        # Squared distances less the squared length of this descriptor, which is added at the end.
        distances = squared_lengths - 2 * (descriptors @ described)  # (N,)
        distances[subjects == subjects[i]] = np.inf

        # The nearest place of every other subject, the nearest subjects first.
        nearest_first = np.argsort(distances, kind="stable")  # (N,)
        _, first_of_subject = np.unique(subjects[nearest_first], return_index=True)
        best = nearest_first[np.sort(first_of_subject)][:num_others]
        neighbours[i] = best
        farthest[i] = distances[best[-1]] + squared_lengths[i]
    return neighbours, farthest
