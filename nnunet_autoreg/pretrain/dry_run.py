"""Tests before the first step: can the network be built, and does a step fit into memory?

File 6 of 11 in reading order.

A plan that does not fit the device is made smaller. The result is written once into the plan, so
that a resumed run uses the same plan.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.geometry import Size, as_size, size_text, smaller_of, volume
from nnunet_autoreg.machine import GIB, has_bf16, is_out_of_memory
from nnunet_autoreg.model.compilation import (
    CallRecorder,
    Disagreement,
    cannot_compile,
    first_line,
    self_check,
)
from nnunet_autoreg.model.memory import CONTEXT_BYTES, TrainingMemory, pretraining_memory
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.model.trunk import FastPath
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import DataPlan, EncoderPlan, OptimPlan, Plan, RunPlan, SequencePlan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.encoder import choose_objective, choose_order
from nnunet_autoreg.planning.length import needs_timing, with_hours
from nnunet_autoreg.planning.make import choose_micro_batch
from nnunet_autoreg.planning.pool import BY_USER, Hardware
from nnunet_autoreg.pretrain.data import StepBatches, seconds_per_crop, training_batches
from nnunet_autoreg.pretrain.distributed import World, is_sharded
from nnunet_autoreg.pretrain.request import write_plan
from nnunet_autoreg.pretrain.trainer import Trainer, TrainingJob, build_trainer
from nnunet_autoreg.pretrain.training_step import peak_memory_gib
from nnunet_autoreg.sampling.kinds import planned_kinds
from nnunet_autoreg.sampling.noise import noise_pool
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sampler import TRAINING
from nnunet_autoreg.stopping import refuse_interruption
from nnunet_autoreg.wording import counted, duration

log = logging.getLogger(__name__)

MOST_STEPS = 200
"""How many steps are searched for one step of every kind of sequence."""

CROP_SHARE = 0.75
"""A crop that does not fit is reduced to at most this share of its voxels."""

WARM_UP_STEPS, MIN_STEPS, MAX_STEPS = 2, 3, 50
ENOUGH_S = 20.0
"""Steps that are timed where the length is given in hours, and for how long at most."""


def check_network(plan: Plan) -> None:
    """Build the network once, without memory for its weights.

    Raises:
        PlanError: its arguments do not fit together.
    """
    try:
        with torch.device("meta"):
            build_objective(plan)
    # Networks raise these for arguments that do not go together.
    except (
        AssertionError,
        AttributeError,
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        LookupError,
    ) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"encoder.arguments={plan.encoder.arguments}: no network can be built from them "
            f"({why})",
            code="plan-network",
        ) from error


def step_memory(
    encoder: EncoderSize,
    crop: Size,
    recompute: bool = False,
    half: bool = True,
) -> tuple[float, float]:
    """Return the estimated bytes of a training step: fixed, and per crop.

    The step has the sequences that are planned for this encoder.

    Args:
        recompute: activation checkpointing.
        half: half precision, as on a GPU.
    """
    # The largest blocks, along each axis, that divide the crop.
    block_tokens = []
    for size, token, most in zip(crop, encoder.token_size, encoder.block_tokens, strict=True):
        fitting = [n for n in range(1, most + 1) if size // token % n == 0]
        block_tokens.append(max(fitting))

    order, predictor, _ = choose_order(encoder)
    objective, _ = choose_objective(encoder)
    # Memory does not depend on the values that are made up here.
    sketch = Plan(
        "sketch",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
        SequencePlan(crop, as_size(block_tokens), order, predictor),
        objective,
        OptimPlan(1, 1, 1e-4, 1, checkpoint_activations=recompute),
        RunPlan(0, 1, 1),
    )
    memory = plan_memory(sketch, half)
    return float(memory.fixed_bytes), float(memory.sample_bytes)


def plan_memory(plan: Plan, half: bool = True) -> TrainingMemory:
    """Return the estimated memory of a plan's training step on spatial sequences.

    Sequences of other kinds have the same length.
    """
    with torch.device("meta"):
        objective = build_objective(plan)
        objective.module.train()

    def loss_of(num_samples: int) -> object:
        # Inputs count where they are kept; the crops themselves are small beside what is made of
        # them.
        return objective.loss(objective.example_batch(num_samples))

    return pretraining_memory(objective.module, loss_of, half, objective.extra)


def with_fitting_parts(plan: Plan, hardware: Hardware, half: bool) -> Plan:
    """Return the plan with a micro-batch that fits the memory of its objective and sequences.

    The micro-batch was planned for sequences of one crop. Objectives with pairs of crops or a
    teacher need more memory per sample.
    """
    planned = plan.optim.micro_batch_size
    if planned is None or planned == 1 or plan.reasons.get("optim.micro_batch_size") == BY_USER:
        return plan

    memory = plan_memory(plan, half)
    fixed, sample = float(memory.fixed_bytes), float(memory.sample_bytes)
    micro, why = choose_micro_batch(plan.optim.batch_size, hardware, fixed, sample)
    if micro >= planned:
        return plan
    fitting = replace(plan, optim=replace(plan.optim, micro_batch_size=micro))
    return _with_reason(fitting, "optim.micro_batch_size", why)


@contextmanager
def memory_errors_in_one_line() -> Iterator[None]:
    """Turn an out-of-memory error during training into one line.

    Raises:
        AutoregError: the training has run out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
        what = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the memory"
        raise AutoregError(
            f"{reason}. Something else may be using {what}: free it and type the same line again; "
            "training continues from its last checkpoint",
            code="out-of-memory",
        ) from error


