"""Find scans in nnU-Net raw datasets and in plain folders.

Whatever is left out comes back too, with its reason.
"""

import logging
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from nnunet_autoreg.corpus.collect import DicomCollector
from nnunet_autoreg.corpus.dataset_json import (
    DatasetJson,
    lists_its_files,
    read_dataset_json,
    unset_variables,
)
from nnunet_autoreg.corpus.private import terminal_only
from nnunet_autoreg.corpus.read import num_volumes
from nnunet_autoreg.errors import ScanError, UsageError, did_you_mean
from nnunet_autoreg.io.archive import members, opened, unpacked
from nnunet_autoreg.io.dicom import is_archive, may_be_dicom
from nnunet_autoreg.io.names import (
    IMAGE_ENDINGS,
    absolute,
    bids_names,
    case_and_channel,
    is_label_name,
    modality_of_contrast,
    natural_key,
    strip_ending,
)
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.nnunet_api import dataset_folder

log = logging.getLogger(__name__)

USUAL_ENDINGS = frozenset(
    """
    .7z .bak .bin .bmp .bval .bvec .bz2 .cfg .csv .dat .db .dll .doc .docx .exe .fcsv .gif .gz .h5
    .hdf5 .htm .html .ini .ipynb .jpeg .jpg .json .log .m .mat .mat4 .md .npy .npz .obj .parquet
    .pdf .pkl .png .ppt .pptx .pt .pth .py .rar .raw .rtf .sh .sql .sqlite .stl .svg .tar .tfm .tgz
    .tif .tiff .toml .tsv .txt .vtk .vtp .xls .xlsx .xml .yaml .yml .zip .zraw .mrk .mrb
    """.split()  # noqa: SIM905
)
DATASET_FOLDERS = ("imagesTr", "imagesTs", "labelsTr", "labelsTs")


