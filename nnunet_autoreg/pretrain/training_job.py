"""The training of stored scans: what the main process prepares, and what each process does.

The main process calls ``run_main``, and every worker ``run_worker``. Both make the same calls that
involve all processes, in the same order.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.length import with_hours
from nnunet_autoreg.planning.pool import BY_USER
from nnunet_autoreg.pretrain import dry_run
from nnunet_autoreg.pretrain.checkpointing import load_initial_weights
from nnunet_autoreg.pretrain.data import choose_loaders
from nnunet_autoreg.pretrain.distributed import ALONE, World, device_of, gathered, is_sharded
from nnunet_autoreg.pretrain.probe import LabelledCrop
from nnunet_autoreg.pretrain.run_folder import write_plan
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.report.report import Reporter, RunSetting
from nnunet_autoreg.report.slices import Picture, held_out_pictures
from nnunet_autoreg.sampling.pool import SamplingPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """All that a process needs to train with the others. Only the main process uses the folder.

    Attributes:
        device: cpu, cuda or mps.
        training, validation: what sequences are cut from.
        probe: labelled crops for the frozen probe.
        is_new: there is no checkpoint, so that weights named by ``--init`` are loaded.
        num_local: processes on one machine.
    """

    folder: Path
    plan: Plan
    device: str
    training: SamplingPool
    validation: SamplingPool
    probe: Sequence[LabelledCrop]
    is_new: bool
    num_local: int = 1


def build_trainer(job: TrainingJob, world: World = ALONE, local_rank: int = 0) -> Trainer:
    """Return the trainer of a fresh network, which is the same in all processes."""
    plan = job.plan
    torch.manual_seed(plan.run.seed)
    objective = build_objective(plan)
    if job.is_new:
        load_initial_weights(objective.network, plan, job.folder)
    num_loaders, _ = choose_loaders(plan, job.device, job.num_local)
    trainer = Trainer(
        plan,
        job.folder,
        objective,
        job.training,
        job.validation,
        device_of(job.device, local_rank, world),
        num_loaders,
        job.probe,
        world,
    )

    # From here on each process draws its own numbers, e.g. for stochastic depth.
    if not world.is_main:
        torch.manual_seed(plan.run.seed + world.rank)
    return trainer


def fit_to_device(
    job: TrainingJob, make_job: Callable[[Plan], TrainingJob], num_training: int
) -> TrainingJob:
    """Return the job with a plan that fits this process's device, as a dry step has shown.

    The plan is written once, before the first step, so that a resumed run is the same run.

    Args:
        make_job: makes the job of a plan whose sequences are different.
        num_training: processes that will train together.
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
        plan = dry_run.fit_plan(
            dry_run.limit_to_share(job.plan, num_training),
            lambda plan: build_trainer(with_plan(plan)),
            torch.device(job.device),
        )
    write_plan(job.folder, plan)
    return with_plan(plan)


def will_be_sharded(job: TrainingJob, num_processes: int) -> bool:
    """Return whether the weights will be sharded over so many processes."""
    # Without memory for the weights.
    with torch.device("meta"):
        module = build_objective(job.plan).module
    world = World(size=num_processes)
    return is_sharded(job.plan.run.sharding, module, torch.device(job.device), world)


def run_main(job: TrainingJob, world: World, local_rank: int, setting: RunSetting) -> Trainer:
    """Train as the main process, and write the report; return the trainer for the export.

    Args:
        setting: where the run trains, for the report.
    """
    is_timed = needs_timing(job.plan)
    world.share((job, is_timed))
    if is_timed:
        with phase("measuring how long a step takes"):
            seconds = time_steps(job, world, local_rank)
            plan = plan_with_hours(job.folder, job.plan, seconds, job.device)
            job = replace(job, plan=world.share(plan))

    if world.size > 1:
        batch_size = job.plan.optim.batch_size
        log.info(
            "%d processes train together, %d of %d crops in this one",
            world.size,
            batch_size // world.size,
            batch_size,
        )
    if job.device == "cuda":
        num_loaders, why = choose_loaders(job.plan, job.device, job.num_local)
        log.info("%d processes load for each GPU (%s)", num_loaders, why)

    with phase("building the network and the validation batches"):
        trainer = build_trainer(job, world, local_rank)
    draw = picture_function(trainer, setting)
    reporter = Reporter(job.folder, job.plan, setting)

    def report() -> None:
        # Of sharded weights all processes draw the pictures, also where the report needs none.
        pictures = draw() if trainer.is_sharded else None
        reporter.write(draw if pictures is None else lambda: pictures)

    trainer.after_checkpoint = report
    trainer.run()
    trainer.require_folder()
    with phase("drawing the report"):
        report()
    return trainer


def run_worker(world: World, local_rank: int) -> None:
    """Train as a worker: compute a share of every batch, and hold a part of sharded weights."""
    received: tuple[TrainingJob, bool] | None = world.share(None)
    assert received is not None, "the main process sends the job"
    job, is_timed = received
    if is_timed:
        time_steps(job, world, local_rank)
        job = replace(job, plan=world.share(job.plan))

    trainer = build_trainer(job, world, local_rank)
    draw = picture_function(trainer)
    # Pictures and the export gather sharded weights, which takes all processes.
    if trainer.is_sharded:
        trainer.after_checkpoint = draw
    trainer.run()
    if trainer.is_sharded:
        draw()
        trainer.objective.transferable_state()
    world.wait()


def picture_function(
    trainer: Trainer, setting: RunSetting | None = None
) -> Callable[[], list[Picture]]:
    """Return a function that draws validation samples.

    Where the weights are sharded, all processes have to call it.
    """
    draw = partial(
        held_out_pictures,
        trainer.objective,
        trainer.validation_batches,
        trainer.device,
        trainer.plan.data.spacing_mm,
        None if setting is None else setting.scan_axes,
    )

    def draw_gathered() -> list[Picture]:
        with gathered(trainer.train_step.loss_of):
            return draw()

    return draw_gathered


def needs_timing(plan: Plan) -> bool:
    """Return whether the length was given in hours and no step has been timed yet."""
    is_open = plan.request.get("num_hours") is not None and plan.run.seconds_per_step is None
    return is_open and plan.reasons.get("optim.num_steps") != BY_USER


def time_steps(job: TrainingJob, world: World, local_rank: int) -> float:
    """Return the seconds of a step; all processes train a trainer that is then thrown away."""
    seconds = dry_run.seconds_per_step(build_trainer(job, world, local_rank))
    dry_run.free_memory()
    return seconds


def plan_with_hours(folder: Path, plan: Plan, seconds: float, device: str) -> Plan:
    """Return the plan with its hours turned into steps of so many seconds.

    It is written once, so that a resumed run is the same run.
    """
    plan = with_hours(plan, float(plan.request["num_hours"]), seconds, device)
    write_plan(folder, plan)
    log.info("optim.num_steps = %d (%s)", plan.optim.num_steps, plan.reasons["optim.num_steps"])
    return plan
