"""Fine-tuning by ``evidence.py``: the project's network, recipe and loading of weights; nnU-Net's loss; whole scans scored."""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_augment import LabelledScans
from evidence_data import SETS, DeviceScan, ResidentSet, labelled_patients
from evidence_lines import Deadline, Journal, Line, circumstances, key_of
from evidence_pretrain import weights_file
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nnunet_autoreg import checkpoint
from nnunet_autoreg.benchmark.protocol import recipe_values as read_recipe
from nnunet_autoreg.benchmark.surface import surface_dice_of_labels
from nnunet_autoreg.geometry import Size, as_size, round_up
from nnunet_autoreg.model.card import read_card, verify_weights
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.model.topology import suited_to
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.pretrain.validation import autocast
from nnunet_autoreg.records import from_jsonable, to_jsonable
from nnunet_autoreg.transfer.block import Recipe, check_recipe
from nnunet_autoreg.transfer.families import decoder_first, is_cnn, recipe_values
from nnunet_autoreg.transfer.load import Target, load_encoder
from nnunet_autoreg.transfer.recipe import (
    IterationRates,
    encoder_parameters,
    make_optimizer,
    make_schedule,
    parameter_groups,
)

log = logging.getLogger("evidence")

SCRATCH = "scratch"
SAVE_EVERY_S = 60.0
WHOLE, TILES = "whole", "tiles"
TILE_OVERLAP = 0.5


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning.

    Attributes:
        init: the arm whose pretraining the network starts from, or "scratch".
        pretraining_seed: of that pretraining; None from scratch.
        labels: number of labelled patients.
        draw: number of the draw, which decides the patients, the fresh weights and the patches; arms share it.
        split: "development" or "test".
        at: steps after which the scans are scored besides the last.
        optimizer, lr, encoder_lr: None for the recipe's own; ``encoder_lr`` for that of the other parameters.
        recipe: other changed values of the recipe, "key=value".
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

    @property
    def identity(self) -> Line:
        """What makes it the run that it is."""
        return {
            "command": "finetune",
            "set": self.data,
            "arm": self.init,
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
            },
        }

    @property
    def crop(self) -> Size:
        """The patch, (z, y, x)."""
        return self.crop_vox or SETS[self.data].crop_vox


@dataclass(frozen=True)
class Start:
    """A network before its first step, with what is said of it.

    Attributes:
        share: of the parameters of the encoder that come from the weights; 0 from scratch.
        sha256: of the weights; "" from scratch.
    """

    network: nn.Module
    encoder: EncoderPlan
    share: float
    sha256: str


@dataclass(frozen=True)
class Scores:
    """Dice and surface Dice per patient and class; NaN where neither truth nor prediction holds a class."""

    dice: dict[str, list[float]]
    surface: dict[str, list[float]]

    def mean(self) -> float:
        """Return the mean Dice over patients of the mean over classes."""
        return mean_of(self.dice)