@dataclass(frozen=True)
class Candidate:
    """A file that may be a scan, or (``status`` set) something that was left out already.

    Attributes:
        id: unique and stable: ``Dataset004_Hippocampus/hippocampus_001_0000``, or folder name /
            path below it, no ending.
        path: the file, or the folder that a left-out row stands for.
        dataset: name of the nnU-Net dataset, or of the folder given.
        case: groups the channels of one nnU-Net case; in plain folders the path below the folder,
            no ending.
        channel: name in dataset.json; "" in plain folders.
        status, reason: why it was left out; "" for candidates.
        part: what inside ``path``, as ``load_scan`` takes it: "" is the file itself,
            ``series=<SeriesInstanceUID>`` a series in a DICOM folder, ``t=<k>`` a volume of a 4D
            file, ``member=<name>`` a file within a .zip; joined by ";".
        modality: as the file itself says (MR, CT, PT ...); "" if it does not.
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


def find_scans(
    datasets: list[str], folders: list[Path], *, split_4d: bool = False, salt: str = ""
) -> list[Candidate]:
    """Return all candidates, datasets first, in natural order.

    A file that is reached twice is listed once.

    Of an nnU-Net dataset (``dataset.json`` beside ``imagesTr``) only the images are taken, wherever
    it is met. Other folders are searched whole, following links but no link twice, without hidden
    files, and .zip archives with them. Of DICOM files the headers are read and sorted into series;
    no pixels are.

    Args:
        split_4d: list every volume of a 4D file or series as a scan of its own.
        salt: secret of the hashes in the ids of DICOM series.

    Raises:
        UsageError: a dataset or folder that does not exist.
    """
    finder = _Finder(split_4d, salt)
    for dataset in datasets:
        finder.add_dataset(dataset_folder(dataset))
    for folder in folders:
        finder.add_given(folder)
    finder.leave_out_listed_labels()
    if finder.num_repeated:
        log.info("%d files were reached twice and are counted once", finder.num_repeated)
    return finder.found


def is_dataset(folder: Path) -> bool:
    """Return whether a folder is an nnU-Net raw dataset."""
    has_images = (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()
    return has_images or lists_its_files(folder)


@dataclass
class _Finder:
    split_4d: bool
    salt: str
    found: list[Candidate] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    listed_labels: set[str] = field(default_factory=set)
    num_repeated: int = 0

    def leave_out_listed_labels(self) -> None:
        """Leave out files that a dataset.json lists as label maps, wherever they were met."""
        for number, found in enumerate(self.found):
            if not found.status and os.path.realpath(found.path) in self.listed_labels:
                reason = "dataset.json lists it as a label map"
                self.found[number] = replace(found, status="labels", reason=reason)

    def add_given(self, given: Path) -> None:
        """Add a path given with -i: a folder, a dataset, a part of a dataset, or one file."""
        folder = absolute(given)
        if not folder.exists():
            siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            hint = (
                did_you_mean(folder.name, siblings)
                if 0 < len(siblings) <= 1000
                else "check the path"
            )
            raise UsageError(f"-i {given} does not exist; {hint}", code="input-missing")
        if folder.is_file():
            self._add_given_file(folder)
        elif (
            is_dataset(folder.parent)
            and folder.name in DATASET_FOLDERS
            and self._is_ours(folder.parent)
        ):
            self.add_dataset(folder.parent, only=folder.name)
        else:
            self.add_folder(folder)

    def _is_ours(self, folder: Path) -> bool:
        """Return whether ``dataset.json`` is nnU-Net's.

        In a folder that was not given as a dataset it may be anything.
        """
        try:
            read_dataset_json(folder)
        except UsageError as error:
            log.warning(
                "a dataset.json is not nnU-Net's; its folder is searched as any other",
                extra=terminal_only(f" ({error})"),
            )
            return False
        return True

    def _add_given_file(self, path: Path) -> None:
        dicom, labels = self._collector(), Counter[Path]()
        if is_archive(path.name):
            self.add_archive(path, path.parent, dicom)
        elif path.name.lower().endswith(IMAGE_ENDINGS) or not (
            may_be_dicom(path.name) and dicom.add_file(path, path)
        ):
            self.add_file(path, path.parent, labels)
        self._add_dicom(path.parent, dicom)
        self._report_labels(path.parent, labels)

    def _collector(self) -> DicomCollector:
        return DicomCollector(self.salt, self.split_4d)

    def add(self, path: Path, base_id: str, dataset: str, case: str, **facts: str) -> None:
        """List one candidate, or one row of something left out, once.

        ``facts`` are fields of ``Candidate``.
        """
        status, part = facts.get("status", ""), facts.get("part", "")
        real = f"{status}:{path}:{base_id}" if status else f"{os.path.realpath(path)}:{part}"
        if real in self.files:
            self.num_repeated += 1
            return
        self.files.add(real)
        problem = _problem_of_name(path)
        if problem:
            path, base_id, case = (
                Path(_printable(str(path))),
                _printable(base_id),
                _printable(case),
            )
            facts.update(status="unreadable", reason=problem)
        unique, n = base_id, 1
        while unique in self.ids:
            n += 1
            unique = f"{base_id}#{n}"
        self.ids.add(unique)
        self.found.append(Candidate(unique, path, dataset, case, **facts))

    def add_volumes(
        self,
        path: Path,
        base_id: str,
        dataset: str,
        case: str,
        volumes: int,
        facts: dict[str, str],
        part: ScanPart | None = None,
    ) -> None:
        """Add a file: one candidate, or one for each of its ``volumes``."""
        part = part or ScanPart()
        if volumes == 1:
            self.add(path, base_id, dataset, case, part=str(part), **facts)
            return
        for t in range(volumes):
            self.add(
                path,
                f"{base_id}/t{t}",
                dataset,
                f"{case}/t{t}",
                part=str(replace(part, t=str(t))),
                **facts,
            )

    def _volumes(self, path: Path) -> int:
        return num_volumes(path) if self.split_4d else 1

    def leave_out(self, path: Path, dataset: str, what: str, status: str, reason: str) -> None:
        """Add a row for something that is no candidate."""
        self.add(path, f"{dataset}/{what}", dataset, "", status=status, reason=reason)

    def add_dataset(self, folder: Path, only: str | None = None) -> None:
        """Add the images of an nnU-Net raw dataset.

        These are imagesTr and imagesTs (or one of them), and dataset.json's own list.
        """
        described = read_dataset_json(folder)
        wanted = [only] if only else ["imagesTr", "imagesTs"]
        if described.listed and not only:
            self._add_listed(folder, described)
        for part in wanted:
            if part.startswith("images") and (folder / part).is_dir():
                self._add_images(folder, part, described)
        for part in sorted(
            p.name for p in folder.iterdir() if p.is_dir() and (only is None or p.name == only)
        ):
            if part not in ("imagesTr", "imagesTs"):
                self._count_other(folder, part)
        files = (
            []
            if only
            else [p.name for p in folder.iterdir() if p.is_file() and p.name != "dataset.json"]
        )
        self._report_others(folder, folder.name, "(other files)", Counter(map(_ending, files)))

    def _add_images(self, folder: Path, part: str, described: DatasetJson) -> None:
        others: Counter[str] = Counter()
        images: list[Path] = []
        for path in _listing(folder / part):
            if path.name.startswith("."):
                others["hidden"] += 1
            elif path.name.lower().endswith(IMAGE_ENDINGS):
                images.append(path)
            else:
                others[_ending(path.name)] += 1

        positions = channel_positions(images, len(described.channels))
        for path in images:
            stem = strip_ending(path.name)
            case, number = case_and_channel(path)
            channel = described.channel_name(positions[number])
            facts = _of_dataset(folder, case, channel)
            self.add_volumes(
                path, f"{folder.name}/{stem}", folder.name, case, self._volumes(path), facts
            )
        self._report_others(folder / part, folder.name, f"{part}/(other files)", others)

    def _add_listed(self, folder: Path, described: DatasetJson) -> None:
        for case in sorted(described.listed, key=natural_key):
            label = described.listed[case].label
            if label is not None:
                self.listed_labels.add(os.path.realpath(label))
            for number, path in enumerate(described.listed[case].images):
                name = f"{case}_{number:04d}"
                if not path.exists():
                    self.leave_out(path, folder.name, name, "unreadable", _why_missing(path))
                    continue
                facts = _of_dataset(folder, case, described.channel_name(number))
                facts["listed_in"] = str(folder)
                self.add_volumes(
                    path, f"{folder.name}/{name}", folder.name, case, self._volumes(path), facts
                )

    def _count_other(self, folder: Path, part: str) -> None:
        count = sum(
            1
            for _, _, names in os.walk(folder / part)
            for n in names
            if n.lower().endswith(IMAGE_ENDINGS)
        )
        if count:
            kind = (
                "label maps"
                if part.startswith("labels")
                else "images outside imagesTr and imagesTs"
            )
            self.leave_out(
                folder / part,
                folder.name,
                part,
                "labels" if part.startswith("labels") else "ignored",
                f"{count} {kind} of an nnU-Net dataset; only imagesTr and imagesTs are read",
            )

    def add_folder(self, root: Path) -> None:
        """Add everything below a plain folder."""
        others: Counter[str] = Counter()
        labels: Counter[Path] = Counter()
        dicom = self._collector()
        pending = [root]
        while pending:
            folder = pending.pop()
            if is_dataset(folder) and self._is_ours(folder):
                self.add_dataset(folder)
                continue
            pending.extend(reversed(self._visit(root, folder, others, labels, dicom)))
        self._add_dicom(root, dicom)
        self._report_labels(root, labels)
        self._report_others(root, root.name, "(other files)", others)

    def _visit(
        self,
        root: Path,
        folder: Path,
        others: Counter[str],
        labels: Counter[Path],
        dicom: DicomCollector,
    ) -> list[Path]:
        """List the candidates of one folder; returns the folders to go on with."""
        where = _below(folder, root)
        real = os.path.realpath(folder)
        if real in self.folders:
            self.leave_out(
                folder, root.name, where, "link", "leads to a folder that is searched already"
            )
            return []
        self.folders.add(real)
        try:
            entries = _listing(folder)
        except OSError as error:
            self.leave_out(
                folder,
                root.name,
                where,
                "unreadable",
                f"the folder cannot be listed: {error.strerror}",
            )
            return []
        deeper = []
        for path in entries:
            if path.name.startswith("."):
                self._hidden(path, root, others)
            elif path.name.lower().endswith(IMAGE_ENDINGS):
                self.add_file(path, root, labels)
            elif path.is_dir():
                deeper.append(path)
            elif is_archive(path.name):
                self.add_archive(path, root, dicom)
            elif path.name.upper() == "DICOMDIR" or not (
                may_be_dicom(path.name) and dicom.add_file(path)
            ):
                others["DICOMDIR" if path.name.upper() == "DICOMDIR" else _ending(path.name)] += 1
        return deeper

    def _hidden(self, path: Path, root: Path, others: Counter[str]) -> None:
        if path.is_dir() or path.name.lower().endswith(IMAGE_ENDINGS):
            self.leave_out(
                path,
                root.name,
                _below(path, root),
                "hidden",
                "its name begins with a dot; rename it if it is wanted",
            )
        else:
            others["hidden"] += 1

    def add_file(self, path: Path, root: Path, labels: Counter[Path]) -> None:
        """Add one file of a plain folder; a label map by its name is counted instead."""
        inside = strip_ending(_below(path, root))
        if is_label_name(f"{root.name}/{inside}"):
            labels[path.parent] += 1
            return
        self.add_volumes(
            path,
            f"{root.name}/{inside}",
            root.name,
            inside,
            self._volumes(path),
            _of_name(root.name, inside),
        )

    def add_archive(self, path: Path, root: Path, dicom: DicomCollector) -> None:
        """Add the scans inside a .zip: images by their names, DICOM by series."""
        where, others, bad = _below(path, root), Counter[str](), Counter[tuple[str, str]]()
        try:
            with opened(path) as archive:
                good, dangerous = members(archive)
                bad.update(dangerous)
                for info in good:
                    self._add_member(archive, info, path, root, dicom, others)
        except ScanError as error:
            bad[error.status, str(error)] += 1
        for number, ((status, reason), count) in enumerate(bad.items()):
            what = f"{where}/(left out {number})" if number else f"{where}/(left out)"
            self.leave_out(
                path, root.name, what, status, reason if count == 1 else f"{reason} ({count} files)"
            )
        self._report_others(path, root.name, f"{where}/(other files)", others)

    def _add_member(
        self,
        archive: zipfile.ZipFile,
        info: zipfile.ZipInfo,
        path: Path,
        root: Path,
        dicom: DicomCollector,
        others: Counter[str],
    ) -> None:
        name = PurePosixPath(info.filename)
        inside = strip_ending(info.filename)
        if name.name.startswith(".") or name.parts[0] == "__MACOSX":
            others["hidden"] += 1
        elif name.suffix.lower() == ".mhd":
            others[".mhd (its data is another file: unpack the archive)"] += 1
        elif not name.name.lower().endswith(IMAGE_ENDINGS):
            if name.name.upper() == "DICOMDIR" or not (
                may_be_dicom(name.name) and dicom.add_member(archive, info, path)
            ):
                others[_ending(name.name)] += 1
        elif is_label_name(inside):
            others["label maps"] += 1
        else:
            part, case = ScanPart(member=info.filename), f"{_below(path, root)}/{inside}"
            self.add_volumes(
                path,
                f"{root.name}/{case}",
                root.name,
                case,
                self._member_volumes(path, info.filename),
                _of_name(f"{root.name}/{_below(path, root)}", inside),
                part,
            )

    def _member_volumes(self, path: Path, name: str) -> int:
        if not self.split_4d:
            return 1
        try:
            with unpacked(path, [name]) as files:
                return num_volumes(files[name])
        except ScanError:
            return 1

    def _add_dicom(self, root: Path, dicom: DicomCollector) -> None:
        for row in dicom.rows():
            # A manifest may overrule that images are derived, so they keep what a scan has.
            case = row.name if row.status in ("", "derived") and row.part else ""
            self.add(
                row.path,
                f"{root.name}/{row.name}",
                root.name,
                case,
                status=row.status,
                reason=row.reason,
                part=row.part,
                modality=row.modality,
                subject=row.subject,
                session=row.session,
                contrast=row.contrast,
            )

    def _report_labels(self, root: Path, labels: Counter[Path]) -> None:
        for folder, count in labels.items():
            self.leave_out(
                folder,
                root.name,
                f"{_below(folder, root)}/(label maps)",
                "labels",
                f"{count} label {'map' if count == 1 else 'maps'} by name (a folder labels..., or "
                "_dseg, _mask)",
            )

    def _report_others(self, path: Path, dataset: str, what: str, others: Counter[str]) -> None:
        if any(c.path.suffix.lower() == ".mhd" and path in c.path.parents for c in self.found):
            others = Counter({e: n for e, n in others.items() if e not in (".raw", ".zraw")})
        if others:
            listed = ", ".join(f"{n} {e or 'without ending'}" for e, n in sorted(others.items()))
            self.leave_out(path, dataset, what, "ignored", f"no image endings: {listed}")


def channel_positions(images: Iterable[Path], num_channels: int) -> dict[int, int]:
    """Return channel number -> position of its name in dataset.json.

    nnU-Net sorts the files of a case and takes names in order, so numbers may begin at 1. Where
    files and names differ in number, no order is certain, and a number is its own position.
    """
    numbers = sorted({case_and_channel(path)[1] for path in images})
    if len(numbers) != num_channels:
        return {number: number for number in numbers}
    return {number: position for position, number in enumerate(numbers)}


def _why_missing(path: Path) -> str:
    unset = unset_variables(path)
    if unset:
        return (
            f"dataset.json lists it below {unset[0]}, and that environment variable is not set; "
            "export it"
        )
    return "dataset.json lists it, and there is no such file; restore it, or mend the list"


def _of_dataset(folder: Path, case: str, channel: str) -> dict[str, str]:
    """Return what an nnU-Net dataset says about an image."""
    return {"channel": channel, "subject": f"{folder.name}/{case}", "contrast": channel}


def _of_name(scope: str, inside: str) -> dict[str, str]:
    """Return what a BIDS name says.

    Subjects of different datasets are different people, so ``scope`` goes with them.
    """
    subject, session, contrast = bids_names(inside)
    return {
        "subject": subject and f"{scope}/{subject}",
        "session": session,
        "contrast": contrast,
        "modality": modality_of_contrast(contrast),
    }


def _problem_of_name(path: Path) -> str:
    """Return why a file cannot be read by its name, and the remedy; "" if it can.

    SimpleITK and our own files use UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not str(path).isascii():
        return (
            f"Python reads names as {encoding} here, and the name has other letters than English "
            "ones; run again after: export PYTHONUTF8=1"
        )
    is_utf8 = _printable(str(path)) == str(path)
    return "" if is_utf8 else "the name is not valid UTF-8; rename the file"


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda p: natural_key(p.name))


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else "."


def _ending(name: str) -> str:
    """Return the ending of a file that is no scan, if it is a usual one; else what to call it.

    What follows the last dot may be a part of a name or a UID.
    """
    ending = Path(name).suffix.lower()
    if ending in USUAL_ENDINGS:
        return ending
    return "with other endings" if ending else ""
