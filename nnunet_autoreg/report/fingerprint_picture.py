"""``fingerprint.png``: all usable scans on one page.

It shows spacings and their targets, sizes and the crop, intensities, and spacing groups.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.fingerprint import (
    Fingerprint,
    row_spacing,
    transposed_geometry,
)
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.geometry import size_text, volume
from nnunet_autoreg.nnunet_api import resampled_shape
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.palette import BLACK, GRID, SERIES, SOFT, Style
from nnunet_autoreg.wording import amount, counted

MAX_PANELS, MAX_GROUPS, MAX_LINES = 4, 8, 200
LOGARITHMIC_FROM = 100
"""Intensities get a logarithmic axis if scans differ by this factor, as MR scans may."""

TABLE_HEADER = (
    "scans",
    "modality",
    "own spacing, median mm",
    "target mm",
    "size, 10 %",
    "size, median",
    "size, 90 %",
    "million voxels",
)
TABLE_WIDTHS = (0.06, 0.1, 0.17, 0.15, 0.14, 0.14, 0.14, 0.1)


def draw_fingerprint(
    picture: Path,
    fingerprint: Fingerprint,
    rows: Sequence[ScanRow],
    plan: Plan,
    num_images: int = 0,
) -> None:
    """Draw the usable scans ``rows`` and the plan's choices into the file ``picture``.

    Args:
        num_images: usable 2D images, which are counted and not drawn.
    """
    from matplotlib.figure import Figure

    table_height = 0.7 + 0.32 * min(len(fingerprint.groups), MAX_GROUPS)
    heights = (4.6, 3.6, table_height)
    figure = Figure(figsize=(11.7, 1.3 * sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = parts

    scans = counted(fingerprint.num_scans, "scan")
    cases = counted(fingerprint.num_cases, "case")
    voxels = amount(fingerprint.total_vox)
    title = f"{plan.name}: {scans} of {cases}, {voxels} voxels after cropping and resampling"
    if num_images:
        title += f"; {counted(num_images, '2D image')} not drawn"
    figure.suptitle(title, fontsize=13)

    styles = {}
    for number, name in enumerate(fingerprint.modalities):
        styles[name] = SERIES[number % len(SERIES)]
    left, right = top.subplots(1, 2)
    _draw_spacings(left, fingerprint, rows, styles)
    _draw_sizes(right, rows, plan, styles)

    window = "; dashed: the CT window" if fingerprint.ct_window else ""
    middle.suptitle(
        "Each line is a scan. It spans 0.5 to 99.5 % of its intensities, the thick part 5 to 95 %; "
        f"the dot is the median{window}",
        fontsize=10,
    )
    shown = list(fingerprint.modalities)[:MAX_PANELS]
    axes = middle.subplots(1, len(shown), squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        of_modality = [row for row in rows if row.modality == name]
        _draw_intensities(axis, name, of_modality, fingerprint, styles[name].colour)

    _draw_groups(bottom.subplots(), fingerprint)

    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _draw_spacings(
    axis: Any,
    fingerprint: Fingerprint,
    rows: Sequence[ScanRow],
    styles: dict[str, Style],
) -> None:
    """Draw the in-plane and the slice spacing of every scan, and the targets."""
    spacings_mm = []

    for name, style in styles.items():
        # (in-plane, slice spacing) in mm -> number of scans. Scans of one spacing make one larger
        # dot, instead of many on top of each other.
        points: Counter[tuple[float, float]] = Counter()
        for row in rows:
            if row.modality == name:
                _, (z, y, x) = transposed_geometry(row)
                points[round((y * x) ** 0.5, 2), round(z, 2)] += 1
                spacings_mm += [z, y, x]

        axis.scatter(
            [in_plane for in_plane, _ in points],
            [between_slices for _, between_slices in points],
            s=[28 * count**0.5 for count in points.values()],
            alpha=0.45,
            color=style.colour,
            marker=style.marker,
            label=f"{name} ({points.total()} scans)",
            linewidths=0,
        )

    for number, group in enumerate(fingerprint.groups):
        z, y, x = group.spacing_mm
        axis.scatter(
            [(y * x) ** 0.5],
            [z],
            marker="+",
            s=220,
            color=BLACK,
            linewidths=1.6,
            # One entry of the legend serves all targets.
            label=None if number else "target spacing",
        )

    low, high = 0.5 * min(spacings_mm), 2 * max(spacings_mm)
    axis.plot([low, high], [low, high], color=SOFT, linestyle=":", label="isotropic voxels")
    axis.set(
        xlabel="in-plane spacing, mm",
        ylabel="slice spacing (coarsest axis), mm",
        title="Spacing of the scans (a larger dot: more scans)",
    )
    _make_logarithmic(axis, (low, high), (low, high))


def _draw_sizes(axis: Any, rows: Sequence[ScanRow], plan: Plan, styles: dict[str, Style]) -> None:
    """Draw the size of every scan in voxels of its target spacing, and the crop."""
    from matplotlib.patches import Rectangle

    z, y, x = crop = plan.sequence.crop_size_vox
    crop_side = (y * x) ** 0.5
    all_sides, all_depths = [crop_side], [float(z)]

    for name, style in styles.items():
        in_plane, num_slices = [], []
        for row in rows:
            if row.modality == name:
                target_mm = row_spacing(row, plan.data)
                depth, height, width = resampled_shape(*transposed_geometry(row), target_mm)
                in_plane.append((height * width) ** 0.5)
                # The logarithmic axis has no 0.
                num_slices.append(max(depth, 1))

        axis.scatter(
            in_plane,
            num_slices,
            s=28,
            alpha=0.45,
            color=style.colour,
            marker=style.marker,
            linewidths=0,
        )
        all_sides += in_plane
        all_depths += num_slices

    # From half of the smallest to twice the largest value.
    sides = (0.5 * min(all_sides), 2 * max(all_sides))
    depths = (0.5 * min(all_depths), 2 * max(all_depths))
    num_tokens = volume(crop) // volume(plan.encoder.token_size_vox)
    # A scan in this area is smaller than the crop.
    area = Rectangle(
        (sides[0], depths[0]),
        crop_side - sides[0],
        z - depths[0],
        facecolor=GRID,
        edgecolor=BLACK,
        alpha=0.4,
        hatch="//",
        zorder=0,
        label=f"crop {size_text(crop)} ({num_tokens} tokens); smaller scans are padded",
    )
    axis.add_patch(area)
    axis.set(
        xlabel="in-plane size, voxels (geometric mean of y and x)",
        ylabel="slices",
        title="Size of the scans at the target spacing",
    )
    _make_logarithmic(axis, sides, depths)


def _draw_intensities(
    axis: Any,
    name: str,
    rows: Sequence[ScanRow],
    fingerprint: Fingerprint,
    colour: str,
) -> None:
    """Draw the intensities inside the body of each scan as a vertical line.

    The line is thin from 0.5 to 99.5 %, thick from 5 to 95 %, and has a dot at the median.
    """
    # Each: (0.5 %, 5 %, median, 95 %, 99.5 %), sorted by the median
    known = [row.percentiles for row in rows if row.percentiles]
    known.sort(key=lambda percentiles: percentiles[2])
    # Every n-th of the sorted scans, so that the whole range is shown.
    every = max(1, -(-len(known) // MAX_LINES))
    lines = known[::every]

    for x, (lowest, low, median, high, highest) in enumerate(lines):
        axis.plot([x, x], [lowest, highest], color=colour, linewidth=0.6, alpha=0.6)
        axis.plot([x, x], [low, high], color=colour, linewidth=2, alpha=0.6)
        axis.plot([x], [median], marker=".", markersize=3, color=BLACK)

    if name == "CT" and fingerprint.ct_window:
        window = fingerprint.ct_window
        for value in (window.percentile_00_5, window.percentile_99_5):
            axis.axhline(value, color=BLACK, linestyle="--", linewidth=0.8)

    if name != "CT" and lines:
        # Raw values of different scanners differ by powers of ten.
        lowest_values = [percentiles[0] for percentiles in lines]
        highest_values = [percentiles[4] for percentiles in lines]
        is_positive = min(lowest_values) > 0
        if is_positive and max(highest_values) > LOGARITHMIC_FROM * min(highest_values):
            axis.set_yscale("log")

    axis.set(
        xlabel=f"{len(lines)} of {len(rows)} scans, sorted by their median",
        ylabel="HU" if name == "CT" else "raw values",
        xticks=[],
        title=f"{name}: intensities inside the body",
    )
    axis.grid(alpha=0.3, axis="y")


def _draw_groups(axis: Any, fingerprint: Fingerprint) -> None:
    """Draw the spacing groups as a table."""
    cells = []
    for group in fingerprint.groups[:MAX_GROUPS]:
        row = [str(group.num_scans), group.modality or "all"]
        for spacing_mm in (group.native_mm, group.spacing_mm):
            row.append(size_text(spacing_mm, ".3g"))
        for size in (group.shape_vox.p10, group.shape_vox.median, group.shape_vox.p90):
            row.append(size_text(size, ".0f"))
        row.append(f"{group.total_vox / 1e6:.3g}")
        cells.append(row)

    table = axis.table(
        cellText=cells,
        colLabels=TABLE_HEADER,
        loc="upper center",
        cellLoc="center",
        colWidths=TABLE_WIDTHS,
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.3)

    title = "Target spacings (axes z, y, x; the coarsest axis first)"
    num_more = len(fingerprint.groups) - len(cells)
    if num_more:
        title += f", {num_more} more groups in fingerprint.json"
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def _make_logarithmic(
    axis: Any,
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
) -> None:
    """Give both axes a logarithmic scale with plain numbers, a grid, and a legend below."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())

    axis.set(xlim=x_limits, ylim=y_limits)
    axis.grid(alpha=0.3)
    # Below the axes, where no scan can lie behind it.
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False)
