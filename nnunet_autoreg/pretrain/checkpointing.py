"""Initial weights, checkpoints, and the exported encoder of a run.

File 11 of 11 in reading order.

Initial weights (``--init``) come from a finished run or from another project. The latter are first
imported into the run's folder, as ``autoreg_weights import`` does. A run continues from a
checkpoint. At its end, the encoder is exported with its card.

A checkpoint need not contain everything: the learning rate is a function of the step, samples are
functions of (seed, step, number), and bf16 needs no loss scaler.
"""

import logging
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import AutoregError, CheckpointError
from nnunet_autoreg.io.addresses import is_address
from nnunet_autoreg.machine import is_out_of_memory
from nnunet_autoreg.model.card import (
    CARD_NAME,
    WEIGHTS_NAME,
    Adaptation,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.model.verdict import Verdict
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.phases import phase
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.distributed import (
    SINGLE_PROCESS,
    World,
    deferred,
    full_tensors,
    is_lost_peer,
    shard_like,
)
from nnunet_autoreg.pretrain.request import public_plan
from nnunet_autoreg.pretrain.training_step import LossSpikeGuard, StepStatistics
from nnunet_autoreg.records import sha256_of, to_jsonable
from nnunet_autoreg.sampling.pool import SamplingPool

log = logging.getLogger(__name__)

IMPORT_NAME = "initial"
"""Folder in a run's folder, and name in its log, of imported weights."""

INIT_SHARE = 0.95
"""Share of the encoder's weights that a file named by ``--init`` has to hold."""


def starting_point(init: str, run: Path) -> Path:
    """Return the ``encoder.safetensors`` that a planned run starts from.

    Args:
        init: value of ``--init``: a path, or the address of a repository on Hugging Face.
        run: the run's folder.
    """
    path = Path(init)
    if not is_address(init):
        # Other safetensors files have no card of ours beside them.
        is_ours = path.name == WEIGHTS_NAME or (path.parent / CARD_NAME).is_file()
        if path.suffix == ".safetensors" and is_ours:
            return path
        if (path / WEIGHTS_NAME).is_file():
            return path / WEIGHTS_NAME
    return run / IMPORT_NAME / WEIGHTS_NAME


def prepare_starting_point(init: str, run: Path) -> EncoderCard:
    """Return the card of the weights of ``--init``; import them first if necessary.

    Raises:
        WeightsError: they cannot be downloaded, read or imported.
    """
    weights = starting_point(init, run)
    if weights.parent != run / IMPORT_NAME:
        return read_card(weights.parent)

    # Imported here, because finished runs need no torch to be found.
    from nnunet_autoreg.convert.hub import local_weights
    from nnunet_autoreg.convert.imported import ImportOptions, write_run
    from nnunet_autoreg.convert.importing import converted
    from nnunet_autoreg.convert.source import open_source

    # Nothing was trained yet, so an earlier import may be of another file.
    shutil.rmtree(run / IMPORT_NAME, ignore_errors=True)
    imported = converted(open_source(local_weights(init)), ImportOptions())
    for note in imported.notes:
        log.info("--init: %s", note)
    card = write_run(imported, run, IMPORT_NAME)
    log.info("starting from %s: %s", card.objective, card.encoder)
    return card


def initial_weights(plan: Plan, folder: Path) -> tuple[Path, EncoderCard] | None:
    """Return the verified file of ``--init`` and its card; None without ``--init``.

    Args:
        folder: folder of the run, which holds weights that were imported from another project.

    Raises:
        WeightsError: either is missing or damaged.
    """
    source = plan.request.get("init")
    if not source:
        return None
    weights = starting_point(str(source), folder)
    card = read_card(weights.parent)
    verify_weights(weights, card.sha256)
    return weights, card


def check_initial_weights(plan: Plan, folder: Path) -> None:
    """Refuse weights of ``--init`` that do not fit this plan.

    Raises:
        WeightsError: they are missing, damaged, or of another encoder.
    """
    named = initial_weights(plan, folder)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import check_same_encoder, read_tensors

    weights, card = named
    check_same_encoder(card, plan.encoder)
    read_tensors(weights)


def load_initial_weights(network: nn.Module, plan: Plan, folder: Path) -> None:
    """Load the weights of ``--init`` into the new encoder.

    Raises:
        WeightsError: they are damaged, or of another encoder.
    """
    named = initial_weights(plan, folder)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import Target, load_encoder

    weights, card = named
    target = Target(1, plan.sequence.crop_size_vox)
    table = load_encoder(network, weights, card, target, INIT_SHARE)
    for line in table.lines():
        log.info(line)


@dataclass
class Progress:
    """The progress of a training.

    Attributes:
        step: steps done.
        best_error: the best figure of merit so far, as ``Health.merit`` gives it; infinite before
            the first.
        rollbacks: how often the weights went back to an earlier checkpoint.
        collapsed: validations in a row, up to the newest, that found the features collapsed.
    """

    step: int = 0
    best_error: float = math.inf
    rollbacks: int = 0
    collapsed: int = 0


def snapshot(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    guard: LossSpikeGuard,
    progress: Progress,
    world: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Return the whole state of a training, with full tensors even if they are sharded.

    All processes have to call this. In the workers, sharded tensors are missing from the result.
    """
    return {
        "network_weights": full_tensors(objective.module.state_dict(), world),
        "extra": full_tensors(objective.extra_state(), world),
        "optimizer": full_tensors(optimizer.state_dict(), world),
        "guard": guard.state_dict(),
        "step": progress.step,
        "best_error": progress.best_error,
        "rollbacks": progress.rollbacks,
        "collapsed": progress.collapsed,
        # Every process has its own generators.
        "generators": world.gather(generator_states()),
    }


def measure_pool(objective: Objective, pool: SamplingPool, world: World = SINGLE_PROCESS) -> None:
    """Set the values that the objective measures on the pool, before a run's first step.

    The main process measures them for all processes. Checkpoints contain them.

    Raises:
        AutoregError: the pool cannot be read, or has too few voxels.
    """
    found = world.share(objective.pool_statistics(pool) if world.is_main else {})
    unexpected = objective.module.load_state_dict(found, strict=False).unexpected_keys
    assert not unexpected, f"the module has no buffers {unexpected}"
    objective.begin()


def shareable(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a snapshot in the form in which ``World.share`` sends it to the other processes.

    Weights and moments are sent later, one by one, as they are restored.
    """
    shared = dict(content)
    for key in ("network_weights", "extra", "optimizer"):
        if key in content:
            shared[key] = deferred(content[key])
    return shared


def restore(
    content: Mapping[str, Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    guard: LossSpikeGuard,
    world: World = SINGLE_PROCESS,
) -> Progress:
    """Restore a snapshot in all processes at once; return the progress of the training.

    A process that did not exist when the snapshot was made keeps its new generators.

    Args:
        content: the process's own, or what the main process made ``shareable``.

    Raises:
        KeyError, RuntimeError, ValueError: the content is of another network or optimizer.
    """
    restore_weights(content, objective, optimizer, world)
    guard.load_state_dict(content["guard"])
    if world.rank < len(content["generators"]):
        set_generators(content["generators"][world.rank])
    return Progress(
        int(content["step"]),
        float(content["best_error"]),
        int(content["rollbacks"]),
        # Checkpoints of earlier releases did not count them.
        int(content.get("collapsed", 0)),
    )


def restore_weights(
    content: Mapping[str, Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    world: World = SINGLE_PROCESS,
) -> None:
    """Restore only weights, the objective's extra state and the optimizer, for a roll-back.

    If they are sharded, each process takes its own part.
    """
    module = objective.module
    present = module.state_dict()
    weights = {}
    for name, value in content["network_weights"].items():
        weights[name] = shard_like(world.fetch(value), present.get(name))
    module.load_state_dict(weights)

    # Checkpoints of earlier releases have none, because no objective needed it.
    extra = {name: world.fetch(value) for name, value in content.get("extra", {}).items()}
    objective.load_extra_state(extra)

    # The optimizer's state counts parameters through all groups.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = content["optimizer"]
    state = {}
    for number, entries in saved["state"].items():
        parameter = parameters[number] if number < len(parameters) else None
        moments = {}
        for key, value in entries.items():
            moments[key] = shard_like(world.fetch(value), parameter)
        state[number] = moments
    optimizer.load_state_dict({**saved, "state": state})


def generator_states() -> dict[str, Any]:
    """Return the state of every global generator of this process as tensors and plain values.

    Only the CUDA device of this process is included.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Restore the states from ``generator_states``; those of missing devices are ignored."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])

    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def folder_identity(folder: Path) -> tuple[int, int] | None:
    """Return an identity of a folder, which differs for another folder at the same path; None
    without one.

    It is the number of the file system and of the folder on it.
    """
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Checkpoints:
    """Saves the state of a run in checkpoints, and restores it from them.

    All processes call the methods together. Only the main process reads and writes files.

    Attributes:
        progress: progress of the training.
        statistics: statistics of all steps, as they were last logged.
        saved_step: the step that the newest checkpoint was made after; 0 if there is none.
        latest_is_scheduled: the newest checkpoint was due and good, so that a run may go back to
            it, and the next one must not replace it.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        guard: LossSpikeGuard,
        world: World = SINGLE_PROCESS,
    ):
        self.plan = plan
        self.folder = folder
        self.objective = objective
        self.optimizer = optimizer
        self.guard = guard
        self.world = world

        self.progress = Progress()
        self.statistics = guard.statistics()
        self.saved_step = 0
        self.latest_is_scheduled = False
        self.identity: tuple[int, int] | None = None
        """Which folder on which disk ``folder`` was when training began."""

    def resume(self, pool: SamplingPool) -> None:
        """Continue from the newest checkpoint, or begin with what is measured on the pool.

        Raises:
            CheckpointError: the checkpoint belongs to another plan.
        """
        found = checkpoint.load_newest(self.folder) if self.world.is_main else None
        newest = self.world.share(None if found is None else (found[0], shareable(found[1])))
        if newest is None:
            measure_pool(self.objective, pool, self.world)
            return

        path, content = newest
        try:
            self.progress = restore(content, self.objective, self.optimizer, self.guard, self.world)
            self.statistics = StepStatistics(**content["told"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            # Tensors are sent and moved here: nothing may be wrong with the file.
            if is_lost_peer(error) or is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path} does not belong to this plan ({why}); move it away to start over",
                code="checkpoint-other-plan",
            ) from error

        is_latest = path.name == checkpoint.LATEST_NAME
        self.latest_is_scheduled = is_latest and bool(content["scheduled"])
        self.saved_step = self.progress.step
        log.info("continuing after step %d of %d", self.progress.step, self.plan.optim.num_steps)

    def remember_folder(self) -> None:
        """Note which folder the run's is, so that ``require_folder`` recognises it."""
        self.identity = folder_identity(self.folder)

    def require_folder(self) -> None:
        """Make sure that the folder is there and the same as when training began.

        A folder that was made since belongs to another run.

        Raises:
            AutoregError: it was removed or replaced.
        """
        if self.world.is_main and folder_identity(self.folder) != self.identity:
            raise AutoregError(
                f"{self.folder} was removed, renamed or replaced during training, so nothing can "
                "be saved; training stops here. Put the folder back to continue from its last "
                "checkpoint, or type the same line again to start over",
                code="training-folder-gone",
            )

    def save_newest(self, needed: bool) -> None:
        """Save the newest state, keeping the one before.

        Args:
            needed: also in the middle of a row of bad steps, or while the features are collapsed,
                of which no regular checkpoint is made.
        """
        step = self.progress.step
        is_regular = step % self.plan.run.checkpoint_every == 0
        is_good = self.guard.statistics().in_row == 0 and self.progress.collapsed == 0
        # A roll-back to a bad state would help nobody.
        scheduled = is_regular and is_good
        if not scheduled and not needed and step < self.plan.optim.num_steps:
            return

        # The previous checkpoint is replaced by a scheduled one only.
        previous = self.folder / checkpoint.PREVIOUS_NAME
        keeps = self.latest_is_scheduled or not previous.exists()
        with phase("saving a checkpoint"):
            self._save(checkpoint.LATEST_NAME, scheduled, previous if keeps else None)
        self.latest_is_scheduled = scheduled
        self.saved_step = step

    def save_best(self) -> None:
        """Save the state as the best so far."""
        self._save(checkpoint.BEST_NAME, scheduled=False)

    def _save(self, name: str, scheduled: bool, previous: Path | None = None) -> None:
        """Gather the state of all processes, which the main process writes."""
        state = snapshot(self.objective, self.optimizer, self.guard, self.progress, self.world)
        if self.world.is_main:
            self.require_folder()
            content = {
                **state,
                # The name of this key is part of the format of checkpoints.
                "told": to_jsonable(self.statistics),
                "scheduled": scheduled,
                "plan": to_jsonable(public_plan(self.plan)),
            }
            checkpoint.save_checkpoint(self.folder / name, content, previous)

    def roll_back(self) -> None:
        """Restore weights and optimizer of the last regular checkpoint, after a row of bad steps.

        Step and data continue, so that other data follow. Only regular checkpoints are used,
        because an interruption must not change where a run goes back to.

        Raises:
            AutoregError: there is no such checkpoint, or the run went back too often.
        """
        num_bad, most = self.statistics.in_row, self.plan.run.max_rollbacks
        may_go_back = self.progress.rollbacks < most
        lower_rate = f"--set optim.lr={self.plan.optim.lr / 3:.1e}"
        advice = f"start a new --name with a lower rate, e.g. {lower_rate}"

        # Only the main process reads the folder.
        searches = self.world.is_main and may_go_back
        found = checkpoint.newest_scheduled(self.folder) if searches else None
        good = self.world.share(None if found is None else shareable(found))
        if good is None:
            why = "there is no checkpoint to roll back to"
            if not may_go_back:
                why = f"it was rolled back {most} times already"
            raise AutoregError(
                f"the last {num_bad} steps until step {self.progress.step} were all bad (infinite, "
                f"NaN or far too large), and {why}; {advice}",
                code="training-diverged",
            )

        restore_weights(good, self.objective, self.optimizer, self.world)
        # The usual loss belongs to weights that are gone.
        self.guard.reset()
        self.statistics = self.guard.statistics()
        self.progress.rollbacks += 1
        log.warning(
            "the last %d steps until step %d were all bad. Rolled back to the checkpoint of step "
            "%s; training continues with other data (roll-back %d of at most %d). If this repeats, "
            "%s",
            num_bad,
            self.progress.step,
            good["step"],
            self.progress.rollbacks,
            most,
            advice,
        )

    def line_if_forced(self) -> str:
        """Return the line that ends the command where a stop does not wait for the step's end."""
        step = self.progress.step
        if self.saved_step == step > 0:
            return (
                f"stopped after step {step}; the state is saved: type the same line again to "
                "continue"
            )
        stopped = f"stopped after step {step}, because what follows takes too long to finish"
        if not self.saved_step:
            return (
                f"{stopped}; there was no checkpoint yet: type the same line again to begin the "
                "training again"
            )
        return (
            f"{stopped}; the checkpoint of step {self.saved_step} is kept: type the same line "
            "again to continue from there"
        )


def export_encoder(
    folder: Path,
    plan: Plan,
    objective: Objective,
    rows: Sequence[ScanRow],
    licences: dict[str, str],
    verdict: Verdict,
) -> EncoderCard:
    """Write the encoder's weights, then its card, which marks the run as finished.

    Args:
        rows: the scans of the run, validation scans included.
        licences: dataset -> licence text.
        verdict: what validation showed.
    """
    from nnunet_autoreg.finetune.load import write_tensors

    state, adaptation = objective.transferable_state(), objective.adaptation()
    check_exported_keys(state, adaptation)

    weights = folder / WEIGHTS_NAME
    write_tensors(weights, state)
    card = EncoderCard(
        name=plan.name,
        encoder=plan.encoder.name,
        class_path=plan.encoder.class_path,
        arguments=plan.encoder.arguments,
        token_size_vox=plan.encoder.token_size_vox,
        crop_size_vox=plan.sequence.crop_size_vox,
        spacing_mm=plan.data.spacing_mm,
        spacing_groups=plan.data.spacing_groups,
        modalities=tuple(sorted({row.modality for row in rows})),
        channel_names=tuple(sorted({row.channel for row in rows})),
        ct_window=plan.data.ct_window,
        num_input_channels=1,
        adaptation=adaptation,
        objective=kind_of(plan.objective.name).summary(plan),
        licences=licences,
        num_scans=len(rows),
        num_steps=plan.optim.num_steps,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=sha256_of(weights),
        verdict=verdict,
    )
    card.save(folder)
    return card


def check_exported_keys(keys: Iterable[str], adaptation: Adaptation) -> None:
    """Check that a file of weights has exactly the keys that its card lists.

    Segmentation heads and second names of the encoder (``decoder.encoder.``) would mislead every
    reader of the file.
    """
    encoder = (f"{adaptation.key_to_encoder}.", f"{adaptation.key_to_stem}.")
    listed = (*encoder, *adaptation.keys_to_decoder)
    stray = [key for key in keys if not key.startswith(listed)]
    assert not stray, f"the card lists no place for {stray[:3]}"
