"""Write the files of an evaluation beside its JSON: a table, the FROC curve, and scans with boxes.

The table has a row for every detection, and for every object that was not found.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.evaluate import EvaluationSettings
from nnunet_autoreg.detection.geometry import Frame
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import (
    ScanBoxes,
    largest_sides_mm,
    match_scan,
    overlaps,
    parse_hit_rule,
)
from nnunet_autoreg.records import atomic_path, to_cell
from nnunet_autoreg.report.palette import BLACK, BOXES, SERIES, SOFT, WHITE, Style

COLUMNS = (
    "scan",
    "class",
    "what",
    "score",
    "iou",
    "largest_side_mm",
    "z0",
    "y0",
    "x0",
    "z1",
    "y1",
    "x1",
)
STYLE_OF_OUTCOME = {"hit": "found", "false": "false"}
"""Outcome of a detection -> name of its style; all others do not count."""

BOX_LABELS = {
    "true": "true object",
    "found": "detection that finds an object",
    "false": "false detection",
    "ignored": "does not count",
}
MOST_SCANS, SLICES = 4, 3
SLICE_INCHES = 4.2
LABEL_SIZE = 9
"""Of the text beside a box, in points."""
LEAST_FP, MOST_FP = 0.05, 16.0
IGNORED = "excused"
"""Outcome of a detection that is neither a hit nor false."""


@dataclass(frozen=True)
class Background:
    """Hold the image that boxes are drawn on, and how to show it.

    The usual view has anterior up, and the patient's right on the left.

    Attributes:
        array_ZYX: the image, as stored.
        flip_y, flip_x: whether rows and columns run against the usual view.
    """

    array_ZYX: NDArray[Any]  # noqa: N815
    flip_y: bool = False
    flip_x: bool = False


@dataclass(frozen=True)
class BoxLabel:
    """Hold the text beside a box, and whether it is below the box rather than above.

    A hit and a false detection of the same object have their texts on different sides, so that both
    can be read.
    """

    box: NDArray[np.float64]
    text: str
    style: Style
    is_below: bool


def background(array_ZYX: NDArray[Any], frame: Frame | None) -> Background:
    """Return an image turned to the usual view, if the stored slices are axial.

    If they are not, or their orientation is not known, it is shown as stored.
    """
    if frame is None:
        return Background(array_ZYX)
    main_direction = np.abs(frame.linear).argmax(0)
    if main_direction.tolist() != [0, 1, 2]:
        return Background(array_ZYX)
    runs_right = bool(frame.linear[0, 0] > 0)
    runs_anterior = bool(frame.linear[1, 1] > 0)
    return Background(array_ZYX, flip_y=runs_anterior, flip_x=runs_right)


def write_rows(
    file: Path,
    scans: Sequence[ScanBoxes],
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
) -> None:
    """Write a CSV file with every detection, and every object that was missed or ignored.

    The column ``what`` holds the outcome (``outcomes``).
    """
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for scan in scans:
            overlap_DG = overlaps(scan.boxes_D6, scan.true_boxes_G6)
            found_sides = largest_sides_mm(scan.boxes_D6, scan.spacing_mm)
            true_sides = largest_sides_mm(scan.true_boxes_G6, scan.spacing_mm)

            for class_index, kind in enumerate(classes):
                of_found, of_true = outcomes(scan, class_index, settings)
                of_class = overlap_DG[:, scan.true_classes_G == class_index]
                rows: list[tuple[str, ...]] = []

                # The detections first, by score, then the objects that were not found.
                for d in sorted(of_found, key=lambda d: -scan.scores_D[d]):
                    score = f"{scan.scores_D[d]:.6g}"
                    best_iou = f"{of_class[d].max(initial=0.0):.4f}"
                    side = f"{found_sides[d]:.3f}"
                    edges = [f"{v:.4g}" for v in scan.boxes_D6[d]]
                    rows.append((scan.name, kind.name, of_found[d], score, best_iou, side, *edges))

                for g, outcome in of_true.items():
                    if outcome != "found":
                        side = f"{true_sides[g]:.3f}"
                        edges = [f"{v:.4g}" for v in scan.true_boxes_G6[g]]
                        rows.append((scan.name, kind.name, outcome, "", "", side, *edges))

                for row in rows:
                    # Names may begin with a sign that a spreadsheet takes for a formula.
                    writer.writerow([to_cell(cell) for cell in row])


def outcomes(
    scan: ScanBoxes,
    class_index: int,
    settings: EvaluationSettings,
) -> tuple[dict[int, str], dict[int, str]]:
    """Return the outcome of every detection and of every object of a class, by index.

    A detection is a ``hit``, ``false``, ``excused`` if it does not count, or ``beyond`` the largest
    number that counts. An object is ``found``, ``missed`` or ``ignored``.
    """
    matched = match_scan(
        scan,
        class_index,
        settings.hit,
        duplicates=settings.duplicates,
        max_detections=settings.max_detections,
    )
    of_found = {int(d): "beyond" for d in np.flatnonzero(scan.classes_D == class_index)}
    for n, d in enumerate(matched.detections):
        outcome = "hit" if matched.object_of[n] >= 0 else "false"
        of_found[int(d)] = IGNORED if matched.ignored[n] else outcome

    found_objects = set(matched.object_of.tolist())
    of_true = {}
    for g in np.flatnonzero(scan.true_classes_G == class_index).tolist():
        outcome = "found" if g in found_objects else "missed"
        of_true[g] = "ignored" if scan.ignored_G[g] else outcome
    return of_found, of_true


def draw_froc(picture: Path, results: Mapping[str, Any]) -> None:
    """Draw the curves of all classes, and the operating points of their mean.

    Args:
        results: as ``evaluate`` returns them.
    """
    figure = _figure((7.4, 5.2))
    axis = figure.subplots()
    froc = results["froc"]
    for number, (name, curve) in enumerate(froc["curve"].items()):
        if name in results["absent_classes"]:
            continue
        style = SERIES[number % len(SERIES)]
        # A logarithmic axis cannot show 0 false positives.
        x = np.clip(np.array(curve["fp_per_scan"]), LEAST_FP, None)
        # The last point holds for any larger number of false positives, because the detector has no
        # further box.
        axis.step(
            [*x, MOST_FP],
            [*curve["sensitivity"], curve["sensitivity"][-1]],
            where="post",
            **style.line(),
            label=f"{name}, {results['classes'][name]['objects']} objects",
        )

    mean = froc["sensitivity"]["mean"]
    if None not in mean:
        axis.plot(
            froc["fp_per_scan"],
            mean,
            "ko--",
            markersize=4,
            linewidth=1,
            label=f"mean, CPM {froc['cpm']['mean']:.3f}",
        )

    scans = results["scans"]
    rule = parse_hit_rule(froc["hit"])
    axis.set_xscale("log", base=2)
    axis.set(
        xlim=(LEAST_FP, MOST_FP),
        ylim=(-0.02, 1.02),
        xticks=froc["fp_per_scan"],
        xticklabels=[f"{p:g}" for p in froc["fp_per_scan"]],
        xlabel=f"false positives per scan ({scans['number']} scans, {scans['empty']} empty)",
        ylabel="sensitivity",
        title=f"FROC: {rule.meaning()}",
    )
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        # Below the axes, where no curve can lie behind it.
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, picture, 110)


def thresholds(results: Mapping[str, Any], classes: Sequence[ObjectClass]) -> list[float]:
    """Return the score threshold of about 1 false positive per scan of each class.

    It is that of the nearest operating point; 0 for a class without objects.
    """

    def distance_from_1(point: Mapping[str, Any]) -> float:
        return abs(math.log(point["fp_per_scan_at_most"]))

    found = []
    for kind in classes:
        points = results["froc"]["operating_points"].get(kind.name, [])
        threshold = None
        if points:
            nearest = min(points, key=distance_from_1)
            threshold = nearest["threshold"]
        found.append(0.0 if threshold is None else float(threshold))
    return found


def draw_scans(
    picture: Path,
    scans: Sequence[ScanBoxes],
    backgrounds: Mapping[str, Background],
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
    least_scores: Sequence[float],
) -> None:
    """Draw slices of some scans with true and found boxes, one row of slices per scan.

    Args:
        backgrounds: name of the scan -> its image; scans without one are not drawn.
        least_scores: for each class; detections with lower scores are not drawn.
    """
    from matplotlib.lines import Line2D

    shown = pick_scans([scan for scan in scans if scan.name in backgrounds])
    num_rows = max(1, len(shown))
    figure = _figure((SLICE_INCHES * SLICES, (SLICE_INCHES + 0.2) * num_rows + 0.9))
    axes = figure.subplots(num_rows, SLICES, squeeze=False)
    for row, scan in zip(axes, shown, strict=False):
        on = backgrounds[scan.name]
        for axis, z in zip(row, pick_slices(scan, on.array_ZYX.shape[0]), strict=True):
            _draw_slice(axis, scan, on, z, classes, settings, least_scores)

    figure.suptitle(
        f"Detections with class and score; {settings.hit.meaning()}.\n"
        "Scores below the threshold of about 1 false detection per scan are left out.",
        fontsize=11,
    )
    lines = []
    for name, label in BOX_LABELS.items():
        line = Line2D([], [], label=label, path_effects=_halo(), **BOXES[name].line())
        lines.append(line)
    # On grey, as the boxes lie on an image.
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=len(lines),
        fontsize=11,
        handlelength=3.2,
        facecolor=SOFT,
        labelcolor=WHITE,
        framealpha=1,
    )
    _save(figure, picture, 110)


def pick_scans(scans: Sequence[ScanBoxes]) -> list[ScanBoxes]:
    """Return at most four scans, spread evenly over the list.

    At most one of them has no objects, and it comes last.
    """
    empty = [scan for scan in scans if not len(scan.true_boxes_G6)][:1]
    # An empty scan shows only false positives.
    most = MOST_SCANS - len(empty)
    full = [scan for scan in scans if len(scan.true_boxes_G6)]
    if len(full) > most:
        step = (len(full) - 1) / (most - 1)
        full = [full[round(number * step)] for number in range(most)]
    return full + empty


def pick_slices(scan: ScanBoxes, depth: int) -> list[int]:
    """Return three slices through the middles of objects, spread over z.

    If there are few objects, slices through their quarters are used too. If there are none, slices
    through detections are used, and otherwise slices through the image.
    """
    boxes = scan.true_boxes_G6 if len(scan.true_boxes_G6) else scan.boxes_D6
    if not len(boxes):
        boxes = np.array([[0, 0, 0, depth, 0, 0]])
    known = _cuts(boxes, (0.5,))
    if len(known) < SLICES:
        known = _cuts(boxes, (0.25, 0.5, 0.75))

    if len(known) > SLICES:
        # Evenly spread, without both ends.
        spread = np.linspace(0, len(known) - 1, SLICES + 2)[1:-1]
        chosen = [round(float(index)) for index in spread]
    else:
        chosen = [index % len(known) for index in range(SLICES)]
    slices = np.clip(known[chosen], 0, depth - 1)
    return sorted(slices.astype(int).tolist())


def _cuts(boxes_N6: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    """Return the slices at these shares of the boxes' depth, each once."""
    z0 = boxes_N6[:, 0, None]
    z1 = boxes_N6[:, 3, None]
    z = z0 + np.array(shares) * (z1 - z0)  # (N, shares)
    return np.unique(np.floor(z))


