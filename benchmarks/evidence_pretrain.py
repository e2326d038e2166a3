"""Pretraining by ``evidence.py``, on a set that is kept in memory.

Plan, sampler, objective and training step are the project's.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from evidence_data import SETS, ResidentSet
from evidence_lines import Deadline, Line, ResultFile, Stopwatch, circumstances, half_precision

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.locations import StructureLocation
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.model.card import CARD_NAME, WEIGHTS_NAME, check_run_name, read_card
from nnunet_autoreg.model.compilation import autocast
from nnunet_autoreg.model.verdict import UNKNOWN, Verdict
from nnunet_autoreg.objective_kinds import with_objective
from nnunet_autoreg.objectives.base import LossTerms
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import EncoderPlan, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Overrides, hardware_of
from nnunet_autoreg.pretrain.checkpointing import (
    Progress,
    export_encoder,
    measure_pool,
    restore,
    snapshot,
)
from nnunet_autoreg.pretrain.data import StepBatches, micro_batches
from nnunet_autoreg.pretrain.dry_run import step_memory
from nnunet_autoreg.pretrain.training_step import TrainingStep, step_flops
from nnunet_autoreg.records import differences, from_jsonable, read_json, write_json
from nnunet_autoreg.sampling.gather import gather
from nnunet_autoreg.sampling.kinds import member_crop, planned_kinds
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch

log = logging.getLogger("nnunet_autoreg.evidence")

PLAN_NAME = "plan.json"
SAVE_EVERY_S = 60.0
LOSS_POINTS = 20
"""Number of points of the training curve in a line of results."""
PREPARED_BATCHES = 4
NO_VALIDATION = Verdict(UNKNOWN, "the evidence harness keeps no scan of the pool for validation")


@dataclass(frozen=True)
class PretrainJob:
    """One pretraining.

    Attributes:
        arm: name of the arm; its runs of several seeds are called ``<set>-<arm>-s<seed>``.
        objective: name of a registered objective.
        crop_vox: None for the set's usual crop.
        settings: overrides of plan values, "key=value".
        half: compute in bfloat16 also on a CPU.
    """

    data: str
    arm: str
    encoder: str
    objective: str
    seed: int
    steps: int
    batch: int
    crop_vox: Size | None = None
    settings: tuple[str, ...] = ()
    half: bool = False

    @property
    def name(self) -> str:
        """The run's name."""
        return run_name(self.data, self.arm, self.seed)


def run_name(data: str, arm: str, seed: int) -> str:
    """Return the name of the pretraining run of an arm and a seed."""
    return f"{data}-{arm}-s{seed}"


def run_folder(work: Path, name: str) -> Path:
    """Return the folder of a pretraining run."""
    return work / "runs" / name


def plan_of(job: PretrainJob, data: ResidentSet, device: torch.device) -> Plan:
    """Return the project's plan for the pool's numbers, with the job's crop and settings.

    Raises:
        PlanError: a setting that does not exist, or a plan that cannot be carried out.
    """
    request = {"evidence": data.facts.name}
    memory_of = partial(step_memory, half=has_bf16(device.type))
    overrides = Overrides(encoder=job.encoder, batch_size=job.batch, num_steps=job.steps)
    plan = make_plan(
        job.name,
        data.facts.pool,
        hardware_of(device.type),
        overrides,
        job.seed,
        request,
        memory_of,
    )
    plan = with_objective(plan, job.objective)
    plan = with_crop(plan, job.crop_vox or SETS[data.facts.name].crop_vox)
    # Compiling would take longer than these few minutes of training.
    plan = replace(plan, run=replace(plan.run, compile=False))
    return check(override(plan, list(job.settings)))


def with_crop(plan: Plan, crop_vox: Sequence[int]) -> Plan:
    """Return the plan with another crop, in the largest blocks up to the planned ones."""
    crop = as_size(crop_vox)
    try:
        grid = grid_of(crop, plan.encoder.token_size_vox)
    except ValueError as error:
        raise UsageError(f"--crop {crop}: {error}") from error

    block = []
    for tokens, most in zip(grid, plan.sequence.block_tokens, strict=True):
        fitting = []
        for side in range(1, most + 1):
            has_several_blocks = tokens // side > 1 or tokens == 1
            if tokens % side == 0 and has_several_blocks:
                fitting.append(side)
        block.append(max(fitting))

    sequence = replace(plan.sequence, crop_size_vox=crop, block_tokens=as_size(block))
    # Each image of a pair is a whole crop.
    if sequence.member_crop_vox is not None:
        sequence = replace(sequence, member_crop_vox=crop)
    return replace(plan, sequence=sequence)


