"""Choose the encoder for the scans and the hardware, and the order of its blocks."""

from nnunet_autoreg.families import has_transformer, smallest_block
from nnunet_autoreg.geometry import volume
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size, suited_to
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE, ObjectivePlan
from nnunet_autoreg.planning.layout import MIN_BLOCKS, side_of
from nnunet_autoreg.planning.pool import (
    BY_USER,
    MOSTLY_PADDING,
    Hardware,
    Pool,
    count_of,
    dimensions,
    unpadded_share,
)
from nnunet_autoreg.planning.tokens import SMALL_IMAGE_TOKENS, USUAL_SIDE

STOCK_PLANNERS = {"resenc_l": "nnUNetPlannerResEncL", "resenc_m": "nnUNetPlannerResEncM"}
"""The encoders of GPUs, largest first, and nnU-Net's planners of the same networks."""
ROUNDED_SIZE = 0.9
"""GPUs that are sold as 24 GB report 22 to 24 GiB."""
TOKEN_BY_TOKEN = "the preset goes token by token, which a CNN cannot"
POOL_TOKENS = (("primus_s", 250_000), ("primus_b", 1_500_000))
"""A pool of fewer tokens takes at most this encoder: some hundred parameters a token.

A rule of thumb, not measured.
"""


def choose_encoder(
    name: str,
    hardware: Hardware,
    pool: Pool,
    single_tokens: bool = False,
) -> tuple[str, str]:
    """Return an encoder's name and the reason for it.

    ``auto`` decides by device, image size and GPU memory, and excludes CNNs for ``single_tokens``.
    Of the two tiny ones the CNN was far better in short trainings
    (docs/explanation/measured_segmentation.md). The large ones have not been compared; until then
    the default is nnU-Net's own network.
    """
    if name != "auto":
        return encoder_size(name).name, BY_USER

    if hardware.device != "cuda":
        reason = f"device {hardware.device}: larger encoders need a GPU"
        return _tiny_encoder(reason, pool, single_tokens)

    num_tokens = volume(pool.median_shape_vox) / USUAL_SIDE**3
    if num_tokens < SMALL_IMAGE_TOKENS:
        reason = f"the median scan holds {num_tokens:.0f} tokens, fewer than {SMALL_IMAGE_TOKENS}"
        return _tiny_encoder(reason, pool, single_tokens)

    if single_tokens:
        size, reason = _primus_by_memory(hardware)
        return size, f"{reason}; and {TOKEN_BY_TOKEN}"

    memory = f"{hardware.memory_gib:.0f} GiB of GPU memory"
    for size, planner in STOCK_PLANNERS.items():
        cnn = suited_to(encoder_size(size), pool.spacing_mm)
        assert cnn.patch_gib is not None
        if hardware.memory_gib < ROUNDED_SIZE * cnn.patch_gib:
            continue

        doubt = _doubt(cnn, pool)
        if doubt:
            transformer, reason = _primus_by_memory(hardware)
            return transformer, f"{reason}; and {doubt}"
        return size, (
            f"{memory}: the network of {planner}, which without pretraining is its rival; until "
            "measurements favour another"
        )
    return _tiny_encoder(f"{memory}, too little for larger encoders", pool, single_tokens)


def _primus_by_memory(hardware: Hardware) -> tuple[str, str]:
    """Return the transformer for a GPU's memory, and the reason."""
    memory = f"{hardware.memory_gib:.0f} GiB of GPU memory"
    for limit_gib, size in ((10, "primus_s"), (20, "primus_b")):
        if hardware.memory_gib < limit_gib:
            return size, f"{memory}, under {limit_gib}"
    return "primus_m", memory


def _doubt(cnn: EncoderSize, pool: Pool) -> str:
    """Return why the blocks of a CNN do not suit the scans; "" if they do."""
    # A crop about as large as the scan, of whole blocks of the smallest size that the norms allow.
    side = side_of(cnn, smallest_block(cnn.family, cnn.token_size))
    crop = []
    for scan_vox, block_vox in zip(pool.median_shape_vox, side, strict=True):
        num_blocks = max(1, round(scan_vox / block_vox))
        crop.append(num_blocks * block_vox)

    blocks = f"blocks of {dimensions(side)} voxels, which a CNN needs"
    if volume(crop) < MIN_BLOCKS * volume(side):
        return f"fewer than {MIN_BLOCKS} {blocks}"
    if unpadded_share(crop, pool.median_shape_vox) < MOSTLY_PADDING:
        return f"{blocks}, would be mostly padding"
    return ""


def _tiny_encoder(reason: str, pool: Pool, single_tokens: bool) -> tuple[str, str]:
    """Return the tiny CNN, or the tiny transformer if the CNN's blocks do not suit the scans.

    They do not if scans are too small or too flat for a sequence of them.
    """
    if single_tokens:
        return "primus_tiny", f"{reason}; and {TOKEN_BY_TOKEN}"

    cnn = suited_to(encoder_size("resenc_tiny"), pool.spacing_mm)
    doubt = _doubt(cnn, pool)
    if doubt:
        return "primus_tiny", f"{reason}; and {doubt}"
    return cnn.name, reason


def limit_by_pool(name: str, reason: str, pool: Pool) -> tuple[str, str]:
    """Return a smaller encoder, and why, if the pool has few tokens.

    The given encoder was chosen by memory.
    """
    # A large encoder would learn a small pool by heart.
    num_tokens = pool.total_vox / volume(encoder_size(name).token_size)
    held = f"the pool holds {count_of(num_tokens)} tokens"
    sizes = ("primus_s", "primus_b", "primus_m")

    for smaller, limit in POOL_TOKENS:
        is_larger = name in sizes and sizes.index(name) > sizes.index(smaller)
        if is_larger and num_tokens < limit:
            reason = f"{held}, fewer than {count_of(limit)}; the memory would allow {name}"
            return smaller, reason
    return name, f"{reason}; {held}"


def choose_order(encoder: EncoderSize) -> tuple[str, str, str]:
    """Return order of the blocks, predictor, and the reason.

    Source: docs/explanation/measured_segmentation.md.
    """
    if has_transformer(encoder.family):
        return "random", "query", "a transformer started better from it than from raster order"
    return (
        "random",
        "network",
        "the whole U-Net predicts unknown blocks from known ones, in any order",
    )


def choose_objective(encoder: EncoderSize) -> tuple[ObjectivePlan, dict[str, str]]:
    """Return the values of the default objective for an encoder, and the reasons.

    ``objective_kinds.with_objective`` plans another one afterwards.
    """
    return kind_of(DEFAULT_OBJECTIVE).settings(encoder.encoder_plan())
