"""Whether a plan fits the device: tried with real steps before the first, made smaller where it
does not. What comes out is written once into the plan, so that a resumed run is the same run.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil

import torch

from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.geometry import Size, as_size, volume
from nnunet_autoreg.model.memory import CONTEXT_BYTES, GIB
from nnunet_autoreg.model.trunk import FastPath
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.pool import BY_USER
from nnunet_autoreg.pretrain.batches import StepBatches
from nnunet_autoreg.pretrain.compiled import (
    cannot_compile,
    first_line,
    is_out_of_memory,
)
from nnunet_autoreg.pretrain.display import peak_memory_gib
from nnunet_autoreg.pretrain.loading import seconds_per_crop
from nnunet_autoreg.pretrain.loop import Trainer
from nnunet_autoreg.pretrain.machine import computes_in_half, plan_memory
from nnunet_autoreg.pretrain.self_check import Disagreement, Witness, self_check
from nnunet_autoreg.pretrain.signals import refuse_interruption
from nnunet_autoreg.sampling.kinds import wanted
from nnunet_autoreg.sampling.sampler import TRAINING

log = logging.getLogger(__name__)

MOST_STEPS = 200
"""How many steps' kinds are looked through for one step of every kind."""
CROP_SHARE = 0.75
"""A crop that does not fit is made at most this large."""


@contextmanager
def memory_errors_in_one_line() -> Iterator[None]:
    """Around a training that fitted when it was tried.

    Raises:
        AutoregError: it has run out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
        what = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the memory"
        raise AutoregError(
            f"{first}. Something else may be using {what}: free it and type the same line again; "
            "training goes on from "
            "its last checkpoint"
        ) from error


def share_of_plan(plan: Plan, num_processes: int) -> Plan:
    """The plan with no more crops at once than each of so many processes gets of a batch."""
    optim, share = plan.optim, ceil(plan.optim.batch_size / num_processes)
    if (optim.micro_batch_size or optim.batch_size) <= share:
        return plan
    told = f"all that each of {num_processes} processes gets of a batch of {optim.batch_size}"
    return _changed(
        replace(plan, optim=replace(optim, micro_batch_size=share)), "optim.micro_batch_size", told
    )


def fitted(plan: Plan, trainer_of: Callable[[Plan], Trainer], device: torch.device) -> Plan:
    """Return ``plan``, made smaller until a dry step fits, with the peak that was measured; log
    what a step takes.

    Where compiled layers do not compute what plain attention computes, the plan leaves them out.

    Args:
        trainer_of: makes a trainer alone on its device; it is trained by this and thrown away.

    Raises:
        AutoregError: not even the smallest step fits.
    """
    if device.type == "cuda" and not computes_in_half(device):
        log.warning(
            "%s has no bf16: everything is computed in float32, which takes longer and more memory",
            torch.cuda.get_device_name(device),
        )
    while True:
        tried = _try(trainer_of, plan, device)
        if tried.failed is not None:
            is_compiling = cannot_compile(tried.failed)
            plan, message = without_compiling(plan, tried.failed) if is_compiling else smaller(plan)
        elif tried.disagreement is not None:
            plan, message = without_fast_path(plan, tried.disagreement, tried.is_flex, device)
        else:
            plan = _measured(plan, device, tried)
            free()
            return plan

        log.warning(message)
        # What the try holds is freed only when nothing refers to it, its exception included.
        del tried
        free()


def free() -> None:
    """Give back what a try held: the training's own weights and moments come beside whatever is
    left.

    Compiled layers stay: they hold no weights, and the training uses them again.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Tried:
    """What a dry step showed.

    Attributes:
        failed: what it failed by, if that was memory or compiling.
        seconds: of a whole step.
        crop_seconds: in which this process draws and collates one crop.
        peak_gib: of memory, before the self-check.
        disagreement: between the compiled layers and plain attention.
        is_flex: the compiled layers used FlexAttention.
    """

    failed: Exception | None = None
    seconds: float = 0.0
    crop_seconds: float = 0.0
    peak_gib: float = 0.0
    disagreement: Disagreement | None = None
    is_flex: bool = False


