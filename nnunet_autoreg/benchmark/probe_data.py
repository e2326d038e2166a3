"""Scans of a labelled nnU-Net dataset as arrays for the dense probe."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.benchmark.dense_probe import ProbeCase
from nnunet_autoreg.corpus.dataset_json import read_dataset_json
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Spacing, as_spacing, size_text, volume
from nnunet_autoreg.nnunet_api import (
    CT_SCHEME,
    crop_resample_normalise,
    read_scan,
    resampled_shape,
    scheme_of,
)
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.records import read_object

log = logging.getLogger(__name__)

MASK_BELOW = 0.75
"""As nnU-Net does: if cropping to the non-zero voxels leaves less than this share of the volume,
intensities are normalised inside them.
"""

MOST_VOXELS = 200**3
"""Largest number of voxels of a scan, whose features at full resolution have to fit into memory."""

NUM_SCANS_FOR_SPACING = 50


@dataclass(frozen=True)
class DatasetLabels:
    """The content of ``dataset.json`` that the probe uses.

    Attributes:
        channel_names: names of the channels, in the order of the files.
        structures: label -> name, without the background and without an ignored label.
        ending: file ending of image and label files.
    """

    channel_names: tuple[str, ...]
    structures: dict[int, str]
    ending: str

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return max(self.structures) + 1

    @property
    def is_ct(self) -> bool:
        """Whether the first channel holds Hounsfield units, by nnU-Net's own rule."""
        return self.channel_names[0].casefold() == "ct"


def read_labels(dataset: Path) -> DatasetLabels:
    """Read the channels and structures of a raw dataset.

    Raises:
        UsageError: its labels are regions, which one classifier per voxel cannot express.
    """
    content = read_object(dataset / "dataset.json", ("labels",))
    names = read_dataset_json(dataset).channels

    structures = {}
    for name, label in content["labels"].items():
        if not isinstance(label, int):
            raise UsageError(
                f"{dataset.name} has regions as labels ('{name}'); the probe needs one number each",
                code="probe-regions",
            )
        if label != 0 and name != "ignore":
            structures[label] = str(name)

    ending = str(content.get("file_ending", ".nii.gz"))
    return DatasetLabels(names, structures, ending)


def common_spacing(images: Mapping[str, Sequence[Path]]) -> Spacing:
    """Return the median spacing of the scans along Z, Y and X, as fine-tuning would plan it."""
    # The headers of some scans, spread over all of them, are enough for a median.
    names = sorted(images)
    step = max(1, len(names) // NUM_SCANS_FOR_SPACING)
    spacings = []
    for name in names[::step]:
        first_image = read_scan(images[name][0])
        spacings.append(first_image.spacing_mm)
    return as_spacing(np.median(np.array(spacings), axis=0))


def load_cases(
    dataset: Path,
    names: Sequence[str],
    images: Mapping[str, Sequence[Path]],
    patient_of: Mapping[str, str],
    labels: DatasetLabels,
    spacing_mm: Spacing,
    ct_window: IntensityWindow | None,
) -> list[ProbeCase]:
    """Read, crop, normalise and resample scans as nnU-Net does, and their labels with them.

    Raises:
        UsageError: a scan is too large at this spacing, or it is CT and there is no window.
        PlanError: a scan would have no voxels at this spacing.
    """
    cases = []
    for name in names:
        image, truth = _load(dataset, name, images[name], labels, spacing_mm, ct_window)
        cases.append(ProbeCase(name, patient_of[name], image, truth))
    return cases


def _load(
    dataset: Path,
    name: str,
    files: Sequence[Path],
    labels: DatasetLabels,
    spacing_mm: Spacing,
    ct_window: IntensityWindow | None,
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Return a scan (C, Z, Y, X) and its labels (Z, Y, X) as ``load_cases`` gives them."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    scans = [read_scan(file) for file in files]
    stack_CZYX = np.concatenate([scan.array_CZYX for scan in scans])
    source_mm = scans[0].spacing_mm
    label_file = dataset / "labelsTr" / f"{name}{labels.ending}"
    truth_1ZYX = read_scan(label_file).array_CZYX.astype(np.int16)

    shape = resampled_shape(stack_CZYX.shape[1:], source_mm, spacing_mm)
    if volume(shape) > MOST_VOXELS:
        raise UsageError(
            f"{name} has {size_text(shape)} voxels at this spacing, whose features are too large "
            "to hold; give a coarser --spacing",
            code="probe-too-large",
        )

    # The labels are cropped with the image. Voxels outside the mask come back as -1: background.
    cropped_CZYX, truth_1ZYX, _ = crop_to_nonzero(stack_CZYX.astype(np.float32), truth_1ZYX)
    truth_1ZYX = np.maximum(truth_1ZYX, 0)

    scheme = scheme_of("CT") if labels.is_ct else scheme_of("MR")
    if scheme == CT_SCHEME and ct_window is None:
        raise UsageError(
            f"{dataset.name} is CT, and none of the encoders was pretrained on CT; give one whose "
            "encoder.json holds a Hounsfield window",
            code="probe-no-ct-window",
        )

    saves_much = volume(cropped_CZYX.shape) < MASK_BELOW * volume(stack_CZYX.shape)
    use_mask = not labels.is_ct and saves_much
    image_CZYX = crop_resample_normalise(
        stack_CZYX,
        source_mm,
        spacing_mm,
        scheme,
        use_mask,
        ct_window if labels.is_ct else None,
    )

    # As nnU-Net's own plans say for labels.
    settings: dict[str, Any] = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    truth_1ZYX = resample_data_or_seg_to_shape(
        truth_1ZYX,
        image_CZYX.shape[1:],
        source_mm,
        spacing_mm,
        **settings,
    )

    # An ignored label has the highest number. The probe counts it as background.
    truth_ZYX = np.asarray(truth_1ZYX[0], dtype=np.int16)
    truth_ZYX[truth_ZYX >= labels.num_classes] = 0
    return image_CZYX, truth_ZYX
