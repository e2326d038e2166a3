"""The few nnU-Net functions borrowed: folders, reader, preprocessing, blosc2 layout.

Imported late to keep this light.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.errors import PlanError, UsageError, did_you_mean, shell_quoted
from nnunet_autoreg.geometry import Size, Spacing, as_spacing
from nnunet_autoreg.machine import MOST_DIGITS, is_whole_number, problem_of_name
from nnunet_autoreg.plan import IntensityWindow

Array = npt.NDArray[np.float32]

CT_SCHEME = "CTNormalization"
MR_SCHEME = "ZScoreNormalization"
SCHEMES = (CT_SCHEME, MR_SCHEME)

# ExperimentPlanner.determine_resampling's choice for images.
RESAMPLING: dict[str, Any] = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class RawScan:
    """Hold a scan as nnU-Net reads it: ``array_CZYX`` float32, ``spacing_mm`` (z, y, x)."""

    array_CZYX: Array  # noqa: N815
    spacing_mm: Spacing


def raw_folder() -> Path:
    """Return nnU-Net's folder of raw datasets.

    Raises:
        UsageError: ``nnUNet_raw`` is not set, or is not an existing folder.
    """
    return _environment_folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    """Return nnU-Net's folder of preprocessed data.

    Raises:
        UsageError: ``nnUNet_preprocessed`` is not set, or is not an existing folder.
    """
    return _environment_folder("nnUNet_preprocessed")


def results_folder() -> Path:
    """Return nnU-Net's folder of results.

    Raises:
        UsageError: ``nnUNet_results`` is not set, or is not an existing folder.
    """
    return _environment_folder("nnUNet_results")


def _environment_folder(variable: str) -> Path:
    """Return the folder that an environment variable names.

    Raises:
        UsageError: it is not set, or is not an existing folder; with the value that was probably
            intended if the shell has not expanded it.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise UsageError(
            f"the environment variable {variable} is not set; type: export "
            f"{variable}=/path/to/{variable}",
            code="usage-variable-unset",
        )
    problem = problem_of_name(value)
    if problem:
        raise UsageError(f"{variable} is set to {value}: {problem}", code="usage-name")
    folder = Path(value)
    if not folder.exists():
        # Quotes, "~" or a variable that the shell has not expanded would be taken literally.
        bare = value.strip()
        stripped = bare.strip("\"'").strip()
        meant = os.path.expandvars(os.path.expanduser(stripped))  # noqa: PTH111
        if meant != value:
            kinds = (
                ("quotation marks", bare != bare.strip("\"'")),
                ("~", stripped.startswith("~")),
                ("a variable", "$" in stripped),
                ("spaces around it", value != bare),
            )
            found = " and ".join(kind for kind, is_there in kinds if is_there)
            raise UsageError(
                f"{variable} is set to {value}, with {found} as part of the folder's name; nnU-Net "
                f"uses it literally, so type: export {variable}={shell_quoted(meant)}",
                code="usage-unexpanded",
            )
        raise UsageError(
            f"{variable} is set to {value}, which does not exist; type: mkdir -p "
            f"{shell_quoted(value)}, or set {variable} to another folder",
            code="usage-no-folder",
        )
    if not folder.is_dir():
        raise UsageError(
            f"{variable} is set to {value}, which is not a folder; type: export "
            f"{variable}=/path/to/a/folder",
            code="usage-no-folder",
        )
    return folder


def dataset_number(name: str) -> str:
    """Return the number of a dataset, as nnU-Net's commands need it.

    The dataset is given as ``4``, ``004`` or ``Dataset004_Hippocampus``. For anything else the
    result is "ID".
    """
    match = re.match(r"(?:Dataset)?(\d+)", name)
    if match is None or len(match[1]) > MOST_DIGITS:
        return "ID"
    return str(int(match[1]))


def without_dataset_name(dataset: str) -> str:
    """Return the number of a raw dataset, which replaces its name in a run's plan.

    A dataset that does not exist, or shares its number with another, stays as it was typed.
    """
    number = dataset_number(dataset)
    try:
        is_unique = dataset_folder(number) == dataset_folder(dataset)
    except UsageError:
        # The command refuses it later, where the scans are looked for.
        return dataset
    return number if is_unique else dataset


