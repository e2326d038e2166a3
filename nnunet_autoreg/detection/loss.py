"""What a detector is trained on: anchors told from background, boxes drawn to the objects, and the
auxiliary segmentation.
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
"""nnDetection v0.1's: 32 anchors per image, a third positive, the negatives drawn from a pool 20
times as large as needed.
"""
CLASSIFICATIONS = ("hard_negatives", "focal")


@dataclass(frozen=True)
class Objects:
    """The objects of one patch.

    Attributes:
        boxes_G6: voxel edges of the patch.
        labels_G: class, from 0.
        ignored_G: objects that are neither to be found nor background: too small, or of an unsure
            label.
    """

    boxes_G6: Tensor  # noqa: N815
    labels_G: Tensor  # noqa: N815
    ignored_G: Tensor  # noqa: N815


@dataclass(frozen=True)
class DetectionLoss:
    """The losses of one batch, float32 scalars with gradients.

    Attributes:
        classification, regression: to be minimised.
        num_positive: anchors that stand for an object in the batch.
    """

    classification: Tensor
    regression: Tensor
    num_positive: int


def detection_loss(
    logits_BAC: Tensor,
    codes_BA6: Tensor,
    grid: AnchorGrid,
    objects: Sequence[Objects],
    *,
    classification: str = "hard_negatives",
    centre_inside: bool = False,
    generator: torch.Generator | None = None,
    uncounted_BZYX: Tensor | None = None,
) -> DetectionLoss:
    """Loss of a batch; an image without objects is fine, and so is a batch of such images.

    Args:
        logits_BAC: one logit per anchor and class, anchors in the order of ``grid``.
        codes_BA6: predicted codes (boxes.encode).
        classification: ``hard_negatives`` or ``focal``.
        generator: draws the sampled anchors, on the CPU; torch's global one if None.
        uncounted_BZYX: bool, voxels of nobody's label: an anchor with its centre there is no
            background.

    Raises:
        PlanError: there is no such classification loss.
    """
    if classification not in CLASSIFICATIONS:
        raise PlanError(
            f"there is no classification loss '{classification}'; known are: "
            f"{', '.join(CLASSIFICATIONS)}"
        )
    with torch.no_grad():
        assigned = [_assign(o, grid, centre_inside) for o in objects]
        state_BA = torch.stack([state for state, _, _ in assigned])
        if uncounted_BZYX is not None:
            state_BA = torch.where(
                (state_BA == 0) & _at_centres(uncounted_BZYX, grid), -1, state_BA
            )
        wanted_BA6 = torch.stack([wanted for _, _, wanted in assigned])
        target_BAC = functional.one_hot(
            torch.stack([labels for _, labels, _ in assigned]), logits_BAC.shape[-1]
        ).float()
        target_BAC = target_BAC * (state_BA > 0)[..., None]
    logits, codes = logits_BAC.float(), codes_BA6.float()
    positive = state_BA > 0
    if classification == "focal":
        loss, used = focal(logits, target_BAC, state_BA >= 0, int(positive.sum())), positive
    else:
        chosen = sample_hard_negatives(state_BA, logits.detach().amax(-1), generator)
        # Zero, but with a gradient for every parameter: distributed training waits for one.
        loss = (
            functional.binary_cross_entropy_with_logits(logits[chosen], target_BAC[chosen])
            if bool(chosen.any())
            else logits.sum() * 0
        )
        used = chosen & positive
    anchors = grid.boxes_A6.float()[None].expand_as(codes)
    return DetectionLoss(loss, box_loss(codes, anchors, wanted_BA6, used), int(positive.sum()))


def box_loss(codes_BA6: Tensor, anchors_BA6: Tensor, wanted_BA6: Tensor, used_BA: Tensor) -> Tensor:
    """Mean of 1 - GIoU over the anchors in use; 0, with a gradient of 0, where there is none."""
    if not bool(used_BA.any()):
        return codes_BA6.sum() * 0
    found = bx.decode(codes_BA6[used_BA], anchors_BA6[used_BA])
    return (1 - bx.pair_giou(found, wanted_BA6[used_BA])).mean()


def sample_hard_negatives(
    state_BA: Tensor, hardness_BA: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """(B, A) bool: the anchors that count in this step, pooled over the whole batch.

    Positives are drawn at random up to their share. Two negatives go with each, but with none at
    all two still count; they are drawn at random from the hardest.

    Args:
        state_BA: 1 positive, 0 background, -1 to be left out.
        hardness_BA: highest logit of each anchor.
    """
    state, hardness = state_BA.flatten(), hardness_BA.flatten()
    positive, negative = torch.nonzero(state > 0)[:, 0], torch.nonzero(state == 0)[:, 0]
    num_positive = min(
        len(positive), max(1, int(SAMPLED_PER_IMAGE * len(state_BA) * POSITIVE_SHARE))
    )
    num_negative = min(len(negative), round(max(1, num_positive) * (1 / POSITIVE_SHARE - 1)))
    hardest = negative[hardness[negative].topk(min(len(negative), num_negative * POOL)).indices]
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
    """Sigmoid focal loss over every anchor that counts, divided by the number of positives.

    Source: Lin et al. 2017 (arXiv 1708.02002); gamma 1 and alpha 0.75 are what nnDetection V002
        uses.
    """
    logits, target = logits_BAC[counted_BA], target_BAC[counted_BA]
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = (logits.sigmoid() - target).abs()
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * missed**gamma * entropy).sum() / max(1, num_positive)


def segmentation_loss(ignore_label: int | None = None, distributed: bool = False) -> nn.Module:
    """nnU-Net's own 0.5 cross-entropy + 0.5 Dice over the batch, for logits (B, C, Z, Y, X) and a
    target (B, 1, Z, Y, X).
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


def _assign(
    objects: Objects, grid: AnchorGrid, centre_inside: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """State (A,) as in ``sample_hard_negatives``, class (A,) and box (A, 6) of the object of each
    anchor.
    """
    device = grid.boxes_A6.device
    matched = match(objects.boxes_G6, grid, centre_inside=centre_inside)
    if not len(objects.boxes_G6):
        none = torch.zeros_like(matched)
        return none, none, torch.zeros_like(grid.boxes_A6)
    place = matched.clamp(min=0)
    ignored = objects.ignored_G.to(device)[place] & (matched >= 0)
    state = (matched >= 0).long() - 2 * ignored.long()
    return (
        state,
        objects.labels_G.to(device).long()[place],
        objects.boxes_G6.to(grid.boxes_A6)[place],
    )


def _at_centres(values_BZYX: Tensor, grid: AnchorGrid) -> Tensor:
    """(B, A) values of the voxels that hold the anchors' centres; of the nearest one beyond the
    patch.
    """
    place = bx.centres(grid.boxes_A6).floor().long()
    last = torch.tensor(values_BZYX.shape[1:], device=place.device) - 1
    z, y, x = torch.minimum(place.clamp(min=0), last).unbind(1)
    return values_BZYX[:, z, y, x]


def _draw(indices: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)[:number].to(indices.device)]
