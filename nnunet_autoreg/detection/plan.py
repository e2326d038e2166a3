"""Make and read the ``"autoreg_detection"`` block of a configuration in a plans file.

It holds classes, levels, anchors, heads, and how they are trained. ``plan_from_labels`` makes it
together with the plan for segmentation. It reads the raw dataset's labels, because nothing has been
preprocessed at that time.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunet_autoreg.detection.anchors import AnchorPlan, plan_anchors
from nnunet_autoreg.detection.instances import BLOCK, ObjectClass, Rules, object_classes, read_rules
from nnunet_autoreg.detection.loss import CLASSIFICATIONS
from nnunet_autoreg.detection.net import stage_strides
from nnunet_autoreg.detection.objects import (
    ObjectSource,
    in_parallel,
    labelled_cases,
    sizes_of,
)
from nnunet_autoreg.downstream.label_maps import LABELS
from nnunet_autoreg.downstream.plan_block import check_ranges, store
from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.finetune.plans import Fit
from nnunet_autoreg.geometry import Size, Spacing, size_text
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import differences, from_jsonable

VERSION = 1
NUM_EPOCHS, MOMENTUM = 500, 0.9
HEAD_CHANNELS, TINY_HEAD_CHANNELS = 128, 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionPlan:
    """Hold the values of a detector, and of its training if they differ from segmentation.

    Every value may be edited in the plans file.

    Attributes:
        classes: the classes that are detected.
        rules: how labels became objects (``dataset.json["autoreg_detection"]``).
        anchors: levels and anchor shapes.
        head_channels: number of channels of the laterals and heads.
        has_masks: whether the labels outline the objects. If only boxes are known, no segmentation
            is trained.
        num_epochs: length of a training; a trainer's ``_<N>epochs`` name overrides it.
        momentum: momentum of SGD, instead of the recipe's.
        average_decay: the weights that are validated and saved are a moving average with this
            factor per iteration.
        object_share: share of a batch that is drawn around an object.
        classification: loss of the classes, ``hard_negatives`` or ``focal``.
        reasons: the reasons of values above.
        version: version of this format.
    """

    classes: tuple[ObjectClass, ...]
    rules: Rules
    anchors: AnchorPlan
    head_channels: int
    has_masks: bool
    num_epochs: int = NUM_EPOCHS
    momentum: float = MOMENTUM
    average_decay: float = 0.999
    object_share: float = 0.5
    classification: str = "hard_negatives"
    reasons: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def labels(self) -> dict[str, int]:
        """Return name -> label of every class."""
        return {kind.name: kind.label for kind in self.classes}


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
        raw: folder of the raw dataset.
        reader: nnU-Net's class that reads its images.
        encoder: the pretrained encoder.
        fit: the configuration's patch, and the arguments of its network if they differ from the
            encoder's.

    Raises:
        PlanError: the rules or classes are impossible, or there is no object.
        ObjectsError: labels are missing, damaged, or contradict each other.
    """
    source = ObjectSource(raw / LABELS, raw, dataset, reader)
    cases = labelled_cases(source.labels, dataset["file_ending"])
    spacing = plans["configurations"][configuration]["spacing"]
    read_sizes = partial(_sizes_of_case, source, spacing, plans["transpose_forward"])

    sizes: dict[str, list[Spacing]] = defaultdict(list)
    for of_case in in_parallel(read_sizes, cases, default_num_processes):
        for kind, sides in zip(source.classes, of_case, strict=True):
            sizes[kind.name] += sides

    # A configuration with its own patch may have its own network.
    arguments = encoder.arguments if fit.arguments is None else fit.arguments
    plan = make_plan(
        dataset,
        sizes,
        stage_strides(encoder.class_path, arguments, fit.patch_size),
        fit.patch_size,
        is_tiny=encoder.name.endswith("_tiny"),
        has_masks=all(source.has_masks(case) for case in cases),
    )
    store(plans, configuration, BLOCK, plan)
    return plan


def _sizes_of_case(
    source: ObjectSource,
    spacing_mm: Any,
    transpose: Any,
    case: str,
) -> list[list[Spacing]]:
    """Return the sizes of the objects of a case; it can be sent to another process."""
    return sizes_of(source.read(case), len(source.classes), spacing_mm, transpose)


