"""Probe a frozen encoder: how well does a linear classifier predict a token's label?

It reads the token's features, and is compared with a classifier that reads the token's raw voxels.
The labels come from the label maps of a dataset among the inputs. Training never sees a label.

Shape suffixes: N tokens, V width, C classes, T tokens of one crop.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.fingerprint import transpose_axes
from nnunet_autoreg.corpus.grid import read_label_map
from nnunet_autoreg.corpus.locations import (
    dataset_of,
    label_map_of,
    label_names,
    nonzero_box,
    subject_of,
)
from nnunet_autoreg.corpus.private import public_dataset, terminal_only
from nnunet_autoreg.corpus.rows import ScanRow, public_message
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.geometry import Size, as_size, grid_of
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.sample import Batch, Sample, collate
from nnunet_autoreg.store.case import StoredCase

log = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]

MAX_CASES, MIN_CASES = 24, 4
UNKNOWN = -1
SMALLEST_SHARE = 0.25
"""A structure that fills this share of a token is its label, although background may fill more."""

MAX_TOKENS, MAX_ITERATIONS, PENALTY = 8192, 50, 1e-3


@dataclass(frozen=True)
class LabelledCrop:
    """Hold one crop of a labelled case.

    Attributes:
        batch: a batch of one sample.
        labels: (T,) label of every token in raster order (``token_labels``); -1 if not known.
        is_test: whether the crop is scored, and not used to fit the probe.
    """

    batch: Batch
    labels: Tensor
    is_test: bool


class Probe:
    """A classifier that is fitted on the tokens of some crops and scored on those of others.

    Every score uses the same tokens.

    Args:
        crops: may be empty.
    """

    def __init__(self, crops: Sequence[LabelledCrop]):
        # The keys say whether the crops are for testing.
        self.crops = {
            False: [crop for crop in crops if not crop.is_test],
            True: [crop for crop in crops if crop.is_test],
        }
        self.labels: dict[bool, Tensor] = {}  # (N,) of each part
        self.known: dict[bool, Tensor] = {}  # indices of the tokens that are used
        for is_test, part in self.crops.items():
            if part:
                labels = torch.cat([crop.labels for crop in part])
                known = (labels >= 0).nonzero()[:, 0]
                self.labels[is_test] = labels
                self.known[is_test] = known[evenly_spread(len(known), MAX_TOKENS)]

    def _known_labels(self, is_test: bool) -> Tensor:
        """Return the labels (N,) of the tokens that are used."""
        return self.labels[is_test][self.known[is_test]]

    def _num_classes(self, is_test: bool) -> int:
        return len(torch.unique(self._known_labels(is_test)))

    @property
    def works(self) -> bool:
        """Whether there are at least two classes to fit and two to test on."""
        has_both = len(self.labels) == 2
        return has_both and self._num_classes(False) > 1 and self._num_classes(True) > 1

    @property
    def chance(self) -> float:
        """Balanced accuracy of guessing."""
        return 1 / self._num_classes(True)

    def score(self, read: Callable[[Batch], Tensor]) -> float:
        """Return the balanced accuracy on the test crops; 0 if an input is not finite.

        Args:
            read: computes the inputs (T, V), on the CPU, of the tokens of a batch of one sample.
        """
        parts = {}
        for is_test in (False, True):
            inputs = torch.cat([read(crop.batch) for crop in self.crops[is_test]])
            inputs = inputs[self.known[is_test]]  # (N, V)
            if not bool(torch.isfinite(inputs).all()):
                return 0.0
            parts[is_test] = (inputs, self._known_labels(is_test))
        return fit_and_score(parts[False], parts[True])


def evenly_spread(num: int, most: int) -> Tensor:
    """Return at most ``most`` indices out of ``range(num)``, evenly spread, always the same."""
    if num <= most:
        return torch.arange(num)
    return torch.linspace(0, num - 1, most).round().long()


def fit_and_score(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the balanced accuracy on ``test`` of a logistic regression fitted on ``train``.

    Classes count equally, and inputs are standardised by ``train``. The problem is convex and
    starts from zero, so that nothing is random.

    Args:
        train, test: inputs (N, V) and labels (N,).
    """
    train_NV = train[0].double()
    labels_N = train[1]
    mean = train_NV.mean(0)
    deviation = train_NV.std(0).clamp(min=1e-6)
    train_NV = (train_NV - mean) / deviation

    num_classes = int(torch.cat([train[1], test[1]]).max()) + 1
    # A structure of few tokens counts as much as the background.
    weight_C = 1 / torch.bincount(labels_N, minlength=num_classes).clamp(min=1).double()
    # Validation, which calls this, runs without gradients.
    with torch.enable_grad():
        slope_VC = torch.zeros(
            train_NV.shape[1],
            num_classes,
            dtype=torch.float64,
            requires_grad=True,
        )
        offset_C = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [slope_VC, offset_C],
            max_iter=MAX_ITERATIONS,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            scores_NC = train_NV @ slope_VC + offset_C  # (N, C)
            error = functional.cross_entropy(scores_NC, labels_N, weight=weight_C)
            total = error + PENALTY * slope_VC.square().sum()
            torch.autograd.backward(total)
            return total

        solver.step(objective)  # type: ignore[no-untyped-call]

    test_NV = (test[0].double() - mean) / deviation
    scores_NC = test_NV @ slope_VC.detach() + offset_C.detach()
    predicted_N = scores_NC.argmax(1)
    return balanced_accuracy(predicted_N, test[1])


