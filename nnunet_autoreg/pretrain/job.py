"""The training itself, from stored scans to the last step: what the main process hands to all, and
what each makes of it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.distributed import ALONE, World, is_spread, usable
from nnunet_autoreg.pretrain.loading import choose_loaders
from nnunet_autoreg.pretrain.loop import Trainer
from nnunet_autoreg.pretrain.machine import usable_cores
from nnunet_autoreg.pretrain.probe import LabelledCrop
from nnunet_autoreg.pretrain.start import start_from
from nnunet_autoreg.report.slices import Picture, held_out_pictures
from nnunet_autoreg.sampling.material import Material


@dataclass(frozen=True)
class Job:
    """All that a process needs to train with the others; files are read through it, and the run's
    folder by the main process alone.

    Attributes:
        device: cpu, cuda or mps.
        is_new: no checkpoint is there, so that weights named by ``--init`` count.
        num_local: processes on one machine.
    """

    folder: Path
    plan: Plan
    device: str
    training: Material
    heldout: Material
    probe: Sequence[LabelledCrop]
    is_new: bool
    num_local: int = 1


def trainer_of(job: Job, world: World = ALONE, local_rank: int = 0) -> Trainer:
    """The trainer of a fresh network, the same one in all processes."""
    plan = job.plan
    torch.manual_seed(plan.run.seed)
    objective = build_objective(plan)
    if job.is_new:
        start_from(objective.network, plan)
    num_loaders, _ = choose_loaders(plan, job.device, job.num_local)
    trainer = Trainer(
        plan,
        job.folder,
        objective,
        job.training,
        job.heldout,
        device_of(job.device, local_rank, world),
        num_loaders,
        job.probe,
        world,
    )
    if not world.is_main:
        torch.manual_seed(plan.run.seed + world.rank)
    return trainer


def device_of(device: str, local_rank: int, world: World = ALONE) -> torch.device:
    """This process's own device; alone it is the current one."""
    return (
        torch.device(device, local_rank)
        if device == "cuda" and world.size > 1
        else torch.device(device)
    )


def is_shared_out(job: Job, num_processes: int) -> bool:
    """Whether the weights are to be spread over the processes, so that one of them cannot try a
    step alone.
    """
    with torch.device("meta"):
        module = build_objective(job.plan).module
    return is_spread(
        job.plan.run.sharding, module, torch.device(job.device), World(size=num_processes)
    )


def share_cores(num_local: int) -> None:
    """Have this process compute on its share of the cores, unless the user chose."""
    if num_local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // num_local))


def measured(
    job: Job, world: World, local_rank: int, write: Callable[[Plan, float], Plan] | None
) -> Job:
    """The job with its hours turned into steps by a rehearsal of all processes.

    Args:
        write: of the main process, makes the plan from the seconds of a step and keeps it.
    """
    from nnunet_autoreg.pretrain.fit import free
    from nnunet_autoreg.pretrain.pace import seconds_per_step

    seconds = seconds_per_step(trainer_of(job, world, local_rank))
    free()
    return replace(
        job, plan=world.share(write(job.plan, seconds) if write is not None else job.plan)
    )


def pictures_of(trainer: Trainer) -> Callable[[], list[Picture]]:
    """What draws held-out samples; where the weights are spread, all processes have to call it."""
    draw = partial(
        held_out_pictures,
        trainer.objective,
        trainer.heldout,
        trainer.device,
        trainer.plan.data.spacing_mm,
    )

    def drawn() -> list[Picture]:
        with usable(trainer.train_step.loss_of):
            return draw()

    return drawn


def assist(job: Job, is_paced: bool, world: World, local_rank: int) -> None:
    """The part of a process beside the main one: it trains its share, and lends its part of the
    weights where they are spread.
    """
    if is_paced:
        job = measured(job, world, local_rank, None)
    trainer = trainer_of(job, world, local_rank)
    pictures = pictures_of(trainer)
    if trainer.is_sharded:
        trainer.after_checkpoint = pictures
    trainer.run()
    if trainer.is_sharded:
        pictures()
        trainer.objective.transferable_state()
    world.wait()
