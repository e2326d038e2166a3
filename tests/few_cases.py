"""A few cases of a real raw dataset as a separate dataset."""

import json
import shutil
from pathlib import Path


def copy_cases(source: Path, target: Path, number: int, num_tests: int = 0) -> None:
    """The first ``number`` labelled cases of one channel, and the next ``num_tests`` as test cases
    without labels.
    """
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (target / folder).mkdir(parents=True)
    images = sorted((source / "imagesTr").glob("*.nii.gz"))
    for image in images[:number]:
        shutil.copy(image, target / "imagesTr")
        shutil.copy(source / "labelsTr" / image.name.replace("_0000", ""), target / "labelsTr")
    for image in images[number : number + num_tests]:
        shutil.copy(image, target / "imagesTs")
    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": number}))
