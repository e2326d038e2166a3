"""Compute the features of whole scans: a vector, and optionally the features of all positions."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.corpus.fingerprint import transpose_axes
from nnunet_autoreg.corpus.private import without_names
from nnunet_autoreg.corpus.read import box_around, check_3d, information
from nnunet_autoreg.downstream.encoder import PretrainedEncoder
from nnunet_autoreg.downstream.scans import Scan, check_image, ready
from nnunet_autoreg.downstream.tiles import TiledScan, features_of_scan
from nnunet_autoreg.errors import AutoregError, PlanError, ScanError, UsageError
from nnunet_autoreg.geometry import Size, Spacing, as_size, size_text
from nnunet_autoreg.io.files import quiet_readers
from nnunet_autoreg.nnunet_api import RawScan, read_scan
from nnunet_autoreg.records import atomic_path, write_json

DEEPEST = -1
PARQUET, NPZ = ".parquet", ".npz"
LABEL_ENDING = ".nii.gz"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedScan:
    """Hold the features of one scan.

    Attributes:
        name: name of the scan.
        spacing_mm: spacing (z, y, x) of the file.
        vector_V: mean over the positions in the scan, or in the region of interest.
        grid_Vzyx: the features of every position of the preprocessed scan; None if not wanted. The
            scan is padded with zeros on both sides to a whole number of positions.
        grid_offset_vox: number of voxels (z, y, x) of padding before the first voxel of the scan.
    """

    name: str
    spacing_mm: Spacing
    vector_V: NDArray[np.float32]  # noqa: N815
    grid_Vzyx: NDArray[np.float32] | None  # noqa: N815
    grid_offset_vox: Size


@dataclass(frozen=True)
class LabelRegion:
    """Define a region of interest: the bounding box of the labelled voxels.

    Attributes:
        folder: folder of label maps named like the scans, such as ``case.nii.gz``.
        margin_mm: distance by which the box is enlarged on every side.
    """

    folder: Path
    margin_mm: float

    def counted(
        self,
        name: str,
        image_CZYX: NDArray[np.float32],
        spacing_mm: Spacing,
        prepared: Size,
    ) -> Tensor:
        """Return the region in the preprocessed scan, (Z, Y, X) with 1 inside the box, else 0.

        Args:
            name: name of the scan.
            image_CZYX: the scan as stored in the file.
            spacing_mm: spacing (z, y, x) of the file.
            prepared: shape of the preprocessed scan.

        Raises:
            ScanError: there is no label map, it is empty, or it is of another size.
        """
        file = self.folder / f"{name}{LABEL_ENDING}"
        if not file.is_file():
            raise ScanError("label", f"there is no label map {file.name} in --labels {self.folder}")
        labels_ZYX = _read_file(str(file)).array_CZYX[0]
        if labels_ZYX.shape != image_CZYX.shape[1:]:
            raise ScanError(
                "geometry",
                f"its label map {file.name} has {size_text(labels_ZYX.shape)} voxels, and the "
                f"scan {size_text(image_CZYX.shape[1:])}",
            )
        is_labelled = labels_ZYX > 0
        if not is_labelled.any():
            raise ScanError("label", f"its label map {file.name} has no labelled voxel")
        margin = np.ceil(self.margin_mm / np.array(spacing_mm))
        low, high = np.array(box_around(is_labelled))  # each (3,)
        low = low - margin
        high = high + margin

        # Preprocessing has cut the scan to its non-zero part, turned its axes, and resampled it.
        has_value = np.asarray(image_CZYX.any(axis=0), dtype=bool)
        first, end = np.array(box_around(has_value))  # each (3,)
        axes = list(transpose_axes(spacing_mm))
        scale = np.array(prepared) / (end - first)[axes]
        start = np.floor((low - first)[axes] * scale)
        start = np.clip(start, 0, np.array(prepared) - 1).astype(int)
        stop = np.ceil((high - first)[axes] * scale)
        stop = np.clip(stop, start + 1, prepared).astype(int)

        counted_ZYX = torch.zeros(prepared)
        z, y, x = (slice(*ends) for ends in zip(start, stop, strict=True))
        counted_ZYX[z, y, x] = 1
        return counted_ZYX


def map_chooser(encoder: PretrainedEncoder, layer: int) -> Callable[[Tensor], Tensor]:
    """Return a function that computes one feature map.

    Args:
        layer: index of the map; 0 is the finest, -1 the deepest.

    Raises:
        UsageError: there is no such map (code "embed-layer").
    """
    num_maps = len(encoder.num_features)
    if not -num_maps <= layer < num_maps:
        raise UsageError(
            f"--layer {layer}: '{encoder.card.name}' has {num_maps} feature maps; give a number "
            f"from 0 (the finest) to {num_maps - 1} (the deepest)",
            code="embed-layer",
        )
    if layer in (DEEPEST, num_maps - 1):
        return encoder.deepest

    def chosen(volume_BCZYX: Tensor) -> Tensor:
        return encoder(volume_BCZYX)[layer]  # type: ignore[no-any-return]

    return chosen


def embed_scan(
    encoder: PretrainedEncoder,
    scan: Scan,
    layer: int = DEEPEST,
    dense: bool = False,
    device: torch.device | None = None,
    region: LabelRegion | None = None,
) -> EmbeddedScan:
    """Return the features of a scan; a large scan is covered by tiles of the crop size.

    Args:
        layer: see ``map_chooser``.
        dense: also return the features of every position.
        device: device of the encoder; None for the CPU.
        region: region of the mean; None for the whole scan.

    Raises:
        ScanError: the scan cannot be read or preprocessed.
        UsageError: there is no such layer.
    """
    feature_map = map_chooser(encoder, layer)
    image_CZYX, spacing_mm = _read(scan)
    check_image(image_CZYX, encoder.num_channels)
    try:
        prepared = encoder.preprocess(image_CZYX, spacing_mm)
    except PlanError as error:
        raise ScanError("spacing", str(error)) from error
    if not bool(torch.isfinite(prepared).all()):
        raise ScanError("nonfinite", "it holds NaN or infinity; repair or leave out the scan")

    counted_ZYX = None
    if region is not None:
        prepared_shape = as_size(prepared.shape[1:])
        counted_ZYX = region.counted(scan.name, image_CZYX, spacing_mm, prepared_shape)
    tiled = TiledScan(prepared, encoder.built_for, encoder.token_size, counted_ZYX)

    def on_device(tile: Tensor) -> Tensor:
        return feature_map(tile if device is None else tile.to(device))

    found = features_of_scan(on_device, tiled, with_map=dense)
    grid = None if found.map_Vzyx is None else found.map_Vzyx.numpy()
    return EmbeddedScan(scan.name, spacing_mm, found.mean_V.numpy(), grid, tiled.offset)


def _read(scan: Scan) -> tuple[NDArray[np.float32], Spacing]:
    """Return the channels (C, Z, Y, X) of a scan, and its spacing (z, y, x) in mm."""
    with ready(scan) as files:
        channels = [_read_file(file) for file in files]
    shapes = {channel.array_CZYX.shape for channel in channels}
    if len(shapes) > 1:
        raise ScanError("geometry", f"its channels differ in size: {sorted(shapes)}")
    stacked = np.concatenate([channel.array_CZYX for channel in channels])
    return stacked, channels[0].spacing_mm


def _read_file(file: str) -> RawScan:
    """Read one file with nnU-Net's reader.

    Raises:
        ScanError: it cannot be read, or is not a 3D image.
    """
    path = Path(file)
    # nnU-Net reads a 2D image as a slice of 999 mm, which would become hundreds of equal slices.
    reader = information(path)
    check_3d(reader.GetDimension(), path.name)
    if reader.GetNumberOfComponents() != 1:
        raise ScanError(
            "rgb",
            f"{path.name} has {reader.GetNumberOfComponents()} values per voxel; split it",
        )
    try:
        with quiet_readers():
            return read_scan(path)
    except Exception as error:
        # The reader raises errors of any kind. Paths may hold the names of patients.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = without_names(lines[-1].strip(), [file])
        raise ScanError("unreadable", f"nnU-Net cannot read {path.name} ({reason})") from error


def write_features(
    file: Path,
    scans: Sequence[EmbeddedScan],
    encoder: PretrainedEncoder,
    layer: int,
    region: LabelRegion | None = None,
) -> None:
    """Write the features of all scans, whole or not at all.

    ``.npz`` has ``ids`` (S,), ``features`` (S, V), ``spacing_mm`` (S, 3), and for every scan with a
    grid ``grid/<id>`` (V, z, y, x) and ``offset_vox/<id>``. ``.parquet`` has a row per scan. A JSON
    file beside it names the encoder.

    Args:
        layer, region: how the features were made, for the JSON file.

    Raises:
        AutoregError: ``.parquet`` needs a package that is not installed (code "embed-no-pyarrow").
    """
    ids = [scan.name for scan in scans]
    features = np.stack([scan.vector_V for scan in scans])  # (S, V)
    spacings = np.array([scan.spacing_mm for scan in scans])  # (S, 3)
    if file.suffix == PARQUET:
        _write_parquet(file, ids, features, spacings)
    else:
        arrays: dict[str, Any] = {
            "ids": np.array(ids),
            "features": features,
            "spacing_mm": spacings,
        }
        for scan in scans:
            if scan.grid_Vzyx is not None:
                arrays[f"grid/{scan.name}"] = scan.grid_Vzyx
                arrays[f"offset_vox/{scan.name}"] = np.array(scan.grid_offset_vox)
        with atomic_path(file) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    card = encoder.card
    described = {
        "encoder": card.name,
        "sha256": card.sha256,
        "layer": layer,
        "region": "scan" if region is None else "label",
        "margin_mm": None if region is None else region.margin_mm,
        "num_features": features.shape[1],
        "tile_size_vox": encoder.built_for,
        "spacing_mm": card.spacing_mm,
        "token_size_vox": card.token_size_vox,
    }
    write_json(file.with_suffix(".json"), described)


def _write_parquet(
    file: Path,
    ids: list[str],
    features: NDArray[np.float32],
    spacings: NDArray[np.float64],
) -> None:
    """Write a row per scan; ``features`` (S, V) and ``spacings`` (S, 3) become columns."""
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {"id": ids}
    for number, axis in enumerate("zyx"):
        columns[f"spacing_{axis}_mm"] = spacings[:, number]
    for number in range(features.shape[1]):
        columns[f"feature_{number}"] = features[:, number]
    with atomic_path(file) as temporary:
        parquet.write_table(pyarrow.table(columns), str(temporary))


def check_parquet() -> None:
    """Refuse ``.parquet`` if the package that writes it is not installed.

    Raises:
        AutoregError: it is not (code "embed-no-pyarrow").
    """
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        raise AutoregError(
            ".parquet needs the package pyarrow; type: pip install pyarrow, or write features.npz",
            code="embed-no-pyarrow",
        )