def limit_to_share(plan: Plan, num_processes: int) -> Plan:
    """Return the plan with a micro-batch that is not larger than a process's share of the batch."""
    optim = plan.optim
    # Some processes get one crop more than others; the plan has to fit all.
    share = ceil(optim.batch_size / num_processes)
    if (optim.micro_batch_size or optim.batch_size) <= share:
        return plan
    reason = f"the share of each of {num_processes} processes in a batch of {optim.batch_size}"
    limited = replace(plan, optim=replace(optim, micro_batch_size=share))
    return _with_reason(limited, "optim.micro_batch_size", reason)


def fit_to_device(
    job: TrainingJob,
    make_job: Callable[[Plan], TrainingJob],
    num_training: int,
) -> TrainingJob:
    """Return the job with a plan that fits this process's device, as tested by a dry step.

    The plan is written once, before the first step, so that a resumed run uses the same plan.

    Args:
        make_job: makes the job again for a plan with other sequences.
        num_training: number of processes that will train together.
    """
    was_tried = not job.is_new or job.plan.run.peak_memory_gib is not None
    # One process cannot try a step alone if it cannot hold all weights.
    if was_tried or (num_training > 1 and will_be_sharded(job, num_training)):
        return job

    def with_plan(plan: Plan) -> TrainingJob:
        if plan.sequence == job.plan.sequence:
            return replace(job, plan=plan)
        return make_job(plan)

    with phase("trying a training step, to see that it fits"):
        plan = fit_plan(
            limit_to_share(job.plan, num_training),
            lambda plan: build_trainer(with_plan(plan)),
            torch.device(job.device),
        )
    write_plan(job.folder, plan)
    return with_plan(plan)


def will_be_sharded(job: TrainingJob, num_processes: int) -> bool:
    """Return whether the weights will be sharded over this many processes."""
    # Without memory for the weights.
    with torch.device("meta"):
        module = build_objective(job.plan).module
    world = World(size=num_processes)
    return is_sharded(job.plan.run.sharding, module, torch.device(job.device), world)


@dataclass(frozen=True)
class DryStepResult:
    """The result of a dry step.

    Attributes:
        failure: the error, if memory or compiling failed; else None.
        seconds: duration of a whole step.
        crop_seconds: time in which this process draws and collates one crop.
        peak_gib: peak of memory, before the self-check.
        disagreement: difference between compiled layers and plain attention, if it is too large.
        is_flex: the compiled layers used FlexAttention.
    """

    failure: Exception | None = None
    seconds: float = 0.0
    crop_seconds: float = 0.0
    peak_gib: float = 0.0
    disagreement: Disagreement | None = None
    is_flex: bool = False


def fit_plan(plan: Plan, build: Callable[[Plan], Trainer], device: torch.device) -> Plan:
    """Return ``plan`` with its measured peak, made smaller until a dry step fits.

    Time and memory of the step are logged. If compiled layers disagree with plain attention, the
    plan switches them off.

    Args:
        build: makes a trainer for one process, which is trained here and then discarded.

    Raises:
        AutoregError: not even the smallest step fits.
    """
    if device.type == "cuda" and not has_bf16(device):
        log.warning(
            "%s has no bf16: everything is computed in float32, which takes longer and more memory",
            torch.cuda.get_device_name(device),
        )

    while True:
        result = _try_step(build, plan, device)
        if result.failure is not None:
            if cannot_compile(result.failure):
                plan, message = without_compiling(plan, result.failure)
            else:
                plan, message = smaller(plan)
        elif result.disagreement is not None:
            plan, message = without_fast_path(plan, result.disagreement, result.is_flex, device)
        else:
            plan = _with_measurements(plan, device, result)
            free_memory()
            return plan

        log.warning(message)
        # What the step holds is freed only when nothing refers to it, its exception included.
        del result
        free_memory()


