"""Build the classifier: an encoder, standardised means over all positions, a linear layer per task.

The encoder's parts keep the names that they have in the segmentation network, so that pretrained
weights load unchanged.

Shape suffixes: B or N samples, C channels, Z Y X voxels, V features, T tasks, K classes of a task.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.classification.plan import WEIGHTS, ClassificationPlan
from nnunet_autoreg.classification.table import UNKNOWN
from nnunet_autoreg.downstream.tiles import TiledScan
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.feature_maps import FeatureEncoder

MIN_DEVIATION = 0.1
"""Deviations below this share of the mean deviation are replaced by it."""


class Classifier(FeatureEncoder):
    """An encoder with a linear layer per task, which gives the logits of every task.

    It gives them in training, and in evaluation mode if ``gives_classes`` is set.

    Args:
        network, class_path, arguments, input_shape: see ``FeatureEncoder``.
        class_numbers: number of classes of every task.
    """

    def __init__(
        self,
        network: nn.Module,
        class_path: str,
        arguments: Mapping[str, Any],
        input_shape: Sequence[int],
        class_numbers: Sequence[int],
    ):
        super().__init__(network, class_path, arguments, input_shape)
        self.gives_classes = False
        width = self.num_features[-1]
        self.heads = nn.ModuleList(nn.Linear(width, number) for number in class_numbers)
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_scale", torch.ones(width))

        # Small logits, so that training begins near the same probability for every class.
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def pooled(self, volume_BCZYX: Tensor) -> Tensor:
        """Return the mean of the deepest features over all positions, (B, V)."""
        return self.deepest(volume_BCZYX).float().mean((2, 3, 4))

    @torch.no_grad()
    def standardise(self, pooled_NV: Tensor) -> None:
        """Scale the features for the heads, to mean 0 and deviation 1 over these cases.

        The scale does not change in training: it is that of the encoder before fine-tuning.
        """
        # Instance normalisation gives every channel of a CNN the same mean in every scan, except
        # for the nonlinearity after it. So the means over positions of different scans are almost
        # equal, and heads that read them without scaling hardly learn.
        deviation_V = pooled_NV.std(0, correction=0)
        # A feature that is almost constant must not be enlarged to the size of the others.
        deviation_V = deviation_V.clamp_min(MIN_DEVIATION * float(deviation_V.mean()))
        # All deviations are 0 for a single case.
        scale_V = torch.ones_like(deviation_V)
        if not bool((deviation_V == 0).any()):
            scale_V = 1 / deviation_V
        self.feature_mean.copy_(pooled_NV.mean(0))
        self.feature_scale.copy_(scale_V)

    def logits(self, pooled_BV: Tensor) -> list[Tensor]:
        """Return the logits (B, K) of every task."""
        standardised_BV = (pooled_BV - self.feature_mean) * self.feature_scale
        return [head(standardised_BV) for head in self.heads]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # The heads of earlier releases read the features without scaling.
        state_dict.setdefault(f"{prefix}feature_mean", torch.zeros_like(self.feature_mean))
        state_dict.setdefault(f"{prefix}feature_scale", torch.ones_like(self.feature_scale))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, volume_BCZYX: Tensor) -> list[Tensor]:
        """Return the logits (B, K) of every task.

        Raises:
            PlanError: nnU-Net's predictor calls it (code "classification-no-segmentation").
        """
        # nnU-Net's predictor would take the logits for a segmentation.
        if not (self.training or self.gives_classes):
            raise PlanError(
                "this model classifies scans and does not segment; use autoreg_classify instead "
                "of nnUNetv2_predict",
                code="classification-no-segmentation",
            )
        return self.logits(self.pooled(volume_BCZYX))

    @torch.no_grad()
    def pooled_over_scan(
        self,
        image_CZYX: Tensor,
        patch_size: Size,
        device: torch.device,
    ) -> Tensor:
        """Return the mean features (V,) of a preprocessed scan of any size.

        A scan larger than the patch is covered by tiles. A smaller one is padded with zeros on both
        sides, which are part of the mean, as in training.
        """
        scan = TiledScan(image_CZYX, patch_size, self.token_size)
        parts = [self.pooled(tile.image_1CZYX.to(device))[0] for tile in scan]
        return torch.stack(parts).mean(0)


class ClassificationLoss:
    """Cross-entropy summed over the tasks; classes that are not known carry no loss.

    Args:
        plan: balance and smoothing.
        training_counts: per task, the number of training cases of each class.
    """

    def __init__(self, plan: ClassificationPlan, training_counts: Sequence[Sequence[int]]):
        self.plan = plan
        # The weights (K,) of the classes of each task.
        self.weights: list[Tensor] = []
        for counts in training_counts:
            is_balanced = plan.balance == WEIGHTS
            self.weights.append(class_weights(counts) if is_balanced else torch.ones(len(counts)))

    def __call__(self, logits: Sequence[Tensor], labels_BT: Tensor) -> Tensor:
        """Return the loss of a batch; it is 0, with a gradient of 0, if no class is known.

        Args:
            logits: logits (B, K) of every task.
            labels_BT: class indices; ``UNKNOWN`` if not known.
        """
        # Every head gets a gradient, because distributed training waits for all of them.
        total = torch.zeros(()).to(logits[0])
        for values_BK in logits:
            total = total + values_BK.sum() * 0
        for task_index, (task, values_BK) in enumerate(zip(self.plan.tasks, logits, strict=True)):
            labels_B = labels_BT[:, task_index]
            is_known_B = labels_B != UNKNOWN
            if not bool(is_known_B.any()):
                continue
            smoothing = self.plan.ordinal_smoothing if task.ordinal else 0.0
            target_BK = smoothed(labels_B[is_known_B], len(task.classes), smoothing)
            log_probabilities_BK = functional.log_softmax(values_BK[is_known_B].float(), 1)
            weights_K = self.weights[task_index].to(values_BK.device)
            each_B = -(target_BK * weights_K * log_probabilities_BK).sum(1)
            total = total + each_B.mean()
        return total


def class_weights(counts: Sequence[int]) -> Tensor:
    """Return weights (K,) that give every class the same share of the loss.

    Their mean over the cases is 1. A class without cases has the weight 0.

    Args:
        counts: number of training cases of each class.
    """
    present = [count for count in counts if count]
    even_share = sum(present) / len(present)
    weights = [even_share / count if count else 0.0 for count in counts]
    return torch.tensor(weights)


def smoothed(labels_N: Tensor, num_classes: int, share: float) -> Tensor:
    """Return targets (N, K): 1 - ``share`` for the class, the rest evenly for its neighbours."""
    target_NK = functional.one_hot(labels_N, num_classes).float()
    if not share:
        return target_NK
    lower_NK = functional.pad(target_NK[:, 1:], (0, 1))
    upper_NK = functional.pad(target_NK[:, :-1], (1, 0))
    neighbours_NK = lower_NK + upper_NK
    neighbours_NK = neighbours_NK / neighbours_NK.sum(1, keepdim=True)
    return (1 - share) * target_NK + share * neighbours_NK
