"""``sequences.png`` of objectives that compare views: a few crops and 2D images in both views."""

from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg import rng
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.slices import grey_range
from nnunet_autoreg.sampling.kinds import planned_kinds
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.sampler import SequenceSampler

PER_KIND = 3
MOST_SLICES = 4
NAMES = {"views": "One crop", "images": "One 2D image"}
EXPLANATION = (
    "A view is rotated, zoomed, mirrored, shifted and changed in brightness, contrast and noise at "
    "random.\nThe network should put what both views show into the same cluster. White: outside "
    "the scan."
)


def draw_views(path: Path, plan: Plan, pool: SamplingPool) -> int:
    """Sample as in training, and draw both views of each sample.

    Returns:
        the number of samples in the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    samples: list[tuple[str, Sample]] = []
    sampler = SequenceSampler(plan)
    for kind in planned_kinds(plan):
        for number in range(min(PER_KIND, pool.num_sources(kind))):
            generator = rng.generator(plan.run.seed, f"picture: {kind}", number)
            sample, _ = sampler.draw_kind(kind, pool, generator)
            samples.append((kind, sample.augmented()))
    if not samples:
        return 0

    figure = Figure(figsize=(15, 3.4 * len(samples) + 1), layout="constrained", facecolor="white")
    figure.suptitle(
        f"Two views of each sample: run '{plan.name}'\n{EXPLANATION}",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    rows: Any = figure.subfigures(len(samples), 1, squeeze=False)[:, 0]
    for row, (kind, sample) in zip(rows, samples, strict=True):
        same = "" if kind == "images" else "the same slices "
        row.suptitle(f"{NAMES[kind]}, {same}in view 1 and in view 2", fontsize=12)
        _draw_sample(row, plan, sample)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    return len(samples)


def _draw_sample(row: Any, plan: Plan, sample: Sample) -> None:
    """Draw the same few slices of both views side by side."""
    # A 2D image was repeated along z.
    num_views, _, depth, _, _ = sample.voxels.shape
    is_image = bool((sample.voxels == sample.voxels[:, :, :1]).all())
    count = 1 if is_image else min(MOST_SLICES, depth)
    slices = np.linspace(0, depth - 1, count).round().astype(int).tolist()

    # Both views have the same greys.
    inside = sample.voxels[:, 0][sample.valid_mask]
    low, high = grey_range(inside, 99.5)
    _, y_mm, x_mm = plan.data.spacing_mm
    aspect = 1.0 if is_image else y_mm / x_mm

    axes = np.atleast_1d(row.subplots(1, num_views * count))
    for number, axis in enumerate(axes):
        view, index = divmod(number, count)
        z = slices[index]
        slice_YX = np.where(sample.valid_mask[view, z], sample.voxels[view, 0, z], np.nan)
        axis.imshow(slice_YX, cmap="gray", vmin=low, vmax=high, aspect=aspect)
        title = f"view {view + 1}" if is_image else f"view {view + 1}, slice {z + 1}"
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