def _draw_slice(
    axis: Any,
    scan: ScanBoxes,
    on: Background,
    z: int,
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
    least_scores: Sequence[float],
) -> None:
    """Draw one slice with the boxes that cross it."""
    # A few bright voxels, such as metal, must not darken all others.
    finite = on.array_ZYX[np.isfinite(on.array_ZYX)]
    low, high = np.percentile(finite, [1, 99.5]) if finite.size else (0.0, 1.0)
    _, y_mm, x_mm = scan.spacing_mm
    height, width = on.array_ZYX.shape[1:]
    # The extent is in voxel edges, as the boxes are.
    axis.imshow(
        on.array_ZYX[z],
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        aspect=y_mm / x_mm,
        extent=(0, width, height, 0),
    )
    xlim = (width, 0) if on.flip_x else (0, width)
    ylim = (0, height) if on.flip_y else (height, 0)
    axis.set(xlim=xlim, ylim=ylim)

    labels: list[BoxLabel] = []
    for class_index, kind in enumerate(classes):
        of_found, of_true = outcomes(scan, class_index, settings)
        for g, outcome in of_true.items():
            style = BOXES["ignored" if outcome == "ignored" else "true"]
            _draw_box(axis, scan.true_boxes_G6[g], z, style)
        for d, outcome in of_found.items():
            score = scan.scores_D[d]
            if score < least_scores[class_index]:
                continue
            box = scan.boxes_D6[d]
            style = BOXES[STYLE_OF_OUTCOME.get(outcome, "ignored")]
            if _draw_box(axis, box, z, style):
                text = f"{kind.name} {score:.2f}"
                labels.append(BoxLabel(box, text, style, is_below=outcome != "hit"))

    # The image fills the axis in one direction.
    longer_side = max(width, height * y_mm / x_mm)
    _draw_labels(axis, labels, 72 * SLICE_INCHES / longer_side, y_mm / x_mm)
    axis.set_title(f"{scan.name}, slice {z + 1} of {len(on.array_ZYX)}", fontsize=10)
    axis.axis("off")


