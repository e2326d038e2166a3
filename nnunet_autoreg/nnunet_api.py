"""The few nnU-Net functions borrowed: folders, reader, preprocessing, blosc2 layout.

Imported late to keep this light.
"""

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.errors import PlanError, UsageError, did_you_mean
from nnunet_autoreg.geometry import Size, Spacing, as_spacing
from nnunet_autoreg.plan import IntensityWindow

Array = npt.NDArray[np.float32]

CT_SCHEME = "CTNormalization"
MR_SCHEME = "ZScoreNormalization"
SCHEMES = (CT_SCHEME, MR_SCHEME)

# ExperimentPlanner.determine_resampling's choice for images.
RESAMPLING: dict[str, Any] = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class RawScan:
    """A scan as nnU-Net reads it: ``array_CZYX`` float32, ``spacing_mm`` (z, y, x)."""

    array_CZYX: Array  # noqa: N815
    spacing_mm: Spacing


def raw_folder() -> Path:
    """nnU-Net's folder of raw datasets.

    Raises:
        UsageError: ``nnUNet_raw`` is not set, or is no existing folder.
    """
    return _environment_folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    """nnU-Net's folder of preprocessed data.

    Raises:
        UsageError: ``nnUNet_preprocessed`` is not set, or is no existing folder.
    """
    return _environment_folder("nnUNet_preprocessed")


def results_folder() -> Path:
    """nnU-Net's folder of results.

    Raises:
        UsageError: ``nnUNet_results`` is not set, or is no existing folder.
    """
    return _environment_folder("nnUNet_results")


def _environment_folder(variable: str) -> Path:
    value = os.environ.get(variable, "")
    if not value:
        raise UsageError(
            f"the environment variable {variable} is not set; type: export "
            f"{variable}=/path/to/{variable}"
        )
    folder = Path(value)
    if not folder.exists():
        _refuse_unexpanded(variable, value)
        raise UsageError(
            f"{variable} is set to {value}, which does not exist; type: mkdir -p '{value}', or set "
            f"{variable} anew"
        )
    if not folder.is_dir():
        raise UsageError(
            f"{variable} is set to {value}, which is not a folder; type: export "
            f"{variable}=/path/to/a/folder"
        )
    return folder


def _refuse_unexpanded(variable: str, value: str) -> None:
    """Refuse a value in which quotes, ``~`` or a variable stand literally; nnU-Net would take them
    as part of the name.

    Raises:
        UsageError: with the value that was probably meant.
    """
    stripped = value.strip().strip("\"'").strip()
    meant = os.path.expandvars(os.path.expanduser(stripped))  # noqa: PTH111
    if meant == value:
        return
    kinds = (
        ("quotation marks", value.strip() != value.strip().strip("\"'")),
        ("~", stripped.startswith("~")),
        ("a variable", "$" in stripped),
        ("spaces around it", value != value.strip()),
    )
    found = " and ".join(kind for kind, is_there in kinds if is_there)
    raise UsageError(
        f"{variable} is set to {value}, with {found} as part of the folder's name, which nnU-Net "
        "takes as it is; "
        f"type: export {variable}={shlex.quote(meant)}"
    )


def dataset_number(name: str) -> str:
    """The number that nnU-Net's commands want, of a dataset given as ``4``, ``004`` or
    ``Dataset004_Hippocampus``; "ID" of others.
    """
    match = re.match(r"(?:Dataset)?(\d+)", name)
    return str(int(match[1])) if match else "ID"


def dataset_folder(dataset: str) -> Path:
    """The folder of a raw dataset given as ``4``, ``004`` or ``Dataset004_Hippocampus``.

    Raises:
        UsageError: there is none, or the number is shared by several.
    """
    root = raw_folder()
    found = {
        p.name: p
        for p in sorted(root.iterdir())
        if p.is_dir() and re.match(r"Dataset\d{3,}_.", p.name)
    }
    if dataset in found:
        return found[dataset]
    if not found:
        raise UsageError(
            f"-d {dataset}: {root} (nnUNet_raw) holds no folder named like Dataset004_Hippocampus"
        )
    numbers = {name: int(name[len("Dataset") :].split("_")[0]) for name in found}
    if not dataset.isdecimal():
        raise UsageError(
            f"-d {dataset}: there is no such dataset in {root}; {did_you_mean(dataset, found)}"
        )
    matches = [name for name, number in numbers.items() if number == int(dataset)]
    if not matches:
        known = ", ".join(f"{numbers[name]} ({name})" for name in found)
        raise UsageError(
            f"-d {dataset}: no dataset of {root} has the number {int(dataset)}; known are: {known}"
        )
    if len(matches) > 1:
        raise UsageError(
            f"-d {dataset}: {' and '.join(matches)} share the number {int(dataset)}; give the full "
            "name"
        )
    return found[matches[0]]


