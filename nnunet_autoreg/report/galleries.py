"""Groups of slices of validation scans, as small pictures for the report."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from nnunet_autoreg.objective_kinds import SliceGroup
from nnunet_autoreg.report.slices import Floats, evaluating

if TYPE_CHECKING:
    import torch

    from nnunet_autoreg.objectives.base import Objective
    from nnunet_autoreg.sampling.sample import Batch


def galleries_of(
    objective: "Objective",
    batches: Sequence["Batch"],
    device: "torch.device",
) -> list[SliceGroup]:
    """Return the groups of slices that an objective makes with its present weights.

    Args:
        batches: batches of validation samples.
    """
    with evaluating(objective.module):
        return objective.groups([batch.to(device) for batch in batches])


def html_of(galleries: Sequence[SliceGroup]) -> str:
    """Return the galleries as HTML, each with its slices side by side."""
    parts = []
    for gallery in galleries:
        cells = []
        for text, values in gallery.slices:
            cells.append(f"<div><p>{escape(text)}</p>{_image(values, text)}</div>")
        title = escape(gallery.title)
        parts.append(
            f'<figure aria-label="{title}"><h3>{title}</h3>'
            f'<div class="panels">{"".join(cells)}</div></figure>',
        )
    return "\n".join(parts)


def _image(values: Floats, text: str) -> str:
    """Return one slice as an HTML image that holds its own data."""
    from matplotlib.image import imsave

    low, high = np.percentile(values, [1, 99])
    png = io.BytesIO()
    imsave(png, values, cmap="gray", vmin=low, vmax=max(high, low + 1e-3), format="png")
    data = base64.b64encode(png.getvalue()).decode()
    height, width = values.shape
    return (
        f'<img class="slice" alt="{escape(text)}" style="aspect-ratio:{width / height:.4f}" '
        f'src="data:image/png;base64,{data}">'
    )
