"""The generated set of cubes: what it says it is, and the same every time."""

import json
import runpy
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "detection.py"


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def test_cubes_have_the_promised_sizes_numbers_and_distances(
    toy: dict[str, Any],
) -> None:
    for number in range(16):
        case = toy["draw_case"](number, side=48)
        components = cc3d.connected_components(case.labels > 0, connectivity=26)
        # Component 0 is the background.
        boxes = cc3d.statistics(components)["bounding_boxes"][1:]
        sides = [s.stop - s.start for box in boxes for s in box]

        # Cubes that touched would be one component.
        assert len(boxes) == case.num_cubes
        assert all(8 <= side <= 16 for side in sides)
        # Every eighth scan is empty.
        assert (number % 8 != 7) or case.num_cubes == 0
        bright = case.image[case.labels > 0]
        dark = case.image[case.labels == 0]
        assert not bright.size or bright.mean() - dark.mean() == pytest.approx(2, abs=0.1)

    first, again = (toy["draw_case"](3, side=48).image for _ in range(2))
    assert np.array_equal(again, first)


def test_only_holed_cubes_have_a_hole_without_label(toy: dict[str, Any]) -> None:
    seen = set()
    for number in range(12):
        labels = toy["draw_case"](number, side=48).labels
        components = cc3d.connected_components(labels > 0, connectivity=26)
        for i, box in enumerate(cc3d.statistics(components)["bounding_boxes"][1:], start=1):
            kind = int(labels[box][0, 0, 0])
            seen.add(kind)
            # A cube without a hole fills its box, and only that of kind 1 has none.
            full = np.prod([s.stop - s.start for s in box])
            is_full = (components[box] == i).sum() == full
            assert is_full == (kind == 1)

    assert seen == {1, 2}


def test_the_raw_dataset_asks_for_detection(toy: dict[str, Any], tmp_path: Path) -> None:

    toy["write_toy"](tmp_path, num_cases=2, side=40)

    described = json.loads((tmp_path / "dataset.json").read_text())

    assert described["autoreg_detection"] == {}
    assert described["numTraining"] == 2
    images = sorted(p.name for p in (tmp_path / "imagesTr").iterdir())
    assert images == ["toy_00_0000.nii.gz", "toy_01_0000.nii.gz"]