def pretrain(
    job: PretrainJob,
    data: ResidentSet,
    work: Path,
    results: ResultFile,
    deadline: Deadline,
    device: torch.device,
) -> bool:
    """Train until the run's end or the deadline; return whether it is finished.

    What was trained is kept either way.

    Raises:
        UsageError: a run of this name exists and has another plan.
        AutoregError: too many steps in a row were bad.
    """
    check_run_name(job.name)
    folder = run_folder(work, job.name)
    plan = _kept_plan(folder, plan_of(job, data, device))
    identity = _identity(job)
    if (folder / CARD_NAME).is_file() and results.has(identity):
        return True

    torch.manual_seed(plan.run.seed)
    objective = build_objective(plan)
    train_step = TrainingStep(plan, objective, device)
    if job.half:
        loss_in_half(train_step, device)
    pool = sampling_pool(plan, data)

    progress, notes = _new_or_restored(folder, train_step, pool)
    batches = StepBatches(objective.sampler, pool, train_step.numbers)
    steps = range(progress.step, plan.optim.num_steps)
    every = max(1, plan.optim.num_steps // LOSS_POINTS)
    losses = []
    clock = Stopwatch(notes["seconds"], notes["process_seconds"])
    saved = time.monotonic()

    def save() -> None:
        state = snapshot(objective, train_step.optimizer, train_step.guard, progress)
        kept = {**notes, **clock.read()}
        checkpoint.save_checkpoint(folder / checkpoint.LATEST_NAME, {**state, "notes": kept})

    for step, batch in zip(steps, prepared_ahead(batches, steps, device), strict=True):
        loss, _ = train_step(step, batch)
        losses.append(loss)
        progress.step = step + 1
        if progress.step % every == 0:
            notes["curve"].append([progress.step, round(float(torch.stack(losses).mean()), 4)])
            losses.clear()
            _stop_if_lost(train_step, step)
        if deadline.has_passed() and progress.step < plan.optim.num_steps:
            save()
            done = f"step {progress.step} of {plan.optim.num_steps}"
            log.info("%s: stopped after %s", job.name, done)
            return False
        if time.monotonic() - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()

    spent = clock.read()
    save()
    licences = {data.facts.dataset: data.facts.licence}
    export_encoder(folder, plan, objective, data.pool_rows(), licences, NO_VALIDATION)

    sample = batches[0]
    assert isinstance(sample, Batch), "the first batch was drawn before"
    costs = {**_costs(plan, train_step, sample, device), **spent, "loss": notes["curve"]}
    results.append({**identity, **_sizes(plan, data), **costs, **circumstances(device)})
    return True


def _costs(
    plan: Plan,
    train_step: TrainingStep,
    sample: Batch,
    device: torch.device,
) -> dict[str, Any]:
    parameters = train_step.module.parameters()
    return {
        "flops_per_step": flops_per_step(plan, train_step, sample, device),
        "skipped_steps": train_step.guard.statistics().skipped,
        "parameters": sum(tensor.numel() for tensor in parameters),
    }


def _new_or_restored(
    folder: Path,
    train_step: TrainingStep,
    pool: SamplingPool,
) -> tuple[Progress, dict[str, Any]]:
    """Return the progress and the notes of a run: new ones, or those of its newest checkpoint."""
    found = checkpoint.load_newest(folder)
    if found is None:
        measure_pool(train_step.objective, pool)
        return Progress(), {"seconds": 0.0, "process_seconds": 0.0, "curve": []}

    _, state = found
    progress = restore(state, train_step.objective, train_step.optimizer, train_step.guard)
    return progress, state["notes"]


def sampling_pool(plan: Plan, data: ResidentSet) -> SamplingPool:
    """Return the sampling pool from which the plan's sequences are cut.

    Images of several patients are paired by likeness. The labels of the set are never looked at,
    because fine-tuning and the probe get only a few of them.
    """
    # Cases in memory have all methods of stored cases that the samplers use.
    cases = cast(Any, data.pool_cases())
    places: list[StructureLocation] = []
    if "semantic" in planned_kinds(plan):
        rows = [replace(row, subject=data.subject_of[row.case]) for row in data.pool_rows()]
        places = places_alike(
            rows,
            cases,
            member_crop(plan, "semantic"),
            plan.sequence.semantic_members,
        )
    return gather(plan, cases, (), places)


def loss_in_half(train_step: TrainingStep, device: torch.device) -> None:
    """Have a training step compute its loss in bfloat16, on any device."""
    loss_of: Any = train_step.batch_loss
    in_full = loss_of.loss

    def in_half(batch: Batch) -> LossTerms:
        with half_precision(device, True):
            terms: LossTerms = in_full(batch)
        return terms

    loss_of.loss = in_half


def prepared_ahead(batches: StepBatches, steps: range, device: torch.device) -> Iterator[Batch]:
    """Yield the batch of every step.

    For a GPU a thread prepares the next ones meanwhile; a CPU has no core to spare.

    Raises:
        AutoregError: a batch cannot be made.
    """
    if device.type == "cpu":
        for step in steps:
            yield _made(batches[step])
        return

    ready: queue.Queue[Batch | AutoregError] = queue.Queue(PREPARED_BATCHES)
    ended = threading.Event()

    def work() -> None:
        for step in steps:
            batch = batches[step]
            pinned = batch.pin_memory() if isinstance(batch, Batch) else batch
            while not ended.is_set():
                try:
                    ready.put(pinned, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if ended.is_set():
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in steps:
            yield _made(ready.get())
    finally:
        ended.set()
        thread.join()


def _made(batch: Batch | AutoregError) -> Batch:
    if isinstance(batch, AutoregError):
        raise batch
    return batch


def _kept_plan(folder: Path, plan: Plan) -> Plan:
    """Write the plan of a new run. If the run exists, refuse another plan."""
    path = folder / PLAN_NAME
    if not path.is_file():
        write_json(path, plan)
        return plan
    kept = from_jsonable(Plan, read_json(path), str(path))
    changed = differences(replace(kept, reasons={}), replace(plan, reasons={}))
    if changed:
        raise UsageError(
            f"{folder} holds a run of another plan ({'; '.join(changed[:3])}), and one run has one "
            "plan; use another --arm, or remove the folder",
        )
    return kept


def _identity(job: PretrainJob) -> Line:
    return {
        "command": "pretrain",
        "set": job.data,
        "arm": job.arm,
        "pretraining_seed": job.seed,
        "encoder": job.encoder,
        "settings": {
            "objective": job.objective,
            "steps": job.steps,
            "batch": job.batch,
            "crop": None if job.crop_vox is None else list(job.crop_vox),
            "set": list(job.settings),
            "half": job.half,
        },
    }


def _sizes(plan: Plan, data: ResidentSet) -> Line:
    num_samples = plan.optim.num_steps * plan.optim.batch_size
    num_voxels = num_samples * volume(plan.sequence.crop_size_vox)
    return {
        "objective": plan.objective.name,
        "steps": plan.optim.num_steps,
        "samples": num_samples,
        "crop_vox": list(plan.sequence.crop_size_vox),
        "block_tokens": list(plan.sequence.block_tokens),
        "token_size_vox": list(plan.encoder.token_size_vox),
        "passes": round(num_voxels / data.facts.pool.total_vox, 1),
        "scans": len(data.division.pool),
    }


def _stop_if_lost(train_step: TrainingStep, step: int) -> None:
    """Raise an error if more steps in a row were bad than the plan allows.

    The project's own training would go back to an earlier checkpoint.
    """
    statistics = train_step.guard.statistics()
    if statistics.in_row >= train_step.plan.run.max_bad_steps:
        raise AutoregError(
            f"{train_step.plan.name}: the last {statistics.in_row} steps until step {step + 1} "
            "were all bad (infinite, NaN or far off); try a lower rate, e.g. "
            f"--set optim.lr={train_step.plan.optim.lr / 3:.1e}",
        )


def flops_per_step(
    plan: Plan,
    train_step: TrainingStep,
    batch: Batch,
    device: torch.device,
) -> float:
    """Return the multiplications and additions of a training step, forward and backward.

    One crop is counted and multiplied: crops of one plan cost the same.
    """
    train_step.module.train()
    crop = next(micro_batches(batch, 1)).to(device)
    with autocast(device):
        single = step_flops(train_step.objective, crop)
    return plan.optim.batch_size * single


def weights_file(work: Path, data: str, arm: str, seed: int) -> Path:
    """Return the weights of a finished pretraining run.

    Raises:
        UsageError: the run is not finished.
    """
    folder = run_folder(work, run_name(data, arm, seed))
    if not (folder / CARD_NAME).is_file():
        raise UsageError(
            f"--init {arm}: {folder} holds no finished run; type: python benchmarks/evidence.py "
            f"pretrain --data {data} --arm {arm} --seeds {seed} ...",
        )
    return folder / WEIGHTS_NAME


def encoder_like(work: Path, data: str, arm: str) -> EncoderPlan:
    """Return the architecture of an arm's encoders.

    Pretraining may plan smaller tokens than a transformer has by name. A network with random
    weights has to take the same tokens to be compared with it.

    Raises:
        UsageError: the arm has no finished run.
    """
    finished = sorted((work / "runs").glob(f"{data}-{arm}-s[0-9]*/{CARD_NAME}"))
    if not finished:
        raise UsageError(
            f"--like {arm}: no run of this arm is finished; type: python benchmarks/evidence.py "
            f"pretrain --data {data} --arm {arm} ...",
        )
    card = read_card(finished[0].parent)
    return EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