def _draw_box(axis: Any, box: NDArray[np.float64], z: int, style: Style) -> bool:
    """Draw a box if it crosses slice ``z``, and return whether it does."""
    from matplotlib.patches import Rectangle

    z0, y0, x0, z1, y1, x1 = box
    # A box crosses a slice if it holds the centres of its voxels.
    if not z0 <= z + 0.5 < z1:
        return False

    rectangle = Rectangle(
        (x0, y0),
        x1 - x0,
        y1 - y0,
        fill=False,
        edgecolor=style.colour,
        linestyle=style.dash,
        linewidth=style.width,
        path_effects=_halo(),
    )
    axis.add_patch(rectangle)
    return True


def _draw_labels(
    axis: Any,
    labels: Sequence[BoxLabel],
    points_per_voxel: float,
    stretch: float,
) -> None:
    """Write the text of every box above or below it, moved away if it would cover another.

    Args:
        points_per_voxel: width of a voxel in the picture.
        stretch: height of a voxel, divided by its width.
    """
    line_height = 1.5 * LABEL_SIZE
    x_sign = -1 if axis.xaxis_inverted() else 1
    y_sign = -1 if axis.yaxis_inverted() else 1
    # Left, right and lower edge of texts that are written already, in points.
    taken: list[tuple[float, float, float]] = []

    for label in labels:
        _, y0, x0, _, y1, x1 = label.box
        left = x1 if axis.xaxis_inverted() else x0
        foot = y1 if axis.yaxis_inverted() == label.is_below else y0

        # In points, to the right and upwards.
        start = left * points_per_voxel * x_sign
        stop = start + 0.62 * LABEL_SIZE * len(label.text)
        height = foot * points_per_voxel * stretch * y_sign
        away = -1 if label.is_below else 1
        lower_edge = height - line_height if label.is_below else height

        # Texts side by side do not cover each other.
        edges = [edge for other, right, edge in taken if start < right and stop > other]
        moved = 0.0
        while any(abs(lower_edge + moved - edge) < line_height for edge in edges):
            moved += away * line_height / 2
        taken.append((start, stop, lower_edge + moved))

        axis.annotate(
            label.text,
            (left, foot),
            (0, moved + 3 * away),
            textcoords="offset points",
            va="top" if label.is_below else "bottom",
            # Letters in the colour of the box would be too dark for some of the colours.
            color=WHITE,
            fontsize=LABEL_SIZE,
            annotation_clip=True,
            bbox={
                "facecolor": (0, 0, 0, 0.7),
                "edgecolor": label.style.colour,
                "linestyle": label.style.dash,
                "pad": 0.8,
            },
        )


def _halo() -> list[Any]:
    """Return a dark edge around lines, so that they show on bright voxels too."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=4.2, foreground=BLACK, alpha=0.55), Normal()]


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib

    # No window is needed, and a cluster has none.
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, picture: Path, dpi: int) -> None:
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