def finetune(
    job: FinetuneJob, data: ResidentSet, work: Path, journal: Journal, deadline: Deadline, device: torch.device
) -> bool:
    """Train and score until the run's end or the deadline; return whether it is finished. What was trained is kept.

    Raises:
        UsageError: the pretraining is not finished, or the pool has too few patients.
        WeightsError: the weights do not fit the network.
    """
    if journal.has(job.identity):
        return True
    chosen = labelled_patients(data, job.labels, job.draw)
    torch.manual_seed(job.draw)
    start = start_of(job, data, work)
    network = start.network.to(device)
    recipe = recipe_of(job, start.encoder, len(chosen))
    peak_rate = job.lr or (recipe.scratch_rate if job.init == SCRATCH else recipe.pretrained_rate)

    groups = with_encoder_rate(parameter_groups(network, recipe), network, peak_rate, job.encoder_lr)
    optimizer = make_optimizer(groups, recipe, peak_rate)
    schedule = make_schedule(recipe, peak_rate, 1, job.steps, job.batch, job.init != SCRATCH)
    rates = IterationRates(optimizer, schedule, job.steps)
    loss_of = segmentation_loss(recipe.deep_supervision, network)
    scans = LabelledScans(data.scans_on(chosen, device), data.facts.spacing_mm)
    scored = data.scans_on(data.division.scored(job.split), device)

    folder = work / "finetuning" / hashlib.sha256(key_of(job.identity).encode()).hexdigest()[:16]
    step, notes = _resumed(folder, network, optimizer)
    flops = flops_per_step(network, loss_of, scans.batch(job.draw, 0, job.batch, job.crop), device)
    started = saved = time.monotonic()
    paused = 0.0

    while step < job.steps:
        network.train()
        images, labels = scans.batch(job.draw, step, job.batch, job.crop)
        rates.step(0, step)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            outputs = network(images)
        loss_of(outputs, labels).backward()
        if rates.is_decoder_first(0, step):
            for parameter in encoder_parameters(network):
                parameter.grad = None
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        step += 1

        if step in job.at and step < job.steps:
            before = time.monotonic()
            found = score(job, network, scored, data, device, with_surface=False)
            notes["curve"][str(step)] = {patient: _mean(values) for patient, values in found.dice.items()}
            paused += time.monotonic() - before
        is_late = deadline.has_passed() and step < job.steps
        if is_late or time.monotonic() - saved > SAVE_EVERY_S:
            spent = notes["seconds"] + time.monotonic() - started - paused
            _save(folder, network, optimizer, step, {**notes, "seconds": spent})
            saved = time.monotonic()
        if is_late:
            log.info("%s: stopped after step %d of %d", described(job), step, job.steps)
            return False

    seconds = notes["seconds"] + time.monotonic() - started - paused
    before = time.monotonic()
    scores = score(job, network, scored, data, device, with_surface=True)
    journal.append(
        {
            **job.identity,
            "scans": len(chosen),
            "labelled": sorted({data.subject_of[case] for case in chosen}),
            "classes": list(data.facts.classes),
            "steps": job.steps,
            "samples": job.steps * job.batch,
            "flops_per_step": flops,
            "seconds": round(seconds, 2),
            "scoring_seconds": round(time.monotonic() - before, 2),
            "peak_rate": peak_rate,
            "recipe": to_jsonable(recipe),
            "loaded_share": round(start.share, 4),
            "weights_sha256": start.sha256[:16],
            "dice_mean": round(scores.mean(), 5),
            "surface_mean": round(mean_of(scores.surface), 5),
            "dice": _storable(scores.dice),
            "surface": _storable(scores.surface),
            "curve": notes["curve"],
            **circumstances(device),
        }
    )
    shutil.rmtree(folder, ignore_errors=True)
    log.info("%s: Dice %.4f, %.2f s a step", described(job), scores.mean(), seconds / job.steps)
    return True


def described(job: FinetuneJob) -> str:
    """Return a run in words for messages."""
    seed = "" if job.pretraining_seed is None else f" s{job.pretraining_seed}"
    return f"{job.data} {job.init}{seed}, {job.labels} labelled, draw {job.draw}"


def start_of(job: FinetuneJob, data: ResidentSet, work: Path) -> Start:
    """Return the network with random weights, and with the pretrained ones copied in where the job names some."""
    arguments: dict[str, Any] = {}
    if job.init == SCRATCH:
        size = suited_to(encoder_size(job.encoder), data.facts.spacing_mm)
        encoder = EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)
    else:
        assert job.pretraining_seed is not None, "every pretraining has a seed"
        file = weights_file(work, job.data, job.init, job.pretraining_seed)
        card = read_card(file.parent)
        encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
    recipe = recipe_of(job, encoder, job.labels)
    if is_cnn(encoder):
        arguments["deep_supervision"] = recipe.deep_supervision
    else:
        arguments["drop_path_rate"] = recipe.drop_path_rate
    network = build_network(
        encoder.class_path, encoder.arguments, job.crop, 1, data.num_classes, **arguments
    )
    if job.init == SCRATCH:
        return Start(network, encoder, 0.0, "")

    verify_weights(file, card.sha256)
    names = tuple(sorted({scan.channel for scan in data.facts.scans}))
    target = Target(1, job.crop, names)
    table = load_encoder(network, file, card, target, recipe.expected_encoder_share)
    for line in table.lines():
        log.info(line)
    return Start(network, encoder, table.encoder_share, card.sha256)


