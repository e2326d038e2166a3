"""Raw datasets with a table of classes, small enough for unit tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "case,patient,diagnosis"


def write_table(file: Path, rows: Sequence[str], header: str = HEADER) -> Path:
    """Write ``classesTr.csv``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def write_image(file: Path, shape: Sequence[int], value: float, seed: int = 0) -> None:
    """Write noise inside a box of half the size, which is brighter by ``value``; zeros around."""
    import SimpleITK

    voxels = np.zeros(shape, dtype=np.float32)
    # Zeros around a quarter from every side: a cube of half the side.
    inside = tuple(slice(size // 4, size - size // 4) for size in shape)
    noise = np.random.default_rng(seed).normal(100, 10, voxels[inside].shape)
    voxels[inside] = noise + value
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(file))


def write_dataset(
    raw: Path,
    cases: Mapping[str, str],
    shape: Sequence[int] = (16, 16, 16),
    **described: Any,
) -> Path:
    """Write a raw dataset; ``cases`` maps a case to the rest of its row in ``classesTr.csv``."""
    dataset = raw / "Dataset960_Classes"
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "body": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **described,
    }
    for number, case in enumerate(cases):
        file = dataset / "imagesTr" / f"{case}_0000.nii.gz"
        write_image(file, shape, 0.0, seed=number)
    (dataset / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    write_table(dataset / "classesTr.csv", [f"{case},{rest}" for case, rest in cases.items()])
    return dataset
