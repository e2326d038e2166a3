"""The rules: numbers about the data and the hardware in, plan values with their reasons out. Pure, and torch-free."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nnunet_autoreg.corpus.fingerprint import Fingerprint, GroupPrint
from nnunet_autoreg.families import is_convolutional, smallest_block
from nnunet_autoreg.geometry import Size, Spacing, as_size, round_up, volume
from nnunet_autoreg.model.sizes import EncoderSize, encoder_size
from nnunet_autoreg.model.topology import suited_to
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    IntensityWindow,
    ObjectivePlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
    SpacingGroup,
)
from nnunet_autoreg.presets import BY_PRESET

START_VOX = 256**3
MAX_PRETRAIN_VOX = 128**3
MIN_BLOCKS = 8
"""A sequence of fewer blocks teaches little: each is mostly context, and few are predicted."""
SMALL_IMAGE_TOKENS = 512
POOL_TOKENS = (("primus_s", 250_000), ("primus_b", 1_500_000))
"""A pool of fewer tokens takes at most this encoder: some hundred parameters a token. A rule of thumb, not measured."""
NUM_PASSES, MIN_STEPS, MAX_STEPS = 300, 1000, 100_000
BATCH_GPU, BATCH_ELSEWHERE = 32, 8
USABLE_GPU, USABLE_ELSEWHERE = 0.8, 0.5
TRAINING_SHARE = 0.95
MOSTLY_PADDING = 0.25
BY_USER = "set by the user"

MemoryOf = Callable[[EncoderSize, Size, bool], tuple[float, float]]
"""(encoder, crop, activations checkpointed) -> fixed bytes and bytes per crop of a training step."""


def plan_crop(
    median_shape_vox: Sequence[float], spacing_mm: Sequence[float], token_vox: Sequence[int], max_vox: int, round_to_nearest: bool = False
) -> Size:
    """The crop (pretraining) or patch (fine-tuning) that suits images of a median shape.

    As nnU-Net plans patches: start from a box that is isotropic in mm and larger than needed, clip it to the median shape,
    round up to whole tokens, then shrink the axis that is largest relative to the median shape until it fits.

    Args:
        median_shape_vox: median image size after resampling, (z, y, x).
        spacing_mm: target spacing, (z, y, x).
        token_vox: token or block; every axis of the result is a multiple of it.
        max_vox: largest number of voxels allowed.
        round_to_nearest: round to the nearest multiple rather than up, at least one: large blocks would be padding mostly.
    """
    resolution = [1 / s for s in spacing_mm]
    scale = (START_VOX / (resolution[0] * resolution[1] * resolution[2])) ** (1 / 3)
    start = [max(1, min(round(r * scale), round(m))) for r, m in zip(resolution, median_shape_vox, strict=True)]
    nearest = [max(1, math.floor(s / t + 0.5)) * t for s, t in zip(start, token_vox, strict=True)]
    crop = nearest if round_to_nearest else list(round_up(start, token_vox))
    while volume(crop) > max_vox:
        shrinkable = [i for i in range(3) if crop[i] > token_vox[i]]
        if not shrinkable:
            break
        largest = max(shrinkable, key=lambda i: crop[i] / median_shape_vox[i])
        crop[largest] -= token_vox[largest]
    return as_size(crop)


@dataclass(frozen=True)
class Hardware:
    """What the run has: ``device`` is cpu, cuda or mps; ``memory_gib`` of the GPU, or of the machine without one."""

    device: str
    memory_gib: float

    @property
    def usable_bytes(self) -> float:
        """What a training step may take: 80 % of a GPU, half of a machine that others use too."""
        return (USABLE_GPU if self.device == "cuda" else USABLE_ELSEWHERE) * self.memory_gib * 2**30


@dataclass(frozen=True)
class Pool:
    """What planning needs to know of the scans: how many, their median shape and all their voxels after resampling, the CT
    window if CT is among them, and the groups by target spacing, of which the largest has ``spacing_mm``."""

    num_scans: int
    spacing_mm: Spacing
    median_shape_vox: Size
    total_vox: int
    ct_window: IntensityWindow | None
    groups: tuple[GroupPrint, ...] = ()


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None is planned. At most one of ``num_steps``, ``num_epochs`` and ``num_hours``.

    Attributes:
        single_tokens: the planned encoder has to go token by token, which a CNN cannot (``--preset faithful``).
    """

    encoder: str = "auto"
    batch_size: int | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    num_hours: float | None = None
    single_tokens: bool = False


