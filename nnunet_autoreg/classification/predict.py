"""Classify new scans with all folds of a trained classifier together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_autoreg.classification.net import Classifier
from nnunet_autoreg.classification.plan import ClassificationPlan, read_plan
from nnunet_autoreg.classification.predictions import are_probabilities
from nnunet_autoreg.classification.table import ClassificationTask
from nnunet_autoreg.downstream.model import TrainedModel
from nnunet_autoreg.downstream.scans import Scan, ready
from nnunet_autoreg.errors import ClassesError, WeightsError
from nnunet_autoreg.geometry import Size, as_size, names_text, size_text
from nnunet_autoreg.records import MEND_YOURS, read_json, write_json

FORMAT, VERSION = "nnunet_autoreg.scan_classes", 1


class ClassifierModel(TrainedModel[ClassificationPlan]):
    """A trained classifier: a folder of ``nnUNetv2_train``."""

    kind = "Classification"
    noun = "classifier"
    read_plan = staticmethod(read_plan)

    @property
    def patch_size(self) -> Size:
        """Return the size of a tile, in preprocessed voxels."""
        return as_size(self.configuration.patch_size)


@dataclass(frozen=True)
class ScanClasses:
    """Hold the probabilities of one scan.

    Attributes:
        scan: name of the scan.
        model, settings, inputs: a later run compares them, to see whether the result is its own.
        probabilities: task -> class -> probability, the mean over the folds.
        shape_vox: shape (z, y, x) after preprocessing; None in results of earlier releases.
    """

    scan: str
    model: dict[str, Any]
    settings: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    probabilities: dict[str, dict[str, float]]
    shape_vox: Size | None = None

    def of_tasks(self) -> list[NDArray[np.float64]]:
        """Return one array (K,) for each task."""
        return [np.array(list(of_classes.values())) for of_classes in self.probabilities.values()]


def classify(model: ClassifierModel, scan: Scan) -> ScanClasses:
    """Classify a scan.

    Raises:
        ScanError: it cannot be read, or does not fit the model.
        WeightsError: the network gives numbers that are not finite.
    """
    inputs = scan.inputs()
    with ready(scan) as files:
        image_CZYX, _ = model.preprocess(files, scan.name)

    # The probabilities of the folds are averaged.
    sums: list[NDArray[np.float64]] = []
    num_folds = 0
    for _ in model.weights():
        assert isinstance(model.network, Classifier)
        found = probabilities_of(
            model.network,
            image_CZYX,
            model.patch_size,
            model.device,
            model.autocast(),
        )
        if sums:
            found = [a + b for a, b in zip(sums, found, strict=True)]
        sums = found
        num_folds += 1

    probabilities = {}
    for task, total_K in zip(model.plan.tasks, sums, strict=True):
        values = (total_K / num_folds).tolist()
        probabilities[task.name] = dict(zip(task.classes, values, strict=True))
    shape = as_size(image_CZYX.shape[1:])
    return ScanClasses(scan.name, model.describe(), {}, inputs, probabilities, shape)


def small_scans_line(names: Sequence[str], num_scans: int, patch_size: Size) -> str:
    """Return the line about scans that are smaller than the patch along some axis."""
    return (
        f"{len(names)} of {num_scans} scans are smaller than the patch of {size_text(patch_size)} "
        f"voxels along an axis ({names_text(names)}); they are padded with zeros, in training and "
        "in prediction"
    )


def probabilities_of(
    network: Classifier,
    image_CZYX: torch.Tensor,
    patch_size: Size,
    device: torch.device,
    context: Any,
) -> list[NDArray[np.float64]]:
    """Return the probabilities (K,) of every task for a preprocessed scan.

    Args:
        network: classifier in evaluation mode.
        image_CZYX: preprocessed.
        context: context manager of the forward passes, such as autocast.

    Raises:
        WeightsError: they are not finite (code "classification-not-finite").
    """
    # The features of all tiles are averaged first, and then the heads read them once.
    with context:
        pooled_V = network.pooled_over_scan(image_CZYX, patch_size, device)
    with torch.no_grad():
        logits = network.logits(pooled_V[None].float())
    found = []
    for values_1K in logits:
        probabilities_K = torch.softmax(values_1K[0].double(), 0).cpu().numpy()
        if not np.isfinite(probabilities_K).all():
            raise WeightsError(
                "the network's outputs are not finite, so its training failed: use "
                "another checkpoint, or train again",
                code="classification-not-finite",
            )
        found.append(probabilities_K)
    return found


def check_tasks(file: Path, found: ScanClasses, tasks: Sequence[ClassificationTask]) -> None:
    """Check that an earlier result has the probabilities of all classes of a model's tasks.

    Raises:
        ClassesError: it has not, because the file was edited (code "classes-scan-file").
    """
    for task in tasks:
        of_classes = found.probabilities.get(task.name, {})
        has_all = list(of_classes) == list(task.classes)
        values_K = np.array(list(of_classes.values()))
        if not has_all or not are_probabilities(values_K):
            raise ClassesError(
                f"{file} does not hold a probability from 0 to 1 for every class of {task.name} "
                f"({', '.join(task.classes)}), with the sum 1; remove that file to have the scan "
                "classified again",
                code="classes-scan-file",
            )


def write_scan_classes(file: Path, found: ScanClasses) -> None:
    """Write the result of one scan, whole or not at all."""
    write_json(file, {"format": FORMAT, "version": VERSION, **vars(found)})


def read_scan_classes(file: Path) -> ScanClasses:
    """Read the result of one scan.

    Raises:
        ClassesError: the file is not such a result (code "classes-scan-file").
    """
    data = read_json(file, MEND_YOURS)
    try:
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise KeyError("format")
        inputs = tuple(dict(fact) for fact in data["inputs"])
        probabilities: Mapping[str, Mapping[str, float]] = data["probabilities"]
        of_tasks = {}
        for task, of_classes in probabilities.items():
            of_tasks[str(task)] = {str(kind): float(p) for kind, p in of_classes.items()}
        shape = as_size(data["shape_vox"]) if data.get("shape_vox") else None
        return ScanClasses(data["scan"], data["model"], data["settings"], inputs, of_tasks, shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClassesError(
            f"{file} is not a result of autoreg_classify ({error!r}); move it elsewhere, or give "
            "another -o",
            code="classes-scan-file",
        ) from error