def balanced_accuracy(predicted_N: Tensor, truth_N: Tensor) -> float:
    """Return the mean, over the classes in ``truth_N``, of the share that was predicted right."""
    shares = []
    for label in torch.unique(truth_N).tolist():
        is_right = predicted_N[truth_N == label] == label
        shares.append(float(is_right.float().mean()))
    return sum(shares) / len(shares)


def labelled_crops(
    plan: Plan,
    rows: Sequence[ScanRow],
    cases: Mapping[str, StoredCase],
    validation: Collection[str],
) -> list[LabelledCrop]:
    """Return one crop of each of up to 24 subjects, around labelled voxels.

    Half of the subjects are for testing, validation scans first. If several datasets have labels,
    the one with the most subjects is used. If a scan has several channels, the first is used.

    Args:
        rows: all scans of pretraining.
        cases: scan id -> stored case.
        validation: ids of scans that pretraining does not see.

    Returns:
        The crops; none if there are fewer than 4 subjects, or too few classes.
    """
    chosen = choose_scans(rows, validation, plan.run.seed, plan.data.salt_free)
    crops = []
    for number, row in enumerate(chosen):
        is_test = number < len(chosen) // 2
        try:
            crops.append(_crop(plan, row, cases[row.id], number, is_test))
        except (ScanError, UsageError) as error:
            label_map = label_map_of(row)
            files = [label_map] if label_map is not None else []
            log.warning(
                "probe: %s is left out: %s",
                row.id,
                public_message(str(error), row, *files),
                extra=terminal_only(f" ({row.source})"),
            )
    if not crops:
        return []

    dataset = public_dataset(chosen[0].dataset)
    if not Probe(crops).works:
        log.warning(
            "probe: left out, because the labels of %s have fewer than two classes to fit or to "
            "test on",
            dataset,
        )
        return []
    num_test = sum(crop.is_test for crop in crops)
    log.info(
        "probe: %d labelled crops of %s, %d of them for testing",
        len(crops),
        dataset,
        num_test,
    )
    return crops


def choose_scans(
    rows: Sequence[ScanRow],
    validation: Collection[str],
    seed: int,
    salt_free: bool = True,
) -> list[ScanRow]:
    """Return one labelled scan for each of up to 24 subjects of one dataset.

    Validation scans come first. Apart from that, a hash decides the order.

    Args:
        validation: ids of scans that pretraining does not see.
        salt_free: ``data.salt_free`` of the plan: hash the scan's content, and not the subject.
    """

    def name_of(row: ScanRow) -> str:
        return row.content_hash if salt_free else row.id

    first: dict[tuple[str, str], ScanRow] = {}
    for row in sorted(rows, key=name_of):
        if label_map_of(row) is not None:
            # Two scans of a subject are too alike to fit on one and to test on the other.
            first.setdefault((row.dataset, subject_of(row)), row)

    counts = Counter(dataset for dataset, _ in first)
    if not counts or max(counts.values()) < MIN_CASES:
        return []
    # One dataset, because a label may mean different structures in two datasets.
    dataset = min(counts, key=lambda name: (-counts[name], name))
    labelled = [row for (name, _), row in first.items() if name == dataset]

    def order(row: ScanRow) -> tuple[bool, str]:
        name = row.content_hash if salt_free else subject_of(row)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
        return row.id not in validation, digest

    return sorted(labelled, key=order)[:MAX_CASES]