def pool_of(fingerprint: Fingerprint) -> Pool:
    """The part of a fingerprint that decides the plan."""
    f = fingerprint
    return Pool(f.num_scans, f.spacing_mm, f.median_shape_vox, f.total_vox, f.ct_window, f.groups)


def choose_encoder(name: str, hardware: Hardware, pool: Pool, single_tokens: bool = False) -> tuple[str, str]:
    """Encoder name and the reason for it; ``auto`` goes by device, image size and GPU memory, and takes no CNN for ``single_tokens``.

    Of the two tiny ones the CNN is far ahead in short trainings (docs/measured.md, "Encoders"); the large ones have not been compared.
    """
    if name != "auto":
        return encoder_size(name).name, BY_USER
    tokens = volume(pool.median_shape_vox) / volume(encoder_size("resenc_tiny").token_size)
    if hardware.device != "cuda":
        return _tiny_encoder(f"device {hardware.device}: larger encoders need a GPU", pool, single_tokens)
    if tokens < SMALL_IMAGE_TOKENS:
        return _tiny_encoder(f"the median scan holds {tokens:.0f} tokens, fewer than {SMALL_IMAGE_TOKENS}", pool, single_tokens)
    for limit_gib, size in ((10, "primus_s"), (20, "primus_b")):
        if hardware.memory_gib < limit_gib:
            return size, f"{hardware.memory_gib:.0f} GiB of GPU memory, under {limit_gib}"
    return "primus_m", f"{hardware.memory_gib:.0f} GiB of GPU memory"


def _tiny_encoder(reason: str, pool: Pool, single_tokens: bool) -> tuple[str, str]:
    """The CNN, or the transformer where scans are too small or too flat for a sequence of the CNN's blocks."""
    if single_tokens:
        return "primus_tiny", f"{reason}; and the preset goes token by token, which a CNN cannot"
    cnn = suited_to(encoder_size("resenc_tiny"), pool.spacing_mm)
    side = _side(cnn, smallest_block(cnn.family, cnn.token_size))
    crop = [max(1, round(m / b)) * b for m, b in zip(pool.median_shape_vox, side, strict=True)]
    if volume(crop) < MIN_BLOCKS * volume(side):
        return "primus_tiny", f"{reason}; and fewer than {MIN_BLOCKS} blocks of {_times(side)} voxels, which a CNN needs"
    if _real_share(crop, pool) < MOSTLY_PADDING:
        return "primus_tiny", f"{reason}; and blocks of {_times(side)} voxels, which a CNN needs, would be mostly padding"
    return cnn.name, reason


def limit_by_pool(name: str, reason: str, pool: Pool) -> tuple[str, str]:
    """A smaller encoder, and why, where the pool holds few tokens for the one chosen by memory."""
    tokens = pool.total_vox / volume(encoder_size(name).token_size)
    sizes = ("primus_s", "primus_b", "primus_m")
    for size, limit in POOL_TOKENS:
        if name in sizes and tokens < limit and sizes.index(name) > sizes.index(size):
            return size, f"the pool holds {_count(tokens)} tokens, fewer than {_count(limit)}; the memory would allow {name}"
    return name, f"{reason}; the pool holds {_count(tokens)} tokens"


def choose_order(encoder: EncoderSize) -> tuple[str, str, str]:
    """Order of the blocks, predictor, and the reason (docs/measured.md)."""
    if encoder.trunk is None:
        return "random", "query", "a transformer started better from it than from raster order"
    return "raster", "next", "a CNN learnt more from it than from random order"


@dataclass(frozen=True)
class Layout:
    """A crop in voxels and its blocks in tokens, both (z, y, x), each with its reason."""

    crop: Size
    block_tokens: Size
    why_crop: str
    why_block: str


