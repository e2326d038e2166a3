"""The length of a training, and the values that depend on it."""

from dataclasses import replace

from nnunet_autoreg.objective_kinds import presets
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.pool import BY_USER, Pool, count_of

NUM_PASSES, MIN_STEPS, MAX_STEPS = 300, 1000, 100_000
TRAINING_SHARE = 0.95
COMPILE_FROM_STEPS, COMPILE_FROM_HOURS = 500, 0.25
"""Compiling the layers takes about half a minute for every kind of sequence, which is not worth it
in a shorter run.
"""


def choose_length(pool: Pool, step_vox: int, num_epochs: float | None = None) -> tuple[int, str]:
    """Return the number of steps and the reason.

    It follows from the number of epochs over the pool's tokens: the requested one, else 300 within
    bounds.

    Args:
        step_vox: valid voxels that a step sees.
    """
    # A step may see more voxels than a small pool holds.
    steps_per_epoch = max(1.0, pool.total_vox / step_vox)
    voxels = f"{count_of(pool.total_vox)} voxels"

    if num_epochs is not None:
        steps = max(1, round(num_epochs * steps_per_epoch))
        return steps, f"{num_epochs:g} epochs over {voxels}, {BY_USER}"

    usual = NUM_PASSES * steps_per_epoch
    steps = round(min(max(usual, MIN_STEPS), MAX_STEPS))
    planned_epochs = steps / steps_per_epoch
    bounds = f"within {MIN_STEPS} to {MAX_STEPS} steps"
    return steps, f"{planned_epochs:.0f} epochs over {voxels}: {NUM_PASSES}, but {bounds}"


def with_length(plan: Plan, num_steps: int, reason: str) -> Plan:
    """Return ``plan`` with this many steps and the values that depend on them.

    Values that the user set are kept.
    """
    by_preset = [preset.reason for _, preset in presets().values()]
    fixed = (BY_USER, *by_preset)

    # Values of the user or of a preset do not follow the length.
    def derived(key: str, planned: int, current: int) -> int:
        return current if plan.reasons.get(key) in fixed else planned

    twentieth = num_steps // 20
    warmup = derived("optim.warmup_steps", max(1, twentieth), plan.optim.warmup_steps)
    why_warmup = plan.reasons.get("optim.warmup_steps", "5 % of the steps")

    # Twenty times in a run, but not so often that it costs, nor so rarely that little is seen.
    every = min(num_steps, max(25, min(1000, twentieth)))
    checkpoint = derived("run.checkpoint_every", every, plan.run.checkpoint_every)
    validate = derived("run.validate_every", every, plan.run.validate_every)

    return replace(
        plan,
        optim=replace(plan.optim, num_steps=num_steps, warmup_steps=warmup),
        run=replace(plan.run, checkpoint_every=checkpoint, validate_every=validate),
        reasons={**plan.reasons, "optim.num_steps": reason, "optim.warmup_steps": why_warmup},
    )


def choose_compile(num_steps: int, num_hours: float | None = None) -> tuple[bool, str]:
    """Return whether a GPU compiles the transformer's layers, and the reason.

    Args:
        num_hours: the length, if it was given in hours.
    """
    # The steps of a run of this many hours are not known before one is measured.
    if num_hours is None:
        pays = num_steps >= COMPILE_FROM_STEPS
        length, limit = f"{num_steps} steps", f"{COMPILE_FROM_STEPS} steps"
    else:
        pays = num_hours >= COMPILE_FROM_HOURS
        length, limit = f"{num_hours:g} h", f"{COMPILE_FROM_HOURS:g} h"

    verdict = "earn back" if pays else "are too few to earn back"
    reason = (
        f"on a GPU: {length} {verdict} the time that compiling takes, about half a minute; from "
        f"{limit} on"
    )
    return pays, reason


def needs_timing(plan: Plan) -> bool:
    """Return whether the length was given in hours and no step has been timed yet."""
    has_hours = plan.request.get("num_hours") is not None
    is_timed = plan.run.seconds_per_step is not None
    is_fixed = plan.reasons.get("optim.num_steps") == BY_USER
    return has_hours and not is_timed and not is_fixed


def with_hours(plan: Plan, hours: float, seconds_per_step: float, device: str) -> Plan:
    """Return ``plan`` with as many steps as ``hours`` allow at the measured pace.

    5 % are left for validation and checkpoints.
    """
    training_s = TRAINING_SHARE * hours * 3600
    steps = max(1, int(training_s / seconds_per_step))

    percent = 100 * TRAINING_SHARE
    pace = f"{seconds_per_step:.3g} s a step measured on {device}"
    reason = f"{percent:.0f} % of {hours:g} h at {pace}"

    timed = replace(plan, run=replace(plan.run, seconds_per_step=seconds_per_step))
    return with_length(timed, steps, reason)


def expected_seconds(plan: Plan, device: str) -> float | None:
    """Return the expected time of the training steps, if a step was timed.

    Validation, checkpoints and preprocessing are not included.
    """
    run, optim = plan.run, plan.optim
    if run.dry_step_seconds is None:
        return None
    # A GPU computes while other processes load; elsewhere batches are loaded between the steps.
    loading = 0.0
    if device != "cuda":
        loading = optim.batch_size * (run.loader_seconds_per_crop or 0.0)
    return optim.num_steps * (run.dry_step_seconds + loading)