def recipe_of(job: FinetuneJob, encoder: EncoderPlan, num_cases: int) -> Recipe:
    """Return the project's recipe for this encoder with the job's changes.

    Raises:
        UsageError, PlanError: a value that does not exist or is impossible.
    """
    recipe = Recipe(num_epochs=1, **{**recipe_values(encoder), "num_iterations_per_epoch": job.steps})
    share, _ = decoder_first(encoder, num_cases, job.init != SCRATCH, "")
    recipe = replace(recipe, decoder_first_fraction=share)
    changed = {**read_recipe(job.recipe), **({"optimizer": job.optimizer} if job.optimizer else {})}
    made = from_jsonable(Recipe, {**to_jsonable(recipe), **changed}, "--recipe")
    check_recipe(made, "--recipe")
    return made


def with_encoder_rate(
    groups: Sequence[Mapping[str, Any]], network: nn.Module, peak_rate: float, encoder_rate: float | None
) -> list[dict[str, Any]]:
    """Return the optimiser's groups with a rate of its own for the encoder; as they are where none is given."""
    if encoder_rate is None:
        return [dict(group) for group in groups]
    of_encoder = {id(parameter) for parameter in encoder_parameters(network)}
    made = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in of_encoder]
        outside = [p for p in group["params"] if id(p) not in of_encoder]
        factor = group["rate_factor"] * encoder_rate / peak_rate
        if outside:
            made.append({**group, "params": outside})
        if inside:
            made.append({**group, "params": inside, "rate_factor": factor})
    return made


class SegmentationLoss:
    """nnU-Net's sum of Dice and cross-entropy, over all resolutions of a network that predicts at several.

    Args:
        num_outputs: resolutions; each weighs half of the one before, and the last of several nothing.
    """

    def __init__(self, num_outputs: int):
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
        weights = [0.5**level for level in range(num_outputs)]
        if num_outputs > 1:
            weights[-1] = 0.0
        self.weights = [weight / sum(weights) for weight in weights]

    def __call__(self, outputs: Tensor | Sequence[Tensor], labels_B1ZYX: Tensor) -> Tensor:
        """Return the loss of logits (B, classes, Z, Y, X), or of those of every resolution, the finest first."""
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
    network: nn.Module, loss_of: SegmentationLoss, batch: tuple[Tensor, Tensor], device: torch.device
) -> float:
    """Return the multiplications and additions of a training step, forward and backward."""
    images, labels = batch
    network.train()
    # Dropped paths draw random numbers; the run must go on as if nothing had been counted.
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter, autocast(device):
        loss_of(network(images[:1]), labels[:1]).backward()
    torch.set_rng_state(state)
    network.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) * len(images)


