"""Dense probe: how well a linear classifier segments from frozen features, voxel by voxel.

A few labelled scans give the classifier its voxels. Their features, of all levels of the network at
once, are interpolated to the places of these voxels. The classifier is scored as Dice per structure
on all voxels of other patients. Nothing of the network is trained, so the score shows how much of
the segmentation its features hold already. It costs minutes, where fine-tuning costs hours.

The functions here know arrays only: no files, no nnU-Net, no particular network.

Shape suffixes: N sampled voxels, V features of all levels, C classes (0 is background).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg import rng
from nnunet_autoreg.benchmark.split import ordered
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Size, as_size

NetworkFeatures = Callable[[NDArray[np.float32]], Sequence[Tensor]]
"""Image -> feature maps, each (channels, z, y, x), each covering the whole image."""

PRIOR_SHARES = tuple(step / 10 for step in range(11))
"""Candidates for the share of the log prior that is added to the classifier's offsets."""

BACKGROUND_FACTOR = 8
"""Background looks like many things, so it gets this many times the voxels of a structure."""

SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class ProbeCase:
    """One labelled scan.

    Attributes:
        name: name of the case.
        patient: all scans of one patient are labelled, or scored, together.
        image: (Z, Y, X) or (channels, Z, Y, X), float32, normalised as the network expects it.
        labels: (Z, Y, X), 0 is background; 1 to ``num_classes - 1`` are the structures.
    """

    name: str
    patient: str
    image: NDArray[np.float32]
    labels: NDArray[np.integer]


@dataclass(frozen=True)
class ProbeSettings:
    """Settings that change a probe's figures.

    Attributes:
        num_labels: numbers of labelled patients.
        num_draws: sets of labelled patients; those of one draw are nested.
        voxels_per_class: voxels that each structure gives at most in each labelled scan.
        penalty: weight of the squared slopes beside the mean cross-entropy.
        max_iterations: largest number of iterations of the optimiser.
        seed: random seed of the choice of voxels.
    """

    num_labels: tuple[int, ...] = (5,)
    num_draws: int = 10
    voxels_per_class: int = 100
    penalty: float = 1e-3
    max_iterations: int = 40
    seed: int = 0


@dataclass(frozen=True)
class ProbeResult:
    """The score of one classifier.

    Attributes:
        levels: name of the set of feature maps that it reads.
        num_labels, draw: number and draw of the labelled patients that it was fitted on.
        labelled: names of their scans.
        dice_of_patient: patient -> structure -> mean Dice over the patient's scans; a structure
            that neither the labels nor the predictions hold is missing.
    """

    levels: str
    num_labels: int
    draw: int
    labelled: tuple[str, ...]
    dice_of_patient: dict[str, dict[int, float]]

    @property
    def dice_of_structure(self) -> dict[int, float]:
        """Mean Dice of each structure over the patients."""
        return mean_of_each(list(self.dice_of_patient.values()))

    @property
    def dice(self) -> float:
        """Mean over the structures of their mean Dice over the patients."""
        means = list(self.dice_of_structure.values())
        return float(np.mean(means)) if means else math.nan