def _try(trainer_of: Callable[[Plan], Trainer], plan: Plan, device: torch.device) -> Tried:
    """Run a dry step and, where layers are compiled, the self-check."""
    try:
        trainer = trainer_of(plan)
        path = trainer.train_step.fast_path
        witness = None
        if path is not None and plan.run.self_check:
            witness = path.witness = Witness(path)

        seconds = dry_step(trainer)
        peak = peak_memory_gib(device)
        steps = list(_one_of_each_kind(trainer).values())
        crop_seconds = seconds_per_crop(trainer.batches, steps, plan.sequence.weights)
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or cannot_compile(error)):
            raise
        return Tried(error.with_traceback(None))

    if path is None or witness is None:
        return Tried(seconds=seconds, crop_seconds=crop_seconds, peak_gib=peak)

    path.witness = None
    trainer.optimizer.zero_grad(set_to_none=True)
    disagreement = _checked(path, witness, device)
    return Tried(None, seconds, crop_seconds, peak, disagreement, path.flex)


def _checked(path: FastPath, witness: Witness, device: torch.device) -> Disagreement | None:
    """Return what the self-check found. One that cannot be done does not stop a training."""
    calls = [(kind, call) for (kind, _, _), call in witness.calls.items()]
    try:
        with phase("checking attention on this device"):
            return self_check(path, calls, device)
    except AutoregError:
        raise
    except Exception as error:
        refuse_interruption(error)
        why = f"{type(error).__name__}: {first_line(error)}"
        log.warning(
            "attention could not be checked on this device (%s): training goes on unchecked", why
        )
        return None


def dry_step(trainer: Trainer) -> float:
    """Seconds of a whole optimiser step, estimated from two steps of up to two parts of a batch, of
    every kind of sequence.

    Two parts, because the second is computed while the first one's gradient is there; two steps,
    because the first compiles.
    """
    sampler, cases, step = trainer.batches.sampler, trainer.batches.cases, trainer.train_step
    witness = None if step.fast_path is None else step.fast_path.witness
    tried = range(min(len(step.numbers), 2 * step.micro_batch_size))
    batches = StepBatches(sampler, cases, tried)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = []
    for kind, number in _one_of_each_kind(trainer).items():
        batch = batches[number]
        if isinstance(batch, AutoregError):
            raise batch
        if isinstance(witness, Witness):
            witness.kind = kind
        for _ in range(2):
            start = time.monotonic()
            loss, _ = step(number, batch)
            float(loss)  # waits for the device
        seconds.append(time.monotonic() - start)
    return sum(seconds) / len(seconds) * len(step.numbers) / len(tried)


def _one_of_each_kind(trainer: Trainer) -> dict[str, int]:
    """Return the first step of every kind of sequence, by kind, among the first few."""
    sampler, cases = trainer.batches.sampler, trainer.batches.cases
    kinds = wanted(trainer.plan)
    first: dict[str, int] = {}
    for number in range(MOST_STEPS):
        first.setdefault(sampler.kind(cases, TRAINING, number), number)
        if len(first) == len(kinds):
            break
    return first


def smaller(plan: Plan) -> tuple[Plan, str]:
    """The next smaller plan after one that ran out of memory, and what was done: first what changes
    no number, the crop last.

    Raises:
        AutoregError: there is none.
    """
    optim, crop = plan.optim, plan.sequence.crop_size_vox
    micro = min(optim.micro_batch_size or optim.batch_size, optim.batch_size)
    if micro > 1:
        half = ceil(micro / 2)
        told = (
            f"out of memory with {micro} crops at once: {half} at once, "
            f"{ceil(optim.batch_size / half)} times a step; the batch stays"
        )
        return _changed(
            replace(plan, optim=replace(optim, micro_batch_size=half)),
            "optim.micro_batch_size",
            told,
        ), told
    if not optim.checkpoint_activations:
        told = (
            "out of memory with one crop at once: activations are checkpointed; the losses stay, a "
            "step takes about a third longer"
        )
        return _changed(
            replace(plan, optim=replace(optim, checkpoint_activations=True)),
            "optim.checkpoint_activations",
            told,
        ), told
    if plan.reasons.get("sequence.crop_size_vox") == BY_USER:
        raise AutoregError(
            f"out of memory with one crop of {_times(crop)} and activations checkpointed, and "
            "sequence.crop_size_vox was "
            "set by the user; set a smaller one, or choose a smaller --encoder, with a new --name"
        )
    reduced = smaller_crop(plan)
    if reduced is None:
        raise AutoregError(
            f"out of memory with one crop of {_times(crop)} and activations checkpointed, and no "
            "smaller crop makes a "
            "sequence; choose a smaller --encoder with a new --name"
        )
    told = (
        f"out of memory with one crop of {_times(crop)} and activations checkpointed: crops of "
        f"{_times(reduced.sequence.crop_size_vox)}"
    )
    return _changed(reduced, "sequence.crop_size_vox", told), told