def _resumed(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Go on from what an earlier slice left; return the step and the notes."""
    path = folder / checkpoint.LATEST_NAME
    if not path.is_file():
        return 0, {"seconds": 0.0, "curve": {}}
    content = checkpoint.load_checkpoint(path)
    network.load_state_dict(content["network_weights"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["generator"])
    return int(content["step"]), dict(content["notes"])


def _save(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int, notes: Mapping[str, Any]
) -> None:
    content = {
        "network_weights": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "step": step,
        "notes": dict(notes),
    }
    checkpoint.save_checkpoint(folder / checkpoint.LATEST_NAME, content)


@torch.no_grad()
def score(
    job: FinetuneJob,
    network: nn.Module,
    scans: Sequence[DeviceScan],
    data: ResidentSet,
    device: torch.device,
    with_surface: bool,
) -> Scores:
    """Score a network on whole scans; a patient's scans are averaged."""
    network.eval()
    is_deep = bool(getattr(getattr(network, "decoder", None), "deep_supervision", False))
    _set_deep_supervision(network, False)
    spacing = data.facts.spacing_mm
    tolerance = job.tolerance_mm or min(spacing)
    classes = range(1, data.num_classes)

    dice: dict[str, list[list[float]]] = {}
    surface: dict[str, list[list[float]]] = {}
    for scan in scans:
        predicted = segment(network, scan.image, job.crop, data.num_classes, device)
        truth = scan.labels[0, 0].cpu().numpy()
        patient = data.subject_of[scan.case]
        dice.setdefault(patient, []).append(dice_of_labels(truth, predicted, classes))
        if with_surface:
            found = surface_dice_of_labels(truth, predicted, list(classes), spacing, tolerance)
            surface.setdefault(patient, []).append(list(found))

    _set_deep_supervision(network, is_deep)
    network.train()
    return Scores(
        {patient: _over_scans(rows) for patient, rows in dice.items()},
        {patient: _over_scans(rows) for patient, rows in surface.items()},
    )


def _set_deep_supervision(network: nn.Module, is_on: bool) -> None:
    decoder: Any = getattr(network, "decoder", None)
    if hasattr(decoder, "deep_supervision"):
        decoder.deep_supervision = is_on


def segment(
    network: nn.Module, image: Tensor, crop_vox: Size, num_classes: int, device: torch.device
) -> NDArray[np.uint8]:
    """Return the label map (Z, Y, X) of a scan (1, 1, Z, Y, X).

    A CNN sees the whole scan at once, padded with zeros to what its strides divide. A transformer, whose grid of tokens is
    fixed, sees patches that overlap by half, with nnU-Net's Gaussian weights.
    """
    shape = image.shape[2:]
    with autocast(device):
        if hasattr(network, "decoder") and hasattr(network.decoder, "deep_supervision"):
            strides = torch.tensor([list(stride) for stride in network.encoder.strides])  # type: ignore[union-attr,operator]
            whole = round_up(as_size(shape), strides.prod(dim=0).tolist())
            logits = network(_padded(image, whole)).float()
        else:
            logits = _by_tiles(network, image, crop_vox, num_classes)
    cropped = logits[0, :, : shape[0], : shape[1], : shape[2]]
    return np.asarray(cropped.argmax(dim=0).to(torch.uint8).cpu().numpy())


def _padded(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return the image with zeros behind it, up to ``size``."""
    missing = [max(0, s - n) for s, n in zip(size, image.shape[2:], strict=True)]
    return functional.pad(image, [0, missing[2], 0, missing[1], 0, missing[0]])


def _by_tiles(network: nn.Module, image: Tensor, crop_vox: Size, num_classes: int) -> Tensor:
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

    padded = _padded(image, crop_vox)
    shape = padded.shape[2:]
    starts = compute_steps_for_sliding_window(tuple(shape), tuple(crop_vox), TILE_OVERLAP)
    weight = compute_gaussian(tuple(crop_vox), sigma_scale=1 / 8, value_scaling_factor=10, device=image.device).float()
    total = torch.zeros((1, num_classes, *shape), device=image.device)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                place = (..., slice(z, z + crop_vox[0]), slice(y, y + crop_vox[1]), slice(x, x + crop_vox[2]))
                total[place] += network(padded[place]).float() * weight
    return total


def dice_of_labels(
    truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: Sequence[int]
) -> list[float]:
    """Return the Dice of every class; NaN where neither map holds it."""
    found = []
    for value in classes:
        a, b = truth == value, predicted == value
        size = int(a.sum()) + int(b.sum())
        found.append(2 * int((a & b).sum()) / size if size else math.nan)
    return found


def _over_scans(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over a patient's scans, per class, without those that have no score."""
    table = np.array(rows, dtype=float)
    known = np.isfinite(table)
    counts = known.sum(axis=0)
    sums = np.where(known, table, 0.0).sum(axis=0)
    return [float(s / n) if n else math.nan for s, n in zip(sums, counts, strict=True)]


def mean_of(scores: Mapping[str, Sequence[float]]) -> float:
    """Return the mean over patients of the mean over the classes that have a score."""
    means = [_mean(values) for values in scores.values()]
    return float(np.nanmean(means)) if means else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return round(float(np.mean(known)), 5) if known else math.nan


def _storable(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float | None]]:
    """Return scores as JSON has them: null where there is none."""
    return {
        patient: [round(value, 4) if math.isfinite(value) else None for value in values]
        for patient, values in scores.items()
    }
