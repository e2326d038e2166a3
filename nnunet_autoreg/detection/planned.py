"""Detection planned together with segmentation, from the raw dataset's labels: nothing is
preprocessed yet.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunet_autoreg.detection.net import stage_strides
from nnunet_autoreg.detection.objects import ObjectSource, in_parallel, sizes_of
from nnunet_autoreg.detection.plan import DetectionPlan, make_plan, store
from nnunet_autoreg.finetune.plans import Fit
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.plan import EncoderPlan


def plan_from_labels(
    plans: dict[str, Any],
    configuration: str,
    dataset: dict[str, Any],
    raw: Path,
    reader: Any,
    encoder: EncoderPlan,
    fit: Fit,
) -> DetectionPlan:
    """Plan detection for a configuration of parsed plans, and write the block into them.

    Args:
        dataset: parsed dataset.json.
        raw: the raw dataset.
        reader: nnU-Net's class that reads its images.
        fit: the configuration's patch, and its network's arguments where they are its own.

    Raises:
        PlanError: rules or classes that cannot be, or no object at all.
        ObjectsError: labels that are missing, damaged, or contradict each other.
    """
    source = ObjectSource(raw / "labelsTr", raw, dataset, reader)
    cases = labelled_cases(source.labels, dataset["file_ending"])
    spacing, transpose = (
        plans["configurations"][configuration]["spacing"],
        plans["transpose_forward"],
    )
    found = in_parallel(partial(_sizes, source, spacing, transpose), cases, default_num_processes)
    sizes: dict[str, list[Spacing]] = defaultdict(list)
    for of_case in found:
        for kind, sides in zip(source.classes, of_case, strict=True):
            sizes[kind.name] += sides
    arguments = encoder.arguments if fit.arguments is None else fit.arguments
    plan = make_plan(
        dataset,
        sizes,
        stage_strides(encoder.class_path, arguments, fit.patch_size),
        fit.patch_size,
        is_tiny=encoder.name.endswith("_tiny"),
        has_masks=all(source.has_masks(case) for case in cases),
    )
    store(plans, configuration, plan)
    return plan


def labelled_cases(labels: Path, file_ending: str) -> list[str]:
    """The cases of a folder of label maps; hidden files (macOS writes ``._case.nii.gz``) are
    none.
    """
    return sorted(
        f.name.removesuffix(file_ending)
        for f in labels.iterdir()
        if f.name.endswith(file_ending) and not f.name.startswith(".")
    )


def _sizes(source: ObjectSource, spacing_mm: Any, transpose: Any, case: str) -> list[list[Spacing]]:
    return sizes_of(source.read(case), len(source.classes), spacing_mm, transpose)
