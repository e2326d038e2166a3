"""Classify the scans of a request: the results of an earlier run, and one scan after the other.

``cli/classify.py`` calls these functions and prints the results.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_autoreg.classification.predict import (
    ClassifierModel,
    ScanClasses,
    check_tasks,
    classify,
    read_scan_classes,
    small_scans_line,
    write_scan_classes,
)
from nnunet_autoreg.downstream.results import check_same_run, scans_with_results
from nnunet_autoreg.downstream.scans import Scan
from nnunet_autoreg.downstream.tiles import is_smaller
from nnunet_autoreg.errors import ScanError

log = logging.getLogger(__name__)


def earlier_results(
    model: ClassifierModel,
    scans: Sequence[Scan],
    folder: Path,
    overwrite: bool,
) -> dict[str, ScanClasses]:
    """Return what an earlier call has left in ``folder``, by the name of the scan.

    Args:
        overwrite: all scans are classified again, so that nothing counts as done.

    Raises:
        UsageError: it is of another model or of other scans.
    """
    by_name = {scan.name: scan for scan in scans}
    results = {}
    for name in scans_with_results(folder, list(by_name), overwrite):
        file = folder / f"{name}.json"
        old = read_scan_classes(file)
        present = {"model": old.model, "settings": old.settings, "inputs": old.inputs}
        wanted = {"model": model.describe(), "settings": {}, "inputs": by_name[name].inputs()}
        check_same_run(file, present, wanted)
        check_tasks(file, old, model.plan.tasks)
        results[name] = old
    return results


def classify_one(model: ClassifierModel, scan: Scan, folder: Path) -> ScanClasses | None:
    """Classify a scan and write its file; return None if it cannot be read."""
    try:
        found = classify(model, scan)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", scan.name, error.status, error)
        return None
    write_scan_classes(folder / f"{scan.name}.json", found)
    return found


def likeliest_line(found: ScanClasses) -> str:
    """Return the likeliest class of every task with its probability, as one line."""
    best = []
    for task, of_classes in found.probabilities.items():
        kind = max(of_classes, key=lambda name: of_classes[name])
        best.append(f"{task} {kind} ({of_classes[kind]:.2f})")
    return ", ".join(best)


def small_scans_message(model: ClassifierModel, results: Mapping[str, ScanClasses]) -> str:
    """Return a line about the scans that are smaller than the model's patch; "" without any."""
    small = []
    for name, found in results.items():
        if found.shape_vox and is_smaller(found.shape_vox, model.patch_size):
            small.append(name)
    return small_scans_line(small, len(results), model.patch_size) if small else ""
