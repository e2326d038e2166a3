"""Compute the losses of the anchors (class and box), and of the auxiliary segmentation.

Shape suffixes: B samples, A anchors, C classes, G objects of a sample, Z Y X voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.detection.anchors import AnchorGrid, match
from nnunet_autoreg.errors import PlanError

SAMPLED_PER_IMAGE, POSITIVE_SHARE, POOL = 32, 1 / 3, 20
"""nnDetection v0.1's values: 32 anchors per image, a third of them positive, and the negatives
drawn from a pool 20 times as large as needed.
"""
CLASSIFICATIONS = ("hard_negatives", "focal")


@dataclass(frozen=True)
class PatchObjects:
    """Hold the objects of one patch.

    Attributes:
        boxes_G6: in voxel edges of the patch.
        labels_G: class index, from 0.
        ignored_G: whether an object is neither to be found nor background, because it is too small
            or marked so.
    """

    boxes_G6: Tensor  # noqa: N815
    labels_G: Tensor  # noqa: N815
    ignored_G: Tensor  # noqa: N815


@dataclass(frozen=True)
class AnchorLosses:
    """Hold the losses of one batch, float32 scalars with gradients.

    Attributes:
        classification, regression: losses to be minimised.
        num_positive: number of anchors that have an object to find.
    """

    classification: Tensor
    regression: Tensor
    num_positive: int


def anchor_losses(
    logits_BAC: Tensor,
    deltas_BA6: Tensor,
    grid: AnchorGrid,
    objects: Sequence[PatchObjects],
    *,
    classification: str = "hard_negatives",
    centre_inside: bool = False,
    generator: torch.Generator | None = None,
    uncounted_BZYX: Tensor | None = None,
) -> AnchorLosses:
    """Return the losses of a batch; images, and whole batches, may be without objects.

    Args:
        logits_BAC: one logit per anchor and class, anchors in the order of ``grid``.
        deltas_BA6: predicted deltas (boxes.encode).
        grid: the anchors.
        objects: the objects of every sample.
        classification: ``hard_negatives`` or ``focal``.
        centre_inside: see ``anchors.match``.
        generator: draws the sampled anchors, on the CPU; torch's global generator if None.
        uncounted_BZYX: bool, voxels without a known label. An anchor with its centre there is not
            background.

    Raises:
        PlanError: there is no such classification loss.
    """
    if classification not in CLASSIFICATIONS:
        raise PlanError(
            f"there is no classification loss '{classification}'; known are: "
            f"{', '.join(CLASSIFICATIONS)}",
            code="detection-classification-loss",
        )

    state_BA, labels_BA, wanted_BA6 = _targets(objects, grid, centre_inside, uncounted_BZYX)
    is_positive = state_BA > 0
    num_positive = int(is_positive.sum())
    # Background anchors have a target of zeros.
    target_BAC = functional.one_hot(labels_BA, logits_BAC.shape[-1]).float()
    target_BAC = target_BAC * is_positive[..., None]

    logits = logits_BAC.float()
    deltas = deltas_BA6.float()
    if classification == "focal":
        # The focal loss uses every anchor, because it gives easy ones a small weight.
        loss = focal(logits, target_BAC, state_BA >= 0, num_positive)
        is_used = is_positive
    else:
        chosen = sample_hard_negatives(state_BA, logits.detach().amax(-1), generator)
        if bool(chosen.any()):
            loss = functional.binary_cross_entropy_with_logits(logits[chosen], target_BAC[chosen])
        else:
            # It is 0 but has a gradient for every parameter, because distributed training waits for
            # all of them.
            loss = logits.sum() * 0
        # Boxes are learned only from the drawn positives.
        is_used = chosen & is_positive

    anchors = grid.boxes_A6.float()[None].expand_as(deltas)
    return AnchorLosses(loss, box_loss(deltas, anchors, wanted_BA6, is_used), num_positive)


def box_loss(
    deltas_BA6: Tensor,
    anchors_BA6: Tensor,
    wanted_BA6: Tensor,
    used_BA: Tensor,
) -> Tensor:
    """Return the mean of 1 - GIoU over the anchors in use.

    Without any anchor in use it is 0, with a gradient of 0.
    """
    if not bool(used_BA.any()):
        return deltas_BA6.sum() * 0
    found = bx.decode(deltas_BA6[used_BA], anchors_BA6[used_BA])
    return (1 - bx.pair_giou(found, wanted_BA6[used_BA])).mean()


def sample_hard_negatives(
    state_BA: Tensor,
    hardness_BA: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the anchors (B, A) that count in this step, pooled over the whole batch.

    Positives are drawn at random up to their share. Two negatives are drawn for each positive, and
    two if there is no positive at all. They are drawn at random from the hardest ones.

    Args:
        state_BA: 1 for a positive, 0 for background, -1 if the anchor does not count.
        hardness_BA: highest logit of each anchor.
        generator: see ``anchor_losses``.

    Returns:
        True for every anchor that was drawn.
    """
    state = state_BA.flatten()
    hardness = hardness_BA.flatten()
    positive = torch.nonzero(state > 0)[:, 0]
    negative = torch.nonzero(state == 0)[:, 0]

    most_positive = max(1, int(SAMPLED_PER_IMAGE * len(state_BA) * POSITIVE_SHARE))
    num_positive = min(len(positive), most_positive)
    negatives_per_positive = 1 / POSITIVE_SHARE - 1
    num_negative = min(len(negative), round(max(1, num_positive) * negatives_per_positive))

    # From a pool of hard negatives, so that the drawn ones differ from step to step.
    pool_size = min(len(negative), num_negative * POOL)
    hardest = negative[hardness[negative].topk(pool_size).indices]
    chosen = torch.zeros_like(state, dtype=torch.bool)
    chosen[_draw(positive, num_positive, generator)] = True
    chosen[_draw(hardest, num_negative, generator)] = True
    return chosen.view_as(state_BA)


