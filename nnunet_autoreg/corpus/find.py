"""Find scans in nnU-Net raw datasets and in plain folders. Whatever is left out comes back too, with its reason."""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import PlanError, UsageError, did_you_mean
from nnunet_autoreg.nnunet_api import dataset_folder
from nnunet_autoreg.records import read_json

log = logging.getLogger(__name__)

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True)
class Candidate:
    """A file that may be a scan, or (``status`` set) something that was left out already.

    Attributes:
        id: unique and stable: ``Dataset004_Hippocampus/hippocampus_001_0000``, or folder name / path below it, no ending.
        path: the file, or the folder that a left-out row stands for.
        dataset: name of the nnU-Net dataset, or of the folder given.
        case: groups the channels of one nnU-Net case; in plain folders the path below the folder, no ending.
        channel: name in dataset.json; "" in plain folders.
        status, reason: why it was left out; "" for candidates.
        part: what inside ``path``, as ``load_scan`` takes it: "" is the file itself, ``series=<SeriesInstanceUID>`` a series in
            a DICOM folder, ``t=<k>`` a volume of a 4D file, ``member=<name>`` a file within a .zip; joined by ";".
        modality: as the file itself says (MR, CT, PT ...); "" if it does not.
        subject, session: identifiers **as found**; hash them with a salt before they are written or logged.
        contrast: a harmless word (T1w, FLAIR, ...), never free text.
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


def find_scans(datasets: list[str], folders: list[Path], *, split_4d: bool = False) -> list[Candidate]:
    """All candidates, datasets first, in natural order; a file reached twice is listed once.

    Of an nnU-Net dataset (``dataset.json`` beside ``imagesTr``) only the images are taken, wherever it is met. Other folders
    are searched whole, following links but no link twice, without hidden files. DICOM is counted, not read.

    Raises:
        UsageError: a dataset or folder that does not exist.
    """
    finder = _Finder()
    for dataset in datasets:
        finder.add_dataset(dataset_folder(dataset))
    for folder in folders:
        finder.add_given(folder)
    if finder.num_repeated:
        log.info("%d files were reached twice and are counted once", finder.num_repeated)
    return finder.found


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which scan2 comes before scan10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", text) if part]


def strip_ending(name: str) -> str:
    """A file name without its image ending; unchanged if it has none."""
    return next((name[: -len(e)] for e in IMAGE_ENDINGS if name.lower().endswith(e)), name)


def absolute(path: str | Path) -> Path:
    """An absolute path without ``..``, links left as they are (``resolve`` would follow them and change ids)."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def is_dataset(folder: Path) -> bool:
    """Whether a folder is an nnU-Net raw dataset."""
    return (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()


@dataclass
class _Finder:
    found: list[Candidate] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    num_repeated: int = 0

    def add_given(self, given: Path) -> None:
        """A path given with -i: a folder, a dataset, a part of a dataset, or one file."""
        folder = absolute(given)
        if not folder.exists():
            siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            hint = did_you_mean(folder.name, siblings) if 0 < len(siblings) <= 1000 else "check the path"
            raise UsageError(f"-i {given} does not exist; {hint}")
        if folder.is_file():
            self.add_file(folder, folder.parent)
        elif is_dataset(folder.parent) and folder.name in ("imagesTr", "imagesTs", "labelsTr", "labelsTs"):
            self.add_dataset(folder.parent, only=folder.name)
        else:
            self.add_folder(folder)

    def add(
        self, path: Path, base_id: str, dataset: str, case: str, *, channel: str = "", status: str = "", reason: str = ""
    ) -> None:
        """List one candidate, or one row of something left out, unless its file is listed already."""
        real = os.path.realpath(path) if not status else f"{status}:{path}"
        if real in self.files:
            self.num_repeated += 1
            return
        self.files.add(real)
        if not _is_utf8(path):
            path, base_id, case = (Path(_printable(str(path))), _printable(base_id), _printable(case))
            status, reason = "unreadable", "the name is not valid UTF-8; rename the file"
        unique, n = base_id, 1
        while unique in self.ids:
            n += 1
            unique = f"{base_id}#{n}"
        self.ids.add(unique)
        self.found.append(Candidate(unique, path, dataset, case, channel, status, reason))

    def leave_out(self, path: Path, dataset: str, what: str, status: str, reason: str) -> None:
        """A row for something that is no candidate."""
        self.add(path, f"{dataset}/{what}", dataset, "", status=status, reason=reason)

    def add_dataset(self, folder: Path, only: str | None = None) -> None:
        """The images of an nnU-Net raw dataset: imagesTr and imagesTs (or one of them), and dataset.json's own list."""
        channels, listed = _read_dataset_json(folder)
        wanted = [only] if only else ["imagesTr", "imagesTs"]
        if listed and not only:
            self._add_listed(folder, channels, listed)
        for part in wanted:
            if part.startswith("images") and (folder / part).is_dir():
                self._add_images(folder, part, channels)
        for part in sorted(p.name for p in folder.iterdir() if p.is_dir() and (only is None or p.name == only)):
            if part not in ("imagesTr", "imagesTs"):
                self._count_other(folder, part)

    def _add_images(self, folder: Path, part: str, channels: dict[int, str]) -> None:
        others: Counter[str] = Counter()
        for path in _listing(folder / part):
            if not path.name.lower().endswith(IMAGE_ENDINGS) or path.name.startswith("."):
                others["hidden" if path.name.startswith(".") else _ending(path.name)] += 1
                continue
            stem = strip_ending(path.name)
            match = CHANNEL_SUFFIX.match(stem)
            number = int(match["channel"]) if match else 0
            case, channel = match["case"] if match else stem, channels.get(number, str(number))
            self.add(path, f"{folder.name}/{stem}", folder.name, case, channel=channel)
        self._report_others(folder / part, folder.name, f"{part}/(other files)", others)

    def _add_listed(self, folder: Path, channels: dict[int, str], listed: dict[str, Any]) -> None:
        for case in sorted(listed, key=natural_key):
            for number, name in enumerate(listed[case].get("images", [])):
                path = absolute(folder / name)
                channel = channels.get(number, str(number))
                self.add(path, f"{folder.name}/{case}_{number:04d}", folder.name, case, channel=channel)

    def _count_other(self, folder: Path, part: str) -> None:
        count = sum(1 for _, _, names in os.walk(folder / part) for n in names if n.lower().endswith(IMAGE_ENDINGS))
        if count:
            kind = "label maps" if part.startswith("labels") else "images outside imagesTr and imagesTs"
            self.leave_out(folder / part, folder.name, part, "labels" if part.startswith("labels") else "ignored",
                           f"{count} {kind} of an nnU-Net dataset; only imagesTr and imagesTs are read")

    def add_folder(self, root: Path) -> None:
        """Everything below a plain folder."""
        others: Counter[str] = Counter()
        dicom: Counter[str] = Counter()
        pending = [root]
        while pending:
            folder = pending.pop()
            if is_dataset(folder):
                self.add_dataset(folder)
                continue
            pending.extend(reversed(self._visit(root, folder, others, dicom)))
        if dicom:
            self.leave_out(root, root.name, "(DICOM)", "dicom", f"{sum(dicom.values())} DICOM files in {len(dicom)} folders are "
                           "not read yet; convert them to NIfTI (for instance with dcm2niix) and run again")
        self._report_others(root, root.name, "(other files)", others)

    def _visit(self, root: Path, folder: Path, others: Counter[str], dicom: Counter[str]) -> list[Path]:
        """List the candidates of one folder; returns the folders to go on with."""
        where = _below(folder, root)
        real = os.path.realpath(folder)
        if real in self.folders:
            self.leave_out(folder, root.name, where, "link", "leads to a folder that is searched already")
            return []
        self.folders.add(real)
        try:
            entries = _listing(folder)
        except OSError as error:
            self.leave_out(folder, root.name, where, "unreadable", f"the folder cannot be listed: {error.strerror}")
            return []
        deeper = []
        for path in entries:
            if path.name.startswith("."):
                if path.is_dir() or path.name.lower().endswith(IMAGE_ENDINGS):
                    reason = "its name begins with a dot; rename it if it is wanted"
                    self.leave_out(path, root.name, _below(path, root), "hidden", reason)
                else:
                    others["hidden"] += 1
            elif path.name.lower().endswith(IMAGE_ENDINGS):
                self.add_file(path, root)
            elif path.is_dir():
                deeper.append(path)
            elif _is_dicom(path):
                dicom[str(folder)] += 1
            else:
                others[_ending(path.name)] += 1
        return deeper

    def add_file(self, path: Path, root: Path) -> None:
        """One file of a plain folder."""
        inside = strip_ending(_below(path, root))
        self.add(path, f"{root.name}/{inside}", root.name, inside)

    def _report_others(self, path: Path, dataset: str, what: str, others: Counter[str]) -> None:
        if any(c.path.suffix.lower() == ".mhd" and path in c.path.parents for c in self.found):
            others = Counter({e: n for e, n in others.items() if e not in (".raw", ".zraw")})
        if others:
            listed = ", ".join(f"{n} {e or 'without ending'}" for e, n in sorted(others.items()))
            self.leave_out(path, dataset, what, "ignored", f"no image endings: {listed}")


def _read_dataset_json(folder: Path) -> tuple[dict[int, str], dict[str, Any]]:
    """Channel names by number, and the case list that a dataset.json may hold."""
    try:
        data = read_json(folder / "dataset.json")
        names = data.get("channel_names", data.get("modality", {}))
        listed = data.get("dataset", {})
        return {int(k): str(v) for k, v in names.items()}, listed if isinstance(listed, dict) else {}
    except (PlanError, AttributeError, ValueError) as error:
        raise UsageError(f"{folder / 'dataset.json'} is no nnU-Net dataset.json ({error}); mend it") from error


def _is_utf8(path: Path) -> bool:
    return _printable(str(path)) == str(path)


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda p: natural_key(p.name))


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else "."


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def _is_dicom(path: Path) -> bool:
    """By ending, or for names without a usual ending (1.2.840.113619..., IM0001) by the mark at byte 128."""
    ending = _ending(path.name)
    if ending in DICOM_ENDINGS or path.name.upper() == "DICOMDIR":
        return True
    if ending and not ending[1:].isdecimal():
        return False
    try:
        with path.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False