def make_plan(
    dataset: Mapping[str, Any],
    sizes_vox: Mapping[str, Sequence[Sequence[float]]],
    strides_vox: Sequence[Size],
    patch_size: Size,
    *,
    is_tiny: bool,
    has_masks: bool,
    where: str = "dataset.json",
) -> DetectionPlan:
    """Return the plan of a configuration.

    Args:
        dataset: parsed dataset.json.
        sizes_vox: class name -> sides (z, y, x) of its objects at the target spacing, without
            ignored ones.
        strides_vox: strides of the stages that can carry a level, finest first (net.stage_strides).
        patch_size: (z, y, x) voxels.
        is_tiny: whether the encoder is one of the smallest, which get narrower heads.
        has_masks: whether the labels outline the objects.
        where: name of dataset.json in an error.

    Raises:
        PlanError: the rules or classes are impossible, or there is no object.
    """
    rules = read_rules(dataset, where)
    classes = object_classes(dataset, rules, where)
    anchors = plan_anchors(sizes_vox, strides_vox)

    num_objects = 0
    num_too_large = 0
    for of_class in sizes_vox.values():
        num_objects += len(of_class)
        for sides in of_class:
            fits = [side <= size for side, size in zip(sides, patch_size, strict=True)]
            num_too_large += not all(fits)

    if num_too_large:
        log.warning(
            "%d of %d objects are larger than the patch of %s voxels and are never seen "
            "completely; plan with more memory, or a coarser spacing",
            num_too_large,
            num_objects,
            size_text(patch_size),
        )

    strides = ", ".join("x".join(map(str, stride)) for stride in anchors.strides_vox)
    outlines = "labels outline the objects"
    if not has_masks:
        outlines = "boxesTr: only boxes are known, so no segmentation is trained"
    reasons = {
        "anchors": f"{num_objects} objects: {anchors.num_shapes} shapes on strides {strides} "
        f"reach a mean best IoU of {anchors.mean_iou:g}",
        "has_masks": outlines,
        "num_epochs": f"{NUM_EPOCHS} epochs of 250 iterations are nnDetection's length",
    }
    return DetectionPlan(
        classes=classes,
        rules=rules,
        anchors=anchors,
        head_channels=TINY_HEAD_CHANNELS if is_tiny else HEAD_CHANNELS,
        has_masks=has_masks,
        reasons=reasons,
    )


def read_plan(configuration: Mapping[str, Any], where: str) -> DetectionPlan | None:
    """Return the checked block of a configuration of parsed plans, None if it has none.

    The configuration must hold the values that it inherits.

    Raises:
        PlanError: the format is newer, a key is unknown, or a value is impossible.
    """
    data = configuration.get(BLOCK)
    if data is None:
        return None
    return check(from_jsonable(DetectionPlan, data, f"{where}: {BLOCK}"), where)


def check(plan: DetectionPlan, where: str) -> DetectionPlan:
    """Return ``plan`` if a detector can be built and trained by it.

    Raises:
        PlanError: a value is missing or impossible.
    """
    anchors = plan.anchors
    has_anchors = bool(anchors.shapes_vox) and bool(anchors.strides_vox)
    has_stages = len(anchors.stages) == len(anchors.strides_vox)
    if not plan.classes or not has_anchors or not has_stages:
        raise PlanError(
            f"{where}: {BLOCK} needs classes, and anchors with shapes_vox and as many stages as "
            "strides_vox; remove the block to have it planned again",
            code="detection-plan-incomplete",
        )
    if any(side <= 0 for shape in anchors.shapes_vox for side in shape):
        raise PlanError(
            f"{where}: {BLOCK}.anchors.shapes_vox={anchors.shapes_vox}: every side must be greater "
            "than 0",
            code="detection-plan-shapes",
        )
    if plan.classification not in CLASSIFICATIONS:
        raise PlanError(
            f"{where}: {BLOCK}.classification={plan.classification} is not known; "
            f"{did_you_mean(plan.classification, CLASSIFICATIONS)}",
            code="detection-plan-classification",
        )

    rules = {
        "head_channels": (plan.head_channels >= 1, "at least 1"),
        "num_epochs": (plan.num_epochs >= 1, "at least 1"),
        "momentum": (0 <= plan.momentum < 1, "in [0, 1)"),
        "average_decay": (0 <= plan.average_decay < 1, "in [0, 1)"),
        "object_share": (0 <= plan.object_share <= 1, "in [0, 1]"),
    }
    check_ranges(plan, rules, BLOCK, where, "detection-plan-range")
    return plan


def check_same_dataset(plan: DetectionPlan, dataset: Mapping[str, Any], where: str) -> None:
    """Compare the plan with dataset.json, which may have been edited since.

    Raises:
        PlanError: rules or classes differ.
    """
    rules = read_rules(dataset)
    wanted = replace(plan, rules=rules, classes=object_classes(dataset, rules))
    changes = differences(plan, wanted)
    if changes:
        raise PlanError(
            f"{where} was planned for other objects than dataset.json describes now "
            f'({"; ".join(changes)}); remove the "{BLOCK}" block from its configurations to have '
            "it planned again",
            code="detection-plan-other-dataset",
        )