def choose_layout(encoder: EncoderSize, hardware: Hardware, pool: Pool, memory_of: MemoryOf) -> Layout:
    """The largest crop that suits the median scan and of which one fits into the memory, in blocks that suit the encoder.

    A linear tokenizer takes whole tokens, rounded up, and blocks of one. Convolutions take larger blocks, and crops to the nearest
    whole block; where that makes fewer than 8 blocks, the smallest blocks that their norms allow, and at last crops rounded up.
    """
    if not is_convolutional(encoder.family):
        crop, why = choose_crop(encoder, encoder.block_tokens, False, hardware, pool, memory_of)
        return Layout(crop, encoder.block_tokens, why, "linear tokens: one of them is a block")
    smallest = smallest_block(encoder.family, encoder.token_size)
    ways = ((_fitting_block(encoder, smallest, pool), True), (smallest, True), (smallest, False))
    for block, nearest in ways:
        crop, why = choose_crop(encoder, block, nearest, hardware, pool, memory_of)
        side = _side(encoder, block)
        count = volume(crop) // volume(side)
        if count >= MIN_BLOCKS:
            break
    real = _real_share(crop, pool)
    too_few = "" if count >= MIN_BLOCKS else f", FEWER than the {MIN_BLOCKS} of a good sequence: an encoder of smaller blocks suits better"
    padded = "" if real >= MOSTLY_PADDING else f", only {100 * real:.0f} % of them not padding"
    why_block = (
        f"{_times(side)} voxels, on each of which the convolutions run separately (at least {_times(_side(encoder, smallest))}, for "
        f"their norms): blocks in a crop: {count}{too_few}{padded}"
    )
    return Layout(crop, block, why, why_block)


def choose_crop(
    encoder: EncoderSize, block_tokens: Size, round_to_nearest: bool, hardware: Hardware, pool: Pool, memory_of: MemoryOf
) -> tuple[Size, str]:
    """The largest crop of whole blocks that suits the median scan and of which one fits into the memory, if need be with activations
    checkpointed, and the reason."""
    limit, side = min(encoder.max_crop_vox, MAX_PRETRAIN_VOX), _side(encoder, block_tokens)
    max_vox = limit
    while True:
        crop = plan_crop(pool.median_shape_vox, pool.spacing_mm, side, max_vox, round_to_nearest)
        fits = any(sum(memory_of(encoder, crop, recompute)) <= hardware.usable_bytes for recompute in (False, True))
        if fits or volume(crop) <= 2 * volume(side):
            break
        max_vox = volume(crop) - 1
    extent = [size * spacing for size, spacing in zip(crop, pool.spacing_mm, strict=True)]
    tokens = volume(crop) // volume(encoder.token_size)
    unit = "tokens" if volume(block_tokens) == 1 else "blocks"
    cause = f"at most {limit} voxels" if max_vox == limit else f"as large as {hardware.memory_gib:.4g} GiB allow"
    return crop, f"median scan of {_times(pool.median_shape_vox)} voxels in whole {unit}, {cause}: {_times(extent)} mm, {tokens} tokens"


def _fitting_block(encoder: EncoderSize, smallest: Size, pool: Pool) -> Size:
    """The encoder's usual block, but the smallest along axes that do not fill half of it, or whose tokens are short."""
    usual = zip(encoder.block_tokens, smallest, encoder.token_size, pool.median_shape_vox, strict=True)
    return as_size([max(block, least) if median >= block * token / 2 else least for block, least, token, median in usual])


def _side(encoder: EncoderSize, block_tokens: Size) -> Size:
    return as_size([t * b for t, b in zip(encoder.token_size, block_tokens, strict=True)])


def _real_share(crop: Sequence[int], pool: Pool) -> float:
    """The share of a crop that the median scan fills."""
    return volume([min(c, m) for c, m in zip(crop, pool.median_shape_vox, strict=True)]) / volume(crop)


def choose_batch(hardware: Hardware) -> tuple[int, str]:
    """Crops per optimiser step and the reason; the same for every GPU, so that its memory does not change the result."""
    if hardware.device != "cuda":
        return BATCH_ELSEWHERE, f"device {hardware.device}: small steps"
    return BATCH_GPU, "the same on every GPU; what does not fit at once is accumulated"


def choose_checkpointing(encoder: EncoderSize, crop: Size, hardware: Hardware, memory_of: MemoryOf) -> tuple[bool, str]:
    """Whether activations have to be checkpointed so that one crop fits, and the reason; "" where they need not."""
    without = sum(memory_of(encoder, crop, False))
    if without <= hardware.usable_bytes:
        return False, ""
    with_it = sum(memory_of(encoder, crop, True))
    if with_it >= without:
        return False, ""
    return True, (f"one crop takes about {with_it / 2**30:.1f} GiB with it and {without / 2**30:.1f} without, more than the "
                  f"{hardware.usable_bytes / 2**30:.1f} that may be used; a step takes about a third longer")