def _crop(plan: Plan, row: ScanRow, case: StoredCase, number: int, is_test: bool) -> LabelledCrop:
    """Return a crop around labelled voxels; ``number`` is part of the seed of its location."""
    labels_ZYX = stored_labels(row, case.shape_vox)
    size = plan.sequence.crop_size_vox
    start = around_labels(labels_ZYX, size, rng.generator(plan.run.seed, "probe", number))
    voxels, valid = case.read_padded(start, size)

    # The crop may reach beyond the case, so only the common part is copied.
    padded_ZYX = np.full(size, UNKNOWN, dtype=np.int64)
    in_crop = []
    in_case = []
    for first, length, num_voxels in zip(start, size, case.shape_vox, strict=True):
        low = max(0, first)
        high = min(num_voxels, first + length)
        in_crop.append(slice(low - first, high - first))
        in_case.append(slice(low, high))
    padded_ZYX[tuple(in_crop)] = labels_ZYX[tuple(in_case)]

    labels_T = token_labels(padded_ZYX, plan.encoder.token_size_vox)
    # All tokens are in one block, so that all are visible, as in fine-tuning.
    block_index_T = np.zeros(len(labels_T), dtype=np.int64)
    sample = Sample(voxels[None], valid[None], block_index_T, 1)
    return LabelledCrop(collate([sample]), torch.from_numpy(labels_T), is_test)


def stored_labels(row: ScanRow, shape_vox: Size) -> Labels:
    """Return the label map (Z, Y, X) of a scan on the voxels of its stored case.

    It is resampled to the nearest neighbours. Values that have no name become -1.

    Args:
        shape_vox: shape of the stored case.

    Raises:
        ScanError: the label map cannot be read, or does not fit the scan.
    """
    path = label_map_of(row)
    assert path is not None and row.spacing_mm is not None, "only labelled, usable rows come here"
    labels_ZYX, grid = read_label_map(path)
    if grid.shape_vox != row.shape_vox:
        raise ScanError("geometry", f"{path} has {grid.shape_vox} voxels, its scan {row.shape_vox}")

    # As preprocessing does: crop to nonzero voxels, turn the axes, resample.
    low, high = nonzero_box(row)
    inside = tuple(slice(first, stop) for first, stop in zip(low, high, strict=True))
    box_ZYX = labels_ZYX[inside].transpose(transpose_axes(row.spacing_mm))
    indices = [nearest_index(n, m) for n, m in zip(box_ZYX.shape, shape_vox, strict=True)]
    nearest_ZYX = box_ZYX[np.ix_(*indices)]

    named = [0, *label_names(dataset_of(row))]
    return np.where(np.isin(nearest_ZYX, named), nearest_ZYX, UNKNOWN)


def nearest_index(num_source: int, num_target: int) -> Labels:
    """Return which source voxel the centre of each target voxel lies in, (num_target,).

    Source and target divide the same length into equal parts.
    """
    centres = (np.arange(num_target) + 0.5) * num_source / num_target
    return np.minimum(centres.astype(np.int64), num_source - 1)


def around_labels(labels_ZYX: Labels, size: Size, generator: np.random.Generator) -> Size:
    """Return the start (z, y, x) of a crop with a labelled voxel in its middle.

    A structure is drawn first, so that small ones are as likely as large ones. Near the border of
    the case, the crop is moved inwards.

    Args:
        labels_ZYX: label map of the case.
        size: size of the crop, (z, y, x).
    """
    values = np.unique(labels_ZYX[labels_ZYX > 0])
    middle = [n // 2 for n in labels_ZYX.shape]
    if len(values):
        structure = values[generator.integers(len(values))]
        voxels = np.argwhere(labels_ZYX == structure)  # (voxels, 3)
        middle = voxels[generator.integers(len(voxels))].tolist()

    start = []
    for centre, length, num_voxels in zip(middle, size, labels_ZYX.shape, strict=True):
        first = 0
        last = num_voxels - length
        # A case that is smaller than the crop lies in its middle.
        if last < 0:
            first = last // 2
            last = first
        start.append(min(max(centre - length // 2, first), last))
    return as_size(start)


def token_labels(labels_ZYX: Labels, token: Size) -> Labels:
    """Return the label of every token, (T,) in raster order.

    It is the structure with the most voxels of the token, if it fills at least a quarter of the
    known voxels, else 0. A token without known voxels has the label -1.

    Args:
        labels_ZYX: -1 for voxels whose label is not known.
        token: size of a token in voxels, (z, y, x).
    """
    z, y, x = grid_of(labels_ZYX.shape, token)
    cubes = labels_ZYX.reshape(z, token[0], y, token[1], x, token[2])
    cubes = cubes.transpose(0, 2, 4, 1, 3, 5).reshape(z * y * x, -1)  # (T, voxels of a token)
    num_known_T = (cubes >= 0).sum(axis=1)

    labels_T = np.zeros(len(cubes), dtype=np.int64)
    values = np.unique(cubes[cubes > 0])
    if len(values):
        counts = np.stack([(cubes == value).sum(axis=1) for value in values], axis=1)  # (T, values)
        is_large_T = counts.max(axis=1) >= SMALLEST_SHARE * num_known_T
        labels_T = np.where(is_large_T, values[counts.argmax(axis=1)], 0)
    return np.where(num_known_T > 0, labels_T, UNKNOWN)
