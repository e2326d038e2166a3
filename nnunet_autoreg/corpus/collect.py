"""Collect the DICOM files that were found into one row per series, used or left out.

Ids and reasons contain no names of files or folders and no free text of a header. A series is named
by a salted hash.
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

RADIOGRAPHS = ("CR", "DX", "MG", "IO", "PX")
"""Modalities of DICOM files that hold one projection."""


@dataclass(frozen=True)
class DicomRow:
    """Facts about one DICOM candidate or left-out row; ``name`` contains nothing personal."""

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
    """Headers of DICOM files below one root, and the rows that they make.

    Attributes:
        images: also accept series of one slice, and radiographs.
        radiographs: files of one projection, each with the facts from its header.
    """

    salt: str
    split_4d: bool
    images: bool = False
    slices: dict[Path, list[DicomSlice]] = field(default_factory=lambda: defaultdict(list))
    left: "Counter[tuple[Path, str, str, str, str]]" = field(default_factory=Counter)
    radiographs: list[tuple[Path, NotAScanError]] = field(default_factory=list)

    def add_file(self, path: Path, source: Path | None = None) -> bool:
        """Take a file if it is DICOM, or claims to be by its ending.

        ``source`` is the file itself if no folder was given.
        """
        source = source or path.parent
        try:
            self.slices[source] += file_slices(path, path.name)
        except NotAScanError as left:
            if self.images and left.what in RADIOGRAPHS:
                self.radiographs.append((path, left))
            else:
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
        """Yield scans first, then rows that are left out."""
        groups = list(self._series())
        original = set()
        for _, group in groups:
            if not originals(group)[0].derived:
                original.add(_kind(group[0]))

        num_derived_used = 0
        for path, group in groups:
            kept = list(originals(group))
            # Derived images within a series of originals are not a separate stack.
            beside = [one for one in group if one.derived and len(kept) < len(group)]
            for one in beside:
                reason = f"derived images ({one.derived}) beside the original ones of their series"
                self.left[path, one.series, one.modality, "derived", reason] += 1

            reason = _why_derived(kept, original)
            if kept[0].derived and not reason:
                num_derived_used += 1
            yield from self._rows_of(path, kept, reason)

        if num_derived_used:
            log.info(
                "%d series are derived images (%s) and are used: their studies hold no original "
                "ones",
                num_derived_used,
                SECONDARY,
            )

        # The loop above adds to these, so they come last.
        for (source, series, what, status, reason), count in self.left.items():
            identity = series or f"{source} {reason}"
            name = f"{what}-{salted(identity, self.salt)}"
            yield DicomRow(source, name, status=status, reason=f"{reason} ({_num_files(count)})")

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
            # Folders that share an instance hold copies of a series, each of which is whole.
            instances: list[tuple[object, ...]] = []
            for folder in folders:
                instances += {one.identity for one in groups[folder]}
            is_spread = len(folders) > 1 and len(set(instances)) == len(instances)
            if is_spread:
                root = Path(os.path.commonpath(folders))
                joined = []
                for folder in folders:
                    below = folder.relative_to(root)
                    for one in groups.pop(folder):
                        joined.append(replace(one, file=(below / one.file).as_posix()))
                yield root, joined
            yield from groups.items()

    def _rows_of(self, path: Path, group: list[DicomSlice], derived: str) -> Iterator[DicomRow]:
        """Yield the rows of a series.

        ``derived`` says why a series of derived images is left out; it is "" for others.
        """
        first = group[0]
        # A series that is spread over folders is read from below their common folder.
        is_spread = path.is_dir() and any("/" in one.file for one in group)
        part = ScanPart(
            series=first.series,
            instance=first.instance if first.frame >= 0 else "",
            below="yes" if is_spread else "",
        )

        stacks = stacks_of(group)
        for number, stack in enumerate(stacks):
            # The only stack has no number, so that its id does not depend on the splitting.
            part_of_stack = replace(part, stack=str(number)) if len(stacks) > 1 else part
            if self.split_4d and len(stack.volumes) > 1:
                for t in range(len(stack.volumes)):
                    yield self._row(path, stack, replace(part_of_stack, t=str(t)), derived)
            else:
                yield self._row(path, stack, part_of_stack, derived)

        num_copies = len(group) - len(without_copies(group))
        if num_copies:
            name = f"{first.modality}-{salted(f'{part} copies', self.salt)}"
            reason = (
                f"{num_copies} of {len(group)} files of a series hold a slice that another file "
                "of it holds too (same SOP instance); each is read once"
            )
            yield DicomRow(path, name, status="duplicate", reason=reason)

    def _row(self, path: Path, stack: Stack, part: ScanPart, derived: str) -> DicomRow:
        first = stack.first
        status, reason = "", ""
        is_image = self.images and stack.shape_vox[0] == 1 and not stack.problem[0]
        try:
            # What reading an image checks does not depend on where it lies.
            if not is_image:
                check_stack(stack, str(part))
        except ScanError as error:
            status, reason = error.status, str(error)
        if derived:
            status, reason = "derived", derived

        # Where the slices lie is not part of a scan's id: a folder may be renamed.
        lasting_part = str(replace(part, below=""))
        name = f"{first.modality}-{salted(lasting_part, self.salt)}"
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
    """Return the values that an original and an image derived from it share."""
    return one.subject, one.study, one.modality


def _why_derived(group: Sequence[DicomSlice], original: AbstractSet[tuple[str, str, str]]) -> str:
    """Return why a series of derived images is left out.

    It is "" for originals, and if there is nothing better.
    """
    first = group[0]
    if not first.derived:
        return ""
    files = f"({_num_files(len(group))})"
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


def _num_files(count: int) -> str:
    return f"{count} {'file' if count == 1 else 'files'}"