def choose_micro_batch(batch_size: int, hardware: Hardware, fixed_bytes: float, bytes_per_crop: float) -> tuple[int, str]:
    """Crops on the device at once and the reason: as many as fit, in equal parts of the batch.

    Args:
        fixed_bytes, bytes_per_crop: estimated training memory of the encoder at the planned crop.
    """
    room = (hardware.usable_bytes - fixed_bytes) // bytes_per_crop if bytes_per_crop else batch_size
    parts = math.ceil(batch_size / min(max(room, 1), batch_size))
    micro = math.ceil(batch_size / parts)
    needed = (fixed_bytes + micro * bytes_per_crop) / 2**30
    share = USABLE_GPU if hardware.device == "cuda" else USABLE_ELSEWHERE
    usable = f"{100 * share:.0f} % of {hardware.memory_gib:.4g} GiB"
    if room < 1:
        return micro, f"about {needed:.1f} GiB, MORE than {usable}: even one crop does not fit"
    parts_text = "all at once" if parts == 1 else f"{parts} times a step"
    return micro, f"{parts_text}; about {needed:.1f} GiB ({bytes_per_crop / 2**30:.2f} a crop), within {usable}"


def choose_rate(encoder: EncoderSize, batch_size: int) -> tuple[float, str]:
    """Peak rate and the reason: the encoder's usual one at its usual batch, times the root of the ratio of batches.

    Source: the square-root rule for adaptive optimisers - Malladi et al. 2022, arXiv 2205.10287.
    """
    usual = BATCH_ELSEWHERE if encoder.is_tiny else BATCH_GPU
    rate = float(f"{encoder.pretrain_rate * math.sqrt(batch_size / usual):.3g}")
    return rate, f"the usual {encoder.pretrain_rate:g} of {encoder.name} at batch {usual}, times the root of {batch_size}/{usual}"


def choose_length(pool: Pool, step_vox: int, num_epochs: float | None = None) -> tuple[int, str]:
    """Steps and the reason: epochs over the pool's tokens - those asked for, else 300 within bounds.

    Args:
        step_vox: real voxels that a step sees.
    """
    per_epoch = max(1.0, pool.total_vox / step_vox)
    if num_epochs is not None:
        return max(1, round(num_epochs * per_epoch)), f"{num_epochs:g} epochs over {_count(pool.total_vox)} voxels, {BY_USER}"
    steps = round(min(max(NUM_PASSES * per_epoch, MIN_STEPS), MAX_STEPS))
    epochs = f"{steps / per_epoch:.0f} epochs over {_count(pool.total_vox)} voxels"
    return steps, f"{epochs}: {NUM_PASSES}, but within {MIN_STEPS} to {MAX_STEPS} steps"


def plan_data(pool: Pool, crop: Size) -> tuple[DataPlan, dict[str, str]]:
    """Target spacings and the reasons; groups are written where their targets differ."""
    if len({group.spacing_mm for group in pool.groups}) < 2:
        reasons = [f"{group.reason}{f' ({group.modality})' if group.modality else ''}" for group in pool.groups]
        reason = " and ".join(reasons) or f"median of {pool.num_scans} scans"
        return DataPlan(pool.spacing_mm, pool.ct_window), {"data.spacing_mm": f"{reason}, coarsest axis first"}
    groups = tuple(SpacingGroup(g.modality, g.native_mm, g.spacing_mm) for g in pool.groups)
    told = "; ".join(f"{g.num_scans} {g.modality} to {_times(g.spacing_mm)} mm ({g.reason}){_padding(crop, g)}" for g in pool.groups)
    return DataPlan(pool.spacing_mm, pool.ct_window, spacing_groups=groups), {
        "data.spacing_mm": f"that of the largest of {len(groups)} groups ({pool.groups[0].modality}, {pool.groups[0].reason})",
        "data.spacing_groups": f"spacings within about a factor of 2 share a target: {told}",
    }


