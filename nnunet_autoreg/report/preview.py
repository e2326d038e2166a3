"""``sequences.png``: a few sequences as the network will see them.

In the code below, a layer is one block thick along z, and a member is one image of a sequence.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.fingerprint import row_spacing
from nnunet_autoreg.corpus.groups import contrast_groups, reduced
from nnunet_autoreg.corpus.locations import PLACES_NAME, StructureLocation, read_places, subject_of
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import as_size, grid_of, volume
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.plan import VIEW_KINDS, Plan
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.palette import CROP, GIVEN, GRID, INK, PREDICTED, SOFT, Style
from nnunet_autoreg.report.slices import grey_range
from nnunet_autoreg.report.view_preview import draw_views
from nnunet_autoreg.sampling import members, spatial, strided
from nnunet_autoreg.sampling.blocks import block_ids
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.gather import gather
from nnunet_autoreg.sampling.kinds import member_crop, num_blocks, planned_kinds
from nnunet_autoreg.sampling.neighbours import ALIKE, places_alike
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.sampler import SampleOrigin, SequenceSampler
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.groups import store_groups
from nnunet_autoreg.store.store import Store

log = logging.getLogger(__name__)

PICTURE_NAME = "sequences.png"
PER_KIND = {"spatial": 3, "strided": 2, "contrast": 2, "semantic": 3}
MOST_INPUTS = 6
LIKENESS_SCANS = 2
"""Number of scans, as a multiple of the images of a semantic sequence, if structures are found by
similarity."""

STRIP = 13
"""Number of blocks in the strip below each sequence, around the first that has to be predicted."""

PANEL_INCH = {"one image": 4.6, "several images": 5.2}
TITLES = {
    "spatial": "One crop of one scan",
    "strided": "Overlapping parts of one crop, one after another",
    "contrast": "The same region in several contrasts of one patient",
    "semantic": "The same structure in several patients",
}


@dataclass(frozen=True)
class DrawnSequence:
    """One sequence to draw, and its source."""

    sample: Sample
    origin: SampleOrigin

    @property
    def has_several_images(self) -> bool:
        """Whether the sequence has more than one crop."""
        return len(self.sample.voxels) > 1


def draw_preview(
    folder: Path,
    plan: Plan,
    rows: Sequence[ScanRow],
    store: Store,
    num_workers: int,
) -> Path:
    """Preprocess a few scans, sample sequences from them as in training, and draw them.

    Returns:
        the picture in the run's folder.

    Raises:
        AutoregError: none of the scans gives a sequence.
    """
    kinds = planned_kinds(plan)
    path = folder / PLACES_NAME
    places = read_places(path) if path.exists() else []
    chosen = choose_rows(plan, rows, places)
    spacing_of = partial(row_spacing, data=plan.data)
    keys = store.ensure(chosen, spacing_of, plan.data.ct_window, num_workers)
    stored = [row for row in chosen if row.id in keys]
    cases = {row.id: store.open(keys[row.id]) for row in stored}

    if "semantic" in kinds and not places:
        num_members = plan.sequence.semantic_members
        places = places_alike(stored, cases, member_crop(plan, "semantic"), num_members)
    groups = []
    if "contrast" in kinds:
        groups_of_rows = contrast_groups(chosen, plan.data.salt_free)
        groups = store_groups(plan, store, groups_of_rows, num_workers)

    picture = folder / PICTURE_NAME
    images = [cases[row.id] for row in stored if row.is_image]
    volumes = {row.id: cases[row.id] for row in stored if not row.is_image}
    pool = gather(plan, volumes, groups, places, images)
    if set(kinds) <= set(VIEW_KINDS):
        num_samples = draw_views(picture, plan, pool)
        log.info("both views of %d samples of %d scans: %s", num_samples, len(cases), picture)
        return picture

    sequences = draw_sequences(plan, pool)
    if not sequences:
        raise AutoregError(
            f"--show: none of the {len(chosen)} scans tried allows a sequence; see the lines "
            "above, or leave out --show",
            code="preview-no-sequence",
        )
    names = {cases[row.id].path: row.id for row in stored}
    draw_picture(picture, plan, sequences, names)
    log.info("%d sequences of %d scans: %s", len(sequences), len(cases), picture)
    return picture


def choose_rows(
    plan: Plan,
    rows: Sequence[ScanRow],
    places: Sequence[StructureLocation],
) -> list[ScanRow]:
    """Return enough scans for the picture.

    They come from all datasets. They include whole groups of contrasts, and scans of subjects that
    share structures.
    """
    kinds = planned_kinds(plan)
    chosen: list[ScanRow] = []
    if {"spatial", "strided", *VIEW_KINDS} & set(kinds):
        chosen += spread_over_datasets(rows)
    if "contrast" in kinds:
        groups = contrast_groups(rows, plan.data.salt_free)
        fitting = []
        for group in groups:
            with_contrasts = reduced(group, plan.sequence.contrasts)
            if len(with_contrasts.rows) >= plan.sequence.contrast_members:
                fitting.append(with_contrasts)
        for group in fitting[: PER_KIND["contrast"]]:
            chosen += group.rows
    if "semantic" in kinds:
        chosen += scans_with_structures(plan, rows, places)

    # Each scan once, in the order in which it was chosen first.
    return list({row.id: row for row in chosen}.values())


def spread_over_datasets(rows: Sequence[ScanRow]) -> list[ScanRow]:
    """Return the first, middle and last scan of every dataset, up to a limit."""
    by_dataset: dict[str, list[ScanRow]] = {}
    for row in rows:
        by_dataset.setdefault(row.dataset, []).append(row)

    spread = []
    for part in range(3):
        for name in sorted(by_dataset):
            of_dataset = by_dataset[name]
            spread.append(of_dataset[round(part * (len(of_dataset) - 1) / 2)])
    wanted = max(PER_KIND["spatial"], len(by_dataset))
    return spread[: min(wanted, MOST_INPUTS)]


def scans_with_structures(
    plan: Plan,
    rows: Sequence[ScanRow],
    places: Sequence[StructureLocation],
) -> list[ScanRow]:
    """Return scans of different subjects that share structures."""
    num_members = plan.sequence.semantic_members
    by_id = {row.id: row for row in rows}
    # structure -> subject -> scan
    structures: dict[str, dict[str, str]] = {}
    for place in places:
        if place.scan in by_id:
            subject = subject_of(by_id[place.scan])
            scan_of_subject = structures.setdefault(place.structure, {})
            scan_of_subject.setdefault(subject, place.scan)
    if not structures:
        return list(rows[: LIKENESS_SCANS * num_members])

    enough = [scans for _, scans in sorted(structures.items()) if len(scans) >= num_members]
    every = max(1, len(enough) // PER_KIND["semantic"])
    chosen = []
    for scan_of_subject in enough[::every][: PER_KIND["semantic"]]:
        first_scans = list(scan_of_subject.values())[:num_members]
        chosen += [by_id[scan] for scan in first_scans]
    return chosen


def draw_sequences(plan: Plan, pool: SamplingPool) -> list[DrawnSequence]:
    """Return a few sequences of each kind, from different scans, groups or structures.

    In each, some blocks are given and most have to be predicted.
    """
    sampler = SequenceSampler(plan)
    sequences = []
    for kind in planned_kinds(plan):
        field = {"contrast": "groups", "semantic": "structures"}.get(kind, "cases")
        for number in range(min(PER_KIND[kind], pool.num_sources(kind))):
            source = getattr(pool, field)[number]
            generator = rng.generator(plan.run.seed, f"picture: {kind}", number)
            only_source = replace(pool, **{field: (source,)})
            _, origin = sampler.draw_kind(kind, only_source, generator)

            sample, origin = upright(plan, origin)
            share = (0.3, 0.5, 0.2)[number % 3]
            prefix = informative_prefix(plan, sample, kind, share)
            sequences.append(DrawnSequence(replace(sample, prefix=prefix), origin))
    return sequences


def upright(plan: Plan, origin: SampleOrigin) -> tuple[Sample, SampleOrigin]:
    """Return the same sequence in radiological orientation.

    Training also uses this orientation, among others.
    """
    flips = (False, True, True) if plan.sequence.flip else (False, False, False)
    # Views come to ``view_preview`` instead, so that all kinds here have this field.
    before: Any = origin.drawn
    drawn: Any = replace(before, flip_transpose=FlipTranspose(flips))
    if origin.kind == "spatial":
        sample = spatial.apply(plan, origin.cases[0], drawn)
    elif origin.kind == "strided":
        sample = strided.apply(plan, origin.cases[0], drawn)
    else:
        sample = members.apply(plan, origin.kind, origin.cases, drawn)
    return sample.augmented(), replace(origin, drawn=drawn)


def informative_prefix(plan: Plan, sample: Sample, kind: str, share: float) -> int:
    """Return a number of given blocks such that the first block to predict is not empty.

    It is about this share of the blocks. If the plan fixes the share, that share is kept.
    """
    if plan.sequence.prefix == "fixed":
        return sample.prefix
    total = num_blocks(plan, kind)
    low = max(1, round((share - 0.1) * total))
    high = max(2, round((share + 0.1) * total))
    indices = block_indices(plan, sample)
    position_of = {int(index): position for position, index in enumerate(indices.ravel())}

    def contrast(prefix: int) -> float:
        slice_YX = _middle_slice(plan, sample, indices.shape, position_of[prefix])
        return float(np.nan_to_num(slice_YX).std())

    return max(range(low, min(high, total)), key=contrast, default=1)


def block_indices(plan: Plan, sample: Sample) -> NDArray[np.int64]:
    """Return the index in the sequence of every block, (members, Z, Y, X)."""
    token, block = plan.encoder.token_size_vox, plan.sequence.block_tokens
    grid = grid_of(sample.voxels.shape[2:], token)
    shape = [tokens // side for tokens, side in zip(grid, block, strict=True)]
    num_members = len(sample.voxels)
    per_token = sample.order_index.reshape(num_members, -1)  # (members, T)
    indices = np.zeros((num_members, volume(shape)), dtype=np.int64)
    indices[:, block_ids(grid, block)] = per_token
    return indices.reshape(num_members, *shape)


def draw_picture(
    path: Path,
    plan: Plan,
    sequences: Sequence[DrawnSequence],
    names: Mapping[Path, str],
) -> None:
    """Write the picture, one panel per sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    heights = []
    for one in sequences:
        kind = "several images" if one.has_several_images else "one image"
        heights.append(PANEL_INCH[kind])
    figure = Figure(figsize=(15, sum(heights) + 1.4), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(len(sequences) + 1, 1, height_ratios=[1.4, *heights])
    head, *panels = parts

    title = f"What the network sees and what it has to predict: run '{plan.name}'"
    head.text(0.01, 0.93, title, fontsize=16, weight="bold", va="top")
    moves = []
    if plan.sequence.flip:
        moves.append("flipped")
    if plan.sequence.swap_axes:
        moves.append("transposed")
    training = f"During training they are {' and '.join(moves)} at random." if moves else ""
    details = f"(order: {plan.sequence.order}, predictor: {plan.sequence.predictor})"
    if plan.sequence.is_at_once:
        details = ""
    explanation = (
        f"A crop is cut into blocks. {use_of_blocks(plan)} "
        "Hatched: outside the scan; nothing is predicted there.\n"
        f"Crops are shown as radiologists view them. {training} {details}"
    )
    head.text(0.01, 0.62, explanation, fontsize=11.5, va="top")

    for panel, one in zip(panels, sequences, strict=True):
        draw_panel(panel, plan, one, names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def use_of_blocks(plan: Plan) -> str:
    """Return two lines of text about the use of the blocks by the network."""
    kind = kind_of(plan.objective.name)
    if kind.preview:
        return kind.preview
    seen = "The network sees the blocks with a solid blue frame."
    if plan.sequence.is_at_once:
        return f"{seen} It has to predict those with a dashed orange frame,\nall of them at once."
    return (
        f"{seen} It has to predict those with a dashed orange frame, in the order of the numbers.\n"
        "When it predicts a block, it sees the true content of all blocks with smaller numbers."
    )


def draw_panel(panel: Any, plan: Plan, one: DrawnSequence, names: Mapping[Path, str]) -> None:
    """Draw one sequence: a title, its views side by side, and below them its blocks in order."""
    sample, origin = one.sample, one.origin
    source = origin.subject or names.get(origin.cases[0].path, "")
    title = f"{TITLES[origin.kind]}:  {source}"
    if origin.subject.startswith(ALIKE):
        # Such a structure has only a number.
        title = "Regions that look alike in several patients"
    num_given = sample.prefix
    num_predicted = int(sample.order_index.max()) + 1 - num_given
    panel.suptitle(
        f"{title}   ({num_given} blocks are seen, {num_predicted} predicted)",
        x=0.01,
        ha="left",
        fontsize=13,
    )

    top, bottom = panel.subfigures(2, 1, height_ratios=[2.6, 1])
    views = views_of(plan, one, names)
    axes = np.atleast_1d(top.subplots(1, len(views)))
    for axis, (view_title, draw) in zip(axes, views, strict=True):
        draw(axis)
        axis.set_title(view_title, fontsize=10)
        axis.set_axis_off()
    draw_strip(bottom, plan, sample)


def views_of(
    plan: Plan,
    one: DrawnSequence,
    names: Mapping[Path, str],
) -> list[tuple[str, Callable[[Any], None]]]:
    """Return (title, function that draws on an axis) of every view.

    The first is the scan with the crop marked. The others are the crop in layers, or the members
    side by side.
    """
    sample, origin = one.sample, one.origin
    side_z, _, _ = _block_side(plan)
    num_layers = sample.voxels.shape[2] // side_z
    title = "the crop in the whole scan"
    if one.has_several_images:
        is_of_one_patient = origin.kind == "contrast"
        title = "the crop in the scan" if is_of_one_patient else "the crop in the first scan"
    views: list[tuple[str, Callable[[Any], None]]] = [
        (title, partial(draw_context, case=origin.cases[0], one=one, plan=plan)),
    ]

    if not one.has_several_images:
        num_shown = min(4, num_layers)
        evenly = np.linspace(0, num_layers - 1, num_shown).round().astype(int)
        for layer in np.unique(evenly).tolist():
            draw = partial(_draw_layer, plan=plan, sample=sample, member=0, layer=layer)
            views.append((f"layer of blocks {layer + 1} of {num_layers}", draw))
        return views

    for member in range(len(sample.voxels)):
        name = names.get(origin.cases[member].path, "").rpartition("/")[2]
        if origin.kind == "contrast":
            name = origin.names[member]
        draw = partial(_draw_layer, plan=plan, sample=sample, member=member, layer=num_layers // 2)
        views.append((f"{member + 1}.  {name}", draw))
    return views


def _grey_range(sample: Sample, member: int) -> tuple[float, float]:
    """Return the darkest and brightest grey of a member."""
    valid_ZYX = sample.valid_mask[member]
    return grey_range(sample.voxels[member, 0][valid_ZYX], 99.5)


def _aspect(plan: Plan) -> float:
    _, y, x = plan.data.spacing_mm
    return y / x


def _block_side(plan: Plan) -> list[int]:
    """Return the voxels of a block along z, y, x."""
    token, block = plan.encoder.token_size_vox, plan.sequence.block_tokens
    return [voxels * tokens for voxels, tokens in zip(token, block, strict=True)]


def _style_of(sample: Sample, index: int) -> Style:
    """Return how a block is outlined, given its index in the sequence."""
    return GIVEN if index < sample.prefix else PREDICTED


def _draw_padding(axis: Any, left: float, top: float, width: float, height: float) -> None:
    """Hatch an area, below everything else; it stays visible only outside of the scan."""
    from matplotlib.patches import Rectangle

    area = Rectangle(
        (left, top),
        width,
        height,
        facecolor=GRID,
        edgecolor=SOFT,
        hatch="////",
        linewidth=0,
        zorder=-1,
    )
    axis.add_patch(area)


def _draw_layer(axis: Any, *, plan: Plan, sample: Sample, member: int, layer: int) -> None:
    """Draw the middle slice of one layer of blocks, with frames and numbers."""
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    side_z, side_y, side_x = _block_side(plan)
    low, high = _grey_range(sample, member)
    in_layer = slice(layer * side_z, (layer + 1) * side_z)
    z = layer * side_z + _fullest_slice(sample.valid_mask[member, in_layer])
    valid_YX = sample.valid_mask[member, z]
    slice_YX = np.where(valid_YX, sample.voxels[member, 0, z], np.nan)
    height, width = slice_YX.shape
    _draw_padding(axis, -0.5, -0.5, width, height)
    axis.imshow(slice_YX, cmap="gray", vmin=low, vmax=high, aspect=_aspect(plan))

    indices_YX = block_indices(plan, sample)[member, layer]
    # At most six numbers in a row can be read.
    every = -(-indices_YX.shape[1] // 6)
    halo = [patheffects.withStroke(linewidth=1.8, foreground=INK)]
    for y, x in np.ndindex(*indices_YX.shape):
        index = int(indices_YX[y, x])
        rows = slice(y * side_y, (y + 1) * side_y)
        columns = slice(x * side_x, (x + 1) * side_x)
        if not valid_YX[rows, columns].any():
            continue

        # Frames lie inside their blocks, so that neighbours do not cover each other.
        style = _style_of(sample, index)
        left, top = x * side_x - 0.5, y * side_y - 0.5
        frame = Rectangle(
            (left + 0.03 * side_x, top + 0.03 * side_y),
            0.94 * side_x,
            0.94 * side_y,
            fill=False,
            edgecolor=style.colour,
            linestyle=style.dash,
            linewidth=1.0,
        )
        axis.add_patch(frame)
        if x % every == 0 and not plan.sequence.is_at_once:
            axis.text(
                left + 0.08 * side_x,
                top + 0.1 * side_y,
                str(index + 1),
                color=style.colour,
                fontsize=8,
                va="top",
                weight="bold",
                path_effects=halo,
            )


def draw_context(axis: Any, *, case: StoredCase, one: DrawnSequence, plan: Plan) -> None:
    """Draw the slice of the whole scan through the middle of the crop, with the crop marked."""
    from matplotlib.patches import Rectangle

    drawn: Any = one.origin.drawn
    start = drawn.starts[0] if hasattr(drawn, "starts") else drawn.start
    if one.origin.kind == "strided":
        size = strided.stretch(plan)
    else:
        # The sample was transposed after it was cut out; in the scan it has its old axes.
        shape, axes = one.sample.voxels.shape[2:], drawn.flip_transpose.axes
        size = as_size([shape[axes.index(axis)] for axis in range(3)])

    num_slices, height, width = case.shape_vox
    middle = start[0] + size[0] // 2
    z = int(np.clip(middle, 0, num_slices - 1))
    slice_YX = case.read((z, 0, 0), (1, height, width))[0, 0]
    low, high = grey_range(slice_YX, 99.5)
    aspect = case.spacing_mm[1] / case.spacing_mm[2]
    axis.imshow(slice_YX, cmap="gray", vmin=low, vmax=high, aspect=aspect)

    # Pixels are centred on whole numbers, so that their edges are at half ones.
    left, top = start[2] - 0.5, start[1] - 0.5
    _, side_y, side_x = size
    frame = Rectangle((left, top), side_x, side_y, fill=False, edgecolor=CROP.colour, linewidth=2)
    axis.add_patch(frame)
    _draw_padding(axis, left, top, side_x, side_y)

    # The crop may reach beyond the scan.
    limits = []
    for first, length, num_voxels in zip(start[1:], size[1:], case.shape_vox[1:], strict=True):
        limits.append((min(first, 0), max(first + length, num_voxels)))
    (first_y, last_y), (first_x, last_x) = limits
    y_limits, x_limits = (last_y + 1, first_y - 2), (first_x - 2, last_x + 1)
    # The arrays run towards anterior and right. Both are reversed, so that the front is up and the
    # patient's right is on the left.
    if plan.sequence.flip:
        y_limits, x_limits = y_limits[::-1], x_limits[::-1]
    axis.set_ylim(*y_limits)
    axis.set_xlim(*x_limits)


def draw_strip(panel: Any, plan: Plan, sample: Sample) -> None:
    """Draw blocks in their order around the first that has to be predicted."""
    indices = block_indices(plan, sample)
    flat_indices = indices.ravel()

    # Positions of the blocks that hold any image, in the order of the sequence.
    filled = []
    for position in np.argsort(flat_indices).tolist():
        region = _block_region(plan, indices.shape, position)
        if sample.valid_mask[region].any():
            filled.append(position)
    num_given = int((flat_indices[filled] < sample.prefix).sum())
    first = max(0, min(num_given - STRIP // 2, len(filled) - STRIP))

    axes = np.atleast_1d(panel.subplots(1, STRIP))
    shown = range(first, min(first + STRIP, len(filled)))
    for axis, number in zip(axes, shown, strict=False):
        position = filled[number]
        slice_YX = _middle_slice(plan, sample, indices.shape, position)
        member = position // volume(indices.shape[1:])
        low, high = _grey_range(sample, member)
        height, width = slice_YX.shape
        _draw_padding(axis, -0.5, -0.5, width, height)
        axis.imshow(slice_YX, cmap="gray", vmin=low, vmax=high, aspect=_aspect(plan))

        index = int(flat_indices[position])
        style = _style_of(sample, index)
        for spine in axis.spines.values():
            spine.set(edgecolor=style.colour, linestyle=style.dash, linewidth=3)
        axis.set(xticks=[], yticks=[])
        if plan.sequence.is_at_once:
            label = "seen" if number < num_given else "predicted"
        else:
            roles = {num_given - 1: "last seen", num_given: "first predicted"}
            label = f"{index + 1}\n{roles.get(number, '')}"
        axis.set_xlabel(label, fontsize=9, color=INK)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("some blocks" if plan.sequence.is_at_once else "in order", fontsize=10)


def _block_region(plan: Plan, shape: Sequence[int], position: int) -> tuple[int | slice, ...]:
    """Return the index of one block in arrays of the shape (members, Z, Y, X) of voxels.

    Args:
        shape: shape of the blocks, (members, Z, Y, X).
        position: index of the block, counted through all of them.
    """
    member, *cell = (int(index) for index in np.unravel_index(position, shape))
    region = []
    for index, side in zip(cell, _block_side(plan), strict=True):
        region.append(slice(index * side, (index + 1) * side))
    return (member, *region)


def _middle_slice(
    plan: Plan,
    sample: Sample,
    shape: Sequence[int],
    position: int,
) -> NDArray[np.float32]:
    """Return the middle slice of one block, NaN outside the scan.

    Args:
        shape, position: as in ``_block_region``.
    """
    region = _block_region(plan, shape, position)
    valid_ZYX = sample.valid_mask[region]
    voxels_ZYX = sample.voxels[:, 0][region]
    z = _fullest_slice(valid_ZYX)
    slice_YX: NDArray[np.float32] = np.where(valid_ZYX[z], voxels_ZYX[z], np.nan)
    return slice_YX


def _fullest_slice(valid_ZYX: NDArray[np.bool_]) -> int:
    """Return the slice with the most valid voxels; the one nearest to the middle of several."""
    num_valid_Z = valid_ZYX.sum(axis=(1, 2))
    fullest = np.flatnonzero(num_valid_Z == num_valid_Z.max()).tolist()
    middle = len(num_valid_Z) // 2
    return int(min(fullest, key=lambda z: abs(z - middle)))
