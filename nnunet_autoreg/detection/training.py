"""Train a detector: the parts that do not depend on nnU-Net's trainer.

They are its losses, its recipe, its pseudo Dice, and the moving average of the weights.

Shape suffixes: B samples, C channels, Z Y X voxels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_autoreg.detection.anchors import AnchorGrid, lay_out
from nnunet_autoreg.detection.data import InstanceIndex
from nnunet_autoreg.detection.infer import boxes_of_output, merge
from nnunet_autoreg.detection.loss import PatchObjects, anchor_losses, segmentation_loss
from nnunet_autoreg.detection.matching import ScanBoxes, scan_boxes
from nnunet_autoreg.detection.net import Output
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.finetune.block import Recipe
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.parameters import is_decayed

Region = int | Sequence[int]

WEIGHTS_KEY = "autoreg_training_weights"
"""Key in a checkpoint's optimiser state. It holds the weights that training continues from, because
the network's own entry of the checkpoint holds their average.
"""


class MovingAverage:
    """Keep a moving average of the weights, with which the model is validated, saved and used.

    Training continues with the weights themselves. Early in a run the average forgets faster: the
    factor of step n is at most (1 + n) / (10 + n).

    Args:
        network: the network without DDP or torch.compile.
        decay: factor per step, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = network
        self.decay = decay
        self.values: list[Tensor] = []
        self.loaded: list[Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin from the weights as they are."""
        self.values = [p.detach().clone() for p in self.network.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step ``step``, from 0."""
        factor = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self.network.parameters()]
        torch._foreach_lerp_(self.values, weights, 1 - factor)

    @contextmanager
    def applied(self) -> Iterator[list[Tensor]]:
        """Give the network the average for a while.

        Yields:
            The network's own weights, which it has again afterwards.
        """
        own = [p.detach().clone() for p in self.network.parameters()]
        self._copy(self.values)
        try:
            yield own
        finally:
            self._copy(own)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's saved state hold the weights, because the network's is the average.

        nnU-Net decides which parts a checkpoint has. The optimiser's state is the one part to
        which an entry can be added.
        """
        optimizer.register_state_dict_post_hook(self._with_weights)
        optimizer.register_load_state_dict_pre_hook(self._take_weights)
        self.saving: list[Tensor] | None = None

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Give the network the average, and the optimiser's state the weights, for a checkpoint."""
        with self.applied() as own:
            self.saving = own
            try:
                yield
            finally:
                self.saving = None

    def restore(self) -> None:
        """Separate the weights from their average, after a checkpoint was loaded."""
        # The checkpoint has put the average into the network.
        self.reset()
        if self.loaded is not None:
            self._copy(self.loaded)
            self.loaded = None

    def _with_weights(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.saving is None else {**state, WEIGHTS_KEY: self.saving}

    def _take_weights(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self.loaded = state.get(WEIGHTS_KEY)
        return {key: value for key, value in state.items() if key != WEIGHTS_KEY}

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.network.parameters(), values, strict=True):
            parameter.copy_(value)


@dataclass(frozen=True)
class Losses:
    """Hold the losses of one batch; ``total`` has a gradient for every parameter in use."""

    classification: Tensor
    regression: Tensor
    segmentation: Tensor

    @property
    def total(self) -> Tensor:
        """Return their sum."""
        return self.classification + self.regression + self.segmentation

    def numbers(self) -> dict[str, Any]:
        """Return them as nnU-Net's trainer collects them."""
        parts = {
            "loss": self.total,
            "loss_class": self.classification,
            "loss_box": self.regression,
            "loss_seg": self.segmentation,
        }
        return {name: value.detach().cpu().numpy() for name, value in parts.items()}


class DetectionLoss:
    """Compute the three losses of batches; the segmentation's target is in nnU-Net's form.

    Args:
        plan: plan of the detector.
        segmentation: nnU-Net's loss for logits and target.
        regions: nnU-Net's regions (each one label or several); None for plain labels.
        ignore_label: label of voxels that do not count; None if there is no such label.
    """

    def __init__(
        self,
        plan: DetectionPlan,
        segmentation: nn.Module,
        regions: Sequence[Region] | None,
        ignore_label: int | None,
    ):
        self.plan = plan
        self.segmentation = segmentation
        self.regions = regions
        self.ignore_label = ignore_label
        self.grids: dict[tuple[Size, ...], AnchorGrid] = {}

    def grid(self, output: Output) -> AnchorGrid:
        """Return the anchors of an output."""
        if output.cells not in self.grids:
            device = output.deltas_BA6.device
            self.grids[output.cells] = lay_out(self.plan.anchors, output.cells, device)
        return self.grids[output.cells]

    def losses(
        self,
        output: Output,
        target_B1ZYX: Tensor,
        objects: Sequence[Mapping[str, NDArray[Any]]],
    ) -> Losses:
        """Return the three losses of a batch, in float32.

        Args:
            target_B1ZYX: labels of the voxels.
            objects: objects of each sample, as ``data.objects_of_patch`` gives them.
        """
        device = output.deltas_BA6.device
        wanted = []
        for of_patch in objects:
            boxes, labels, ignored = (
                torch.from_numpy(of_patch[name]).to(device)
                for name in ("boxes", "labels", "ignored")
            )
            wanted.append(PatchObjects(boxes, labels, ignored))

        found = anchor_losses(
            output.scores_BAK,
            output.deltas_BA6,
            self.grid(output),
            wanted,
            classification=self.plan.classification,
            uncounted_BZYX=self.uncounted(target_B1ZYX),
        )

        logits = output.logits_BCZYX.float()
        if self.plan.has_masks:
            segmentation = self.segmentation(logits, self.target(target_B1ZYX))
        else:
            # No outline is known. Distributed training still needs a gradient of every parameter.
            segmentation = logits.sum() * 0
        return Losses(found.classification, found.regression, segmentation)

    def uncounted(self, labels_B1ZYX: Tensor) -> Tensor | None:
        """Return which voxels (B, Z, Y, X) have the ignore label; None without such a label."""
        if self.ignore_label is None:
            return None
        return labels_B1ZYX[:, 0] == self.ignore_label

    def target(self, labels_B1ZYX: Tensor) -> Tensor:
        """Return the labels as the loss needs them.

        Plain labels are returned as they are. Regions become one channel each, and the ignore label
        becomes the last channel. This is done on the device, because nnU-Net's own transform would
        have dropped the ids that travel beside the labels.
        """
        if self.regions is None:
            return labels_B1ZYX
        regions = list(self.regions)
        if self.ignore_label is not None:
            regions.append(self.ignore_label)
        return _as_channels(labels_B1ZYX, regions)

    def confusion(self, output: Output, labels_B1ZYX: Tensor) -> dict[str, NDArray[Any]]:
        """Return the number of true positive, false positive and false negative voxels per class.

        A class is a foreground label, or a region.
        """
        logits = output.logits_BCZYX
        if self.regions is None:
            labels = range(1, logits.shape[1])
            predicted = _as_channels(logits.argmax(1, keepdim=True), labels)
            true = _as_channels(labels_B1ZYX, labels)
        else:
            predicted = logits > 0
            true = _as_channels(labels_B1ZYX, self.regions)

        if self.ignore_label is not None:
            is_counted = labels_B1ZYX != self.ignore_label
            predicted = predicted & is_counted
            true = true & is_counted

        masks = {
            "tp_hard": predicted & true,
            "fp_hard": predicted & ~true,
            "fn_hard": ~predicted & true,
        }
        counts = {}
        for name, mask in masks.items():
            # Over the batch and all voxels.
            counts[name] = mask.sum((0, 2, 3, 4)).cpu().numpy()
        return counts


def _as_channels(labels_B1ZYX: Tensor, regions: Sequence[Region]) -> Tensor:
    """Return one channel (B, regions, Z, Y, X) per region: True in the region."""
    channels = []
    for region in regions:
        values = [region] if isinstance(region, int) else list(region)
        in_region = torch.tensor(values, dtype=labels_B1ZYX.dtype, device=labels_B1ZYX.device)
        channels.append(torch.isin(labels_B1ZYX, in_region))
    return torch.cat(channels, 1)


def make_segmentation_loss(
    has_regions: bool,
    ignore_label: int | None,
    distributed: bool,
) -> nn.Module:
    """Return half cross-entropy, half Dice over the batch, for nnU-Net's labels or regions."""
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
    """Return every patch of a batch as if it were a scan, with its objects and boxes.

    Args:
        objects: objects of each sample, as ``data.objects_of_patch`` gives them.
        first: number of the first patch, for its name.
        uncounted_BZYX: True for voxels in which nothing counts.
    """
    masks: Any = [None] * len(objects)
    if uncounted_BZYX is not None:
        masks = uncounted_BZYX.cpu().numpy()
    of_patches = zip(boxes_of_output(output, grid), objects, masks, strict=True)

    scans = []
    for number, (candidates, true, mask) in enumerate(of_patches, start=first):
        merged = merge(candidates, num_members=1)
        scan = scan_boxes(
            name=f"patch {number}",
            spacing_mm=(1.0, 1.0, 1.0),
            true=(true["boxes"], true["labels"], true["ignored"]),
            found=(
                merged.boxes_N6.cpu().numpy(),
                merged.labels_N.cpu().numpy(),
                merged.scores_N.cpu().numpy(),
            ),
            uncounted_ZYX=mask,
        )
        scans.append(scan)
    return scans


def detection_recipe(recipe: Recipe, plan: DetectionPlan) -> Recipe:
    """Return the segmentation's recipe as detection uses it.

    It has its own momentum and one output, and the encoder learns from the start.
    """
    return replace(
        recipe,
        momentum=plan.momentum,
        deep_supervision=False,
        decoder_first_fraction=0.0,
    )


def without_decay_on_norms(
    groups: Sequence[dict[str, Any]],
    network: nn.Module,
) -> list[dict[str, Any]]:
    """Return the parameter groups, with norms, biases and tables in groups without weight decay.

    Of two groups with one learning rate, the decayed one comes first.
    """
    # Parameters are compared by identity: groups hold no names.
    decayed = {id(p) for name, p in network.named_parameters() if is_decayed(name, p)}
    split = []
    for group in groups:
        for has_decay in (True, False):
            chosen = [p for p in group["params"] if (id(p) in decayed) == has_decay]
            if chosen:
                weight_decay = group["weight_decay"] if has_decay else 0.0
                split.append({**group, "params": chosen, "weight_decay": weight_decay})
    return split


def absent_classes(index: InstanceIndex, cases: Sequence[str]) -> list[str]:
    """Return the names of the classes of which no case has an object that counts."""
    present = set()
    for case in cases:
        for item in index.cases[case].objects:
            if not item.ignored:
                present.add(item.class_index)
    return [kind.name for number, kind in enumerate(index.classes) if number not in present]


def mean_dice(outputs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the pseudo Dice of each class over all validation patches.

    It is NaN for a class that is neither there nor predicted.
    """
    sums = {}
    for name in ("tp_hard", "fp_hard", "fn_hard"):
        of_outputs = [output[name] for output in outputs]
        sums[name] = np.sum(of_outputs, 0).astype(np.float64)

    twice_true = 2 * sums["tp_hard"]
    with np.errstate(invalid="ignore"):
        dice = twice_true / (twice_true + sums["fp_hard"] + sums["fn_hard"])
    return [float(value) for value in dice]
