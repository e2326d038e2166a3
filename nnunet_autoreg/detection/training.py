"""The pieces of a detector's training that know nothing of nnU-Net's trainer: its losses, recipe
and pseudo Dice.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_autoreg.detection.anchors import AnchorGrid, lay_out
from nnunet_autoreg.detection.data import InstanceIndex
from nnunet_autoreg.detection.infer import boxes_of_output, merge
from nnunet_autoreg.detection.loss import Objects, detection_loss, segmentation_loss
from nnunet_autoreg.detection.matching import ScanBoxes
from nnunet_autoreg.detection.net import Output
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.detection.score import scan_boxes
from nnunet_autoreg.finetune.block import Recipe
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.parameters import is_decayed

Region = int | Sequence[int]


@dataclass(frozen=True)
class Losses:
    """Of one batch; ``total`` has a gradient for every parameter in use."""

    classification: Tensor
    regression: Tensor
    segmentation: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.classification + self.regression + self.segmentation

    def numbers(self) -> dict[str, Any]:
        """As nnU-Net's trainer collects them."""
        parts = {
            "loss": self.total,
            "loss_class": self.classification,
            "loss_box": self.regression,
            "loss_seg": self.segmentation,
        }
        return {name: value.detach().cpu().numpy() for name, value in parts.items()}


class Losing:
    """Computes the losses of batches; what the segmentation's target looks like is nnU-Net's.

    Args:
        segmentation: nnU-Net's loss for logits and target.
        regions: nnU-Net's regions (each one label or several), None for plain labels.
        ignore_label: voxels that do not count.
    """

    def __init__(
        self,
        plan: DetectionPlan,
        segmentation: nn.Module,
        regions: Sequence[Region] | None,
        ignore_label: int | None,
    ):
        self.plan, self.segmentation, self.regions, self.ignore_label = (
            plan,
            segmentation,
            regions,
            ignore_label,
        )
        self.grids: dict[tuple[Size, ...], AnchorGrid] = {}

    def grid(self, output: Output) -> AnchorGrid:
        """The anchors of an output."""
        if output.cells not in self.grids:
            self.grids[output.cells] = lay_out(
                self.plan.anchors, output.cells, output.codes_BA6.device
            )
        return self.grids[output.cells]

    def losses(
        self, output: Output, target_B1ZYX: Tensor, objects: Sequence[Mapping[str, NDArray[Any]]]
    ) -> Losses:
        """The three losses of a batch, in float32."""
        device = output.codes_BA6.device
        wanted = [
            Objects(
                *(torch.from_numpy(o[name]).to(device) for name in ("boxes", "labels", "ignored"))
            )
            for o in objects
        ]
        found = detection_loss(
            output.scores_BAK,
            output.codes_BA6,
            self.grid(output),
            wanted,
            classification=self.plan.classification,
            uncounted_BZYX=self.uncounted(target_B1ZYX),
        )
        logits = output.logits_BCZYX.float()
        if self.plan.has_masks:
            return Losses(
                found.classification,
                found.regression,
                self.segmentation(logits, self.target(target_B1ZYX)),
            )
        # No outline is known; every parameter still needs a gradient in distributed training.
        return Losses(found.classification, found.regression, logits.sum() * 0)

    def uncounted(self, labels_B1ZYX: Tensor) -> Tensor | None:
        """(B, Z, Y, X) which voxels have the ignore label; None where the dataset has none."""
        return None if self.ignore_label is None else labels_B1ZYX[:, 0] == self.ignore_label

    def target(self, labels_B1ZYX: Tensor) -> Tensor:
        """The labels as the loss wants them: as they are, or a channel per region, and one for the
        ignore label.

        On the device, because nnU-Net's own transform would have dropped the ids that travel beside
        the labels.
        """
        if self.regions is None:
            return labels_B1ZYX
        regions = [*self.regions, *([] if self.ignore_label is None else [self.ignore_label])]
        return torch.cat([_is_in(labels_B1ZYX, region) for region in regions], 1)

    def confusion(self, output: Output, labels_B1ZYX: Tensor) -> dict[str, NDArray[Any]]:
        """True positive, false positive and false negative voxels of each foreground class or
        region.
        """
        logits = output.logits_BCZYX
        if self.regions is None:
            classes = range(1, logits.shape[1])
            chosen = logits.argmax(1, keepdim=True)
            said, true = (
                torch.cat([seg == c for c in classes], 1) for seg in (chosen, labels_B1ZYX)
            )
        else:
            said, true = (
                logits > 0,
                torch.cat([_is_in(labels_B1ZYX, region) for region in self.regions], 1),
            )
        if self.ignore_label is not None:
            counted = labels_B1ZYX != self.ignore_label
            said, true = said & counted, true & counted
        axes = (0, 2, 3, 4)
        pairs = {"tp_hard": said & true, "fp_hard": said & ~true, "fn_hard": ~said & true}
        return {name: mask.sum(axes).cpu().numpy() for name, mask in pairs.items()}


