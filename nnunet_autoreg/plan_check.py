"""Whether a plan can be carried out.

Every impossible or ill-posed value is refused here, with what to set instead.
"""

import math

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import (
    PRIMUS,
    PRIMUS_V2,
    PRIMUS_V3,
    check_argument_types,
    family_of,
    has_start,
    has_transformer,
    missing_arguments,
    smallest_block,
    token_size_of,
)
from nnunet_autoreg.geometry import multiplied, volume
from nnunet_autoreg.objective_kinds import builder_of, kind_of, objective_kinds
from nnunet_autoreg.plan import (
    ORDERS,
    PREDICTORS,
    PREFIXES,
    SHARDINGS,
    EncoderPlan,
    Plan,
    check_known,
    check_not_negative,
    check_positive,
)
from nnunet_autoreg.records import to_jsonable

MAX_ANGLE_DEG = 180.0
MAX_CROP_VOX = 2**14
"""Along one axis. Sizes of tensors would overflow with far larger crops."""


def check(plan: Plan) -> Plan:
    """Return ``plan`` if it can be carried out.

    Raises:
        PlanError: a value is impossible or ill-posed; the message says what to set instead.
    """
    check_names(plan)
    _check_encoder(plan.encoder)
    _check_numbers(plan)
    _check_blocks(plan)
    _check_convolutions(plan)
    builder_of(plan)
    kind_of(plan.objective.name).check(plan)
    _check_whole_network(plan)
    _check_kinds(plan)
    _check_prefix(plan)
    _check_variety(plan)
    _check_finite(to_jsonable(plan), "")
    return plan


