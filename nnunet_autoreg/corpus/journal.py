"""Results of indexing, written scan by scan. With them a killed indexing continues."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.io.names import voxel_file
from nnunet_autoreg.records import parse_json

log = logging.getLogger(__name__)

VERSION = 2
JOURNAL_NAME = ".scans.partial.jsonl"


@dataclass(frozen=True)
class ScanFacts:
    """Facts found by reading one scan, without personal information.

    Attributes:
        status, reason: as in ``ScanRow``; "" if the scan is good.
        shape_vox ... percentiles: as in ``ScanRow``.
        signature: base64 of ``content.signature``; "" without one.
        samples: base64 of float32 Hounsfield values drawn inside the body; "" unless the scan is a
            CT.
    """

    status: str = ""
    reason: str = ""
    modality: str = ""
    modality_rule: str = ""
    shape_vox: Size | None = None
    spacing_mm: Spacing | None = None
    cropped_shape_vox: Size | None = None
    content_hash: str = ""
    percentiles: tuple[float, ...] = ()
    signature: str = ""
    samples: str = ""


class Journal:
    """A hidden file of JSON lines ``[key, facts]``; without a path nothing is kept.

    A key represents the present state of a file (path, part, size, time of change) and everything
    else that the facts depend on.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, ScanFacts] = {}
        self._handle: IO[str] | None = None

    def __enter__(self) -> "Journal":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._load(self.path) if self.path.exists() else 0
            self._handle = self.path.open("a", encoding="utf-8")
            # New lines must not be appended to one that a kill has cut short.
            self._handle.truncate(whole)
            if self.known:
                log.info(
                    "continuing with an index that was cut short: %d scans were read before",
                    len(self.known),
                )
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def _load(self, path: Path) -> int:
        """Read all complete lines, and return their length in bytes.

        A torn last line, and what follows a damaged one, is read again.
        """
        whole = 0
        with path.open("rb") as handle:
            for line in handle:
                try:
                    key, facts = parse_json(line.decode("utf-8"))
                    values: dict[str, Any] = {
                        name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()
                    }
                    self.known[str(key)] = ScanFacts(**values)
                except (ValueError, TypeError, AttributeError):
                    break
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
        return whole

    def add(self, key: str, facts: ScanFacts) -> None:
        """Write the result of a scan immediately, so that a kill does not lose it."""
        if self._handle is not None and key:
            self._handle.write(json.dumps([key, vars(facts)]) + "\n")
            self._handle.flush()


def journal_key(stamp: str, *depends_on: Any) -> str:
    """Return a key for facts about a file with this ``stamp``.

    Without a stamp it is "", which is never found again.
    """
    if not stamp:
        return ""
    # A hash, because paths may name patients and the journal lies in the run's folder.
    text = json.dumps([VERSION, stamp, *depends_on])
    return hashlib.sha256(text.encode()).hexdigest()


def stamp_of(path: Path, deep: bool = False) -> str:
    """Return size and time of change of a file, or of all files in a folder.

    With ``deep`` files in subfolders count too, and the file with the voxels of a header. It is ""
    if they cannot be read.
    """
    try:
        if path.is_dir():
            return _folder_stamp(str(path), deep)
        voxels = voxel_file(path)
        return " ".join(_entry(file.stat()) for file in (path, voxels) if file is not None)
    except OSError:
        return ""


def _entry(found: os.stat_result) -> str:
    return f"{found.st_size}/{found.st_mtime_ns}"


@lru_cache(maxsize=256)
def _folder_stamp(folder: str, deep: bool) -> str:
    folders = [where for where, _, _ in os.walk(folder)] if deep else [folder]
    listed = []
    for where in sorted(folders):
        with os.scandir(where) as entries:
            files = [entry for entry in entries if entry.is_file()]
        # Sorted, because the file system gives them in any order.
        listed += sorted(f"{entry.path}/{_entry(entry.stat())}" for entry in files)
    return hashlib.sha256("\n".join(listed).encode("utf-8", "surrogateescape")).hexdigest()
