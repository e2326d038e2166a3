"""The targets of regression: every token's own voxels in the form of ``objective.target``, smoothed
if the plan says so. All in float32.

Shape suffixes: B samples, T tokens, P = (C, z, y, x) voxels of a token flattened, C channels, N
    tokens of all samples,
O outputs of the head for a token: its P voxels and, where the plan asks for them, two statistics.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nnunet_autoreg.geometry import Size, volume
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan

NUM_STATISTICS = 2
"""A token's mean and the logarithm of its deviation."""


def num_outputs(settings: PredictionPlan, token_voxels: int) -> int:
    """Return the number of values that a head predicts for each token.

    Args:
        token_voxels: voxels of a token, channels included.
    """
    if settings.target == "normalised_with_statistics":
        return token_voxels + NUM_STATISTICS
    return token_voxels


def target_of(settings: PredictionPlan, voxels_BTP: Tensor, real_BTP: Tensor) -> Tensor:
    """Return the targets of a head for each token, (B, T, O); 0 in padding.

    Args:
        voxels_BTP: intensities as normalised by nnU-Net.
        real_BTP: bool, False in padding.
    """
    if settings.target == "voxels":
        return voxels_BTP.float() * real_BTP.float()
    floor, epsilon = settings.variance_floor, settings.variance_epsilon
    pattern_BTP = normalised_target(voxels_BTP, real_BTP, floor, epsilon)
    if settings.target == "normalised":
        return pattern_BTP
    mean_BT1, deviation_BT1 = token_statistics(voxels_BTP, real_BTP, floor, epsilon)
    return torch.cat([pattern_BTP, mean_BT1, deviation_BT1.log()], dim=-1)


def output_weight(settings: PredictionPlan, weight_BTP: Tensor) -> Tensor:
    """Return the weight of each output's squared error, (B, T, O).

    A wrong mean makes all voxels of its token wrong. So each statistic counts as much as the
    token's supervised voxels together, and the loss per voxel is the sum of three mean squared
    errors: errors of pattern, mean and log deviation.

    Args:
        weight_BTP: weight of each voxel, 0 where it carries no loss.
    """
    if settings.target != "normalised_with_statistics":
        return weight_BTP
    token_BT1 = weight_BTP.sum(dim=-1, keepdim=True)
    return torch.cat([weight_BTP, token_BT1, token_BT1], dim=-1)


def as_intensities(
    settings: PredictionPlan,
    predicted_BTO: Tensor,
    voxels_BTP: Tensor,
    real_BTP: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return predictions in intensities, and those of a head that outputs 0; both (B, T, P).

    The target "normalised" does not determine each token's mean and deviation. They are taken from
    the true voxels.
    """
    if settings.target == "voxels":
        return predicted_BTO, torch.zeros_like(predicted_BTO)
    if settings.target == "normalised_with_statistics":
        num_voxels = voxels_BTP.shape[-1]
        pattern_BTP, mean_BT1, log_deviation_BT1 = torch.split(
            predicted_BTO,
            [num_voxels, 1, 1],
            dim=-1,
        )
        predicted_BTP = pattern_BTP * log_deviation_BT1.exp() + mean_BT1
        return predicted_BTP, torch.zeros_like(predicted_BTP)
    floor, epsilon = settings.variance_floor, settings.variance_epsilon
    mean_BT1, deviation_BT1 = token_statistics(voxels_BTP, real_BTP, floor, epsilon)
    return predicted_BTO * deviation_BT1 + mean_BT1, mean_BT1.expand_as(predicted_BTO)


def token_statistics(
    voxels_BTP: Tensor,
    real_BTP: Tensor,
    floor: float,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return mean and sqrt(max(var, floor) + epsilon) of every token, (B, T, 1).

    The variance is unbiased, and computed over valid voxels only.
    """
    voxels_BTP, weight_BTP = voxels_BTP.float(), real_BTP.float()
    count_BT1 = weight_BTP.sum(-1, keepdim=True)
    mean_BT1 = (voxels_BTP * weight_BTP).sum(-1, keepdim=True) / count_BT1.clamp(min=1)
    centred_BTP = (voxels_BTP - mean_BT1) * weight_BTP
    variance_BT1 = centred_BTP.square().sum(-1, keepdim=True) / (count_BT1 - 1).clamp(min=1)
    return mean_BT1, (variance_BT1.clamp(min=floor) + epsilon).sqrt()


def normalised_target(
    voxels_BTP: Tensor,
    real_BTP: Tensor,
    floor: float,
    epsilon: float = 0.0,
) -> Tensor:
    """Return voxels normalised per token: (v - mean) / sqrt(max(var, floor) + epsilon).

    A constant token becomes 0. Padding becomes 0.

    Source: AR-SSL4M's normalised-pixel target (floor 0, epsilon 1e-6); the floor keeps air quiet.
    """
    mean_BT1, deviation_BT1 = token_statistics(voxels_BTP, real_BTP, floor, epsilon)
    return (voxels_BTP.float() - mean_BT1) * real_BTP.float() / deviation_BT1


def smoothed(voxels_BTP: Tensor, real_BTP: Tensor, token_size: Size, sigma_vox: float) -> Tensor:
    """Return every token smoothed by a Gaussian over its own valid voxels.

    Only inside the token, so that its target depends on nothing else: neighbours would bring voxels
    of other blocks, and in strided sequences of other slices. A constant token stays as it is.
    Padding becomes 0; sigma 0 changes nothing.

    Args:
        token_size: voxels (z, y, x); P is a multiple of their number.
        sigma_vox: standard deviation in voxels, the same along every axis.

    Source: the low-pass targets of SAIM (arXiv 2212.01610), which smooths the whole image instead.
    """
    if sigma_vox == 0:
        return voxels_BTP
    weight_BTP = real_BTP.float()
    with full_precision(voxels_BTP.device):
        sums_BTP = _blurred(voxels_BTP.float() * weight_BTP, token_size, sigma_vox)
        weights_BTP = _blurred(weight_BTP, token_size, sigma_vox)
    # A real voxel counts 1 for itself; what is clamped is padding.
    return torch.where(real_BTP, sums_BTP / weights_BTP.clamp(min=1), 0.0)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that computes in the tensors' own precision, also under autocast."""
    # The memory estimate computes on the meta device, which knows no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _blurred(values_BTP: Tensor, token_size: Size, sigma_vox: float) -> Tensor:
    """Return Gaussian sums along z, y and x of every token and channel."""
    assert values_BTP.shape[-1] % volume(token_size) == 0
    cubes_Nzyx = values_BTP.reshape(-1, *token_size)
    for axis, size in enumerate(token_size, start=1):
        # exp(-(i - j)^2 / (2 sigma^2)), (size, size). It is made on the device, so that nothing is
        # copied there in a step.
        voxel = torch.arange(size, dtype=torch.float32, device=values_BTP.device)
        distance_squared = (voxel[:, None] - voxel[None, :]).square()
        kernel = torch.exp(-distance_squared / (2 * sigma_vox**2))
        cubes_Nzyx = torch.tensordot(cubes_Nzyx, kernel, dims=([axis], [0])).movedim(-1, axis)
    return cubes_Nzyx.reshape(values_BTP.shape)