@dataclass(frozen=True)
class VoxelSample:
    """Voxels of one labelled scan.

    Attributes:
        features: (N, V).
        labels: (N,) int64.
        weights: (N,), how many voxels of the scan each one stands for.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LinearClassifier:
    """Logits are ``features @ slopes + offsets``; slopes (V, C), offsets (C,)."""

    slopes: Tensor
    offsets: Tensor


def dense_probe(
    network_features: NetworkFeatures,
    labelled_pool: Sequence[ProbeCase],
    scored: Sequence[ProbeCase],
    num_classes: int,
    settings: ProbeSettings | None = None,
    level_sets: Mapping[str, Sequence[int]] | None = None,
    input_shape: Callable[[Size], Size] | None = None,
) -> list[ProbeResult]:
    """Return one result for each set of levels, number of labels and draw.

    Args:
        network_features: frozen; called once for each scan.
        labelled_pool: scans of which the labelled ones are drawn.
        scored: scans of other patients.
        num_classes: background included.
        level_sets: name -> indices of the feature maps that a classifier reads; by default all.
        input_shape: image shape -> shape that the network wants, not smaller. Images are filled up
            with zeros at the far end of each axis. By default the shape stays.

    Raises:
        UsageError: too few patients in the pool, a patient that is in both lists, or a label
            outside the classes.
    """
    settings = settings or ProbeSettings()
    _check_cases(labelled_pool, scored, num_classes)
    draws = labelled_sets(labelled_pool, settings)

    # Every labelled scan passes through the network once, however many draws it is in.
    needed = {case.name: case for cases in draws.values() for case in cases}
    samples: dict[str, VoxelSample] = {}
    sizes: list[int] = []
    for name, case in needed.items():
        covered = _shape_covered(case, input_shape)
        maps = _maps_of(network_features, case, covered)
        sizes = [len(features) for features in maps]
        samples[name] = sample_voxels(case, maps, covered, num_classes, settings)

    # The columns of each level in the features of a sample.
    ends = np.cumsum([0, *sizes])
    columns_of_level = [range(start, end) for start, end in pairwise(ends)]
    sets = level_sets or {"all levels": range(len(sizes))}

    classifiers: dict[tuple[str, int, int], LinearClassifier] = {}
    for (num_labels, draw), cases in draws.items():
        chosen = [samples[case.name] for case in cases]
        for levels, indices in sets.items():
            columns = [column for index in indices for column in columns_of_level[index]]
            classifiers[levels, num_labels, draw] = fit(chosen, columns, num_classes, settings)

    # Every scored scan passes through the network once as well, and all classifiers read its maps.
    found: dict[tuple[str, int, int], dict[str, list[dict[int, float]]]]
    found = {key: {} for key in classifiers}
    for case in scored:
        covered = _shape_covered(case, input_shape)
        maps = _maps_of(network_features, case, covered)
        for key, classifier in classifiers.items():
            read = [maps[index] for index in sets[key[0]]]
            predicted = predict(read, classifier, covered, case.labels.shape)
            dice = dice_of_labels(case.labels, predicted.cpu().numpy(), num_classes)
            found[key].setdefault(case.patient, []).append(dice)

    results = []
    for key, dice_of_scans in found.items():
        levels, num_labels, draw = key
        names = tuple(sorted(case.name for case in draws[num_labels, draw]))
        dice_of_patient = {name: mean_of_each(scans) for name, scans in dice_of_scans.items()}
        results.append(ProbeResult(levels, num_labels, draw, names, dice_of_patient))
    return results


def _shape_covered(case: ProbeCase, input_shape: Callable[[Size], Size] | None) -> Size:
    """Return the shape to which an image is filled up, which its feature maps cover."""
    shape = as_size(case.image.shape[-3:])
    return input_shape(shape) if input_shape is not None else shape


def _maps_of(network_features: NetworkFeatures, case: ProbeCase, covered: Size) -> list[Tensor]:
    """Return the feature maps of an image that is filled up to a shape."""
    # Zeros at the far end of each spatial axis fill the image up; a channel axis stays.
    widths = [(0, 0)] * (case.image.ndim - 3)
    for extent, own in zip(covered, case.image.shape[-3:], strict=True):
        widths.append((0, extent - own))
    filled = np.pad(case.image, widths)

    with torch.no_grad():
        maps = network_features(filled)
    return [features.float() for features in maps]


def labelled_sets(
    pool: Sequence[ProbeCase],
    settings: ProbeSettings,
) -> dict[tuple[int, int], list[ProbeCase]]:
    """Return (number of labelled patients, draw) -> their scans; the sets of one draw are nested.

    The order of the patients is that of ``autoreg_benchmark`` with the draw as its seed.

    Raises:
        UsageError: the pool has too few patients.
    """
    patients = {case.patient for case in pool}
    most = max(settings.num_labels)
    if most > len(patients):
        raise UsageError(
            f"--labels {most}: the pool holds {len(patients)} patients with labels; ask for fewer",
            code="probe-too-many-labels",
        )

    sets = {}
    for draw in range(settings.num_draws):
        order = ordered(patients, f"{draw}/")
        for num_labels in settings.num_labels:
            chosen = set(order[:num_labels])
            sets[num_labels, draw] = [case for case in pool if case.patient in chosen]
    return sets


def sample_voxels(
    case: ProbeCase,
    maps: Sequence[Tensor],
    covered: Size,
    num_classes: int,
    settings: ProbeSettings,
) -> VoxelSample:
    """Draw voxels of every class of a scan and interpolate the feature maps there.

    Args:
        covered: voxels per axis that the maps cover, from the scan's first corner on.
    """
    generator = rng.generator(settings.seed, f"dense probe: voxels of {case.name}")
    flat = case.labels.reshape(-1)

    indices, weights = [], []
    for label in range(num_classes):
        candidates = np.flatnonzero(flat == label)
        # A structure that is smaller than the number of voxels wanted gives all it has.
        most = settings.voxels_per_class * (BACKGROUND_FACTOR if label == 0 else 1)
        count = min(most, len(candidates))
        if count:
            indices.append(generator.choice(candidates, count, replace=False))
            weights.append(np.full(count, len(candidates) / count))

    chosen_N = np.concatenate(indices)
    weights_N = torch.from_numpy(np.concatenate(weights)).float()
    labels_N = torch.from_numpy(flat[chosen_N].astype(np.int64))

    coordinates_N3 = np.stack(np.unravel_index(chosen_N, case.labels.shape), axis=1)
    features = [values_at(level, coordinates_N3, covered) for level in maps]
    features_NV = torch.cat(features, dim=1).cpu()
    return VoxelSample(features_NV, labels_N, weights_N)


def values_at(features: Tensor, coordinates: NDArray[np.integer], covered: Size) -> Tensor:
    """Interpolate a feature map linearly at the centres of voxels, as upsampling to voxels would.

    Args:
        features: (channels, z, y, x).
        coordinates: (N, 3) voxel indices along Z, Y, X.
        covered: voxels per axis that the map covers.

    Returns:
        (N, channels).
    """
    # grid_sample counts from -1 at the first edge to 1 at the last, in the order x, y, z.
    relative = 2 * (coordinates + 0.5) / np.array(covered) - 1
    grid = torch.from_numpy(relative[:, ::-1].copy()).to(features)
    sampled = functional.grid_sample(
        features[None],
        grid[None, :, None, None],  # (1, N, 1, 1, 3)
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[0, :, :, 0, 0].T


def fit(
    samples: Sequence[VoxelSample],
    columns: Sequence[int],
    num_classes: int,
    settings: ProbeSettings,
) -> LinearClassifier:
    """Fit a multinomial logistic regression in which every class counts equally.

    Classes that count equally would paint rare structures all over the background. So the offsets
    get a share of the log prior of each class, which is its frequency in the labelled scans. The
    share is the one of ``PRIOR_SHARES`` with the best Dice on the labelled voxels themselves.
    """
    features_NV = torch.cat([sample.features for sample in samples])
    features_NV = features_NV[:, list(columns)]
    labels_N = torch.cat([sample.labels for sample in samples])
    weights_N = torch.cat([sample.weights for sample in samples])

    mean_V = features_NV.mean(0)
    deviation_V = features_NV.std(0).clamp(min=SMALLEST_DEVIATION)
    standardised_NV = (features_NV - mean_V) / deviation_V
    slopes_VC, offsets_C = _logistic_regression(standardised_NV, labels_N, num_classes, settings)

    # A class that no labelled scan holds must never be predicted.
    frequency_C = torch.zeros(num_classes).index_add_(0, labels_N, weights_N)
    is_known_C = frequency_C > 0
    share_C = frequency_C / frequency_C.sum()
    log_prior_C = torch.where(is_known_C, share_C, torch.ones(())).log()
    offsets_C = offsets_C.masked_fill(~is_known_C, -math.inf)

    logits_NC = standardised_NV @ slopes_VC + offsets_C
    best_share, best_dice = 0.0, -1.0
    for share in PRIOR_SHARES:
        predicted_N = (logits_NC + share * log_prior_C).argmax(1)
        dice = _weighted_dice(labels_N, predicted_N, weights_N, num_classes)
        if dice > best_dice:
            best_share, best_dice = share, dice

    # Standardisation is made part of the classifier, which then reads features as they are.
    slopes_VC = slopes_VC / deviation_V[:, None]
    offsets_C = offsets_C + best_share * log_prior_C - mean_V @ slopes_VC
    return LinearClassifier(slopes_VC, offsets_C)


def _logistic_regression(
    features_NV: Tensor,
    labels_N: Tensor,
    num_classes: int,
    settings: ProbeSettings,
) -> tuple[Tensor, Tensor]:
    """Return slopes (V, C) and offsets (C,); the problem is convex and starts at zero."""
    # Every class counts equally, however many voxels it gave.
    counts_C = torch.bincount(labels_N, minlength=num_classes).clamp(min=1)
    class_weight_C = (1 / counts_C).to(features_NV)

    slopes_VC = torch.zeros(features_NV.shape[1], num_classes, requires_grad=True)
    offsets_C = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [slopes_VC, offsets_C],
        max_iter=settings.max_iterations,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits_NC = features_NV @ slopes_VC + offsets_C
        error = functional.cross_entropy(logits_NC, labels_N, weight=class_weight_C)
        total = error + settings.penalty * slopes_VC.square().sum()
        torch.autograd.backward(total)
        return total

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return slopes_VC.detach(), offsets_C.detach()


def _weighted_dice(
    labels_N: Tensor,
    predicted_N: Tensor,
    weights_N: Tensor,
    num_classes: int,
) -> float:
    """Return the mean Dice over the structures, each sampled voxel counted with its weight."""
    # Sizes of the true, the predicted and the common part of every class, in voxels of the scans.
    zeros_C = torch.zeros(num_classes)
    true_C = zeros_C.index_add(0, labels_N, weights_N)
    predicted_C = zeros_C.index_add(0, predicted_N, weights_N)
    both_C = zeros_C.index_add(0, labels_N, weights_N * (labels_N == predicted_N))

    # Without the background.
    is_present = true_C[1:] > 0
    if not bool(is_present.any()):
        return 0.0
    total = (true_C[1:] + predicted_C[1:]).clamp(min=1)
    dice = 2 * both_C[1:] / total
    return float(dice[is_present].mean())


def predict(
    maps: Sequence[Tensor],
    classifier: LinearClassifier,
    covered: Size,
    shape: Sequence[int],
) -> Tensor:
    """Return the class of every voxel, (Z, Y, X) int64.

    A linear classifier and linear interpolation may be applied in either order. Each level's logits
    are made at the level's own resolution and then upsampled, so that no feature map of all voxels
    is needed.
    """
    z, y, x = shape
    offsets_C = classifier.offsets.to(maps[0].device)
    logits = offsets_C[:, None, None, None].expand(-1, *covered).clone()

    # Upsampling takes the most time, so levels of one resolution are summed before it.
    logits_of_size: dict[Size, Tensor] = {}
    start = 0
    for level in maps:
        slopes = classifier.slopes[start : start + len(level)].to(level.device)  # (channels, C)
        start += len(level)
        at_level = torch.einsum("vc,vzyx->czyx", slopes, level)
        size = as_size(level.shape[1:])
        earlier = logits_of_size.get(size)
        logits_of_size[size] = at_level if earlier is None else earlier + at_level

    for size, at_size in logits_of_size.items():
        if size == covered:
            logits += at_size
            continue
        upsampled = functional.interpolate(
            at_size[None],
            size=covered,
            mode="trilinear",
            align_corners=False,
        )
        logits += upsampled[0]

    # On a CPU, max is six times as fast as argmax along the first axis.
    return logits[:, :z, :y, :x].max(0).indices


def dice_of_labels(
    truth: NDArray[np.integer],
    predicted: NDArray[np.integer],
    num_classes: int,
) -> dict[int, float]:
    """Return structure -> Dice, without those that neither of the two label maps holds."""
    # One pass over the voxels for all labels together.
    true_sizes = np.bincount(truth.reshape(-1), minlength=num_classes)
    predicted_sizes = np.bincount(predicted.reshape(-1), minlength=num_classes)
    common = np.bincount(truth[truth == predicted].reshape(-1), minlength=num_classes)

    found = {}
    for label in range(1, num_classes):
        total = true_sizes[label] + predicted_sizes[label]
        if total:
            found[label] = float(2 * common[label] / total)
    return found


def mean_of_each(dices: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return structure -> mean Dice over the scans, or the patients, that have a Dice of it."""
    values_of: dict[int, list[float]] = {}
    for dice_of_structure in dices:
        for label, dice in dice_of_structure.items():
            values_of.setdefault(label, []).append(dice)
    return {label: float(np.mean(values)) for label, values in sorted(values_of.items())}


