"""What an evaluation leaves behind beside its JSON: a row per object and detection, the FROC curve,
and some scans with boxes.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.evaluate import EvaluationSettings, largest_sides_mm
from nnunet_autoreg.detection.geometry import Frame
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.matching import ScanBoxes, match_scan, overlaps
from nnunet_autoreg.records import atomic_path

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
TRUE, HIT, FALSE, OTHER = "limegreen", "deepskyblue", "tomato", "0.7"
MOST_SCANS, SLICES = 4, 3
LEAST_FP, MOST_FP = 0.05, 16.0

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Background:
    """What boxes are drawn on: an image (Z, Y, X), and whether its rows and columns run against the
    usual view (anterior up, the patient's right on the left).
    """

    array_ZYX: NDArray[Any]  # noqa: N815
    flip_y: bool = False
    flip_x: bool = False


def background(array_ZYX: NDArray[Any], frame: Frame | None) -> Background:
    """Turned to the usual view as far as the stored slices are axial; as stored where they are not,
    or nothing is known.
    """
    if frame is None:
        return Background(array_ZYX)
    linear = np.array(frame.affine_ras)[:3, :3]
    if np.abs(linear).argmax(0).tolist() != [0, 1, 2]:
        return Background(array_ZYX)
    return Background(array_ZYX, flip_y=bool(linear[1, 1] > 0), flip_x=bool(linear[0, 0] > 0))


def write_rows(
    file: Path,
    scans: Sequence[ScanBoxes],
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
) -> None:
    """A CSV with every detection (hit, false, excused, or beyond the most that count) and every
    object missed or ignored.
    """
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        for scan in scans:
            for place, kind in enumerate(classes):
                writer.writerows(_rows(scan, place, kind.name, settings))


def outcomes(
    scan: ScanBoxes, place: int, settings: EvaluationSettings
) -> tuple[dict[int, str], dict[int, str]]:
    """What became of every detection (hit, false, excused, beyond) and every object (found, missed,
    ignored) of a class, by number.
    """
    matched = match_scan(
        scan,
        place,
        settings.hit,
        duplicates=settings.duplicates,
        max_detections=settings.max_detections,
    )
    of_found = {int(d): "beyond" for d in np.flatnonzero(scan.places_D == place)}
    for d, target, excused in zip(
        matched.detections, matched.object_of, matched.excused, strict=True
    ):
        of_found[int(d)] = "excused" if excused else "hit" if target >= 0 else "false"
    reached = set(matched.object_of.tolist())
    of_true = {
        int(g): "ignored" if scan.ignored_G[g] else "found" if int(g) in reached else "missed"
        for g in np.flatnonzero(scan.true_places_G == place)
    }
    return of_found, of_true


def _rows(scan: ScanBoxes, place: int, name: str, settings: EvaluationSettings) -> Rows:
    of_found, of_true = outcomes(scan, place, settings)
    overlap = overlaps(scan.boxes_D6, scan.true_boxes_G6)[:, scan.true_places_G == place]
    sides = largest_sides_mm(scan.boxes_D6, scan)
    for d in sorted(of_found, key=lambda d: -scan.scores_D[d]):
        best = f"{overlap[d].max(initial=0.0):.4f}"
        yield _row(
            scan.name,
            name,
            of_found[d],
            scan.boxes_D6[d],
            sides[d],
            f"{scan.scores_D[d]:.6g}",
            best,
        )
    sides = largest_sides_mm(scan.true_boxes_G6, scan)
    for g, what in of_true.items():
        if what != "found":
            yield _row(scan.name, name, what, scan.true_boxes_G6[g], sides[g])


def _row(
    scan: str,
    kind: str,
    what: str,
    box: NDArray[np.float64],
    side_mm: float,
    score: str = "",
    iou: str = "",
) -> dict[str, Any]:
    values = (scan, kind, what, score, iou, f"{side_mm:.3f}", *(f"{v:.4g}" for v in box))
    return dict(zip(COLUMNS, values, strict=True))


def draw_froc(picture: Path, results: Mapping[str, Any]) -> None:
    """The curves of all classes, and the operating points of their mean."""
    figure = _figure((7.4, 5.2))
    axis = figure.subplots()
    froc = results["froc"]
    for name, curve in froc["curve"].items():
        if name in results["absent_classes"]:
            continue
        x = np.clip(np.array(curve["fp_per_scan"]), LEAST_FP, None)
        # The last point holds for any larger number of false positives: the detector has nothing
        # more to say.
        axis.step(
            [*x, MOST_FP],
            [*curve["sensitivity"], curve["sensitivity"][-1]],
            where="post",
            linewidth=1.3,
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
    axis.set_xscale("log", base=2)
    axis.set(
        xlim=(LEAST_FP, MOST_FP),
        ylim=(-0.02, 1.02),
        xticks=froc["fp_per_scan"],
        xticklabels=[f"{p:g}" for p in froc["fp_per_scan"]],
        xlabel=f"false positives per scan ({results['scans']['number']} scans, "
        f"{results['scans']['empty']} of them empty)",
        ylabel="sensitivity",
        title=f"FROC, hit rule {froc['hit']}",
    )
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="lower right")
    _save(figure, picture, 110)


def thresholds(results: Mapping[str, Any], classes: Sequence[ObjectClass]) -> list[float]:
    """By class the score threshold of about 1 false positive per scan, from the nearest operating
    point; 0 without objects.
    """
    found = []
    for kind in classes:
        points = results["froc"]["operating_points"].get(kind.name, [])
        nearest = min(
            points, key=lambda point: abs(np.log(point["fp_per_scan_at_most"])), default=None
        )
        known = nearest is not None and nearest["threshold"] is not None
        found.append(float(nearest["threshold"]) if nearest is not None and known else 0.0)
    return found


def draw_scans(
    picture: Path,
    scans: Sequence[ScanBoxes],
    backgrounds: Mapping[str, Background],
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
    least_scores: Sequence[float],
) -> None:
    """Slices of some scans, through true objects first, with true and found boxes; one row per
    scan.

    Args:
        backgrounds: by scan; scans without one are not drawn.
        least_scores: by class; detections below are not drawn.
    """
    shown = pick_scans([scan for scan in scans if scan.name in backgrounds])
    figure = _figure((3.4 * SLICES, 3.5 * max(1, len(shown)) + 0.6))
    axes = figure.subplots(max(1, len(shown)), SLICES, squeeze=False)
    for row, scan in zip(axes, shown, strict=False):
        for axis, z in zip(
            row, pick_slices(scan, backgrounds[scan.name].array_ZYX.shape[0]), strict=True
        ):
            _draw_slice(axis, scan, backgrounds[scan.name], z, classes, settings, least_scores)
    figure.suptitle(
        f"green: true, blue: found (hit rule {settings.hit}), red: false, grey: does not count; "
        "the score beside the box",
        fontsize=10,
    )
    _save(figure, picture, 100)


def pick_scans(scans: Sequence[ScanBoxes]) -> list[ScanBoxes]:
    """At most four, spread evenly over the list; one without objects at most, and that last."""
    empty = [scan for scan in scans if not len(scan.true_boxes_G6)][:1]
    most = MOST_SCANS - len(empty)
    full = [scan for scan in scans if len(scan.true_boxes_G6)]
    if len(full) > most:
        full = [full[round(i * (len(full) - 1) / (most - 1))] for i in range(most)]
    return full + empty


def pick_slices(scan: ScanBoxes, depth: int) -> list[int]:
    """Three slices: through the middles of objects spread over z, through their quarters too if
    they are few; of detections, where there is no object; of the image, where neither.
    """
    boxes = scan.true_boxes_G6 if len(scan.true_boxes_G6) else scan.boxes_D6
    if not len(boxes):
        boxes = np.array([[0, 0, 0, depth, 0, 0]])
    known = _cuts(boxes, (0.5,))
    if len(known) < SLICES:
        known = _cuts(boxes, (0.25, 0.5, 0.75))
    places = (
        np.linspace(0, len(known) - 1, SLICES + 2)[1:-1]
        if len(known) > SLICES
        else np.arange(SLICES) % len(known)
    )
    return sorted(int(np.clip(known[round(float(p))], 0, depth - 1)) for p in places)


def _cuts(boxes_N6: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    """The slices at these shares of the boxes' depth, each once."""
    return np.unique(
        np.floor([z0 + share * (z1 - z0) for z0, z1 in boxes_N6[:, (0, 3)] for share in shares])
    )


def _draw_slice(
    axis: Any,
    scan: ScanBoxes,
    on: Background,
    z: int,
    classes: Sequence[ObjectClass],
    settings: EvaluationSettings,
    least_scores: Sequence[float],
) -> None:
    finite = on.array_ZYX[np.isfinite(on.array_ZYX)]
    low, high = np.percentile(finite, [1, 99.5]) if finite.size else (0.0, 1.0)
    _, y_mm, x_mm = scan.spacing_mm
    height, width = on.array_ZYX.shape[1:]
    # Edges, not centres: a box that ends at voxel v ends where the pixel does.
    axis.imshow(
        on.array_ZYX[z],
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        aspect=y_mm / x_mm,
        extent=(0, width, height, 0),
    )
    axis.set(
        xlim=(width, 0) if on.flip_x else (0, width), ylim=(0, height) if on.flip_y else (height, 0)
    )
    for place in range(len(classes)):
        of_found, of_true = outcomes(scan, place, settings)
        for g, what in of_true.items():
            _draw_box(axis, scan.true_boxes_G6[g], z, OTHER if what == "ignored" else TRUE, "", 2.6)
        for d, what in of_found.items():
            if scan.scores_D[d] >= least_scores[place]:
                colour = {"hit": HIT, "false": FALSE}.get(what, OTHER)
                _draw_box(
                    axis,
                    scan.boxes_D6[d],
                    z,
                    colour,
                    f"{classes[place].name} {scan.scores_D[d]:.2f}",
                    1.2,
                    is_below=what != "hit",
                )
    axis.set_title(f"{scan.name}, z {z}", fontsize=8)
    axis.axis("off")


def _draw_box(
    axis: Any,
    box: NDArray[np.float64],
    z: int,
    colour: str,
    text: str,
    width: float,
    is_below: bool = False,
) -> None:
    """A box where it crosses slice ``z``, its text above it, or below: hits and false ones on the
    same object stay readable.
    """
    from matplotlib.patches import Rectangle

    z0, y0, x0, z1, y1, x1 = box
    if not z0 <= z + 0.5 < z1:
        return
    axis.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width)
    )
    if text:
        left, foot = (
            x1 if axis.xaxis_inverted() else x0,
            y1 if axis.yaxis_inverted() == is_below else y0,
        )
        axis.annotate(
            text,
            (left, foot),
            (0, -3 if is_below else 3),
            textcoords="offset points",
            va="top" if is_below else "bottom",
            color=colour,
            fontsize=8,
            annotation_clip=True,
            bbox={"color": "black", "alpha": 0.75, "pad": 0.4},
        )


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, picture: Path, dpi: int) -> None:
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