def make_plan(
    name: str, pool: Pool, hardware: Hardware, wishes: Wishes, seed: int, request: dict[str, Any], memory_of: MemoryOf
) -> Plan:
    """The plan that fits these scans and this hardware."""
    chosen, why_encoder = choose_encoder(wishes.encoder, hardware, pool, wishes.single_tokens)
    if why_encoder != BY_USER:
        chosen, why_encoder = limit_by_pool(chosen, why_encoder, pool)
    encoder = suited_to(encoder_size(chosen), pool.spacing_mm)
    memory_of = _remembered(memory_of)
    layout = choose_layout(encoder, hardware, pool, memory_of)
    crop = layout.crop
    order, predictor, why_order = choose_order(encoder)
    batch, why_batch = choose_batch(hardware) if wishes.batch_size is None else (wishes.batch_size, BY_USER)
    recompute, why_recompute = choose_checkpointing(encoder, crop, hardware, memory_of)
    micro, why_micro = choose_micro_batch(batch, hardware, *memory_of(encoder, crop, recompute))
    rate, why_rate = choose_rate(encoder, batch)
    real_vox = volume([min(c, m) for c, m in zip(crop, pool.median_shape_vox, strict=True)])
    planned = choose_length(pool, real_vox * batch, wishes.num_epochs)
    steps, why_steps = planned if wishes.num_steps is None else (wishes.num_steps, BY_USER)
    if wishes.num_hours is not None:
        why_steps = f"stands in until a step has been measured, before the first; then what {wishes.num_hours:g} h allow"
    data, why_data = plan_data(pool, crop)
    plan = Plan(
        name=name,
        data=data,
        encoder=EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
        sequence=SequencePlan(crop, layout.block_tokens, order, predictor),
        objective=ObjectivePlan(trunk=encoder.trunk),
        optim=OptimPlan(steps, batch, rate, warmup_steps=1, micro_batch_size=micro, checkpoint_activations=recompute),
        run=RunPlan(seed, checkpoint_every=1, validate_every=1),
        request=request,
        reasons={
            **why_data,
            "encoder.name": why_encoder,
            **({} if encoder.trunk is None else {"encoder.token_size_vox": "total stride; as nnU-Net plans strides by spacing"}),
            "sequence.crop_size_vox": layout.why_crop,
            "sequence.block_tokens": layout.why_block,
            "sequence.order": why_order,
            "optim.batch_size": why_batch,
            "optim.micro_batch_size": why_micro,
            **({"optim.checkpoint_activations": why_recompute} if recompute else {}),
            "optim.lr": why_rate,
        },
    )
    return with_length(plan, steps, why_steps)


def _remembered(memory_of: MemoryOf) -> MemoryOf:
    """The same, asked once of every combination: a count of a large encoder takes seconds."""
    known: dict[tuple[str, Size, bool], tuple[float, float]] = {}

    def remembered(encoder: EncoderSize, crop: Size, recompute: bool) -> tuple[float, float]:
        key = encoder.name, crop, recompute
        if key not in known:
            known[key] = memory_of(encoder, crop, recompute)
        return known[key]

    return remembered


def with_length(plan: Plan, num_steps: int, reason: str) -> Plan:
    """``plan`` with this many steps and all that follows from them, but for what the user set."""
    every = min(num_steps, max(25, min(1000, num_steps // 20)))

    def derived(key: str, planned: int, current: int) -> int:
        return current if plan.reasons.get(key) in (BY_USER, BY_PRESET) else planned

    why_warmup = plan.reasons.get("optim.warmup_steps", "5 % of the steps")
    warmup = derived("optim.warmup_steps", max(1, num_steps // 20), plan.optim.warmup_steps)
    checkpoint = derived("run.checkpoint_every", every, plan.run.checkpoint_every)
    validate = derived("run.validate_every", every, plan.run.validate_every)
    return replace(
        plan,
        optim=replace(plan.optim, num_steps=num_steps, warmup_steps=warmup),
        run=replace(plan.run, checkpoint_every=checkpoint, validate_every=validate),
        reasons={**plan.reasons, "optim.num_steps": reason, "optim.warmup_steps": why_warmup},
    )


def with_hours(plan: Plan, hours: float, seconds_per_step: float, device: str) -> Plan:
    """``plan`` with as many steps as ``hours`` allow at the measured pace; 5 % are left for held-out errors and checkpoints."""
    steps = max(1, int(TRAINING_SHARE * hours * 3600 / seconds_per_step))
    pace = f"{seconds_per_step:.3g} s a step measured on {device}"
    timed = replace(plan, run=replace(plan.run, seconds_per_step=seconds_per_step))
    return with_length(timed, steps, f"{100 * TRAINING_SHARE:.0f} % of {hours:g} h at {pace}")


def _padding(crop: Size, group: GroupPrint) -> str:
    real = volume([min(c, m) for c, m in zip(crop, group.median_shape_vox, strict=True)]) / volume(crop)
    if real >= MOSTLY_PADDING:
        return ""
    return f", of whose crops only {100 * real:.0f} % is not padding: give these scans a run of their own if they matter"


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"
