"""Keep the features of every finished scan, so that a stopped ``autoreg_embed`` can continue.

They are in a hidden folder beside the file of ``-o``, with one file for each scan. The folder is
removed when the file of ``-o`` has been written.
"""

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.downstream.embed import LABEL_ENDING, EmbeddedScan, LabelRegion
from nnunet_autoreg.downstream.encoder import PretrainedEncoder
from nnunet_autoreg.downstream.scans import Scan, facts_of
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import as_size, as_spacing
from nnunet_autoreg.records import atomic_path, differences, remove_temporary, to_jsonable

FORMAT = 1
MOST_NAMED = 3
"""Differences that a message lists."""
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
"""What reading a damaged file may raise."""

log = logging.getLogger(__name__)


def settings_of(
    encoder: PretrainedEncoder,
    layer: int,
    dense: bool,
    region: LabelRegion | None,
) -> dict[str, Any]:
    """Return everything but the scan itself that its features depend on."""
    card = encoder.card
    return {
        "format": FORMAT,
        "weights": card.sha256,
        "spacing_mm": card.spacing_mm,
        "normalization": card.normalization,
        "ct_window": card.ct_window,
        "tile_size_vox": encoder.built_for,
        # -1 and the index of the last map are the same.
        "layer": layer % len(encoder.num_features),
        "dense": dense,
        "region": "scan" if region is None else "label",
        "margin_mm": None if region is None else region.margin_mm,
    }


def inputs_of(scan: Scan, region: LabelRegion | None) -> list[dict[str, Any]]:
    """Return the sizes and times of a scan's files and of its label map, without their paths."""
    facts = [*scan.inputs()]
    if region is not None:
        facts += facts_of([region.folder / f"{scan.name}{LABEL_ENDING}"])
    return facts


class KeptFeatures:
    """The folder of the finished scans of one ``autoreg_embed``.

    Args:
        output: the file of ``-o``.
        settings: ``settings_of`` this call.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.output = output
        self.folder = output.with_name(f".{output.name}.unfinished")
        self.settings = to_jsonable(settings)

    def read(self, inputs: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, EmbeddedScan]:
        """Return the features that an earlier call has left, by the name of the scan.

        Scans whose files have changed since are not among them.

        Args:
            inputs: name of the scan -> ``inputs_of`` it.

        Raises:
            UsageError: they are of other weights or options (code "embed-other-options").
        """
        found = {}
        for file in sorted(self.folder.glob("*.npz")):
            try:
                # numpy does not close a damaged file that it has opened itself.
                with file.open("rb") as handle, np.load(handle) as arrays:
                    header = json.loads(str(arrays["header"]))
                    name = header["name"]
                    self._check(header["settings"])
                    if name in inputs and header["inputs"] == to_jsonable(inputs[name]):
                        found[name] = _scan_of(name, arrays)
            except DAMAGED as error:
                # The folder's name may say whose scans they are.
                reason = type(error).__name__
                log.warning("kept features are damaged (%s, %s)", file.name, reason)
        return found

    def _check(self, settings: Any) -> None:
        """Refuse features of other weights or options."""
        changes = differences(settings, self.settings)
        if changes:
            raise UsageError(
                f"-o {self.output}: a call that was stopped has kept features of other weights or "
                f"options ({'; '.join(changes[:MOST_NAMED])}); type its options to continue it, "
                f"remove {self.folder} to start again, or give another -o",
                code="embed-other-options",
            )

    def write(self, scan: EmbeddedScan, inputs: Sequence[dict[str, Any]]) -> None:
        """Keep the features of one scan; a kill at any moment leaves all of them or none.

        Args:
            inputs: ``inputs_of`` the scan, from before it was read.
        """
        header = {"name": scan.name, "settings": self.settings, "inputs": inputs}
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps(header)),
            "vector_V": scan.vector_V,
            "spacing_mm": np.array(scan.spacing_mm),
            "offset_vox": np.array(scan.grid_offset_vox),
        }
        if scan.grid_Vzyx is not None:
            arrays["grid_Vzyx"] = scan.grid_Vzyx

        # The name of a scan may be too long, or unsuitable, for the name of a file.
        digest = hashlib.sha256(scan.name.encode(errors="surrogateescape")).hexdigest()[:32]
        file = self.folder / f"{digest}.npz"
        with atomic_path(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays)

    def remove(self) -> None:
        """Remove the folder, and what a kill has left while the files of ``-o`` were written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for written in (self.output, self.output.with_suffix(".json")):
            remove_temporary(written.parent, f".{escape(written.name)}.*.tmp")


def _scan_of(name: str, arrays: Mapping[str, NDArray[Any]]) -> EmbeddedScan:
    """Return the features that ``KeptFeatures.write`` has kept."""
    return EmbeddedScan(
        name,
        as_spacing(arrays["spacing_mm"].tolist()),
        arrays["vector_V"],
        arrays.get("grid_Vzyx"),
        as_size(arrays["offset_vox"].tolist()),
    )
