"""x"""

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
from nnunet_autoreg.corpus.places import KnownPlace, subject_of
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.preprocessing import store_groups
from nnunet_autoreg.pretrain.sampling_pool import PLACES_NAME, read_places
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.sampling import members, spatial, strided
from nnunet_autoreg.sampling.blocks import block_ids
from nnunet_autoreg.sampling.gather import gather
from nnunet_autoreg.sampling.kinds import member_crop, num_blocks, wanted
from nnunet_autoreg.sampling.neighbours import ALIKE, places_alike
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.sampler import SequenceSampler, Shown
from nnunet_autoreg.sampling.turn import Turn
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.store import Store

log = logging.getLogger(__name__)


PICTURE_NAME = "sequences.png"


PER_KIND = {"spatial": 3, "strided": 2, "contrast": 2, "semantic": 3}


LIKENESS_SCANS = 2
"""Times as many scans as a semantic sequence has images, where structures are found by likeness."""


STRIP = 13
"""Blocks in the strip below each sequence, around the first that has to be predicted."""


GIVEN, ASKED, NOW = "#35b779", "#e8743b", "#ffffff"


TITLES = {
    "spatial": "One crop of one scan",
    "strided": "Overlapping sub-volumes of one crop, one after another",
    "contrast": "One place in several contrasts of one patient",
    "semantic": "One structure in several patients",
}


@dataclass(frozen=True)
class Drawn:
    """One sequence to picture."""

    sample: Sample
    shown: Shown


def draw_preview(
    folder: Path, plan: Plan, rows: Sequence[ScanRow], store: Store, num_workers: int
) -> Path:
    """Preprocess a few scans, draw sequences from them as training would, and picture them in the
    run's folder.

    Raises:
        AutoregError: none of the scans gives a sequence.
    """
    path = folder / PLACES_NAME
    places = read_places(path) if path.exists() else []
    chosen = few_rows(plan, rows, places)
    spacing_of = partial(row_spacing, data=plan.data)
    keys = store.ensure(chosen, spacing_of, plan.data.ct_window, num_workers)
    cases = {row.id: store.open(keys[row.id]) for row in chosen if row.id in keys}
    if "semantic" in wanted(plan) and not places:
        tried = [row for row in chosen if row.id in cases]
        places = places_alike(
            tried, cases, member_crop(plan, "semantic"), plan.sequence.semantic_members
        )
    groups = (
        store_groups(plan, store, contrast_groups(chosen), num_workers)
        if "contrast" in wanted(plan)
        else []
    )
    names = {
        case.path: row.id
        for row, case in ((row, cases[row.id]) for row in chosen if row.id in cases)
    }
    drawn = draw_few(plan, gather(plan, cases, groups, places))
    if not drawn:
        raise AutoregError(
            f"--show: none of the {len(chosen)} scans tried gives a sequence; see the lines above, "
            "or leave out --show"
        )
    picture = folder / PICTURE_NAME
    draw_picture(picture, plan, drawn, names)
    log.info("%d sequences of %d scans: %s", len(drawn), len(cases), picture)
    return picture


