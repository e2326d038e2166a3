"""Contrasts of one subject on one grid: every member of a group is stored again, cropped and
resampled like the others.

Channels of an nnU-Net case lie on one grid already; they are cropped to the box around all of them,
as nnU-Net does. Images of a session are first resampled onto the member with most voxels, by world
coordinates, and cropped to what all of them cover. The key of a member holds the content of the
whole group, so that a group that changes is made again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_autoreg.corpus.fingerprint import row_spacing, transpose_axes
from nnunet_autoreg.corpus.grid import brought_onto, grid_of_scan
from nnunet_autoreg.corpus.groups import ContrastGroup, reduced
from nnunet_autoreg.corpus.parallel import is_large, parallel_map, workers_for
from nnunet_autoreg.corpus.read import box_around, check_memory, cropped_shape
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import Spacing, as_size, as_spacing, box_at, size_text, volume
from nnunet_autoreg.nnunet_api import (
    CT_SCHEME,
    Array,
    crop_resample_normalise,
    resampled_shape,
)
from nnunet_autoreg.plan import IntensityWindow, Plan
from nnunet_autoreg.store.case import CaseRecord, StoredCase, read_record, write_case
from nnunet_autoreg.store.store import (
    MASK_BELOW,
    Store,
    case_path,
    failure_of,
    load_unchanged,
    plan_task,
)

log = logging.getLogger(__name__)

LAYOUT = 2
"""Version of the preprocessing of groups."""
MIN_SHARED_VOX = 8


@dataclass(frozen=True)
class GroupTask:
    """One group to preprocess.

    It has the scans, the index of the reference, and a key, scheme and window per scan.
    """

    group: ContrastGroup
    reference: int
    spacing_mm: Spacing
    keys: tuple[str, ...]
    schemes: tuple[str, ...]
    windows: tuple[IntensityWindow | None, ...]


def ensure_groups(
    store: Store,
    groups: Sequence[ContrastGroup],
    spacing_of: Callable[[ScanRow], Spacing],
    ct_window: IntensityWindow | None,
    num_workers: int,
) -> dict[str, tuple[str, ...]]:
    """Preprocess the groups that are missing. It may be killed at any moment and repeated.

    A group that cannot be brought onto one grid is logged and absent from the result; its scans are
    still used one by one.

    Returns:
        name of the group -> keys of its members for ``Store.open``.

    Raises:
        StoreError: the disk is full, or the store cannot be written; finished members stay.
        AutoregError: a worker died.
    """
    tasks = [plan_group(group, spacing_of, ct_window) for group in groups]
    missing = []
    voxels = []  # of each missing group, all its scans together
    for task in tasks:
        records = [read_record(case_path(store.root, key)) for key in task.keys]
        if None in records:
            missing.append(task)
            voxels.append(sum(row.num_vox for row in task.group.rows))

    if missing:
        log.info("store: %d of %d groups of contrasts are missing", len(missing), len(tasks))

    # Every worker holds all scans of one group at a time.
    lost: dict[str, ScanError] = {}
    made = parallel_map(
        partial(_preprocess, store.root),
        missing,
        workers_for(num_workers, voxels),
        "aligning contrasts",
        apart=is_large(voxels),
    )
    first_scan = {group.name: group.rows[0].id for group in groups}
    for name, problem in made:
        if problem:
            lost[name] = ScanError(*problem)
            # A group is called after folders; the id of a scan does not identify a person.
            log.warning(
                "the contrasts of scan %s and others make no sequence (%s): %s",
                first_scan[name],
                *problem,
            )
    return {task.group.name: task.keys for task in tasks if task.group.name not in lost}


def plan_group(
    group: ContrastGroup,
    spacing_of: Callable[[ScanRow], Spacing],
    ct_window: IntensityWindow | None,
) -> GroupTask:
    """Return how a group is preprocessed, and the keys of its members.

    Raises:
        PlanError: a CT scan without ``ct_window``.
    """
    # The member with most voxels is the reference: the others lose nothing by resampling onto it.
    sizes = [row.num_vox for row in group.rows]
    reference = sizes.index(max(sizes))
    spacing = as_spacing(spacing_of(group.rows[reference]))

    # A member is made as its scan would be without the group, but its key depends on the whole
    # group.
    single = [plan_task(row, spacing, ct_window) for row in group.rows]
    whole = [[row.content_hash for row in group.rows], reference, group.channels]
    keys = []
    for number, task in enumerate(single):
        known = json.dumps(["group", LAYOUT, number, whole, task.key])
        keys.append(hashlib.sha256(known.encode()).hexdigest())

    schemes = tuple(task.scheme for task in single)
    windows = tuple(task.ct_window for task in single)
    return GroupTask(group, reference, spacing, tuple(keys), schemes, windows)


def _preprocess(root: Path, task: GroupTask) -> tuple[str, tuple[str, str] | None]:
    """Make one group; return its name and, if it cannot be made, (status, reason)."""
    too_large = "its scans do not fit into memory together; free some memory"
    return task.group.name, failure_of(partial(_make_group, root, task), too_large)


def _make_group(root: Path, task: GroupTask) -> None:
    """Write all members of a group.

    Raises:
        ScanError: the scans have no common grid, or vanish at the target spacing.
    """
    stack_CZYX, spacing_mm = _on_one_grid(task)

    # From the scans' own order of axes to that of the plan, coarsest first.
    axes = transpose_axes(spacing_mm)
    stack_CZYX = stack_CZYX.transpose(0, *(a + 1 for a in axes))
    source_mm = as_spacing([spacing_mm[a] for a in axes])

    is_occupied_ZYX = (stack_CZYX != 0).any(axis=0)
    cropped = cropped_shape(is_occupied_ZYX)
    shape = resampled_shape(cropped, source_mm, task.spacing_mm)
    if min(shape) < 1:
        raise ScanError(
            "spacing",
            f"{cropped} voxels of {source_mm} mm vanish at the target spacing {task.spacing_mm} mm",
        )

    # Members of one scheme are normalised in one go.
    shrinks = volume(cropped) / volume(stack_CZYX.shape[1:]) < MASK_BELOW
    original_shape = as_size([stack_CZYX.shape[1 + axes.index(a)] for a in range(3)])
    settings = set(zip(task.schemes, task.windows, strict=True))
    for scheme, window in sorted(settings, key=lambda pair: pair[0]):
        use_mask = shrinks and scheme != CT_SCHEME
        # The whole stack goes in, because the box that it is cropped to has to be that of all
        # members.
        data_CZYX = crop_resample_normalise(
            stack_CZYX,
            source_mm,
            task.spacing_mm,
            scheme,
            use_mask,
            window,
        )
        for i, own_scheme in enumerate(task.schemes):
            if own_scheme != scheme:
                continue
            row = task.group.rows[i]
            record = CaseRecord(
                content_hash=row.content_hash,
                shape_vox=as_size(data_CZYX.shape[1:]),
                spacing_mm=task.spacing_mm,
                original_shape_vox=original_shape,
                original_spacing_mm=spacing_mm,
                axes=axes,
                scheme=scheme,
                use_mask=use_mask,
                ct_window=window,
            )
            write_case(case_path(root, task.keys[i]), data_CZYX[i : i + 1], record)


def _on_one_grid(task: GroupTask) -> tuple[Array, Spacing]:
    """Return all members as (C, Z, Y, X) on the reference's voxels, and their spacing.

    Raises:
        ScanError: a scan changed, lacks its position in the patient, or overlaps too little with
            the others.
    """
    rows = task.group.rows
    z, y, x = rows[task.reference].shape_vox or (1, 1, 1)
    check_memory([len(rows) * z, y, x])
    scans = [load_unchanged(row) for row in rows]
    target = scans[task.reference]

    # Channels of one nnU-Net case lie on one grid already.
    shapes = {scan.array_CZYX.shape for scan in scans}
    if task.group.channels and len(shapes) == 1:
        return np.concatenate([s.array_CZYX for s in scans]), target.spacing_mm

    grids = []
    for row, scan in zip(rows, scans, strict=True):
        grid = grid_of_scan(Path(row.source), row.part)
        shape_read = scan.array_CZYX.shape[1:]
        if grid.shape_vox != shape_read:
            raise ScanError(
                "geometry",
                f"where {row.id} lies in the patient is unknown ({grid.shape_vox} voxels in its "
                f"header, {shape_read} read)",
            )
        grids.append(grid)

    frame = grids[task.reference]
    moved, covered = [], []
    for scan, grid in zip(scans, grids, strict=True):
        array_ZYX = scan.array_CZYX[0]
        if not grid.is_like(frame):
            # Ones show by the same resampling which voxels the scan covers.
            ones = np.ones(grid.shape_vox, np.float32)
            covered.append(brought_onto(ones, grid, frame, 0.0) > 0.5)
            array_ZYX = brought_onto(array_ZYX, grid, frame, float(array_ZYX.min()))
        moved.append(array_ZYX)

    if not covered:
        return np.stack(moved), target.spacing_mm

    # Crop all members to the box around what every one of them covers.
    low, high = box_around(np.logical_and.reduce(covered))
    sides = [end - start for start, end in zip(low, high, strict=True)]
    if min(sides) < MIN_SHARED_VOX:
        raise ScanError(
            "geometry",
            f"they share only {size_text(sides)} voxels: they show different parts of the body",
        )

    shared = box_at(low, sides)
    return np.stack([array_ZYX[shared] for array_ZYX in moved]), target.spacing_mm


def store_groups(
    plan: Plan,
    store: Store,
    groups: Sequence[ContrastGroup],
    num_workers: int,
) -> list[tuple[ContrastGroup, list[StoredCase]]]:
    """Preprocess the groups that have enough of the plan's contrasts, each on one voxel grid.

    Returns:
        each such group with its stored cases; without those that could not be preprocessed.
    """
    with_contrasts = [reduced(group, plan.sequence.contrasts) for group in groups]
    fitting = [g for g in with_contrasts if len(g.rows) >= plan.sequence.contrast_members]
    spacing_of = partial(row_spacing, data=plan.data)
    keys = ensure_groups(store, fitting, spacing_of, plan.data.ct_window, num_workers)

    stored = []
    for group in fitting:
        if group.name in keys:
            members = [store.open(key) for key in keys[group.name]]
            stored.append((group, members))
    return stored
