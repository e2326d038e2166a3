"""True, trivial and predicted slices of held-out scans, and the error, as small pictures inside
SVG.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Spacing

if TYPE_CHECKING:
    import torch

    from nnunet_autoreg.objectives.base import Objective
    from nnunet_autoreg.sampling.sample import Batch

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

NUM_SAMPLES = 4
AXES = ((0, "y-x plane"), (1, "z-x plane"))
TITLES = ("true", "nothing predicted", "predicted", "error")
ERROR_REACH = 0.5
"""The error's brightest colour, as a share of the truth's grey range."""


@dataclass(frozen=True)
class Slice:
    """One plane of one sample: all (H, W). ``aspect`` is the height of a pixel over its width."""

    name: str
    aspect: float
    truth: Floats
    trivial: Floats
    predicted: Floats
    given: Bools
    scored: Bools
    real: Bools
    grey: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """One held-out sample: how many of its blocks were given, and its planes."""

    num_given: int
    num_blocks: int
    slices: tuple[Slice, ...]


def held_out_pictures(
    objective: "Objective", batches: Sequence["Batch"], device: "torch.device", spacing_mm: Spacing
) -> list[Picture]:
    """The first few held-out samples under the objective's present weights; each costs one forward
    pass of its batch.
    """
    import torch

    was_training = objective.module.training
    objective.module.eval()
    pictures: list[Picture] = []
    try:
        for batch in batches:
            if len(pictures) >= NUM_SAMPLES:
                break
            with torch.no_grad():
                made = objective.reconstruct(batch.to(device))
            parts = {
                name: getattr(made, name).float().cpu().numpy()
                for name in ("truth", "trivial", "predicted", "given", "scored", "real")
            }
            blocks = (batch.ranks.amax(dim=1) + 1).tolist()
            pictures += [
                Picture(
                    given,
                    blocks[b],
                    _planes({name: part[b] for name, part in parts.items()}, spacing_mm),
                )
                for b, given in enumerate(batch.prefix.tolist())
            ]
    finally:
        objective.module.train(was_training)
    return pictures[:NUM_SAMPLES]


def _planes(parts: dict[str, Floats], spacing_mm: Spacing) -> tuple[Slice, ...]:
    """Two planes of that of a sample's members in which most was asked for."""
    member = int(parts["scored"].sum(axis=(1, 2, 3)).argmax())
    own = {name: part[member] for name, part in parts.items()}
    seen = own["truth"][own["real"] > 0]
    low, high = np.percentile(seen, [1, 99]) if seen.size else (0.0, 1.0)
    grey = (float(low), float(max(high, low + 1e-3)))
    return tuple(_slice(own, axis, name, spacing_mm, grey) for axis, name in AXES)


def _slice(
    own: dict[str, Floats], axis: int, name: str, spacing_mm: Spacing, grey: tuple[float, float]
) -> Slice:
    """The plane across ``axis`` where most is to be seen of what was asked for."""
    others = tuple(a for a in range(3) if a != axis)
    busy = (own["scored"] * np.abs(own["truth"] - own["trivial"])).sum(axis=others)
    cut = {key: np.take(part, int(busy.argmax()), axis=axis) for key, part in own.items()}
    height, width = (spacing_mm[a] for a in others)
    flags = {key: cut[key] > 0 for key in ("given", "scored", "real")}
    return Slice(
        name,
        height / width,
        cut["truth"],
        cut["trivial"],
        cut["predicted"],
        flags["given"],
        flags["scored"],
        flags["real"],
        grey,
    )


def panels(cut: Slice) -> list[tuple[str, str]]:
    """(title, SVG) of the truth, the trivial prediction, the prediction, and its error."""
    low, high = cut.grey
    shown = cut.given | cut.scored
    trivial, predicted = (
        np.where(cut.given, cut.truth, made) for made in (cut.trivial, cut.predicted)
    )
    error = np.abs(cut.predicted - cut.truth) / ((high - low) * ERROR_REACH)
    greys = [_grey((image - low) / (high - low)) for image in (cut.truth, trivial, predicted)]
    pictures = [
        (greys[0], cut.real),
        (greys[1], shown),
        (greys[2], shown),
        (_coloured(error), cut.scored),
    ]
    return [
        (title, _svg(cut, title, image, visible))
        for title, (image, visible) in zip(TITLES, pictures, strict=True)
    ]


def _grey(values: Floats) -> NDArray[np.uint8]:
    level = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    return np.repeat(level[..., None], 3, axis=-1)


def _coloured(values: Floats) -> NDArray[np.uint8]:
    import matplotlib

    coloured = matplotlib.colormaps["inferno"](np.clip(values, 0, 1), bytes=True)
    return np.asarray(coloured[..., :3], dtype=np.uint8)


def _svg(cut: Slice, title: str, image: NDArray[np.uint8], visible: Bools) -> str:
    """The image with what was given tinted and outlined; what is not ``visible`` lets the page's
    hatching through.
    """
    rows, columns = visible.shape
    height = rows * cut.aspect
    alt = f"{title}, {cut.name}: {100 * cut.given.mean():.0f} % of the picture was given"
    data = base64.b64encode(_png(np.dstack([image, visible.astype(np.uint8) * 255]))).decode()
    fill, edge = _outline(cut.given)
    return (
        f'<svg class="slice" viewBox="0 0 {columns} {height:.2f}" role="img" aria-label="{alt}">'
        f'<image width="{columns}" height="{height:.2f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
        f'<g transform="scale(1 {cut.aspect:.4f})"><path class="given" d="{fill}"/><path '
        f'class="edge" d="{edge}"/></g></svg>'
    )


def _outline(region: Bools) -> tuple[str, str]:
    """Path data of a region in pixels: its rows of equal pixels as rectangles, and its border
    towards the rest of the picture.
    """
    fill, edge = [], []
    changes = np.flatnonzero(np.any(region[1:] != region[:-1], axis=1)) + 1
    bounds = [0, *changes.tolist(), region.shape[0]]
    for top, bottom in pairwise(bounds):
        for left, right in _runs(region[top]):
            fill.append(f"M{left} {top}h{right - left}v{bottom - top}h{left - right}z")
            edge += [f"M{x} {top}v{bottom - top}" for x in (left, right) if 0 < x < region.shape[1]]
    for y in changes.tolist():
        edge += [f"M{left} {y}h{right - left}" for left, right in _runs(region[y] != region[y - 1])]
    return "".join(fill), "".join(edge)


def _runs(row: Bools) -> list[tuple[int, int]]:
    """[start, end) of every stretch of True."""
    padded = np.concatenate([[False], row, [False]]).astype(np.int8)
    change = np.diff(padded)
    return list(
        zip(
            np.flatnonzero(change == 1).tolist(), np.flatnonzero(change == -1).tolist(), strict=True
        )
    )


def _png(rgba: NDArray[np.uint8]) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, rgba, format="png")
    return buffer.getvalue()
