"""The encoders by name, as numbers: torch-free, so that planning and ``--help`` stay light.

Source: Primus sizes S, B, M, L - Wald et al. 2025, arXiv 2503.01835, as in dynamic_network_architectures'
``_PRIMUS_CONFIGS``; LayerScale 0.1 and inner attention norm as in nnU-Net's Primus trainers. ``tiny`` is ours.
"""

from dataclasses import dataclass
from typing import Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.geometry import Size

PRIMUS = "dynamic_network_architectures.architectures.primus.Primus"


@dataclass(frozen=True)
class EncoderSize:
    """What a plan needs to know of an encoder.

    Attributes:
        class_path: the network class that fine-tuning builds.
        arguments: its constructor's arguments, without channels, classes and input shape.
        token_size: voxels (z, y, x) of one token; crops and patches are multiples of it.
        max_crop_vox: largest useful number of voxels of a crop or patch.
        scratch_rate, pretrained_rate: peak learning rates of fine-tuning (finetuning recipe, AdamW).
        pretrain_rate: peak learning rate of pretraining at the reference batch.
    """

    name: str
    class_path: str
    arguments: dict[str, Any]
    token_size: Size
    max_crop_vox: int
    scratch_rate: float
    pretrained_rate: float
    pretrain_rate: float

    @property
    def is_tiny(self) -> bool:
        """Whether this size is meant for CPUs and very small images."""
        return self.name.endswith("_tiny")


def _primus(name: str, width: int, depth: int, heads: int) -> EncoderSize:
    tiny = name.endswith("_tiny")
    arguments = {
        "embed_dim": width,
        "patch_embed_size": [8, 8, 8],
        "eva_depth": depth,
        "eva_numheads": heads,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }
    return EncoderSize(
        name=name,
        class_path=PRIMUS,
        arguments=arguments,
        token_size=(8, 8, 8),
        max_crop_vox=64**3 if tiny else 160**3,
        scratch_rate=1e-3 if tiny else 3e-4,
        pretrained_rate=1e-3 if tiny else 1e-4,
        pretrain_rate=1e-3 if tiny else 3e-4,
    )


ENCODERS: dict[str, EncoderSize] = {
    size.name: size
    for size in (
        _primus("primus_tiny", 264, 6, 4),
        _primus("primus_s", 396, 12, 6),
        _primus("primus_b", 792, 12, 12),
        _primus("primus_m", 864, 16, 12),
        _primus("primus_l", 1056, 24, 16),
    )
}


def encoder_size(name: str) -> EncoderSize:
    """Look an encoder up by name.

    Raises:
        PlanError: there is none of that name.
    """
    if name not in ENCODERS:
        raise PlanError(f"there is no encoder '{name}'; {did_you_mean(name, ENCODERS)}")
    return ENCODERS[name]