def smaller_crop(plan: Plan) -> Plan | None:
    """The plan with a crop of at most three quarters of the voxels and about its proportions; None
    if there is none.

    It gets shorter by whole blocks, each time along the axis that keeps most of its length, of
    equal ones the longest: to cut the longest axis alone would show the network another part of the
    anatomy than the crop that suited the scans.
    """
    s = plan.sequence
    side = [
        token * block
        for token, block in zip(plan.encoder.token_size_vox, s.block_tokens, strict=True)
    ]
    if "strided" in wanted(plan):
        side[0] *= s.num_subvolumes
    crop = list(s.crop_size_vox)
    while volume(crop) > CROP_SHARE * volume(s.crop_size_vox):
        free = [axis for axis in range(3) if crop[axis] > side[axis]]
        if not free:
            return None
        chosen = max(
            free, key=lambda axis: ((crop[axis] - side[axis]) / s.crop_size_vox[axis], crop[axis])
        )
        crop[chosen] -= side[chosen]
    member = s.member_crop_vox and as_size(
        [min(m, c) for m, c in zip(s.member_crop_vox, crop, strict=True)]
    )
    try:
        return check(
            replace(plan, sequence=replace(s, crop_size_vox=as_size(crop), member_crop_vox=member))
        )
    except PlanError:
        return None


def without_compiling(plan: Plan, error: BaseException) -> tuple[Plan, str]:
    """The plan with nothing compiled, and why."""
    told = (
        f"a layer could not be compiled ({first_line(error)}): everything runs uncompiled, slower; "
        "mend that and start a new --name to have it compiled"
    )
    return _changed(replace(plan, run=replace(plan.run, compile=False)), "run.compile", told), told


def without_fast_path(
    plan: Plan, disagreement: Disagreement, is_flex: bool, device: torch.device
) -> tuple[Plan, str]:
    """Return the plan without the kernels that are wrong on this device, and why, in a line that
    asks for a report.

    Args:
        is_flex: they are FlexAttention's, so that compiled layers may still be right with a dense
            mask.
    """
    run = plan.run
    if is_flex:
        key, wrong, instead = "run.flex_attention", "FlexAttention is wrong", "the dense mask"
        run = replace(run, flex_attention=False)
    else:
        key, wrong, instead = (
            "run.compile",
            "compiled layers are wrong",
            "uncompiled layers and the dense mask",
        )
        run = replace(run, compile=False)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    message = (
        f"{wrong} on this device: {disagreement}; training uses {instead}, which is slower. "
        f"Please report this line to the authors of nnunet-autoreg ({name}, torch "
        f"{torch.__version__})"
    )
    return _changed(replace(plan, run=run), key, message), message


def _measured(plan: Plan, device: torch.device, tried: Tried) -> Plan:
    peak, seconds, crop_seconds = tried.peak_gib, tried.seconds, tried.crop_seconds
    optim = plan.optim
    micro = min(optim.micro_batch_size or optim.batch_size, optim.batch_size)
    estimate = plan_memory(plan, computes_in_half(device)).total_bytes(micro)
    estimated = (estimate - CONTEXT_BYTES if device.type == "cuda" else estimate) / GIB
    log.info(
        "dry step: %.3g s a step, so about %.3g h for %d steps; %.2f GiB at its peak, %.2f were "
        "estimated%s",
        seconds,
        seconds * optim.num_steps / 3600,
        optim.num_steps,
        peak,
        estimated,
        "" if device.type == "cuda" else " for the step alone (the peak is the whole process')",
    )
    run = replace(
        plan.run,
        peak_memory_gib=round(peak, 3),
        dry_step_seconds=float(f"{seconds:.4g}"),
        loader_seconds_per_crop=float(f"{crop_seconds:.4g}"),
    )
    return replace(plan, run=run)


def _changed(plan: Plan, key: str, why: str) -> Plan:
    return replace(plan, reasons={**plan.reasons, key: why})


def _times(size: Size) -> str:
    return " x ".join(str(n) for n in size)
