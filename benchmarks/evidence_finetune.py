"""Fine-tuning by ``evidence.py``.

The network, the recipe and the loading of weights are the project's, the loss is nnU-Net's.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from evidence_augment import LabelledScans
from evidence_data import SETS, ResidentSet, labelled_patients
from evidence_lines import (
    Deadline,
    Line,
    ResultFile,
    Stopwatch,
    circumstances,
    half_precision,
    key_of,
)
from evidence_pretrain import encoder_like, weights_file
from evidence_score import Scores, mean, mean_of, score, storable
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nnunet_autoreg import checkpoint
from nnunet_autoreg.benchmark.protocol import recipe_values as read_recipe
from nnunet_autoreg.finetune.block import AutoregBlock, PlannedWeights, Recipe, check_block
from nnunet_autoreg.finetune.decoder import transferred_keys
from nnunet_autoreg.finetune.families import decoder_first, recipe_values
from nnunet_autoreg.finetune.load import Target, WeightTable, load_encoder
from nnunet_autoreg.finetune.network import build_network
from nnunet_autoreg.finetune.recipe import (
    IterationRates,
    encoder_parameters,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.card import read_card, verify_weights
from nnunet_autoreg.model.sizes import encoder_size, suited_to
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import from_jsonable, to_jsonable

log = logging.getLogger("nnunet_autoreg.evidence")

SCRATCH = "scratch"
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning.

    Attributes:
        init: the arm whose pretraining the network starts from, or "scratch".
        pretraining_seed: of that pretraining; None from scratch.
        labels: number of labelled patients.
        draw: number of the draw, which decides the patients, the fresh weights and the patches; the
            arms share it.
        split: "development" or "test".
        at: steps after which the scans are scored besides the last.
        optimizer, lr, encoder_lr: None for the recipe's own; of ``encoder_lr`` for the rate of the
            other parameters.
        recipe: other changed values of the recipe, "key=value".
        half: compute in bfloat16 also on a CPU.
        like: from scratch, an arm whose architecture the network takes; None for the encoder's own.
    """

    data: str
    init: str
    pretraining_seed: int | None
    encoder: str
    labels: int
    draw: int
    split: str
    steps: int
    at: tuple[int, ...]
    batch: int
    crop_vox: Size | None = None
    optimizer: str | None = None
    lr: float | None = None
    encoder_lr: float | None = None
    recipe: tuple[str, ...] = ()
    tolerance_mm: float | None = None
    half: bool = False
    like: str | None = None

    @property
    def arm(self) -> str:
        """Name of the arm in the results."""
        return self.init if self.like is None else f"{self.init} (like {self.like})"

    @property
    def identity(self) -> Line:
        """The values that identify the run."""
        return {
            "command": "finetune",
            "set": self.data,
            "arm": self.arm,
            "pretraining_seed": self.pretraining_seed,
            "encoder": self.encoder,
            "labels": self.labels,
            "draw": self.draw,
            "split": self.split,
            "settings": {
                "steps": self.steps,
                "at": list(self.at),
                "batch": self.batch,
                "crop": list(self.crop),
                "optimizer": self.optimizer,
                "lr": self.lr,
                "encoder_lr": self.encoder_lr,
                "recipe": sorted(self.recipe),
                "tolerance_mm": self.tolerance_mm,
                "half": self.half,
            },
        }

    @property
    def crop(self) -> Size:
        """The patch, (z, y, x)."""
        return self.crop_vox or SETS[self.data].crop_vox


