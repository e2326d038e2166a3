"""Scores of a fine-tuned network on whole scans: Dice and surface Dice, per patient and class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from evidence_data import DeviceScan, ResidentSet
from evidence_lines import half_precision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.benchmark.surface import surface_dice_of_labels
from nnunet_autoreg.geometry import Size, as_size, round_up

TILE_OVERLAP = 0.5


@dataclass(frozen=True)
class Scores:
    """Dice and surface Dice of every patient and class.

    They are NaN where neither truth nor prediction holds a class.
    """

    dice: dict[str, list[float]]
    surface: dict[str, list[float]]

    def mean(self) -> float:
        """Return the mean Dice over patients of the mean over classes."""
        return mean_of(self.dice)


@torch.no_grad()
def score(
    network: nn.Module,
    scans: Sequence[DeviceScan],
    data: ResidentSet,
    crop_vox: Size,
    half: bool,
    tolerance_mm: float | None = None,
    with_surface: bool = True,
) -> Scores:
    """Score a network on whole scans; a patient's scans are averaged.

    Args:
        crop_vox: the patch that a transformer was trained on.
        half: compute in bfloat16 also on a CPU.
        tolerance_mm: of surface Dice; None for the finest spacing, which is one voxel.
    """
    network.eval()
    is_deep = bool(getattr(getattr(network, "decoder", None), "deep_supervision", False))
    set_deep_supervision(network, False)
    spacing = data.facts.spacing_mm
    tolerance = tolerance_mm or min(spacing)
    classes = range(1, data.num_classes)

    dice: dict[str, list[list[float]]] = {}
    surface: dict[str, list[list[float]]] = {}
    for scan in scans:
        with half_precision(scan.image.device, half):
            predicted = segment(network, scan.image, crop_vox, data.num_classes)
        truth = scan.labels[0, 0].cpu().numpy()
        patient = data.subject_of[scan.case]
        dice.setdefault(patient, []).append(dice_of_labels(truth, predicted, classes))
        if with_surface:
            found = surface_dice_of_labels(truth, predicted, list(classes), spacing, tolerance)
            surface.setdefault(patient, []).append(list(found))

    set_deep_supervision(network, is_deep)
    network.train()
    return Scores(
        {patient: _over_scans(rows) for patient, rows in dice.items()},
        {patient: _over_scans(rows) for patient, rows in surface.items()},
    )


def set_deep_supervision(network: nn.Module, is_on: bool) -> None:
    decoder: Any = getattr(network, "decoder", None)
    if hasattr(decoder, "deep_supervision"):
        decoder.deep_supervision = is_on


def segment(
    network: nn.Module,
    image: Tensor,
    crop_vox: Size,
    num_classes: int,
) -> NDArray[np.uint8]:
    """Return the label map (Z, Y, X) of a scan (1, 1, Z, Y, X).

    A CNN sees the whole scan at once, padded with zeros to what its strides divide. A transformer,
    whose grid of tokens is fixed, sees patches that overlap by half, with nnU-Net's Gaussian
    weights.
    """
    shape = image.shape[2:]
    if hasattr(network, "decoder") and hasattr(network.decoder, "deep_supervision"):
        encoder: Any = network.encoder
        strides = torch.tensor([list(stride) for stride in encoder.strides])
        whole = round_up(as_size(shape), strides.prod(dim=0).tolist())
        logits = network(_padded(image, whole)).float()
    else:
        logits = _by_tiles(network, image, crop_vox, num_classes)
    cropped = logits[0, :, : shape[0], : shape[1], : shape[2]]
    return np.asarray(cropped.argmax(dim=0).to(torch.uint8).cpu().numpy())


def _padded(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return the image with zeros behind it, up to ``size``."""
    missing = []
    for wanted, extent in zip(size, image.shape[2:], strict=True):
        missing.append(max(0, wanted - extent))
    z, y, x = missing
    # torch takes the last axis first.
    return functional.pad(image, [0, x, 0, y, 0, z])


def _by_tiles(network: nn.Module, image: Tensor, crop_vox: Size, num_classes: int) -> Tensor:
    from nnunetv2.inference.sliding_window_prediction import (
        compute_gaussian,
        compute_steps_for_sliding_window,
    )

    padded = _padded(image, crop_vox)
    shape = padded.shape[2:]
    starts = compute_steps_for_sliding_window(tuple(shape), tuple(crop_vox), TILE_OVERLAP)
    weight = compute_gaussian(
        tuple(crop_vox),
        sigma_scale=1 / 8,
        value_scaling_factor=10,
        device=image.device,
    ).float()
    total = torch.zeros((1, num_classes, *shape), device=image.device)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                tile = (
                    ...,
                    slice(z, z + crop_vox[0]),
                    slice(y, y + crop_vox[1]),
                    slice(x, x + crop_vox[2]),
                )
                total[tile] += network(padded[tile]).float() * weight
    return total


def dice_of_labels(
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    classes: Sequence[int],
) -> list[float]:
    """Return the Dice of every class; NaN if neither map holds it."""
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
    means = []
    for total, count in zip(sums, counts, strict=True):
        means.append(float(total / count) if count else math.nan)
    return means


def mean_of(scores: Mapping[str, Sequence[float]]) -> float:
    """Return the mean over patients of the mean over the classes that have a score."""
    means = [mean(values) for values in scores.values()]
    return float(np.nanmean(means)) if means else math.nan


def mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return round(float(np.mean(known)), 5) if known else math.nan


def storable(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float | None]]:
    """Return scores for JSON: null if there is none."""
    stored = {}
    for patient, values in scores.items():
        stored[patient] = [round(value, 4) if math.isfinite(value) else None for value in values]
    return stored
