"""The table that ``autoreg_evaluate_detection`` prints: figures of every class, and their means."""

from collections.abc import Mapping
from typing import Any


def lines_of(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table.

    Args:
        results: what ``evaluate`` returns.
    """
    # Average precisions of single IoUs, their means, and the CPM of FROC: title and figure.
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for iou in results["settings"]["ious"]:
        columns.append((f"AP@{iou:g}", results["ap"][f"{iou:g}"]))
    for name, figure in results["map"].items():
        columns.append((f"mAP@{name.rpartition(':')[0]}", figure))
    columns.append(("CPM", results["froc"]["cpm"]))

    scans, absent = results["scans"], results["absent_classes"]
    rule = results["froc"]["hit"]
    titles = [title for title, _ in columns]
    rows = [("class", "objects", "found", titles)]
    for name, counts in results["classes"].items():
        if name not in absent:
            figures = [f"{figure['per_class'][name]:.3f}" for _, figure in columns]
            rows.append((name, str(counts["objects"]), str(counts["detections"]), figures))

    # There is no mean if no object counts, and no interval without resamples.
    means, intervals = [], []
    for _, figure in columns:
        mean, ends = figure["mean"], figure["ci95"]
        means.append("-" if mean is None else f"{mean:.3f}")
        intervals.append("-" if ends is None else f"{ends[0]:.3f}-{ends[1]:.3f}")
    rows.append(("mean", "", "", means))
    if any(figure["ci95"] for _, figure in columns):
        rows.append(("95 % CI", "", "", intervals))

    width = max(8, *(len(name) for name in results["classes"]))
    lines = [f"{scans['number']} scans, {scans['empty']} without objects; FROC by {rule}"]
    for name, num_objects, num_found, figures in rows:
        cells = " ".join(f"{figure:>11}" for figure in figures)
        lines.append(f"{name:<{width}} {num_objects:>8} {num_found:>8} {cells}")
    if absent:
        lines.append(f"no object of: {', '.join(absent)} (left out of the means)")
    return lines