def _is_in(labels: Tensor, region: Region) -> Tensor:
    values = [region] if isinstance(region, int) else list(region)
    return torch.isin(labels, torch.tensor(values, dtype=labels.dtype, device=labels.device))


def make_segmentation_loss(
    has_regions: bool, ignore_label: int | None, distributed: bool
) -> nn.Module:
    """Half cross-entropy, half Dice over the batch, in nnU-Net's form for labels or for regions."""
    if not has_regions:
        return segmentation_loss(ignore_label, distributed)
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": distributed}
    loss: nn.Module = DC_and_BCE_loss(
        {},
        dice,
        weight_ce=0.5,
        weight_dice=0.5,
        use_ignore_label=ignore_label is not None,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    return loss


def patches_scored(
    output: Output,
    grid: AnchorGrid,
    objects: Sequence[Mapping[str, NDArray[Any]]],
    first: int,
    uncounted_BZYX: Tensor | None = None,
) -> list[ScanBoxes]:
    """Every patch of a batch as if it were a scan; ``first`` is the number of the first one."""
    scans = []
    masks = [None] * len(objects) if uncounted_BZYX is None else uncounted_BZYX.cpu().numpy()
    for number, (candidates, true, mask) in enumerate(
        zip(boxes_of_output(output, grid), objects, masks, strict=True), start=first
    ):
        found = merge(candidates, num_voters=1)
        boxes, places, scores = (
            v.cpu().numpy() for v in (found.boxes_N6, found.labels_N, found.scores_N)
        )
        objects_there = (true["boxes"], true["labels"], true["ignored"])
        scans.append(
            scan_boxes(
                f"patch {number}",
                (1.0, 1.0, 1.0),
                objects_there,
                (boxes, places, scores),
                uncounted_ZYX=mask,
            )
        )
    return scans


def detection_recipe(recipe: Recipe, plan: DetectionPlan) -> Recipe:
    """The segmentation's recipe as detection uses it: its own momentum, one output, and the encoder
    learns from the start.
    """
    return replace(
        recipe, momentum=plan.momentum, deep_supervision=False, decoder_first_fraction=0.0
    )


def without_decay_on_norms(
    groups: Sequence[dict[str, Any]], network: nn.Module
) -> list[dict[str, Any]]:
    """Parameter groups with norms, biases and tables apart, undecayed; of equal rate the decayed
    ones come first.
    """
    decayed = {id(p) for name, p in network.named_parameters() if is_decayed(name, p)}
    split = []
    for group in groups:
        for takes_decay in (True, False):
            chosen = [p for p in group["params"] if (id(p) in decayed) == takes_decay]
            if chosen:
                split.append(
                    {
                        **group,
                        "params": chosen,
                        "weight_decay": group["weight_decay"] if takes_decay else 0.0,
                    }
                )
    return split


def absent_classes(index: InstanceIndex, cases: Sequence[str]) -> list[str]:
    """Names of the classes of which none of the cases has an object that counts."""
    present = {
        item.place for case in cases for item in index.cases[case].objects if not item.ignored
    }
    return [kind.name for place, kind in enumerate(index.classes) if place not in present]


def keep_thread_limit() -> None:
    """Hold torch to ``OMP_NUM_THREADS`` where that is set: on a CPU ``nnUNetv2_train`` has taken
    every core, and threads that share cores with other programs wait for each other.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        torch.set_num_threads(int(wanted))


class ForwardedLog(logging.Handler):
    """Sends the library's log lines to a function, such as that of nnU-Net's trainer."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        mark = "WARNING: " if record.levelno >= logging.WARNING else ""
        self.say(f"{mark}{record.getMessage()}")


def mean_dice(outputs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Pseudo Dice of each class over all validation patches; NaN where it neither is nor was said
    to be.
    """
    tp, fp, fn = (
        np.sum([o[name] for o in outputs], 0).astype(np.float64)
        for name in ("tp_hard", "fp_hard", "fn_hard")
    )
    with np.errstate(invalid="ignore"):
        return [float(v) for v in 2 * tp / (2 * tp + fp + fn)]
