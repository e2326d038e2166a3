"""A table in which the user describes scans: patient, session, contrast, class and modality."""

import csv
import io
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.private import terminal_only
from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.io.names import absolute
from nnunet_autoreg.records import regular

log = logging.getLogger(__name__)

COLUMNS = ("path", "subject", "session", "contrast", "class", "modality")
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class ManifestEntry:
    """One row of a manifest; "" if it says nothing."""

    subject: str = ""
    session: str = ""
    contrast: str = ""
    label_class: str = ""
    modality: str = ""


@dataclass(frozen=True)
class Manifest:
    """Real paths of files or folders -> the user's description of the scans there.

    Attributes:
        file: the manifest itself, for messages.
        missing: paths, as written, that do not exist.
    """

    file: Path
    entries: dict[str, ManifestEntry]
    missing: tuple[str, ...] = ()

    def entry_of(self, path: Path) -> tuple[str, ManifestEntry] | None:
        """Return (key, entry) of the nearest path of the manifest.

        It is the scan's own path, or a folder that contains it.
        """
        real = Path(os.path.realpath(path))
        # From the file itself upwards, so that the nearest folder counts.
        for key in map(str, (real, *real.parents)):
            if key in self.entries:
                return key, self.entries[key]
        return None


def read_manifest(file: Path) -> Manifest:
    """Read a CSV with a header line; separated by commas, semicolons or tabs.

    Columns: ``path`` (of a file or folder; absolute, or relative to the manifest), and any of
    ``subject``, ``session``, ``contrast``, ``class``, ``modality``. An empty cell says nothing.

    Raises:
        UsageError: it cannot be read, has an unknown column, no ``path``, a row that is too long,
            or a path twice.
    """
    try:
        text = regular(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--manifest {file} cannot be read ({error}); give a CSV file in UTF-8 with the "
            f"columns {_listed()}",
            code="manifest-unreadable",
        ) from error
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    try:
        reader = csv.DictReader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            restkey="",
            restval="",
            strict=True,
        )
        _check_columns(file, [_plain_name(name) for name in reader.fieldnames or ()])
        rows = []
        for row in reader:
            rows.append({_plain_name(name): cell for name, cell in row.items()})
    except csv.Error as error:
        raise UsageError(
            f"--manifest {file} is not a CSV file ({error}); check its quotes",
            code="manifest-unreadable",
        ) from error
    return _gather(file, rows)


def _plain_name(name: str | None) -> str:
    """Return the name of a column without case and blanks; "" for cells beyond the last one."""
    return (name or "").strip().lower()


def _check_columns(file: Path, names: list[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            raise UsageError(
                f"--manifest {file}: unknown column '{name}'; {did_you_mean(name, COLUMNS)}",
                code="manifest-unknown-column",
            )
        if names.count(name) > 1:
            raise UsageError(
                f"--manifest {file}: the column '{name}' occurs twice; remove one",
                code="manifest-repeated-column",
            )
    if "path" not in names:
        raise UsageError(
            f"--manifest {file}: the column 'path' is missing; the first line must name the "
            f"columns, from {_listed()}",
            code="manifest-missing-column",
        )


def _gather(file: Path, rows: list[dict[str, str]]) -> Manifest:
    """Return the manifest of these rows.

    Raises:
        UsageError: a row is too long, has no path, or names a path again.
    """
    entries: dict[str, ManifestEntry] = {}
    missing = []
    for number, row in enumerate(rows, 1):
        if row.get(""):
            raise UsageError(
                f"--manifest {file}: row {number} has more cells than the first line has columns; "
                "quote cells that hold the separator",
                code="manifest-extra-cells",
            )
        cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
        if not cells["path"]:
            raise UsageError(
                f"--manifest {file}: row {number} has no path; fill it in, or remove the row",
                code="manifest-no-path",
            )
        path = absolute(file.parent / cells["path"])
        if not path.exists():
            missing.append(cells["path"])
            continue
        real = os.path.realpath(path)
        if real in entries:
            raise UsageError(
                f"--manifest {file}: row {number} names {cells['path']} a second time; keep one "
                "row for each path",
                code="manifest-repeated-path",
            )
        entries[real] = ManifestEntry(
            cells["subject"],
            cells["session"],
            cells["contrast"],
            cells["class"],
            cells["modality"].upper(),
        )
    return Manifest(file, entries, tuple(missing))


def describe(
    candidates: Iterable[Candidate],
    manifest: Manifest | None,
) -> tuple[list[Candidate], dict[str, ManifestEntry]]:
    """Return the candidates as the manifest describes them, and the entries used by id.

    The manifest has priority over the files.
    """
    if manifest is None:
        return list(candidates), {}
    described, used, keys = [], {}, set()
    for found in candidates:
        candidate = found
        match = manifest.entry_of(found.path)
        if match is not None and match[1].modality:
            # Derived images are a scan if a row names their own folder, and a modality.
            is_derived = found.status == "derived" and found.part
            if is_derived and match[0] == os.path.realpath(found.path):
                candidate = replace(found, status="", reason="")
        # What was left out for another reason is not brought back by a manifest.
        if match is None or candidate.status:
            described.append(candidate)
            continue

        key, entry = match
        keys.add(key)
        used[candidate.id] = entry
        described.append(
            replace(
                candidate,
                subject=entry.subject or candidate.subject,
                session=entry.session or candidate.session,
                contrast=entry.contrast or candidate.contrast,
                modality=entry.modality or candidate.modality,
            ),
        )
    _report(manifest, len(used), [key for key in manifest.entries if key not in keys])
    return described, used


def _report(manifest: Manifest, num_used: int, unused: list[str]) -> None:
    log.info(
        "--manifest: %d scans are described by %d of %d rows",
        num_used,
        len(manifest.entries) - len(unused),
        len(manifest.entries) + len(manifest.missing),
    )
    if manifest.missing:
        log.warning(
            "--manifest: %d paths do not exist; they are relative to the manifest's folder",
            len(manifest.missing),
            extra=terminal_only(f"; the first is '{manifest.missing[0]}'"),
        )
    if unused:
        log.warning(
            "--manifest: %d paths hold no scan of the inputs; name their folders with -i",
            len(unused),
            extra=terminal_only(f"; the first is '{unused[0]}'"),
        )


def _listed() -> str:
    return ", ".join(COLUMNS)