def read_scan(path: Path) -> RawScan:
    """Read one file with nnU-Net's SimpleITK reader (NIfTI, NRRD, MHA, MHD).

    Errors are SimpleITK's own.
    """
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    array, properties = SimpleITKIO().read_images([str(path)])
    return RawScan(array, as_spacing(properties["spacing"]))


def scheme_of(modality: str) -> str:
    """The normalisation for a modality:

    CT keeps its Hounsfield window, everything else is z-scored.
    """
    return CT_SCHEME if modality == "CT" else MR_SCHEME


def resampled_shape(
    shape_vox: Sequence[int], spacing_mm: Sequence[float], target_spacing_mm: Sequence[float]
) -> Size:
    """nnU-Net's ``compute_new_shape`` on plain numbers (that module imports torch; a test holds the
    two together).
    """
    z, y, x = (
        round(s / t * n) for s, t, n in zip(spacing_mm, target_spacing_mm, shape_vox, strict=True)
    )
    return (z, y, x)


def crop_resample_normalise(
    array_CZYX: npt.NDArray[Any],
    spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    scheme: str,
    use_mask: bool,
    ct_window: IntensityWindow | None,
) -> Array:
    """Preprocess one scan exactly as nnU-Net's ``DefaultPreprocessor.run_case_npy`` does without a
    segmentation.

    Args:
        array_CZYX: raw intensities, axes already transposed; not modified. Every channel is
            normalised alone.
        spacing_mm, target_spacing_mm: (z, y, x), transposed alike.
        scheme: ``CTNormalization`` or ``ZScoreNormalization``.
        use_mask: z-score inside the non-zero mask only, leaving zeros outside.
        ct_window: Hounsfield statistics; needed for CT.

    Returns:
        float32 (C, Z, Y, X), cropped to non-zero, normalised, then resampled.

    Raises:
        PlanError: an unknown scheme, CT without a window, or a scan that shrinks to nothing at the
            target spacing.
    """
    if scheme not in SCHEMES:
        raise PlanError(f"there is no normalisation '{scheme}'; {did_you_mean(scheme, SCHEMES)}")
    if scheme == CT_SCHEME and ct_window is None:
        raise PlanError(
            "CTNormalization needs a Hounsfield window: index CT scans, or set data.ct_window"
        )
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.resampling.default_resampling import (
        compute_new_shape,
        resample_data_or_seg_to_shape,
    )

    source, target = [float(s) for s in spacing_mm], [float(s) for s in target_spacing_mm]
    data, mask, _ = crop_to_nonzero(array_CZYX.astype(np.float32), None)
    new_shape = compute_new_shape(data.shape[1:], source, target)
    if min(new_shape) < 1:
        raise PlanError(
            f"{data.shape[1:]} voxels of {tuple(source)} mm vanish at the target spacing "
            f"{tuple(target)} mm"
        )
    normaliser = _normaliser(scheme, use_mask, ct_window)
    for c in range(data.shape[0]):
        data[c] = normaliser.run(data[c], mask[0])
    resampled = resample_data_or_seg_to_shape(data, new_shape, source, target, **RESAMPLING)
    return np.ascontiguousarray(resampled, dtype=np.float32)


def _normaliser(scheme: str, use_mask: bool, ct_window: IntensityWindow | None) -> Any:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
        CTNormalization,
        ZScoreNormalization,
    )

    properties = dataclasses.asdict(ct_window) if ct_window else {}
    kind = CTNormalization if scheme == CT_SCHEME else ZScoreNormalization
    return kind(use_mask_for_norm=use_mask, intensityproperties=properties)