def dataset_folder(dataset: str) -> Path:
    """Return the folder of a raw dataset given as ``4``, ``004`` or ``Dataset004_Hippocampus``.

    Raises:
        UsageError: there is no such dataset (code "usage-no-dataset"), or several have this number
            (code "usage-ambiguous-dataset").
    """
    root = raw_folder()
    found = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and re.match(r"Dataset\d{3,}_.", folder.name):
            found[folder.name] = folder

    if dataset in found:
        return found[dataset]
    if not found:
        raise UsageError(
            f"-d {dataset}: {root} (nnUNet_raw) contains no folder with a name like "
            "Dataset004_Hippocampus",
            code="usage-no-dataset",
        )

    numbers = {}
    for name in found:
        digits, _, _ = name.removeprefix("Dataset").partition("_")
        numbers[name] = int(digits)
    if not is_whole_number(dataset):
        raise UsageError(
            f"-d {dataset}: there is no such dataset in {root}; {did_you_mean(dataset, found)}",
            code="usage-no-dataset",
        )
    matches = [name for name, number in numbers.items() if number == int(dataset)]
    if not matches:
        known = ", ".join(f"{numbers[name]} ({name})" for name in found)
        raise UsageError(
            f"-d {dataset}: no dataset of {root} has the number {int(dataset)}; known are: {known}",
            code="usage-no-dataset",
        )
    if len(matches) > 1:
        raise UsageError(
            f"-d {dataset}: {' and '.join(matches)} have the same number {int(dataset)}; give the "
            "full name",
            code="usage-ambiguous-dataset",
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
    """Return the normalisation of a modality: by a Hounsfield window for CT, else z-score."""
    return CT_SCHEME if modality == "CT" else MR_SCHEME


def resampled_shape(
    shape_vox: Sequence[int],
    spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
) -> Size:
    """Return the shape after resampling, by the formula of nnU-Net's ``compute_new_shape``.

    That function's module imports torch, which is slow. A test compares the two.
    """
    triples = zip(spacing_mm, target_spacing_mm, shape_vox, strict=True)
    z, y, x = (round(spacing / target * size) for spacing, target, size in triples)
    return (z, y, x)


def crop_resample_normalise(
    array_CZYX: npt.NDArray[Any],
    spacing_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    scheme: str,
    use_mask: bool,
    ct_window: IntensityWindow | None,
    normaliser: Any = None,
) -> Array:
    """Preprocess one scan exactly as nnU-Net does for prediction.

    It does the same as ``DefaultPreprocessor.run_case_npy`` without a segmentation.

    Args:
        array_CZYX: raw intensities, axes already transposed; not modified. Every channel is
            normalised separately.
        spacing_mm, target_spacing_mm: (z, y, x), in the same order of axes.
        scheme: ``CTNormalization`` or ``ZScoreNormalization``.
        use_mask: z-score inside the non-zero mask only, leaving zeros outside.
        ct_window: Hounsfield statistics; needed for CT.
        normaliser: an object with nnU-Net's ``run(image, seg)``, used instead of the scheme's.

    Returns:
        float32 (C, Z, Y, X), cropped to non-zero, normalised, then resampled.

    Raises:
        PlanError: the scheme is unknown (code "plan-normalisation"), CT has no window (code
            "plan-no-ct-window"), or the scan has no voxels left at the target spacing (code
            "plan-vanishing-scan").
    """
    if scheme not in SCHEMES:
        raise PlanError(
            f"there is no normalisation '{scheme}'; {did_you_mean(scheme, SCHEMES)}",
            code="plan-normalisation",
        )
    if scheme == CT_SCHEME and ct_window is None:
        raise PlanError(
            "CTNormalization needs a Hounsfield window: index CT scans, or set data.ct_window",
            code="plan-no-ct-window",
        )
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.resampling.default_resampling import (
        compute_new_shape,
        resample_data_or_seg_to_shape,
    )

    source = [float(s) for s in spacing_mm]
    target = [float(s) for s in target_spacing_mm]
    data, mask, _ = crop_to_nonzero(array_CZYX.astype(np.float32), None)  # both (C, Z, Y, X)
    new_shape = compute_new_shape(data.shape[1:], source, target)
    if min(new_shape) < 1:
        raise PlanError(
            f"{data.shape[1:]} voxels of {tuple(source)} mm leave no voxel at the target spacing "
            f"of {tuple(target)} mm",
            code="plan-vanishing-scan",
        )

    normaliser = normaliser or _normaliser(scheme, use_mask, ct_window)
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