def raw_voxels(image: NDArray[np.float32], num_levels: int = 5) -> list[Tensor]:
    """Return the intensities and their means over 2, 4, 8 ... voxels, a baseline without a network.

    Args:
        image: (Z, Y, X) or (channels, Z, Y, X).
    """
    shape = image.shape[-3:]
    voxels = torch.from_numpy(image).reshape(-1, *shape)
    maps = [voxels]
    for step in range(1, num_levels):
        # Each level is made from the image itself, so that uneven sizes do not shift the map.
        size = as_size([max(1, round(extent / 2**step)) for extent in shape])
        pooled = functional.adaptive_avg_pool3d(voxels[None], size)
        maps.append(pooled[0])
    return maps


def _check_cases(pool: Sequence[ProbeCase], scored: Sequence[ProbeCase], num_classes: int) -> None:
    pool_patients = {case.patient for case in pool}
    scored_patients = {case.patient for case in scored}
    both = pool_patients & scored_patients
    if both:
        raise UsageError(
            f"patient {min(both)} is labelled and scored; keep all scans of a patient together",
            code="probe-patient-in-both",
        )

    for case in (*pool, *scored):
        low, high = int(case.labels.min()), int(case.labels.max())
        if low < 0 or high >= num_classes:
            raise UsageError(
                f"{case.name} has labels from {low} to {high}; the probe expects 0 to "
                f"{num_classes - 1}",
                code="probe-labels",
            )