def _check_finite(value: object, key: str) -> None:
    """Refuse NaN and infinity anywhere in the plan.

    JSON does not know them, but Python reads them.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_finite(inner, f"{key}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise PlanError(
            f"{key}={value} must be a finite number: with it every weight or loss would be NaN or "
            "infinite",
            code="plan-not-finite",
        )


def _check_variety(plan: Plan) -> None:
    """Refuse impossible rotations, zooms and corruptions."""
    s = plan.sequence
    shares = {
        "sequence.spatial_share": s.spatial_share,
        "objective.corruption": plan.objective.corruption,
    }
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise PlanError(
                f"{key}={share} must lie between 0 (never) and 1 (every training sample); use 0.2, "
                "as nnU-Net does",
                code="plan-out-of-range",
            )
    if not 0 <= s.max_rotation_deg <= MAX_ANGLE_DEG:
        raise PlanError(
            f"sequence.max_rotation_deg={s.max_rotation_deg} must lie between 0 and "
            f"{MAX_ANGLE_DEG:g}; use 30",
            code="plan-out-of-range",
        )
    smallest, largest = s.zoom
    if not 0 < smallest <= largest < float("inf"):
        raise PlanError(
            f"sequence.zoom={list(s.zoom)} must be two factors greater than 0, the smaller one "
            "first; use 0.7,1.4",
            code="plan-out-of-range",
        )
    if not 1 <= s.max_source < float("inf"):
        raise PlanError(
            f"sequence.max_source={s.max_source} must be at least 1: with less, a part of every "
            "rotated crop would be padding; use 1.6",
            code="plan-out-of-range",
        )


def check_names(plan: Plan) -> None:
    """Refuse unknown names, and an order that the predictor cannot learn.

    Raises:
        PlanError: the message says what to set instead.
    """
    s = plan.sequence
    named = {
        "sequence.order": (s.order, ORDERS),
        "sequence.predictor": (s.predictor, PREDICTORS),
        "sequence.prefix": (s.prefix, PREFIXES),
        "objective.name": (plan.objective.name, objective_kinds()),
        "run.sharding": (plan.run.sharding, SHARDINGS),
    }
    check_known(named)
    if s.order == "random" and s.predictor == "next":
        raise PlanError(
            "sequence.order=random with sequence.predictor=next is ill-posed: the position no "
            "longer determines which block follows; use sequence.predictor=query, or "
            "sequence.order=raster",
            code="plan-ill-posed",
        )


def _check_prefix(plan: Plan) -> None:
    """Refuse prefixes of all blocks, and of no blocks if no START token can predict the first."""
    s = plan.sequence
    if not 0 < s.prefix_share < 1:
        raise PlanError(
            f"sequence.prefix_share={s.prefix_share} must lie between 0 and 1: some blocks are "
            "given and some predicted",
            code="plan-out-of-range",
        )
    if s.prefix != "uniform_from_0":
        return

    # Only a START token can predict the first block from a prefix of no blocks.
    remedy = "use sequence.prefix=uniform"
    if not has_start(family_of(plan.encoder.class_path)):
        why = f"encoder {plan.encoder.name} has no START token that could predict the first block"
    elif s.predictor != "next" or volume(s.block_tokens) > 1:
        why = (
            f"START predicts one token by predictor next, and the plan has predictor {s.predictor} "
            f"and blocks of {volume(s.block_tokens)} tokens"
        )
        if s.predictor != "next":
            remedy += ", or sequence.predictor=next with sequence.order=raster"
    else:
        return
    raise PlanError(
        f"sequence.prefix=uniform_from_0: {why}; {remedy}",
        code="plan-start-token",
    )


def _check_encoder(encoder: EncoderPlan) -> None:
    """Refuse arguments that the network cannot be built with, and impossible sizes of tokens."""
    missing = missing_arguments(encoder.class_path, encoder.arguments)
    if missing:
        raise PlanError(
            f"encoder.arguments: {', '.join(missing)} missing; take those of an encoder in "
            "model/sizes.py",
            code="plan-missing-arguments",
        )
    check_argument_types(encoder.class_path, encoder.arguments, "encoder.arguments")
    stated = list(token_size_of(encoder.class_path, encoder.arguments))
    if stated != list(encoder.token_size_vox):
        raise PlanError(
            f"encoder.token_size_vox={list(encoder.token_size_vox)} has to equal {stated}, the "
            "token size that encoder.arguments state",
            code="plan-token-size",
        )

    # The downstream network has to turn tokens back into voxels. The decoder of Primus doubles the
    # grid step by step, along each axis as often as the token can be halved.
    family = family_of(encoder.class_path)
    are_powers_of_two = all(side >= 1 and not side & (side - 1) for side in stated)
    if family == PRIMUS and (max(stated) < 2 or not are_powers_of_two):
        raise PlanError(
            f"encoder.arguments.patch_embed_size={stated}: {encoder.name} doubles its grid until "
            "it has voxels, so each side has to be 1, 2, 4, 8 or 16, and not all 1; use e.g. 4,4,4 "
            "or 1,8,8, and encoder.token_size_vox likewise",
            code="plan-token-size",
        )
    if family in (PRIMUS_V2, PRIMUS_V3):
        halved = 2 ** len(encoder.arguments.get("depth_per_level", (1, 1, 1)))
        if stated != [halved] * 3:
            raise PlanError(
                f"encoder.arguments.patch_embed_size={stated}: the convolutions of {encoder.name} "
                f"make tokens of {halved}^3 voxels and no others; use --encoder primus_* for other "
                "tokens",
                code="plan-token-size",
            )


def _check_numbers(plan: Plan) -> None:
    """Refuse numbers outside their range."""
    o, run = plan.optim, plan.run
    optional = {
        "optim.micro_batch_size": o.micro_batch_size,
        "run.seconds_per_step": run.seconds_per_step,
        "run.peak_memory_gib": run.peak_memory_gib,
        "run.dry_step_seconds": run.dry_step_seconds,
        "run.loader_seconds_per_crop": run.loader_seconds_per_crop,
    }
    positive: dict[str, float] = {
        "optim.num_steps": o.num_steps,
        "optim.batch_size": o.batch_size,
        "optim.lr": o.lr,
        "optim.clip_norm": o.clip_norm,
        "run.checkpoint_every": run.checkpoint_every,
        "run.validate_every": run.validate_every,
        "run.log_every": run.log_every,
        "run.spike_sigmas": run.spike_sigmas,
        "run.max_bad_steps": run.max_bad_steps,
        **{f"sequence.block_tokens[{i}]": v for i, v in enumerate(plan.sequence.block_tokens)},
        **{f"encoder.token_size_vox[{i}]": v for i, v in enumerate(plan.encoder.token_size_vox)},
        **{f"data.spacing_mm[{i}]": v for i, v in enumerate(plan.data.spacing_mm)},
        **{key: value for key, value in optional.items() if value is not None},
    }
    for number, group in enumerate(plan.data.spacing_groups):
        for axis in range(3):
            key = f"data.spacing_groups[{number}]"
            positive[f"{key}.native_mm[{axis}]"] = group.native_mm[axis]
            positive[f"{key}.spacing_mm[{axis}]"] = group.spacing_mm[axis]
    check_positive(positive)

    not_negative = {
        "run.max_rollbacks": run.max_rollbacks,
        "run.max_collapsed": run.max_collapsed,
        "run.min_token_variance": run.min_token_variance,
        "run.min_effective_rank": run.min_effective_rank,
        "run.seed": run.seed,
        "data.min_scans": plan.data.min_scans,
        "optim.weight_decay": o.weight_decay,
        "optim.warmup_steps": o.warmup_steps,
    }
    check_not_negative(not_negative)
    shares = {
        "data.holdout_fraction": plan.data.holdout_fraction,
        "optim.betas[0]": o.betas[0],
        "optim.betas[1]": o.betas[1],
    }
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise PlanError(
                f"{key}={share} must lie in [0, 1)",
                code="plan-out-of-range",
            )


def _check_blocks(plan: Plan) -> None:
    """Refuse crops that cannot be cut into at least two whole blocks."""
    s = plan.sequence
    num_blocks = 1
    for axis, crop, token, block in zip(
        "zyx",
        s.crop_size_vox,
        plan.encoder.token_size_vox,
        s.block_tokens,
        strict=True,
    ):
        side = token * block
        if crop > MAX_CROP_VOX:
            raise PlanError(
                f"sequence.crop_size_vox: {crop} on axis {axis} is more than any scan has; use "
                f"{MAX_CROP_VOX // side * side} at most",
                code="plan-crop",
            )
        if crop <= 0 or crop % side:
            smaller = max(crop // side, 1) * side
            larger = (max(crop // side, 0) + 1) * side
            near = f"{smaller} or {larger}"
            raise PlanError(
                f"sequence.crop_size_vox: {crop} on axis {axis} is not a multiple of the block of "
                f"{side} voxels ({block} tokens of {token}); use {near}",
                code="plan-crop",
            )
        num_blocks *= crop // side
    if num_blocks < 2:
        raise PlanError(
            f"a crop of {s.crop_size_vox} voxels holds one block of {plan.encoder.name}; a "
            "sequence needs at least 2: enlarge sequence.crop_size_vox, or use an --encoder with "
            "smaller blocks, such as primus_tiny or resenc_tiny",
            code="plan-one-block",
        )


def _check_convolutions(plan: Plan) -> None:
    """Refuse blocks that norms cannot be taken over, and layers that move or mix blocks."""
    s = plan.sequence
    family = family_of(plan.encoder.class_path)
    least = smallest_block(family, plan.encoder.token_size_vox)
    if any(own < needed for own, needed in zip(s.block_tokens, least, strict=True)):
        side = list(multiplied(least, plan.encoder.token_size_vox))
        raise PlanError(
            f"sequence.block_tokens={list(s.block_tokens)}: {plan.encoder.name} convolves and "
            "normalises each block separately, which removes intensities in blocks of less than "
            f"{side} voxels; use at least {list(least)}",
            code="plan-small-blocks",
        )
    norm = plan.encoder.arguments.get("norm_op")
    if "BatchNorm" in str(norm):
        raise PlanError(
            f"encoder.arguments.norm_op={norm}: its statistics cover all blocks of a batch, so "
            "they would reveal the blocks to predict; use "
            "torch.nn.modules.instancenorm.InstanceNorm3d",
            code="plan-norm",
        )
    for kernel in plan.encoder.arguments.get("kernel_sizes", []):
        sides = kernel if isinstance(kernel, (list, tuple)) else [kernel]
        if any(side % 2 == 0 for side in sides):
            raise PlanError(
                f"encoder.arguments.kernel_sizes: {kernel} has an even side, which moves features "
                "between voxels; use odd ones",
                code="plan-kernels",
            )


def _check_whole_network(plan: Plan) -> None:
    """Refuse values that the predictor "network" cannot use, and other predictors for a CNN."""
    s, name = plan.sequence, plan.encoder.name
    is_cnn = not has_transformer(family_of(plan.encoder.class_path))
    if is_cnn != (s.predictor == "network"):
        fitting = "network" if is_cnn else "query or next"
        raise PlanError(
            f"sequence.predictor={s.predictor}: {name} needs {fitting}; leave the predictor to the "
            "planner",
            code="plan-predictor",
        )
    if not is_cnn:
        return

    if s.order != "random":
        raise PlanError(
            f"sequence.order={s.order}: a CNN predicts all unknown blocks at once, which has no "
            "other order than random; use sequence.order=random",
            code="plan-cnn-order",
        )
    if s.weights.get("strided", 0) > 0:
        raise PlanError(
            "sequence.weights.strided: overlapping sub-volumes would show a CNN the voxels that it "
            "has to predict; leave strided out of --sequences",
            code="plan-cnn-strided",
        )


def _check_kinds(plan: Plan) -> None:
    """Refuse unknown kinds of sequences, and kinds that cannot be drawn."""
    s = plan.sequence
    known = kind_of(plan.objective.name).sequence_kinds
    for kind in s.weights:
        if kind not in known:
            raise PlanError(
                f"sequence.weights: there are no '{kind}' sequences for --objective "
                f"{plan.objective.name}; {did_you_mean(kind, known)}",
                code="plan-unknown-kind",
            )
    check_not_negative({f"sequence.weights.{kind}": weight for kind, weight in s.weights.items()})
    wanted = {kind for kind, weight in s.weights.items() if weight > 0}
    if not wanted:
        raise PlanError(
            f"sequence.weights={s.weights} draws nothing; give a kind of sequence a weight greater "
            "than 0",
            code="plan-no-kinds",
        )

    if "strided" in wanted:
        _check_strided(plan)
    for kind, members in (("contrast", s.contrast_members), ("semantic", s.semantic_members)):
        if kind in wanted:
            _check_members(plan, kind, members)
    if "contrast" in wanted and s.predictor == "next" and len(s.contrasts) != s.contrast_members:
        raise PlanError(
            f"sequence.contrast_members={s.contrast_members} of {len(s.contrasts)} "
            "sequence.contrasts with sequence.predictor=next is ill-posed: nothing says which "
            "contrast follows; name exactly as many contrasts, or use sequence.predictor=query",
            code="plan-ill-posed",
        )


def _check_strided(plan: Plan) -> None:
    """Refuse crops that cannot be cut into overlapping sub-volumes of whole blocks along z."""
    s = plan.sequence
    crop = s.crop_size_vox[0]
    side = plan.encoder.token_size_vox[0] * s.block_tokens[0]
    if s.num_subvolumes < 1 or crop % (s.num_subvolumes * side):
        raise PlanError(
            f"sequence.crop_size_vox: {crop} on axis z cannot be cut into "
            f"sequence.num_subvolumes={s.num_subvolumes} of whole blocks of {side}; use a multiple "
            f"of {max(s.num_subvolumes, 1) * side}, or another number",
            code="plan-strided",
        )
    depth = crop // s.num_subvolumes
    if not 1 <= s.stride_vox <= depth:
        raise PlanError(
            f"sequence.stride_vox={s.stride_vox} must lie between 1 and the sub-volume's depth of "
            f"{depth} (no overlap)",
            code="plan-strided",
        )


def _check_members(plan: Plan, kind: str, members: int) -> None:
    """Refuse impossible numbers and crops of the images of one sequence."""
    s = plan.sequence
    if members < 2:
        raise PlanError(
            f"sequence.{kind}_members={members}: a {kind} sequence has at least 2 images",
            code="plan-members",
        )
    if s.member_crop_vox is None:
        return
    for axis, member, crop, token, block in zip(
        "zyx",
        s.member_crop_vox,
        s.crop_size_vox,
        plan.encoder.token_size_vox,
        s.block_tokens,
        strict=True,
    ):
        if member % (token * block) or not 0 < member <= crop:
            raise PlanError(
                f"sequence.member_crop_vox: {member} on axis {axis} has to be a multiple of "
                f"{token * block}, at most {crop}",
                code="plan-members",
            )
