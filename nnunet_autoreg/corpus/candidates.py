"""List what a search finds: candidates, and what is left out with its reason."""

import os
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunet_autoreg.corpus.read import NEEDS_3D
from nnunet_autoreg.io.names import PICTURE_ENDINGS
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.machine import problem_of_name

WHOLE_FILE = ScanPart()


@dataclass(frozen=True)
class Candidate:
    """A file that may be a scan, or (with ``status``) something that is already left out.

    Attributes:
        id: unique and stable: ``Dataset004_Hippocampus/hippocampus_001_0000``, or folder name /
            path below it, no ending.
        path: the file, or the folder that a left-out row is about.
        dataset: name of the nnU-Net dataset, or of the folder given.
        case: groups the channels of one nnU-Net case; in plain folders the path below the folder,
            no ending.
        channel: name in dataset.json; "" in plain folders.
        status, reason: why it was left out; "" for candidates.
        part: the part of ``path`` to read, for ``load_scan``: "" is the file itself,
            ``series=<SeriesInstanceUID>`` a series in a DICOM folder, ``t=<k>`` a volume of a 4D
            file, ``member=<name>`` a file within a .zip; joined by ";".
        modality: modality stated in the file (MR, CT, PT ...); "" if none is.
        subject, session: identifiers **as found**; hash them with a salt before they are written or
            logged.
        contrast: a harmless word (T1w, FLAIR, ...), never free text.
        listed_in: folder of the dataset.json that lists the file; "" for files that were found in a
            folder.
    """

    id: str
    path: Path
    dataset: str
    case: str
    channel: str = ""
    status: str = ""
    reason: str = ""
    part: str = ""
    modality: str = ""
    subject: str = field(default="", repr=False)
    session: str = field(default="", repr=False)
    contrast: str = ""
    listed_in: str = ""


@dataclass
class CandidateList:
    """Candidates and left-out rows, in the order in which they were found.

    Attributes:
        found: the list.
        ids: ids of everything found, so that each is used once.
        files: files that are listed already, by real path and part.
        num_repeated: files that were reached a second time.
    """

    found: list[Candidate] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    num_repeated: int = 0

    def add(self, path: Path, base_id: str, dataset: str, case: str, **facts: str) -> None:
        """List one candidate, or one row of something left out, once.

        ``facts`` are fields of ``Candidate``.
        """
        # A scan may be reached by several links and names. What is left out has no content to be
        # recognised by, so its row goes by its own name.
        key = f"{os.path.realpath(path)}:{facts.get('part', '')}"
        if facts.get("status"):
            key = f"{facts['status']}:{path}:{base_id}"
        if key in self.files:
            self.num_repeated += 1
            return
        self.files.add(key)

        problem = problem_of_name(path)
        if problem:
            path = Path(_printable(str(path)))
            base_id, case = _printable(base_id), _printable(case)
            facts.update(status="unreadable", reason=problem)

        # a.nii and a.nrrd in one folder have the same name without ending.
        unique, number = base_id, 1
        while unique in self.ids:
            number += 1
            unique = f"{base_id}#{number}"
        self.ids.add(unique)
        self.found.append(Candidate(unique, path, dataset, case, **facts))

    def add_volumes(
        self,
        path: Path,
        base_id: str,
        dataset: str,
        case: str,
        facts: dict[str, str],
        num_volumes: int,
        part: ScanPart = WHOLE_FILE,
    ) -> None:
        """Add a file: one candidate, or one for each of its volumes."""
        if num_volumes == 1:
            self.add(path, base_id, dataset, case, part=str(part), **facts)
            return
        for t in range(num_volumes):
            volume = str(replace(part, t=str(t)))
            self.add(path, f"{base_id}/t{t}", dataset, f"{case}/t{t}", part=volume, **facts)

    def leave_out(self, path: Path, dataset: str, what: str, status: str, reason: str) -> None:
        """Add a row for something that is not a candidate."""
        self.add(path, f"{dataset}/{what}", dataset, "", status=status, reason=reason)

    def leave_out_labels(self, files: Container[str]) -> None:
        """Leave out files that a dataset.json lists as label maps, given by their real paths."""
        reason = "dataset.json lists it as a label map"
        for number, found in enumerate(self.found):
            if not found.status and os.path.realpath(found.path) in files:
                self.found[number] = replace(found, status="labels", reason=reason)

    def leave_out_others(self, path: Path, dataset: str, what: str, others: Counter[str]) -> None:
        """Add one row that counts the files that are not scans, by their endings."""
        counts = dict(others)
        pictures = {end: counts.pop(end) for end in PICTURE_ENDINGS if end in counts}
        if pictures:
            of_pictures = ", ".join(f"{count} {end}" for end, count in pictures.items())
            reason = f"2D images: {of_pictures}; {NEEDS_3D}"
            self.leave_out(path, dataset, f"{what} (2D)", "not3d", reason)

        # The voxels of a .mhd file are in a .raw file beside it.
        headers = [found.path for found in self.found if found.path.suffix.lower() == ".mhd"]
        if any(path in header.parents for header in headers):
            counts.pop(".raw", None)
            counts.pop(".zraw", None)
        if counts:
            listed = [f"{count} {end or 'without ending'}" for end, count in sorted(counts.items())]
            reason = f"no image endings: {', '.join(listed)}"
            self.leave_out(path, dataset, what, "ignored", reason)


def _printable(name: str) -> str:
    """Return a name in which bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")
