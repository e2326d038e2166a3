"""``fingerprint.png``: the pool on one page - spacings and their targets, sizes against the crop,
intensities, groups.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.fingerprint import (
    Fingerprint,
    GroupPrint,
    ModalityPrint,
    row_spacing,
    transposed_geometry,
)
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.geometry import Spacing, volume
from nnunet_autoreg.nnunet_api import resampled_shape
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import atomic_path

COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:gray",
)
MAX_PANELS, MAX_GROUPS, MAX_LINES = 4, 8, 200
LOG_BEYOND = 100


def draw_fingerprint(
    picture: Path, fingerprint: Fingerprint, rows: Sequence[ScanRow], plan: Plan
) -> None:
    """Draw the usable scans ``rows`` with the plan's choices into ``picture``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.7, 12.4), layout="constrained")
    heights = (4.6, 3.6, 0.9 + 0.32 * min(len(fingerprint.groups), MAX_GROUPS))
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = parts
    figure.suptitle(
        f"{plan.name}: {fingerprint.num_scans} scans of {fingerprint.num_cases} cases, "
        f"{fingerprint.total_vox / 1e6:.4g} million voxels "
        "after cropping and resampling",
        fontsize=13,
    )
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(fingerprint.modalities)}
    left, right = top.subplots(1, 2)
    _draw_spacings(left, fingerprint, rows, colours)
    _draw_sizes(right, rows, plan, colours)
    middle.suptitle(
        "Each line is a scan: thin 0.5 to 99.5 %, thick 5 to 95 %, dot the median; dashed: the CT "
        "window",
        fontsize=10,
    )
    shown = list(fingerprint.modalities.items())[:MAX_PANELS]
    for axis, (name, numbers) in zip(
        middle.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        _draw_intensities(
            axis,
            name,
            numbers,
            [row for row in rows if row.modality == name],
            fingerprint,
            colours[name],
        )
    _draw_groups(bottom.subplots(), fingerprint)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _draw_spacings(
    axis: Any, fingerprint: Fingerprint, rows: Sequence[ScanRow], colours: dict[str, str]
) -> None:
    """In-plane against slice spacing of every scan, and the targets."""
    for name, colour in colours.items():
        places = Counter(
            (round((y * x) ** 0.5, 2), round(z, 2)) for z, y, x in _spacings(rows, name)
        )
        axis.scatter(
            [p[0] for p in places],
            [p[1] for p in places],
            s=[28 * n**0.5 for n in places.values()],
            alpha=0.45,
            color=colour,
            label=f"{name} ({places.total()} scans)",
            linewidths=0,
        )
    for i, group in enumerate(fingerprint.groups):
        z, y, x = group.spacing_mm
        axis.scatter(
            [(y * x) ** 0.5],
            [z],
            marker="+",
            s=220,
            color="black",
            linewidths=1.6,
            label=None if i else "target spacing",
        )
    spacings_mm = [s for row in rows for s in transposed_geometry(row)[1]]
    low, high = 0.5 * min(spacings_mm), 2 * max(spacings_mm)
    axis.plot([low, high], [low, high], color="0.6", linestyle=":", label="isotropic")
    axis.set(
        xlabel="in-plane spacing, mm",
        ylabel="slice spacing (coarsest axis), mm",
        title="Spacing as it comes (larger: more scans)",
    )
    _log_axes(axis)


def _spacings(rows: Sequence[ScanRow], modality: str) -> list[Spacing]:
    return [transposed_geometry(row)[1] for row in rows if row.modality == modality]


def _draw_sizes(axis: Any, rows: Sequence[ScanRow], plan: Plan, colours: dict[str, str]) -> None:
    """Size of every scan in voxels of its target spacing, and the crop."""
    for name, colour in colours.items():
        shapes = [
            resampled_shape(*transposed_geometry(row), row_spacing(row, plan.data))
            for row in rows
            if row.modality == name
        ]
        axis.scatter(
            [(y * x) ** 0.5 for _, y, x in shapes],
            [max(z, 1) for z, _, _ in shapes],
            s=28,
            alpha=0.35,
            color=colour,
            linewidths=0,
        )
    z, y, x = crop = plan.sequence.crop_size_vox
    wide = (y * x) ** 0.5
    blocks = volume(crop) // volume(plan.encoder.token_size_vox)
    axis.axvline(wide, color="black", linewidth=1)
    axis.axhline(
        z,
        color="black",
        linewidth=1,
        label=f"crop {z} x {y} x {x}, {blocks} tokens; smaller scans are padded",
    )
    axis.set(
        xlabel="in-plane size, voxels (geometric mean of y and x)",
        ylabel="slices",
        title="Size at the target spacing",
    )
    _log_axes(axis)


def _draw_intensities(
    axis: Any,
    name: str,
    numbers: ModalityPrint,
    rows: Sequence[ScanRow],
    fingerprint: Fingerprint,
    colour: str,
) -> None:
    """Each scan's intensities inside the body as a line: thin 0.5 to 99.5, thick 5 to 95, dot
    median.
    """
    known = sorted((row.percentiles for row in rows if row.percentiles), key=lambda p: p[2])
    lines = known[:: -(-len(known) // MAX_LINES) or 1]
    for place, (lowest, low, middle, high, highest) in enumerate(lines):
        axis.plot([place, place], [lowest, highest], color=colour, linewidth=0.6, alpha=0.6)
        axis.plot([place, place], [low, high], color=colour, linewidth=2, alpha=0.6)
        axis.plot([place], [middle], marker=".", markersize=3, color="black")
    unit = "raw values"
    if name == "CT":
        unit = "HU"
        if fingerprint.ct_window:
            for value in (
                fingerprint.ct_window.percentile_00_5,
                fingerprint.ct_window.percentile_99_5,
            ):
                axis.axhline(value, color="black", linestyle="--", linewidth=0.8)
    elif (
        lines
        and min(p[0] for p in lines) > 0
        and max(p[4] for p in lines) > LOG_BEYOND * min(p[4] for p in lines)
    ):
        axis.set_yscale("log")
    coarse = numbers.anisotropy
    axis.set(
        xlabel=f"{len(lines)} of {len(rows)} scans, by median",
        ylabel=unit,
        xticks=[],
        title=f"{name}: intensities inside the body\nanisotropy {coarse.median[0]:.3g} "
        f"({coarse.p10[0]:.3g} to {coarse.p90[0]:.3g})",
    )
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3, axis="y")


def _draw_groups(axis: Any, fingerprint: Fingerprint) -> None:
    """The groups as a table."""
    axis.axis("off")
    heads = (
        "scans",
        "modality",
        "own spacing, median mm",
        "target mm",
        "size p10",
        "size median",
        "size p90",
        "million voxels",
    )
    cells = [_cells(group) for group in fingerprint.groups[:MAX_GROUPS]]
    table = axis.table(
        cellText=cells,
        colLabels=heads,
        loc="upper center",
        cellLoc="center",
        colWidths=(0.06, 0.1, 0.17, 0.15, 0.14, 0.14, 0.14, 0.1),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.3)
    more = len(fingerprint.groups) - len(cells)
    axis.set_title(
        "Target spacings (z x y x x, coarsest axis "
        f"first){f', {more} more groups in fingerprint.json' if more else ''}",
        fontsize=10,
    )


def _cells(group: GroupPrint) -> list[str]:
    sizes = (group.shape_vox.p10, group.shape_vox.median, group.shape_vox.p90)
    shapes = [" x ".join(f"{v:.0f}" for v in size) for size in sizes]
    spacings = [
        " x ".join(f"{v:.3g}" for v in spacing) for spacing in (group.native_mm, group.spacing_mm)
    ]
    return [
        str(group.num_scans),
        group.modality or "all",
        *spacings,
        *shapes,
        f"{group.total_vox / 1e6:.3g}",
    ]


def _log_axes(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for side, set_scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        set_scale("log")
        side.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
