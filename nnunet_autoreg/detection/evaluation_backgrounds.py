"""Find the images that the boxes of an evaluation are drawn on."""

import logging
from pathlib import Path

from nnunet_autoreg.detection.evaluation_files import Background, background, pick_scans
from nnunet_autoreg.detection.folders import Folders
from nnunet_autoreg.detection.images import read_onto
from nnunet_autoreg.errors import ObjectsError
from nnunet_autoreg.io.names import IMAGE_ENDINGS

log = logging.getLogger(__name__)


def find_backgrounds(
    folders: Folders,
    truth: Path,
    images: Path | None,
) -> dict[str, Background]:
    """Return the arrays of the scans that are drawn, by the name of the scan.

    They are the images, if there are usable ones, else the maps of the true objects.

    Args:
        truth: folder of the true objects; nnU-Net keeps images beside it.
        images: folder of ``--images``.
    """
    image_folders = [truth.parent / "imagesTr", truth.parent / "imagesTs"]
    if images:
        image_folders = [images]

    found = {}
    for scan in pick_scans(folders.scans):
        # As nnU-Net names the first channel, or plainly.
        names = [f"{scan.name}_0000{end}" for end in IMAGE_ENDINGS]
        names += [f"{scan.name}{end}" for end in IMAGE_ENDINGS]
        candidates = [folder / name for folder in image_folders for name in names]
        files = [file for file in candidates if file.is_file()]
        if images and not files:
            log.warning(
                "--images %s has no %s: it is drawn on its label map, if there is one",
                images,
                names[0],
            )

        # The first file that shows the same voxels is drawn on.
        true_file = folders.true_files[scan.name]
        frame = folders.frames[scan.name]
        if true_file.suffix != ".json":
            files.append(true_file)
        for file in files:
            try:
                found[scan.name] = background(read_onto(file, frame), frame)
                break
            except ObjectsError as error:
                log.warning("%s is not drawn on this image: %s", scan.name, error)
    return found