class Training:
    """A fine-tuning on its device: network, recipe, rates, optimiser, loss and labelled scans."""

    def __init__(self, job: FinetuneJob, data: ResidentSet, work: Path, device: torch.device):
        self.job, self.device = job, device
        self.cases = labelled_patients(data, job.labels, job.draw)
        self.block = block_of(job, data, work, len(self.cases))
        self.recipe = self.block.recipe
        # Weights that are not pretrained are the same in all arms of one draw.
        torch.manual_seed(job.draw)
        network = network_of(self.block, job.crop, data.num_classes)
        self.table = load_weights(network, self.block, job.crop, data)
        self.network = network.to(device)

        usual = self.recipe.scratch_rate if job.init == SCRATCH else self.recipe.pretrained_rate
        self.peak_rate = job.lr or usual
        decoder_keys = transferred_keys(network, self.block)
        groups = parameter_groups(network, self.recipe, decoder_keys)
        groups = with_encoder_rate(groups, network, self.peak_rate, job.encoder_lr)
        self.optimizer = make_optimizer(groups, self.recipe, self.peak_rate)
        uses_weights = job.init != SCRATCH
        schedule = make_schedule(self.recipe, self.peak_rate, 1, job.steps, job.batch, uses_weights)
        self.rates = IterationRates(self.optimizer, schedule, job.steps)
        self.loss_of = segmentation_loss(self.recipe.deep_supervision, self.network)
        scans = data.scans_on(self.cases, device)
        self.scans = LabelledScans(scans, data.facts.spacing_mm)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step."""
        return self.scans.batch(self.job.draw, step, self.job.batch, self.job.crop)

    def step(self, step: int) -> None:
        """Do one step of the optimiser."""
        images, labels = self.batch(step)
        self.network.train()
        self.rates.step(0, step)
        self.optimizer.zero_grad(set_to_none=True)
        with half_precision(self.device, self.job.half):
            outputs = self.network(images)
        self.loss_of(outputs, labels).backward()

        if self.rates.is_decoder_first(0, step):
            for parameter in encoder_parameters(self.network):
                parameter.grad = None
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.optimizer.step()

    def resume(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """Continue from the last checkpoint; return the number of steps done and the notes."""
        path = folder / checkpoint.LATEST_NAME
        if not path.is_file():
            return 0, {"seconds": 0.0, "process_seconds": 0.0, "curve": {}}
        content = checkpoint.load_checkpoint(path)
        self.network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["generator"])
        return int(content["step"]), dict(content["notes"])

    def save(self, folder: Path, step: int, notes: Mapping[str, Any]) -> None:
        """Write the checkpoint from which a later call continues."""
        content = {
            "network_weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "step": step,
            "notes": dict(notes),
        }
        checkpoint.save_checkpoint(folder / checkpoint.LATEST_NAME, content)

    def facts(self, data: ResidentSet) -> Line:
        """Return the values of the training in its line, besides its identity."""
        return {
            "scans": len(self.cases),
            "labelled": sorted({data.subject_of[case] for case in self.cases}),
            "classes": list(data.facts.classes),
            "peak_rate": self.peak_rate,
            "recipe": to_jsonable(self.recipe),
            "loaded_share": 0.0 if self.table is None else round(self.table.encoder_share, 4),
            "loaded": [] if self.table is None else self.table.lines(),
        }


def finetune(
    job: FinetuneJob,
    data: ResidentSet,
    work: Path,
    results: ResultFile,
    deadline: Deadline,
    device: torch.device,
) -> bool:
    """Train and score until the run's end or the deadline; return whether it is finished.

    What was trained is kept either way.

    Raises:
        UsageError: the pretraining is not finished, or the pool has too few patients.
        WeightsError: the weights do not fit the network.
    """
    if results.has(job.identity):
        return True
    training = Training(job, data, work, device)
    scored = data.scans_on(data.division.scored(job.split), device)
    key = hashlib.sha256(key_of(job.identity).encode()).hexdigest()[:16]
    folder = work / "finetuning" / key
    flops = flops_per_step(training.network, training.loss_of, training.batch(0))
    done, notes = training.resume(folder)
    clock = Stopwatch(notes["seconds"], notes["process_seconds"])
    saved = time.monotonic()

    while done < job.steps:
        training.step(done)
        done += 1
        if done in job.at and done < job.steps:
            with clock.paused():
                network = training.network
                found = score(network, scored, data, job.crop, job.half, with_surface=False)
            notes["curve"][str(done)] = {name: mean(values) for name, values in found.dice.items()}

        is_late = deadline.has_passed() and done < job.steps
        if is_late or time.monotonic() - saved > SAVE_EVERY_S:
            training.save(folder, done, {**notes, **clock.read()})
            saved = time.monotonic()
        if is_late:
            log.info("%s: stopped after step %d of %d", described(job), done, job.steps)
            return False

    spent = clock.read()
    scoring = Stopwatch()
    scores = score(training.network, scored, data, job.crop, job.half, job.tolerance_mm)
    costs = {
        "flops_per_step": flops,
        **spent,
        "scoring_seconds": scoring.read()["seconds"],
        "curve": notes["curve"],
    }
    facts = {**training.facts(data), **costs, **result_of(job, scores)}
    results.append({**job.identity, **facts, **circumstances(device)})
    shutil.rmtree(folder, ignore_errors=True)
    pace = spent["seconds"] / job.steps
    log.info("%s: Dice %.4f, %.2f s a step", described(job), scores.mean(), pace)
    return True


def result_of(job: FinetuneJob, scores: Scores) -> Line:
    """Return the length and the scores of a run, as its line keeps them."""
    return {
        "steps": job.steps,
        "samples": job.steps * job.batch,
        "dice_mean": round(scores.mean(), 5),
        "surface_mean": round(mean_of(scores.surface), 5),
        "dice": storable(scores.dice),
        "surface": storable(scores.surface),
    }


def described(job: FinetuneJob) -> str:
    """Return a run in words for messages."""
    start = job.init
    if job.pretraining_seed is not None:
        start += f" s{job.pretraining_seed}"
    return f"{job.data} {start}, {job.labels} labelled, draw {job.draw}"


def block_of(job: FinetuneJob, data: ResidentSet, work: Path, num_cases: int) -> AutoregBlock:
    """Return the project's plan of such a fine-tuning: encoder, weights and recipe.

    Raises:
        UsageError, PlanError: a value of the recipe that does not exist or is impossible, or a
            pretraining that is not finished.
    """
    if job.init == SCRATCH and job.like is not None:
        encoder, weights = encoder_like(work, job.data, job.like), None
    elif job.init == SCRATCH:
        size = suited_to(encoder_size(job.encoder), data.facts.spacing_mm)
        encoder = EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)
        weights = None
    else:
        assert job.pretraining_seed is not None, "every pretraining has a seed"
        file = weights_file(work, job.data, job.init, job.pretraining_seed)
        card = read_card(file.parent)
        encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
        weights = PlannedWeights(card.name, str(file), card.sha256, card.has_decoder)

    planned = {**recipe_values(encoder), "num_iterations_per_epoch": job.steps}
    changed = read_recipe(job.recipe)
    if job.optimizer:
        changed["optimizer"] = job.optimizer
    known = to_jsonable(Recipe(num_epochs=1, **planned))
    recipe = from_jsonable(Recipe, {**known, **changed}, "--recipe")
    block = AutoregBlock(encoder, weights, recipe)

    # For which share of the steps only the decoder learns at first, unless it is given.
    if "decoder_first_fraction" not in changed:
        is_pretrained, has_decoder = weights is not None, block.transfers_decoder
        share, _ = decoder_first(encoder, num_cases, is_pretrained, "", has_decoder)
        block = replace(block, recipe=replace(recipe, decoder_first_fraction=share))
    return check_block(block, "--recipe")


def network_of(block: AutoregBlock, crop_vox: Size, num_classes: int) -> nn.Module:
    """Return the network with random weights."""
    return build_network(
        block,
        crop_vox,
        1,
        num_classes,
        deep_supervision=block.recipe.deep_supervision,
    )


def load_weights(
    network: nn.Module,
    block: AutoregBlock,
    crop_vox: Size,
    data: ResidentSet,
) -> WeightTable | None:
    """Copy the pretrained weights into the network as the recipe says; None from scratch."""
    if block.weights is None:
        return None
    file = Path(block.weights.file)
    verify_weights(file, block.weights.sha256)
    names = tuple(sorted({scan.channel for scan in data.facts.scans}))
    recipe = block.recipe
    return load_encoder(
        network,
        file,
        read_card(file.parent),
        Target(1, crop_vox, names),
        recipe.expected_encoder_share,
        recipe.transfer_decoder,
    )


def with_encoder_rate(
    groups: Sequence[Mapping[str, Any]],
    network: nn.Module,
    peak_rate: float,
    encoder_rate: float | None,
) -> list[dict[str, Any]]:
    """Return the optimiser's groups, with a separate rate for the encoder if one is given."""
    if encoder_rate is None:
        return [dict(group) for group in groups]
    of_encoder = {id(parameter) for parameter in encoder_parameters(network)}
    made = []
    for group in groups:
        inside, outside = [], []
        for parameter in group["params"]:
            part = inside if id(parameter) in of_encoder else outside
            part.append(parameter)
        factor = group["rate_factor"] * encoder_rate / peak_rate
        if outside:
            made.append({**group, "params": outside})
        if inside:
            made.append({**group, "params": inside, "rate_factor": factor})
    return made