def free_memory() -> None:
    """Release the memory of a dry step, which the training needs for its weights and moments.

    Compiled layers are kept: they hold no weights, and the training uses them again.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _try_step(build: Callable[[Plan], Trainer], plan: Plan, device: torch.device) -> DryStepResult:
    """Run a dry step and, if layers are compiled, the self-check."""
    try:
        trainer = build(plan)
        path = trainer.train_step.fast_path
        recorder = None
        if path is not None and plan.run.self_check:
            recorder = path.recorder = CallRecorder(path)

        seconds = dry_step(trainer)
        peak = peak_memory_gib(device)
        steps = list(_one_of_each_kind(trainer).values())
        crop_seconds = seconds_per_crop(trainer.batches, steps, plan.sequence.weights)
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or cannot_compile(error)):
            raise
        # The traceback would keep the tensors alive.
        return DryStepResult(error.with_traceback(None))

    if path is None or recorder is None:
        return DryStepResult(seconds=seconds, crop_seconds=crop_seconds, peak_gib=peak)

    path.recorder = None
    trainer.optimizer.zero_grad(set_to_none=True)
    disagreement = _find_disagreement(path, recorder, device)
    return DryStepResult(None, seconds, crop_seconds, peak, disagreement, path.flex)


def _find_disagreement(
    path: FastPath,
    recorder: CallRecorder,
    device: torch.device,
) -> Disagreement | None:
    """Return the result of the self-check; a check that cannot be done does not stop a training."""
    calls = [(kind, call) for (kind, _, _), call in recorder.calls.items()]
    try:
        with phase("checking attention on this device"):
            return self_check(path, calls, device)
    except AutoregError:
        raise
    except Exception as error:
        refuse_interruption(error)
        why = f"{type(error).__name__}: {first_line(error)}"
        log.warning(
            "attention could not be checked on this device (%s): training continues unchecked",
            why,
        )
        return None


def with_estimated_seconds(folder: Path, plan: Plan, device: str) -> Plan:
    """Return the plan with the time of a step, timed on crops of noise, and write it.

    So the length of a run is known before any scan is preprocessed. The training times a step
    again. A plan whose step does not fit is returned unchanged.
    """
    # Compiling takes longer than the rest of a dry run.
    tried = replace(plan, run=replace(plan.run, compile=False))
    pool = noise_pool(plan)
    try:
        with phase("timing a training step"), torch.random.fork_rng(devices=[]):
            trainer = build_trainer(
                TrainingJob(folder, tried, device, pool, SamplingPool(()), (), is_new=False),
            )
            seconds = dry_step(trainer, ENOUGH_S)
            steps = list(_one_of_each_kind(trainer).values())
            crop_seconds = seconds_per_crop(trainer.batches, steps, plan.sequence.weights)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.info(
            "a step does not fit into memory and could not be timed; training will make it smaller",
        )
        return plan

    del trainer
    free_memory()
    plan = _with_times(plan, seconds, crop_seconds)
    write_plan(folder, plan)
    return plan


def dry_step(trainer: Trainer, enough_s: float = math.inf) -> float:
    """Return the seconds of a whole optimiser step, estimated from short ones.

    For every kind of sequence, two steps of up to two micro-batches are made: two micro-batches,
    because the second one is computed while the gradient of the first one is in memory; two steps,
    because the first one compiles.

    Args:
        enough_s: a first step that takes longer is not repeated.
    """
    sampler, cases = trainer.batches.sampler, trainer.batches.cases
    step = trainer.train_step
    recorder = None if step.fast_path is None else step.fast_path.recorder
    samples = range(min(len(step.numbers), 2 * step.micro_batch_size))
    batches = StepBatches(sampler, cases, samples)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)

    seconds = []
    for kind, number in _one_of_each_kind(trainer).items():
        batch = batches[number]
        if isinstance(batch, AutoregError):
            raise batch
        if isinstance(recorder, CallRecorder):
            recorder.kind = kind
        for _ in range(2):
            start = time.monotonic()
            loss, _ = step(number, batch)
            float(loss)  # waits for the device
            if time.monotonic() - start > enough_s:
                break
        seconds.append(time.monotonic() - start)
    return sum(seconds) / len(seconds) * len(step.numbers) / len(samples)


def _one_of_each_kind(trainer: Trainer) -> dict[str, int]:
    """Return the first step of every kind of sequence, by kind, among the first few steps."""
    sampler, cases = trainer.batches.sampler, trainer.batches.cases
    num_kinds = len(planned_kinds(trainer.plan))
    first: dict[str, int] = {}
    for number in range(MOST_STEPS):
        first.setdefault(sampler.kind(cases, TRAINING, number), number)
        if len(first) == num_kinds:
            break
    return first


def smaller(plan: Plan) -> tuple[Plan, str]:
    """Return the next smaller plan after one that ran out of memory, and a message.

    Changes that do not affect the results come first, the crop last.

    Raises:
        AutoregError: there is none.
    """
    optim, crop = plan.optim, plan.sequence.crop_size_vox
    micro = min(optim.micro_batch_size or optim.batch_size, optim.batch_size)
    if micro > 1:
        half = ceil(micro / 2)
        message = (
            f"out of memory with {micro} crops at once: {half} at once, "
            f"{ceil(optim.batch_size / half)} times a step; the batch size does not change"
        )
        reduced = replace(plan, optim=replace(optim, micro_batch_size=half))
        return _with_reason(reduced, "optim.micro_batch_size", message), message

    if not optim.checkpoint_activations:
        message = (
            "out of memory with one crop at once: activations are checkpointed; the losses do not "
            "change, a step takes about a third longer"
        )
        reduced = replace(plan, optim=replace(optim, checkpoint_activations=True))
        return _with_reason(reduced, "optim.checkpoint_activations", message), message

    failed = f"out of memory with one crop of {size_text(crop)} and activations checkpointed"
    if plan.reasons.get("sequence.crop_size_vox") == BY_USER:
        raise AutoregError(
            f"{failed}, and sequence.crop_size_vox was set by the user; set a smaller one, or "
            "choose a smaller --encoder, with a new --name",
            code="fit-crop-by-user",
        )
    shrunk = smaller_crop(plan)
    if shrunk is None:
        raise AutoregError(
            f"{failed}, and no smaller crop makes a sequence; choose a smaller --encoder with a "
            "new --name",
            code="fit-no-smaller-crop",
        )
    message = f"{failed}: crops of {size_text(shrunk.sequence.crop_size_vox)}"
    return _with_reason(shrunk, "sequence.crop_size_vox", message), message


def smaller_crop(plan: Plan) -> Plan | None:
    """Return the plan with a crop of at most three quarters of the voxels; None if there is none.

    The crop keeps about its proportions: cutting only the longest axis would show the network
    another part of the anatomy than the crop that suited the scans.
    """
    s = plan.sequence
    side = [
        token * block
        for token, block in zip(plan.encoder.token_size_vox, s.block_tokens, strict=True)
    ]
    if "strided" in planned_kinds(plan):
        side[0] *= s.num_subvolumes

    crop = list(s.crop_size_vox)

    def kept_length(axis: int) -> tuple[float, int]:
        # Of axes that keep the same share of their length, the longest one is shortened.
        return (crop[axis] - side[axis]) / s.crop_size_vox[axis], crop[axis]

    while volume(crop) > CROP_SHARE * volume(s.crop_size_vox):
        free_axes = [axis for axis in range(3) if crop[axis] > side[axis]]
        if not free_axes:
            return None
        chosen = max(free_axes, key=kept_length)
        crop[chosen] -= side[chosen]

    member = s.member_crop_vox
    if member is not None:
        member = smaller_of(member, crop)
    sequence = replace(s, crop_size_vox=as_size(crop), member_crop_vox=member)
    try:
        return check(replace(plan, sequence=sequence))
    except PlanError:
        return None


def without_compiling(plan: Plan, error: BaseException) -> tuple[Plan, str]:
    """Return the plan with nothing compiled, and a message."""
    message = (
        f"a layer could not be compiled ({first_line(error)}): everything runs uncompiled, slower; "
        "fix the compiler and start a new --name to have it compiled"
    )
    plan = replace(plan, run=replace(plan.run, compile=False))
    return _with_reason(plan, "run.compile", message), message


def without_fast_path(
    plan: Plan,
    disagreement: Disagreement,
    is_flex: bool,
    device: torch.device,
) -> tuple[Plan, str]:
    """Return the plan without the kernels that are wrong on this device, and a message.

    The message asks the user to report the fault.

    Args:
        is_flex: the kernels are FlexAttention's; compiled layers may still be right with a dense
            mask.
    """
    if is_flex:
        key, wrong, instead = "run.flex_attention", "FlexAttention is wrong", "the dense mask"
        run = replace(plan.run, flex_attention=False)
    else:
        key, wrong = "run.compile", "compiled layers are wrong"
        instead = "uncompiled layers and the dense mask"
        run = replace(plan.run, compile=False)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    message = (
        f"{wrong} on this device: {disagreement}; training uses {instead}, which is slower. "
        f"Please report this line to the authors of nnunet-autoreg ({name}, torch "
        f"{torch.__version__})"
    )
    return _with_reason(replace(plan, run=run), key, message), message


def _with_measurements(plan: Plan, device: torch.device, result: DryStepResult) -> Plan:
    """Return the plan with the measurements of the dry step; log them beside the estimates."""
    optim = plan.optim
    micro = min(optim.micro_batch_size or optim.batch_size, optim.batch_size)
    estimate = plan_memory(plan, has_bf16(device)).total_bytes(micro)
    # torch does not count what CUDA itself needs.
    estimate = estimate - CONTEXT_BYTES if device.type == "cuda" else estimate
    # With --hours, the number of steps follows from a longer measurement.
    length = f"so {counted(optim.num_steps, 'step')} take about "
    length += duration(result.seconds * optim.num_steps)
    if needs_timing(plan):
        length = f"and the run {plan.request['num_hours']:g} h as given"
    log.info(
        "dry step: a step takes %s, %s; peak memory %.2f GiB%s (estimated: %.2f GiB%s)",
        duration(result.seconds),
        length,
        result.peak_gib,
        "" if device.type == "cuda" else " of the whole process",
        estimate / GIB,
        "" if device.type == "cuda" else " for the step alone",
    )
    plan = _with_times(plan, result.seconds, result.crop_seconds)
    return replace(plan, run=replace(plan.run, peak_memory_gib=round(result.peak_gib, 3)))


def _with_times(plan: Plan, seconds: float, crop_seconds: float) -> Plan:
    """Return the plan with the time of a step and of loading a crop, to four digits."""
    run = replace(
        plan.run,
        dry_step_seconds=float(f"{seconds:.4g}"),
        loader_seconds_per_crop=float(f"{crop_seconds:.4g}"),
    )
    return replace(plan, run=run)


def _with_reason(plan: Plan, key: str, reason: str) -> Plan:
    return replace(plan, reasons={**plan.reasons, key: reason})


def time_steps(job: TrainingJob, world: World, local_rank: int) -> float:
    """Return the seconds of a step; all processes train a trainer that is then discarded."""
    # The training begins with fresh weights, so that its numbers do not depend on the timing.
    seconds = seconds_per_step(build_trainer(job, world, local_rank))
    free_memory()
    return seconds


def plan_with_hours(folder: Path, plan: Plan, seconds: float, device: str) -> Plan:
    """Return the plan with its hours turned into steps of this many seconds.

    It is written once, so that a resumed run uses the same plan.
    """
    plan = with_hours(plan, float(plan.request["num_hours"]), seconds, device)
    write_plan(folder, plan)
    log.info("optim.num_steps = %d (%s)", plan.optim.num_steps, plan.reasons["optim.num_steps"])
    return plan


def seconds_per_step(trainer: Trainer) -> float:
    """Return the mean seconds of a training step, loading included.

    After two steps of warm-up, up to 50 steps or about 20 s are measured.

    Args:
        trainer: it is trained here and must not be used afterwards.
    """
    steps = range(WARM_UP_STEPS + MAX_STEPS)
    pin_memory = trainer.device.type == "cuda"
    prepared = training_batches(trainer.batches, steps, trainer.num_workers, pin_memory)
    start, num_done = time.monotonic(), 0
    for step, batch in zip(steps, prepared, strict=True):
        loss, _ = trainer.train_step(step, batch)
        float(loss)  # waits for the device
        if step < WARM_UP_STEPS:
            start = time.monotonic()
            continue
        num_done += 1
        # All processes have to stop after the same step.
        is_enough = num_done >= MIN_STEPS and time.monotonic() - start > ENOUGH_S
        if trainer.world.any(is_enough):
            break
    return (time.monotonic() - start) / num_done
