"""A narrow CNN whose whole network is pretrained, and batches of noise for it.

Shape suffixes: B samples, M members, C channels, Z Y X voxels, T tokens, P voxels of a token.
"""

from typing import Any

import torch
from torch import Tensor

from nnunet_autoreg.families import token_size_of
from nnunet_autoreg.geometry import Size, grid_of, volume
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.objectives.whole_network import Predictions, WholeNetwork
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.sampling.sample import Batch

# Four stages with one block each: the CNN is small enough to be trained in seconds.
NARROW = {"features_per_stage": [4, 6, 8, 8], "n_blocks_per_stage": [1, 1, 1, 1]}


def plan_of(
    crop: Size = (16, 32, 32),
    arguments: dict[str, Any] | None = None,
    prefix: str = "uniform",
    recompute: bool = False,
    name: str = "autoregressive",
    **objective: Any,
) -> Plan:
    size = encoder_size("resenc_tiny")
    built_with = {**size.arguments, **NARROW, **(arguments or {})}
    token = token_size_of(size.class_path, built_with)
    sequence = SequencePlan(crop, order="random", predictor="network", prefix=prefix)
    settings = {"target": "voxels", **objective}

    plan = Plan(
        "test",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan("resenc_tiny", size.class_path, built_with, token),
        sequence,
        PredictionPlan(name=name, **settings),
        OptimPlan(10, 2, 1e-3, 1, checkpoint_activations=recompute),
        RunPlan(0, 10, 10),
    )
    return check(plan)


def objective_of(plan: Plan) -> WholeNetwork:
    torch.manual_seed(0)
    objective = build_objective(plan)
    assert isinstance(objective, WholeNetwork)
    # Marks and centres start at 0, where a wrong use of them would not be noticed.
    if objective.model.mark is not None:
        torch.nn.init.normal_(objective.model.mark)
    if objective.segment_map is not None:
        torch.nn.init.normal_(objective.segment_map.centres, std=0.5)
    return objective


def batch_of(plan: Plan, num_members: int = 1, num_padded: int = 0, prefix: int = 7) -> Batch:
    """Return two samples of noise, the last ``num_padded`` columns of each member padding."""
    generator = torch.Generator().manual_seed(1)
    size = plan.sequence.crop_size_vox
    num_tokens = num_members * volume(grid_of(size, plan.encoder.token_size_vox))

    voxels_BMCZYX = torch.randn(2, num_members, 1, *size, generator=generator)
    valid_mask_BMZYX = torch.ones(2, num_members, *size, dtype=torch.bool)
    if num_padded:
        valid_mask_BMZYX[..., -num_padded:] = False
        voxels_BMCZYX = voxels_BMCZYX * valid_mask_BMZYX[:, :, None]

    orders = [torch.randperm(num_tokens, generator=generator) for _ in range(2)]
    order_index_BT = torch.stack(orders)
    prefix_B = torch.tensor([prefix, prefix + 2])
    return Batch(voxels_BMCZYX, valid_mask_BMZYX, order_index_BT, prefix_B)


def outputs(objective: WholeNetwork, batch: Batch) -> Predictions:
    """Return what the network says of every voxel, from the batch as the loop hands it over."""
    objective.module.eval()
    with torch.no_grad():
        targets = objective._targets(batch)
        return objective._predict(batch, targets.known)


def predictions(objective: WholeNetwork, batch: Batch) -> Tensor:
    """Return the predicted intensities of every voxel, (B, T, P)."""
    return outputs(objective, batch).values