class SegmentationLoss:
    """nnU-Net's sum of Dice and cross-entropy, over all resolutions that a network predicts at.

    Args:
        num_outputs: resolutions; each weighs half of the one before, the last of several nothing.
    """

    def __init__(self, num_outputs: int):
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        self.loss = DC_and_CE_loss(
            dice,
            {},
            weight_ce=1,
            weight_dice=1,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
        weights = [0.5**level for level in range(num_outputs)]
        if num_outputs > 1:
            weights[-1] = 0.0
        self.weights = [weight / sum(weights) for weight in weights]

    def __call__(self, outputs: Tensor | Sequence[Tensor], labels_B1ZYX: Tensor) -> Tensor:
        """Return the loss of logits (B, classes, Z, Y, X), or of several, the finest first."""
        several = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        total = torch.zeros((), device=labels_B1ZYX.device)
        for weight, output in zip(self.weights, several, strict=True):
            if weight == 0:
                continue
            target = labels_B1ZYX
            if output.shape[2:] != target.shape[2:]:
                target = functional.interpolate(target, output.shape[2:], mode="nearest-exact")
            # Dice sums over many voxels, too many for half precision.
            total = total + weight * self.loss(output.float(), target)
        return total


def segmentation_loss(is_deep: bool, network: nn.Module) -> SegmentationLoss:
    """Return the loss for a network's outputs."""
    decoder: Any = getattr(network, "decoder", None)
    return SegmentationLoss(len(decoder.stages) if is_deep else 1)


def flops_per_step(
    network: nn.Module,
    loss_of: SegmentationLoss,
    batch: tuple[Tensor, Tensor],
) -> float:
    """Return the multiplications and additions of a training step, forward and backward."""
    images, labels = batch
    network.train()
    # Dropped paths draw random numbers. The run must not depend on this counting.
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        loss_of(network(images[:1]), labels[:1]).backward()
    torch.set_rng_state(state)
    network.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) * len(images)
