"""Groups of slices of validation scans, as small pictures for the report."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from nnunet_autoreg.objective_kinds import SliceGroup
from nnunet_autoreg.report.slices import evaluating, grey_range, image_element

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
            low, high = grey_range(values, 99)
            image = image_element(values, 1.0, text, cmap="gray", vmin=low, vmax=high)
            cells.append(f"<div><p>{escape(text)}</p>{image}</div>")
        title = escape(gallery.title)
        parts.append(
            f'<figure aria-label="{title}"><h3>{title}</h3>'
            f'<div class="panels">{"".join(cells)}</div></figure>',
        )
    return "\n".join(parts)
