"""The ``"autoreg_detection"`` block of a configuration in a plans file: classes, levels, anchors,
heads, and how they are trained.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnunet_autoreg.detection.anchors import AnchorPlan, plan_anchors
from nnunet_autoreg.detection.instances import BLOCK, ObjectClass, Rules, object_classes, read_rules
from nnunet_autoreg.detection.loss import CLASSIFICATIONS
from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.records import differences, from_jsonable, to_jsonable

VERSION = 1
NUM_EPOCHS, MOMENTUM = 500, 0.9
HEAD_CHANNELS, TINY_HEAD_CHANNELS = 128, 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionPlan:
    """What a detector is, and how it is trained where that differs from segmentation; every value
    may be edited in the plans file.

    Attributes:
        classes: what is detected.
        rules: how labels became objects (``dataset.json["autoreg_detection"]``).
        anchors: levels and anchor shapes.
        head_channels: of the laterals and heads.
        has_masks: the labels outline the objects; False where only boxes are known, and no
            segmentation is trained then.
        num_epochs: length; a trainer's ``_<N>epochs`` name overrides it.
        momentum: of SGD, instead of the recipe's.
        average_decay: the weights that are validated and saved are a moving average with this
            factor per iteration.
        object_share: share of a batch that is drawn around an object.
        classification: ``hard_negatives`` or ``focal``.
        reasons: for the values above.
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
        """Name -> label of every class."""
        return {kind.name: kind.label for kind in self.classes}


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
    """The plan of a configuration.

    Args:
        dataset: parsed dataset.json.
        sizes_vox: class name -> sides (z, y, x) of its objects at the target spacing, ignored ones
            left out.
        strides_vox: of the stages that can carry a level, finest first (net.stage_strides).

    Raises:
        PlanError: rules or classes that cannot be, or no object at all.
    """
    rules = read_rules(dataset, where)
    classes = object_classes(dataset, rules, where)
    anchors = plan_anchors(sizes_vox, strides_vox)
    every = [side for of_class in sizes_vox.values() for side in of_class]
    too_large = sum(any(s > p for s, p in zip(side, patch_size, strict=True)) for side in every)
    if too_large:
        log.warning(
            "%d of %d objects are larger than the patch of %s voxels and are never seen whole; "
            "plan with more memory, or a coarser "
            "spacing",
            too_large,
            len(every),
            " x ".join(map(str, patch_size)),
        )
    reasons = {
        "anchors": f"{len(every)} objects: {anchors.num_shapes} shapes on strides "
        f"{', '.join(_times(s) for s in anchors.strides_vox)} "
        f"reach a mean best IoU of {anchors.mean_iou:g}",
        "has_masks": "labels outline the objects"
        if has_masks
        else "boxesTr: only boxes are known, so no segmentation is trained",
        "num_epochs": f"{NUM_EPOCHS} epochs of 250 iterations are nnDetection's length",
    }
    return DetectionPlan(
        classes,
        rules,
        anchors,
        TINY_HEAD_CHANNELS if is_tiny else HEAD_CHANNELS,
        has_masks,
        reasons=reasons,
    )


def store(plans: dict[str, Any], configuration: str, plan: DetectionPlan) -> None:
    """Write the block into parsed plans."""
    plans["configurations"][configuration][BLOCK] = to_jsonable(plan)


def read_plan(configuration: Mapping[str, Any], where: str) -> DetectionPlan | None:
    """The checked block of a configuration of parsed plans (inheritance resolved), None if it has
    none.

    Raises:
        PlanError: of a newer format, an unknown key, or an impossible value.
    """
    data = configuration.get(BLOCK)
    if data is None:
        return None
    return check(from_jsonable(DetectionPlan, data, f"{where}: {BLOCK}"), where)


def check(plan: DetectionPlan, where: str) -> DetectionPlan:
    """Return ``plan`` if it can be carried out.

    Raises:
        PlanError: it cannot.
    """
    anchors = plan.anchors
    if (
        not plan.classes
        or not anchors.shapes_vox
        or not anchors.strides_vox
        or len(anchors.stages) != len(anchors.strides_vox)
    ):
        raise PlanError(
            f"{where}: {BLOCK} needs classes, and anchors with shapes_vox and as many stages as "
            "strides_vox; remove the block "
            "to have it planned anew"
        )
    if any(side <= 0 for shape in anchors.shapes_vox for side in shape):
        raise PlanError(
            f"{where}: {BLOCK}.anchors.shapes_vox={anchors.shapes_vox}: every side must be greater "
            "than 0"
        )
    if plan.classification not in CLASSIFICATIONS:
        raise PlanError(
            f"{where}: {BLOCK}.classification={plan.classification}; "
            f"{did_you_mean(plan.classification, CLASSIFICATIONS)}"
        )
    rules = {
        "head_channels": (plan.head_channels >= 1, "at least 1"),
        "num_epochs": (plan.num_epochs >= 1, "at least 1"),
        "momentum": (0 <= plan.momentum < 1, "in [0, 1)"),
        "average_decay": (0 <= plan.average_decay < 1, "in [0, 1)"),
        "object_share": (0 <= plan.object_share <= 1, "in [0, 1]"),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise PlanError(f"{where}: {BLOCK}.{name}={getattr(plan, name)} must be {wanted}")
    return plan


def check_same_dataset(plan: DetectionPlan, dataset: Mapping[str, Any], where: str) -> None:
    """Hold the plan against dataset.json, which may have been edited since.

    Raises:
        PlanError: rules or classes differ.
    """
    rules = read_rules(dataset)
    wanted = replace(plan, rules=rules, classes=object_classes(dataset, rules))
    found = differences(plan, wanted)
    if found:
        raise PlanError(
            f"{where} was planned for other objects than dataset.json asks for now "
            f"({'; '.join(found)}); remove the "
            f'"{BLOCK}" block from its configurations, and it is planned anew'
        )


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