def focal(
    logits_BAC: Tensor,
    target_BAC: Tensor,
    counted_BA: Tensor,
    num_positive: int,
    gamma: float = 1.0,
    alpha: float = 0.75,
) -> Tensor:
    """Return the sum of the sigmoid focal loss over all anchors that count, per positive anchor.

    Args:
        counted_BA: whether an anchor counts.

    Source: Lin et al. 2017 (arXiv 1708.02002); gamma 1 and alpha 0.75 are the values of
        nnDetection V002.
    """
    logits = logits_BAC[counted_BA]  # (counted, C)
    target = target_BAC[counted_BA]
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    error = (logits.sigmoid() - target).abs()
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * error**gamma * entropy).sum() / max(1, num_positive)


def segmentation_loss(ignore_label: int | None = None, distributed: bool = False) -> nn.Module:
    """Return nnU-Net's own 0.5 cross-entropy + 0.5 Dice over the batch.

    It takes logits (B, C, Z, Y, X) and a target (B, 1, Z, Y, X).
    """
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": distributed}
    loss: nn.Module = DC_and_CE_loss(
        dice,
        {},
        weight_ce=0.5,
        weight_dice=0.5,
        ignore_label=ignore_label,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    return loss


@torch.no_grad()
def _targets(
    objects: Sequence[PatchObjects],
    grid: AnchorGrid,
    centre_inside: bool,
    uncounted_BZYX: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the training targets of the anchors of a batch.

    Returns:
        State (B, A) as in ``sample_hard_negatives``, and the class index (B, A) and the box
        (B, A, 6) of the object that each anchor has to find.
    """
    states = []
    labels = []
    wanted = []
    for of_image in objects:
        matched = match(of_image.boxes_G6, grid, centre_inside=centre_inside)  # (A,)
        if not len(of_image.boxes_G6):
            states.append(torch.zeros_like(matched))
            labels.append(torch.zeros_like(matched))
            wanted.append(torch.zeros_like(grid.boxes_A6))
            continue

        object_index = matched.clamp(min=0)
        has_object = matched >= 0
        is_ignored = of_image.ignored_G.to(matched.device)[object_index] & has_object
        # 1 for an object, 0 for background, -1 for an ignored object.
        states.append(has_object.long() - 2 * is_ignored.long())
        labels.append(of_image.labels_G.to(matched.device).long()[object_index])
        wanted.append(of_image.boxes_G6.to(grid.boxes_A6)[object_index])

    state_BA = torch.stack(states)
    if uncounted_BZYX is not None:
        # For a centre beyond the patch, the nearest voxel decides.
        voxel_A3 = bx.centres(grid.boxes_A6).floor().long()
        last_3 = torch.tensor(uncounted_BZYX.shape[1:], device=voxel_A3.device) - 1
        z, y, x = torch.minimum(voxel_A3.clamp(min=0), last_3).unbind(1)
        has_unknown_centre = uncounted_BZYX[:, z, y, x]
        state_BA = torch.where(has_unknown_centre & (state_BA == 0), -1, state_BA)
    return state_BA, torch.stack(labels), torch.stack(wanted)


def _draw(indices: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    chosen = torch.randperm(len(indices), generator=generator)[:number]
    return indices[chosen.to(indices.device)]
