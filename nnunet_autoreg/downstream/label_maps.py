"""Write label maps for raw datasets without them, because nnU-Net needs one for every case."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.io.names import CHANNEL_SUFFIX, natural_key
from nnunet_autoreg.records import atomic_path

LABELS, IMAGES = "labelsTr", "imagesTr"


def first_channels(dataset: Path, file_ending: str) -> dict[str, Path]:
    """Return the training cases of a raw dataset: case -> the file of its first channel."""
    images: dict[str, Path] = {}
    files = (dataset / IMAGES).glob(f"*{file_ending}")
    for file in sorted(files, key=lambda f: natural_key(f.name)):
        named = CHANNEL_SUFFIX.match(file.name.removesuffix(file_ending))
        if named and not file.name.startswith("."):
            images.setdefault(named["case"], file)
    return images


def write_label_map(labels_ZYX: NDArray[np.uint8], image: Any, target: Path) -> None:
    """Write a label map with the geometry of SimpleITK's image, atomically."""
    import SimpleITK

    drawn: Any = SimpleITK.GetImageFromArray(labels_ZYX)
    drawn.CopyInformation(image)

    # SimpleITK chooses the format by the ending, but an unfinished file must not have the ending of
    # a label map. So the whole file is written elsewhere first.
    with atomic_path(target) as temporary, TemporaryDirectory() as elsewhere:
        whole = Path(elsewhere) / target.name
        SimpleITK.WriteImage(drawn, str(whole), True)
        shutil.copyfile(whole, temporary)