def few_rows(plan: Plan, rows: Sequence[ScanRow], places: Sequence[KnownPlace]) -> list[ScanRow]:
    """Scans enough for the picture: spread over the datasets, whole groups of contrasts, subjects
    that share structures.
    """
    by_id = {row.id: row for row in rows}
    wish: dict[str, ScanRow] = {}
    kinds, s = wanted(plan), plan.sequence
    if "spatial" in kinds or "strided" in kinds:
        of: dict[str, list[ScanRow]] = {}
        for row in rows:
            of.setdefault(row.dataset, []).append(row)
        most = max(PER_KIND["spatial"], len(of)) if len(of) <= 6 else 6
        spread = [
            of[name][round(i * (len(of[name]) - 1) / 2)] for i in range(3) for name in sorted(of)
        ]
        wish.update({row.id: row for row in spread[:most]})
    if "contrast" in kinds:
        fitting = [
            g
            for g in (reduced(group, s.contrasts) for group in contrast_groups(rows))
            if len(g.rows) >= s.contrast_members
        ]
        wish.update(
            {row.id: row for group in fitting[: PER_KIND["contrast"]] for row in group.rows}
        )
    if "semantic" in kinds:
        structures: dict[str, dict[str, str]] = {}
        for place in places:
            if place.scan in by_id:
                structures.setdefault(place.structure, {}).setdefault(
                    subject_of(by_id[place.scan]), place.scan
                )
        if not structures:
            wish.update({row.id: row for row in rows[: LIKENESS_SCANS * s.semantic_members]})
        enough = [
            scans for _, scans in sorted(structures.items()) if len(scans) >= s.semantic_members
        ]
        shown = enough[:: max(1, len(enough) // PER_KIND["semantic"])][: PER_KIND["semantic"]]
        wish.update(
            {
                scan: by_id[scan]
                for scans in shown
                for scan in list(scans.values())[: s.semantic_members]
            }
        )
    return list(wish.values())


def draw_few(plan: Plan, pool: SamplingPool) -> list[Drawn]:
    """A few sequences of each kind, from different scans, groups or structures; each with some
    blocks given and most asked for.
    """
    sampler, drawn = SequenceSampler(plan), []
    for kind in wanted(plan):
        for number in range(min(PER_KIND[kind], pool.num_sources(kind))):
            one = replace(pool, **{_field(kind): (_things(pool, kind)[number],)})
            _, shown = sampler.draw_kind(
                kind, one, rng.generator(plan.run.seed, f"picture: {kind}", number)
            )
            sample, shown = upright(plan, shown)
            share = (0.3, 0.5, 0.2)[number % 3]
            drawn.append(
                Drawn(replace(sample, prefix=telling_prefix(plan, sample, kind, share)), shown)
            )
    return drawn


def upright(plan: Plan, shown: Shown) -> tuple[Sample, Shown]:
    """The same sequence the way round that radiologists look at scans: one of the ways in which
    training mirrors them.
    """
    flips = (False, True, True) if plan.sequence.flip else (False, False, False)
    drawn: Any = replace(shown.drawn, turn=Turn(flips))
    if shown.kind == "spatial":
        sample = spatial.apply(plan, shown.cases[0], drawn)
    elif shown.kind == "strided":
        sample = strided.apply(plan, shown.cases[0], drawn)
    else:
        sample = members.apply(plan, shown.kind, shown.cases, drawn)
    return sample.turned(), replace(shown, drawn=drawn)


def telling_prefix(plan: Plan, sample: Sample, kind: str, share: float) -> int:
    """About this share of the blocks, such that the first one to predict shows something; a plan's
    fixed one stays.
    """
    if plan.sequence.prefix == "fixed":
        return sample.prefix
    total, ranks = num_blocks(plan, kind), block_ranks(plan, sample)
    low, high = max(1, round((share - 0.1) * total)), max(2, round((share + 0.1) * total))
    place = {int(rank): i for i, rank in enumerate(ranks.ravel())}
    return max(
        range(low, min(high, total)),
        key=lambda p: float(_block(plan, sample, ranks.shape, place[p])[0].std()),
        default=1,
    )


def _field(kind: str) -> str:
    return {"contrast": "groups", "semantic": "structures"}.get(kind, "cases")


def _things(pool: SamplingPool, kind: str) -> tuple[Any, ...]:
    things: tuple[Any, ...] = getattr(pool, _field(kind))
    return things


def draw_picture(path: Path, plan: Plan, drawn: Sequence[Drawn], names: Mapping[Path, str]) -> None:
    """Write the picture, one panel per sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    heights = [PANEL_INCH[len(d.sample.voxels) > 1] for d in drawn]
    figure = Figure(figsize=(15, sum(heights) + 1.4), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(len(drawn) + 1, 1, height_ratios=[1.4, *heights])
    head, *panels = parts
    head.text(
        0.01,
        0.93,
        f"What the network is given and asked for - run '{plan.name}'",
        fontsize=16,
        weight="bold",
        va="top",
    )
    head.text(
        0.01,
        0.58,
        "It is shown the green blocks and predicts the orange ones, one after another in the order "
        "of the numbers; "
        "each block, once predicted, is shown too.\nHatched: no image there, nothing is asked. "
        "Pictured the usual way round; in "
        f"training crops are {_moved(plan)} at random. Order '{plan.sequence.order}', predictor "
        f"'{plan.sequence.predictor}'.",
        fontsize=11.5,
        va="top",
    )
    for panel, one in zip(panels, drawn, strict=True):
        _draw_panel(panel, plan, one, names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _moved(plan: Plan) -> str:
    ways = [
        word
        for word, does in (("mirrored", plan.sequence.flip), ("turned", plan.sequence.swap_axes))
        if does
    ]
    return " and ".join(ways) if ways else "taken"


PANEL_INCH = {False: 4.6, True: 5.2}


def _draw_panel(panel: Any, plan: Plan, one: Drawn, names: Mapping[Path, str]) -> None:
    sample, shown = one.sample, one.shown
    whose = shown.subject if shown.subject else names.get(shown.cases[0].path, "")
    given, asked = sample.prefix, int(sample.ranks.max()) + 1 - sample.prefix
    what = (
        "Places that look alike in several patients"
        if shown.subject.startswith(ALIKE)
        else TITLES[shown.kind]
    )
    panel.suptitle(
        f"{what}:  {whose}   ({given} blocks given, {asked} to predict)",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    top, bottom = panel.subfigures(2, 1, height_ratios=[2.6, 1])
    pictures = _views(plan, one, names)
    axes = np.atleast_1d(top.subplots(1, len(pictures)))
    for axis, (title, draw) in zip(axes, pictures, strict=True):
        draw(axis)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    _draw_strip(bottom, plan, sample)


def _views(
    plan: Plan, one: Drawn, names: Mapping[Path, str]
) -> list[tuple[str, Callable[[Any], None]]]:
    """(title, how to draw): the scan with the crop marked, then the crop in layers, or the members
    side by side.
    """
    sample, shown = one.sample, one.shown
    grey = _window(sample)
    depth, token = (
        sample.voxels.shape[2],
        plan.encoder.token_size_vox[0] * plan.sequence.block_tokens[0],
    )
    layers = depth // token
    if len(sample.voxels) == 1:
        chosen = np.unique(np.linspace(0, layers - 1, min(4, layers)).round().astype(int)).tolist()
        views = [
            (
                f"layer {layer + 1} of {layers}",
                partial(_draw_layer, plan=plan, sample=sample, member=0, layer=layer, grey=grey),
            )
            for layer in chosen
        ]
        return [
            (
                "where it lies in the scan",
                partial(_draw_context, case=shown.cases[0], one=one, plan=plan),
            ),
            *views,
        ]
    middle = layers // 2
    marked = shown.cases[0]
    views = [
        (
            _member_title(shown, names, m),
            partial(
                _draw_layer, plan=plan, sample=sample, member=m, layer=middle, grey=grey[m : m + 1]
            ),
        )
        for m in range(len(sample.voxels))
    ]
    title = "where it lies" if shown.kind == "contrast" else "where it lies in the first"
    return [(title, partial(_draw_context, case=marked, one=one, plan=plan)), *views]


def _member_title(shown: Shown, names: Mapping[Path, str], member: int) -> str:
    if shown.kind == "contrast":
        return f"{member + 1}.  {shown.names[member]}"
    return f"{member + 1}.  {names.get(shown.cases[member].path, '').rpartition('/')[2]}"


def _window(sample: Sample) -> list[tuple[float, float]]:
    """Darkest and brightest grey of each member."""
    greys = []
    for voxels, real in zip(sample.voxels, sample.real, strict=True):
        inside = voxels[0][real] if real.any() else np.zeros(1)
        low, high = np.percentile(inside, (1, 99.5))
        greys.append((float(low), float(max(high, low + 1e-3))))
    return greys


def _draw_layer(
    axis: Any,
    *,
    plan: Plan,
    sample: Sample,
    member: int,
    layer: int,
    grey: Sequence[tuple[float, float]],
) -> None:
    """The middle slice of one layer of blocks: outlines by colour, numbers by order."""
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    token = plan.encoder.token_size_vox
    side = [t * b for t, b in zip(token, plan.sequence.block_tokens, strict=True)]
    low, high = grey[0]
    z = layer * side[0] + _fullest(sample.real[member, layer * side[0] : (layer + 1) * side[0]])
    aspect = _aspect(plan)
    axis.imshow(
        np.where(sample.real[member, z], sample.voxels[member, 0, z], np.nan),
        cmap="gray",
        vmin=low,
        vmax=high,
        aspect=aspect,
    )
    axis.set_facecolor("#dddddd")
    ranks = block_ranks(plan, sample)[member][layer]
    every = -(-ranks.shape[1] // 6)
    outline = [patheffects.withStroke(linewidth=1.8, foreground="black")]
    for y, x in np.ndindex(*ranks.shape):
        rank = int(ranks[y, x])
        colour = GIVEN if rank < sample.prefix else ASKED
        box = (x * side[2] - 0.5, y * side[1] - 0.5)
        empty = not sample.real[
            member, z, y * side[1] : (y + 1) * side[1], x * side[2] : (x + 1) * side[2]
        ].any()
        axis.add_patch(
            Rectangle(
                box,
                side[2],
                side[1],
                facecolor="none" if empty else colour,
                alpha=0.09,
                linewidth=0,
            )
        )
        axis.add_patch(
            Rectangle(
                box,
                side[2],
                side[1],
                facecolor="none",
                edgecolor="#bbbbbb" if empty else colour,
                linewidth=0.6,
                hatch="///" if empty else None,
            )
        )
        if not empty and x % every == 0:
            axis.text(
                box[0] + 0.06 * side[2],
                box[1] + 0.1 * side[1],
                str(rank + 1),
                color=colour,
                fontsize=8,
                va="top",
                weight="bold",
                path_effects=outline,
            )


def block_ranks(plan: Plan, sample: Sample) -> NDArray[np.int64]:
    """(M, Z, Y, X) rank of every block."""
    token, block = plan.encoder.token_size_vox, plan.sequence.block_tokens
    grid = grid_of(sample.voxels.shape[2:], token)
    ids = block_ids(grid, block)
    shape = [g // b for g, b in zip(grid, block, strict=True)]
    per_member = sample.ranks.reshape(len(sample.voxels), -1)
    ranks = np.zeros((len(sample.voxels), int(np.prod(shape))), dtype=np.int64)
    ranks[:, ids] = per_member
    return ranks.reshape(len(sample.voxels), *shape)


def _aspect(plan: Plan) -> float:
    _, y, x = plan.data.spacing_mm
    return y / x


def _draw_context(axis: Any, *, case: StoredCase, one: Drawn, plan: Plan) -> None:
    """The slice of the whole scan through the middle of the crop, with the crop marked."""
    from matplotlib.patches import Rectangle

    drawn: Any = one.shown.drawn
    start = drawn.starts[0] if hasattr(drawn, "starts") else drawn.start
    size = _read_size(plan, one)
    z = int(np.clip(start[0] + size[0] // 2, 0, case.shape_vox[0] - 1))
    whole = case.read((z, 0, 0), (1, *case.shape_vox[1:]))[0, 0]
    low, high = np.percentile(whole, (1, 99.5))
    axis.imshow(
        whole,
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-3),
        aspect=case.spacing_mm[1] / case.spacing_mm[2],
    )
    axis.add_patch(
        Rectangle(
            (start[2] - 0.5, start[1] - 0.5),
            size[2],
            size[1],
            fill=False,
            edgecolor="#ffd92f",
            linewidth=2,
        )
    )
    extent = [
        (min(a, 0), max(a + n, m))
        for a, n, m in zip(start[1:], size[1:], case.shape_vox[1:], strict=True)
    ]
    # The arrays run towards anterior and right: front up and the patient's right on the left is the
    # reverse of both.
    turn = -1 if plan.sequence.flip else 1
    axis.set_ylim(*(extent[0][1] + 1, extent[0][0] - 2)[::turn])
    axis.set_xlim(*(extent[1][0] - 2, extent[1][1] + 1)[::turn])


def _read_size(plan: Plan, one: Drawn) -> tuple[int, int, int]:
    """Voxels along z, y, x of the scan that a member's crop covers: undo the axis order."""
    if one.shown.kind == "strided":
        return strided.stretch(plan)
    shape, axes = one.sample.voxels.shape[2:], one.shown.drawn.turn.axes
    z, y, x = (int(shape[axes.index(axis)]) for axis in range(3))
    return (z, y, x)


def _draw_strip(panel: Any, plan: Plan, sample: Sample) -> None:
    """Blocks in their order around the first that has to be predicted."""
    ranks = block_ranks(plan, sample)
    order = np.argsort(ranks.ravel())
    filled = [i for i in order.tolist() if _block(plan, sample, ranks.shape, i)[1]]
    begin = next(
        (n for n, i in enumerate(filled) if ranks.ravel()[i] >= sample.prefix), len(filled)
    )
    first = max(0, min(begin - STRIP // 2, len(filled) - STRIP))
    axes = np.atleast_1d(panel.subplots(1, STRIP))
    grey = _window(sample)
    for axis, i in zip(axes, filled[first : first + STRIP], strict=False):
        block, _ = _block(plan, sample, ranks.shape, i)
        member, rank = i // int(np.prod(ranks.shape[1:])), int(ranks.ravel()[i])
        axis.imshow(
            block, cmap="gray", vmin=grey[member][0], vmax=grey[member][1], aspect=_aspect(plan)
        )
        colour = GIVEN if rank < sample.prefix else ASKED
        for spine in axis.spines.values():
            spine.set(edgecolor=colour, linewidth=3)
        axis.set(xticks=[], yticks=[])
        words = (
            "first to predict"
            if begin < len(filled) and i == filled[begin]
            else "last given"
            if n_before(filled, begin) == i
            else ""
        )
        axis.set_xlabel(f"{rank + 1}\n{words}", fontsize=9, color=colour)
    for axis in axes[len(filled[first : first + STRIP]) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("in order:", fontsize=10)


def n_before(filled: Sequence[int], begin: int) -> int:
    """The block before the first that has to be predicted; -1 if there is none."""
    return filled[begin - 1] if begin > 0 else -1


def _block(
    plan: Plan, sample: Sample, shape: Sequence[int], index: int
) -> tuple[NDArray[np.float32], bool]:
    """The middle slice of one block, and whether it holds any image."""
    side = [
        t * b for t, b in zip(plan.encoder.token_size_vox, plan.sequence.block_tokens, strict=True)
    ]
    member, *place = (int(i) for i in np.unravel_index(index, shape))
    z, y, x = (slice(p * n, (p + 1) * n) for p, n in zip(place, side, strict=True))
    real = sample.real[member, z, y, x]
    return np.where(real, sample.voxels[member, 0, z, y, x], 0)[_fullest(real)], bool(real.any())


def _fullest(real_ZYX: NDArray[np.bool_]) -> int:
    """The slice nearest to the middle of those with most image."""
    filled = real_ZYX.sum(axis=(1, 2))
    return int(
        min(np.flatnonzero(filled == filled.max()), key=lambda z: abs(int(z) - len(filled) // 2))
    )
