"""Make label maps for datasets of which only classes are known: 1 inside the body."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.classification.table import TABLE_NAME, ClassTable, read_table
from nnunet_autoreg.corpus.dataset_json import read_dataset_json, structures_of
from nnunet_autoreg.corpus.intensity import body_mask, tissue_mask
from nnunet_autoreg.downstream.label_maps import LABELS, first_channels, write_label_map
from nnunet_autoreg.downstream.scans import file_image
from nnunet_autoreg.errors import ClassesError, ScanError
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.records import MEND_YOURS, read_object, remove_temporary

BODY = 1
MOST_NONZERO = 0.99
"""An image with more non-zero voxels was not cut out, so its zeros show no body."""

log = logging.getLogger(__name__)


def write_body_labels(dataset: Path) -> tuple[ClassTable, list[str]]:
    """Check the table of classes, and write ``labelsTr/<case>`` for cases without a label map.

    The label is 1 inside the body. In CT, that is the largest part above -300 HU with all that it
    encloses. Otherwise it is the non-zero voxels, or the tissue if almost no voxel is zero. nnU-Net
    reads the label maps to measure intensities. The training does not use them.

    Args:
        dataset: folder of the raw dataset.

    Returns:
        The table, and the cases written.

    Raises:
        ClassesError: the table is wrong, there is no image (code "classes-no-images"), or
            dataset.json has no label 1 (code "classes-no-label").
        ScanError: an image cannot be read.
    """
    described = read_object(dataset / "dataset.json", ("labels",), MEND_YOURS)
    ending = str(described.get("file_ending", ".nii.gz"))
    images = first_channels(dataset, ending)
    if not images:
        raise ClassesError(
            f"{dataset / 'imagesTr'} holds no image named like case_0000{ending}; put the scans "
            "there",
            code="classes-no-images",
        )
    table = read_table(dataset / TABLE_NAME, described, list(images))

    labels = dataset / LABELS
    wanted = [case for case in images if not (labels / f"{case}{ending}").is_file()]
    if wanted and BODY not in structures_of(described["labels"]):
        raise ClassesError(
            f'{dataset / "dataset.json"} has no label {BODY}; write "labels": {{"background": 0, '
            f'"body": {BODY}}} into it',
            code="classes-no-label",
        )
    labels.mkdir(exist_ok=True)
    # Left behind by a run that was killed.
    remove_temporary(labels)

    channels = read_dataset_json(dataset).channels
    is_ct = bool(channels) and channels[0].casefold() == "ct"
    for case in wanted:
        _write(images[case], labels / f"{case}{ending}", is_ct)
    return table, wanted


def _write(image_file: Path, target: Path, is_ct: bool) -> None:
    """Write the label map of one image."""
    import SimpleITK

    try:
        image: Any = file_image(image_file, ScanPart())
    except ScanError as error:
        raise ScanError(error.status, f"{image_file}: {error}") from error
    array_ZYX: NDArray[np.float32] = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    inside_ZYX = body_of(array_ZYX, is_ct)
    if not inside_ZYX.any():
        log.warning("%s: no body was found, so all of the image counts as body", image_file.name)
        inside_ZYX[:] = True
    write_label_map(inside_ZYX.astype(np.uint8) * BODY, image, target)


def body_of(array_ZYX: NDArray[np.float32], is_ct: bool) -> NDArray[np.bool_]:
    """Return which voxels (Z, Y, X) of a scan are inside the body."""
    if is_ct:
        return body_mask(array_ZYX)
    nonzero = np.asarray(array_ZYX != 0, dtype=bool)
    was_cut_out = nonzero.mean() <= MOST_NONZERO
    return nonzero if was_cut_out else tissue_mask(array_ZYX)
