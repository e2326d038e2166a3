"""The dense probe on arrays: what it samples, fits, predicts and scores."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnunet_autoreg.benchmark.dense_probe import (
    LinearClassifier,
    ProbeCase,
    ProbeSettings,
    dense_probe,
    dice_of_labels,
    fit,
    labelled_sets,
    mean_of_each,
    predict,
    raw_voxels,
    sample_voxels,
    values_at,
)
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import round_up

SHAPE = (10, 12, 14)
SETTINGS = ProbeSettings(num_labels=(2,), num_draws=2, voxels_per_class=40)


def scan(number: int, patient: str | None = None) -> ProbeCase:
    """A noisy image in which structure 1 is bright and structure 2 is dark."""
    generator = np.random.default_rng(number)
    labels = np.zeros(SHAPE, np.int16)
    labels[1:5, 2:8, 2 + number % 3 : 9] = 1
    labels[6:9, 3:11, 3:12] = 2
    # Background 0, and 1 and -1 for the two structures, with noise of 0.05: easy to separate.
    intensity = np.array([0.0, 1.0, -1.0])[labels]
    image = intensity + 0.05 * generator.normal(size=SHAPE)
    return ProbeCase(
        f"case{number}",
        patient or f"patient{number}",
        image.astype(np.float32),
        labels,
    )


def intensities(image: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(image)[None]]


def test_features_that_show_the_structures_score_nearly_one() -> None:
    pool = [scan(n) for n in range(4)]
    scored = [scan(n) for n in (7, 8)]

    results = dense_probe(intensities, pool, scored, 3, SETTINGS)

    assert [(result.num_labels, result.draw) for result in results] == [(2, 0), (2, 1)]
    assert all(len(result.labelled) == 2 for result in results)
    assert all(result.dice > 0.98 for result in results)
    assert set(results[0].dice_of_patient) == {"patient7", "patient8"}
    assert set(results[0].dice_of_structure) == {1, 2}


def test_features_of_noise_score_far_less() -> None:
    pool = [scan(n) for n in range(4)]
    scored = [scan(7)]

    def noise(image: np.ndarray) -> list[torch.Tensor]:
        # Noise that differs between scans and is the same for one scan.
        seed = int(1e4 * abs(float(image[0, 0, 0])))
        return [torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed))]

    assert all(result.dice < 0.5 for result in dense_probe(noise, pool, scored, 3, SETTINGS))


def test_the_same_call_gives_the_same_figures() -> None:
    pool = [scan(n) for n in range(4)]
    scored = [scan(7)]

    first, again = (dense_probe(intensities, pool, scored, 3, SETTINGS) for _ in range(2))

    assert first == again


def test_each_scan_passes_through_the_network_once() -> None:
    pool = [scan(n) for n in range(3)]
    scored = [scan(7)]
    seen = []

    def counted(image: np.ndarray) -> list[torch.Tensor]:
        seen.append(float(image.sum()))
        return intensities(image)

    dense_probe(counted, pool, scored, 3, ProbeSettings((1, 3), 3, 40))

    # Three scans of the pool and one that is scored, for any number of draws and labels.
    assert len(seen) == len(set(seen)) == 4


def test_sampled_features_are_those_of_the_upsampled_map() -> None:
    features = torch.randn(3, 4, 5, 7)
    upsampled = functional.interpolate(features[None], size=(8, 15, 14), mode="trilinear")[0]
    # Two opposite corners, and voxels between the points of the map (4 x 5 x 7).
    coordinates = np.array([[0, 0, 0], [7, 14, 13], [3, 8, 6], [5, 1, 12]])

    found = values_at(features, coordinates, (8, 15, 14))

    z, y, x = coordinates.T
    torch.testing.assert_close(found, upsampled[:, z, y, x].T)


def test_logits_made_before_upsampling_are_those_made_after() -> None:
    # Linear layers and interpolation commute, so few logits are upsampled instead of many features.
    maps = [torch.randn(3, 8, 8, 8), torch.randn(5, 4, 4, 4), torch.randn(2, 4, 4, 4)]
    classifier = LinearClassifier(torch.randn(10, 4), torch.randn(4))
    upsampled = [functional.interpolate(m[None], size=(8, 8, 8), mode="trilinear")[0] for m in maps]
    features = torch.cat(upsampled).flatten(1).T
    logits = features @ classifier.slopes + classifier.offsets
    expected = logits.argmax(1).reshape(8, 8, 8)

    # The image has 6 x 8 x 7 voxels, which was padded to 8 x 8 x 8 for the network.
    found = predict(maps, classifier, (8, 8, 8), (6, 8, 7))

    assert torch.equal(found, expected[:6, :, :7])


def test_a_network_that_wants_larger_shapes_gets_them() -> None:
    pool = [scan(n) for n in range(3)]
    scored = [scan(7)]
    shapes = set()

    def noted(image: np.ndarray) -> list[torch.Tensor]:
        shapes.add(image.shape)
        return intensities(image)

    def padded(shape: tuple[int, ...]) -> tuple[int, ...]:
        return round_up(shape, (8, 8, 8))

    results = dense_probe(noted, pool, scored, 3, SETTINGS, input_shape=padded)

    # 10, 12 and 14 are rounded up to multiples of 8.
    assert shapes == {(16, 16, 16)}
    assert results[0].dice > 0.98


def test_sets_of_levels_are_scored_separately() -> None:
    pool = [scan(n) for n in range(3)]
    scored = [scan(7)]

    # The first level knows nothing, the second everything.
    def two_levels(image: np.ndarray) -> list[torch.Tensor]:
        return [torch.zeros(1, *SHAPE), torch.from_numpy(image)[None]]

    sets = {"first": [0], "second": [1], "both": [0, 1]}
    results = dense_probe(two_levels, pool, scored, 3, SETTINGS, sets)

    dice = {result.levels: result.dice for result in results}
    assert dice["second"] > 0.98
    assert dice["both"] == dice["second"]
    assert dice["first"] < 0.5


def test_samples_hold_every_class_and_represent_all_voxels() -> None:
    case = scan(0)

    settings = ProbeSettings(voxels_per_class=20)

    sample = sample_voxels(case, intensities(case.image), SHAPE, 3, settings)

    # At most 20 voxels per structure and 8 times this number of the background.
    assert torch.bincount(sample.labels).tolist() == [160, 20, 20]
    # The weights of a class add up to the number of its voxels in the scan.
    sizes = [float(sample.weights[sample.labels == label].sum()) for label in range(3)]
    assert sizes == pytest.approx(np.bincount(case.labels.reshape(-1)).tolist(), rel=1e-5)


def test_a_structure_that_no_labelled_scan_holds_is_not_predicted() -> None:
    case = scan(0)
    # Five classes are known, of which the scan has 0, 1 and 2.
    sample = sample_voxels(case, intensities(case.image), SHAPE, 5, SETTINGS)

    classifier = fit([sample], [0], 5, SETTINGS)

    predicted = predict(intensities(case.image), classifier, SHAPE, SHAPE)
    assert set(predicted.unique().tolist()) == {0, 1, 2}
    assert bool(torch.isfinite(classifier.slopes).all())


def test_labelled_sets_hold_whole_patients_and_are_nested() -> None:
    pool = [scan(n, f"patient{n // 2}") for n in range(12)]

    sets = labelled_sets(pool, ProbeSettings((1, 3), 4))

    # One and three patients with two scans each.
    for draw in range(4):
        assert len(sets[1, draw]) == 2
        assert len(sets[3, draw]) == 6

    large_sets = set()
    for draw in range(4):
        small = {case.name for case in sets[1, draw]}
        large = {case.name for case in sets[3, draw]}
        assert small < large
        large_sets.add(frozenset(large))
    assert len(large_sets) > 1


def test_dice_equals_a_count_by_hand_and_is_missing_without_voxels() -> None:
    truth = np.array([[[0, 1, 1, 2]]])
    predicted = np.array([[[1, 1, 1, 0]]])

    # Label 1: 2 voxels of truth and 3 predicted, 2 in common. Labels 3 and 4 are in neither.
    assert dice_of_labels(truth, predicted, 5) == {1: 2 * 2 / 5, 2: 0.0}


def test_scans_of_a_patient_are_averaged_before_patients_are() -> None:
    # Label 1: (0.2 + 0.6) / 2. Label 2 is in one scan only.
    found = mean_of_each([{1: 0.2, 2: 0.5}, {1: 0.6}])

    assert found == {1: pytest.approx(0.4), 2: 0.5}


def test_raw_voxels_are_the_image_and_its_means() -> None:
    image = np.arange(64, dtype=np.float32).reshape(4, 4, 4)

    maps = raw_voxels(image, 3)

    # The image, its means over 2^3 voxels, and those over 4^3.
    assert [tuple(m.shape) for m in maps] == [(1, 4, 4, 4), (1, 2, 2, 2), (1, 1, 1, 1)]
    assert float(maps[1][0, 0, 0, 0]) == image[:2, :2, :2].mean()
    assert math.isclose(float(maps[2]), image.mean())


@pytest.mark.parametrize(
    ("pool", "scored", "num_classes"),
    [
        ([scan(0), scan(1)], [scan(1)], 3),
        ([scan(0), scan(1)], [scan(7)], 2),
        ([scan(0)], [scan(7)], 3),
    ],
    ids=["a patient on both sides", "a label too many", "too few patients"],
)
def test_requests_that_cannot_be_probed_are_refused(
    pool: list[ProbeCase],
    scored: list[ProbeCase],
    num_classes: int,
) -> None:
    with pytest.raises(UsageError):
        dense_probe(intensities, pool, scored, num_classes, SETTINGS)
