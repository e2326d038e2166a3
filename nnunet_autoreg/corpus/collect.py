"""DICOM files met while searching, gathered into one row per series: a scan, or what was left out
and why.

No name of a file or folder, and no free text of a header, gets into an id or a reason; a series is
named by a salted hash.
"""

import logging
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunet_autoreg.corpus.identity import salted
from nnunet_autoreg.corpus.read import check_stack
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.dicom import claims_dicom, file_slices, member_slices
from nnunet_autoreg.io.dicom_header import NotDicomError
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.io.slices import SECONDARY, DicomSlice, NotAScanError
from nnunet_autoreg.io.stacks import Stack, by_series, originals, stacks_of, without_copies

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DicomRow:
    """What one candidate or left-out row of DICOM says; ``name`` is free of anything personal."""

    path: Path
    name: str
    part: str = ""
    modality: str = ""
    subject: str = field(default="", repr=False)
    session: str = field(default="", repr=False)
    contrast: str = ""
    status: str = ""
    reason: str = ""


@dataclass
class DicomCollector:
    """Headers of DICOM files below one root, and the rows that they make."""

    salt: str
    split_4d: bool
    slices: dict[Path, list[DicomSlice]] = field(default_factory=lambda: defaultdict(list))
    left: "Counter[tuple[Path, str, str, str, str]]" = field(default_factory=Counter)

    def add_file(self, path: Path, source: Path | None = None) -> bool:
        """Take a file if it is DICOM, or claims to be by its ending.

        ``source`` is the file itself if it was given alone.
        """
        source = source or path.parent
        try:
            self.slices[source] += file_slices(path, path.name)
        except NotAScanError as left:
            self._leave(source, left)
        except ScanError as error:
            return self._broken(source, path.name, error)
        return True

    def add_member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Path) -> bool:
        """Take a member of an archive if it is DICOM, or claims to be by its ending."""
        try:
            self.slices[source] += member_slices(archive, info)
        except NotAScanError as left:
            self._leave(source, left)
        except ScanError as error:
            return self._broken(source, info.filename, error)
        return True

    def _leave(self, source: Path, left: NotAScanError) -> None:
        self.left[source, left.series, left.what, left.status, left.reason] += 1

    def _broken(self, source: Path, name: str, error: ScanError) -> bool:
        if isinstance(error, NotDicomError) and not claims_dicom(name):
            return False
        self.left[source, "", "DICOM", error.status, str(error)] += 1
        return True

    def rows(self) -> Iterator[DicomRow]:
        """Yield scans first, then what was left out."""
        groups = list(self._series())
        original = {_kind(group[0]) for _, group in groups if not originals(group)[0].derived}
        num_used = 0
        for path, group in groups:
            kept = list(originals(group))
            if len(kept) < len(group):
                # Derived images within a series of originals are no stack of their own.
                self._leave_derived(path, [one for one in group if one.derived])
            reason = _why_derived(kept, original)
            num_used += bool(kept[0].derived and not reason)
            yield from self._rows_of(path, kept, reason)
        if num_used:
            log.info(
                "%d series are derived images (%s) and are used: their studies hold no original "
                "ones",
                num_used,
                SECONDARY,
            )
        for (source, series, what, status, reason), count in self.left.items():
            name = f"{what}-{salted(series or f'{source} {reason}', self.salt)}"
            yield DicomRow(
                source,
                name,
                status=status,
                reason=f"{reason} ({count} {'file' if count == 1 else 'files'})",
            )

    def _leave_derived(self, path: Path, group: Sequence[DicomSlice]) -> None:
        for one in group:
            reason = f"derived images ({one.derived}) beside the original ones of their series"
            self.left[path, one.series, one.modality, "derived", reason] += 1

    def _series(self) -> Iterator[tuple[Path, list[DicomSlice]]]:
        """Yield (folder, file or archive, slices of one series in it).

        A series spread over folders comes with their common folder.
        """
        sources_of: dict[tuple[str, str], dict[Path, list[DicomSlice]]] = defaultdict(dict)
        for source, slices in self.slices.items():
            for key, group in by_series(slices).items():
                sources_of[key][source] = group
        for groups in sources_of.values():
            folders = [source for source in groups if source.is_dir()]
            if len(folders) > 1 and _disjoint([groups[f] for f in folders]):
                yield _joined({f: groups.pop(f) for f in folders})
            yield from groups.items()

    def _rows_of(self, path: Path, group: list[DicomSlice], derived: str) -> Iterator[DicomRow]:
        """Yield the rows of a series.

        ``derived`` says why one of derived images is left out; it is "" for others.
        """
        below = "yes" if any("/" in s.file for s in group) and path.is_dir() else ""
        part = ScanPart(
            series=group[0].series,
            instance=group[0].instance if group[0].frame >= 0 else "",
            below=below,
        )
        stacks = stacks_of(group)
        for number, stack in enumerate(stacks):
            here = replace(part, stack=str(number)) if len(stacks) > 1 else part
            if self.split_4d and len(stack.volumes) > 1:
                for t in range(len(stack.volumes)):
                    yield self._row(path, stack, replace(here, t=str(t)), derived)
            else:
                yield self._row(path, stack, here, derived)
        copies = len(group) - len(without_copies(group))
        if copies:
            name = f"{group[0].modality}-{salted(f'{part} copies', self.salt)}"
            yield DicomRow(
                path,
                name,
                status="duplicate",
                reason=f"{copies} of {len(group)} files of a series hold a slice that another file "
                "of it holds too (same SOP instance); each is read once",
            )

    def _row(self, path: Path, stack: Stack, part: ScanPart, derived: str) -> DicomRow:
        first, status, reason = stack.first, "", ""
        try:
            check_stack(stack, str(part))
        except ScanError as error:
            status, reason = error.status, str(error)
        if derived:
            status, reason = "derived", derived
        name = f"{first.modality}-{salted(str(replace(part, below='')), self.salt)}"
        return DicomRow(
            path,
            name,
            str(part),
            first.modality,
            first.subject,
            first.study,
            first.contrast,
            status,
            reason,
        )


def _kind(one: DicomSlice) -> tuple[str, str, str]:
    """Return what an original must share with a derived image to be the better one."""
    return one.subject, one.study, one.modality


def _why_derived(group: Sequence[DicomSlice], original: AbstractSet[tuple[str, str, str]]) -> str:
    """Return why a series of derived images is left out.

    It is "" for originals, and where nothing better is there.
    """
    first = group[0]
    if not first.derived:
        return ""
    files = f"({len(group)} {'file' if len(group) == 1 else 'files'})"
    use = "to use them, give their folder a modality in --manifest"
    if first.derived != SECONDARY:
        return (
            f"derived images ({first.derived}): computed from others, not acquired; {use} {files}"
        )
    if _kind(first) in original:
        return (
            f"derived images ({SECONDARY}), and their study holds original {first.modality} "
            f"images; {use} {files}"
        )
    return ""


def _disjoint(groups: Sequence[list[DicomSlice]]) -> bool:
    """Return whether no instance is in two of the folders.

    Then they hold pieces of a series, not copies of it.
    """
    seen: set[tuple[object, ...]] = set()
    for group in groups:
        here = {s.identity for s in group}
        if here & seen:
            return False
        seen |= here
    return True


def _joined(groups: dict[Path, list[DicomSlice]]) -> tuple[Path, list[DicomSlice]]:
    root = Path(os.path.commonpath(list(groups)))
    return root, [
        replace(s, file=(folder.relative_to(root) / s.file).as_posix())
        for folder, group in groups.items()
        for s in group
    ]
