"""Find scans in nnU-Net raw datasets and in plain folders.

What is left out is returned too, with its reason.
"""

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nnunet_autoreg.corpus.candidates import Candidate, CandidateList
from nnunet_autoreg.corpus.collect import DicomCollector
from nnunet_autoreg.corpus.dataset_json import (
    DatasetJson,
    lists_its_files,
    read_dataset_json,
    unset_variables,
)
from nnunet_autoreg.corpus.identity import salted
from nnunet_autoreg.corpus.private import terminal_only
from nnunet_autoreg.corpus.read import num_volumes
from nnunet_autoreg.errors import ScanError, UsageError, did_you_mean
from nnunet_autoreg.io.archive import members, opened, unpacked
from nnunet_autoreg.io.dicom import is_archive, may_be_dicom
from nnunet_autoreg.io.names import (
    IMAGE_ENDINGS,
    VOXEL_ENDINGS,
    absolute,
    bids_names,
    case_and_channel,
    is_label_name,
    is_picture,
    modality_of_contrast,
    natural_key,
    strip_ending,
    voxel_file,
)
from nnunet_autoreg.io.parts import ScanPart
from nnunet_autoreg.nnunet_api import dataset_folder
from nnunet_autoreg.records import shown

log = logging.getLogger(__name__)

USUAL_ENDINGS = frozenset(
    """
    .7z .bak .bin .bmp .bval .bvec .bz2 .cfg .csv .dat .db .dll .doc .docx .exe .fcsv .gif .gz .h5
    .hdf5 .htm .html .img .ini .ipynb .jpeg .jpg .json .log .m .mat .mat4 .md .npy .npz .obj
    .parquet .pdf .pkl .png .ppt .pptx .pt .pth .py .rar .raw .rtf .sh .sql .sqlite .stl .svg .tar
    .tfm .tgz .tif .tiff .toml .tsv .txt .vtk .vtp .xls .xlsx .xml .yaml .yml .zip .zraw .mrk .mrb
    """.split(),  # noqa: SIM905
)
IMAGE_MODALITY = "2D"
"""Of PNG and JPEG files, which do not say how they were made."""

DICOMDIR = "DICOMDIR"
DATASET_FOLDERS = ("imagesTr", "imagesTs", "labelsTr", "labelsTs")


def find_scans(
    datasets: list[str],
    folders: list[Path],
    *,
    split_4d: bool = False,
    salt: str = "",
    images: bool = False,
) -> list[Candidate]:
    """Return all candidates, datasets first, in natural order.

    A file that is reached twice is listed once.

    From nnU-Net datasets (``dataset.json`` beside ``imagesTr``) only the images are taken. Other
    folders and .zip archives are searched completely, without hidden files; each link is followed
    once. Headers of DICOM files are read and sorted into series; pixels are not read.

    Args:
        split_4d: list every volume of a 4D file or series as a separate scan.
        salt: secret of the hashes in the ids of DICOM series.
        images: list 2D images as well: PNG, JPEG, radiographs, and DICOM series of one slice.

    Raises:
        UsageError: a dataset or folder does not exist.
    """
    finder = _Finder(split_4d, salt, images)
    for dataset in datasets:
        finder.add_dataset(dataset_folder(dataset))
    for folder in folders:
        finder.add_given(folder)
    # At the end, because a folder that is searched may hold label maps of any dataset.
    scans = finder.scans
    scans.leave_out_labels(finder.listed_labels)
    if scans.num_repeated:
        log.info("%d files were found twice and are counted once", scans.num_repeated)
    return scans.found


def is_dataset(folder: Path) -> bool:
    """Return whether a folder is an nnU-Net raw dataset."""
    has_images = (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()
    return has_images or lists_its_files(folder)


@dataclass
class _Finder:
    """Search inputs one after the other, and collect what they hold in ``scans``.

    Attributes:
        scans: the result.
        folders: real paths of the folders that were searched.
        listed_labels: real paths of files that a dataset.json lists as label maps.
    """

    split_4d: bool
    salt: str
    images: bool
    scans: CandidateList = field(default_factory=CandidateList)
    folders: set[str] = field(default_factory=set)
    listed_labels: set[str] = field(default_factory=set)

    def _is_wanted(self, name: str) -> bool:
        """Return whether a file is listed by its ending."""
        return _is_volume_file(name) or (self.images and is_picture(name))

    def add_given(self, given: Path) -> None:
        """Add a path given with -i: a folder, a dataset, a part of a dataset, or one file."""
        folder = absolute(given)
        if not folder.exists():
            siblings = []
            if folder.parent.is_dir():
                siblings = [path.name for path in folder.parent.iterdir()]
            # A list of thousands of names would hide the message.
            is_short = 0 < len(siblings) <= 1000
            hint = did_you_mean(folder.name, siblings) if is_short else "check the path"
            raise UsageError(f"-i {given} does not exist; {hint}", code="input-missing")

        is_part = folder.name in DATASET_FOLDERS and is_dataset(folder.parent)
        if folder.is_file():
            self.add_given_file(folder)
        elif is_part and self._has_nnunet_json(folder.parent):
            self.add_dataset(folder.parent, only=folder.name)
        else:
            self.add_folder(folder)

    def add_given_file(self, path: Path) -> None:
        """Add one file given with -i."""
        dicom = DicomCollector(self.salt, self.split_4d, self.images)
        labels: Counter[Path] = Counter()
        root = path.parent
        if is_archive(path.name):
            self.add_archive(path, root, dicom)
        else:
            is_in_series = False
            if not self._is_wanted(path.name) and may_be_dicom(path.name):
                # The path is also its name: there is no folder that it could be named after.
                is_in_series = dicom.add_file(path, path)
            if not is_in_series:
                # A file of unknown kind is listed as well, so that its row says why it is not used.
                self.add_file(path, root, labels)
        self._add_dicom(root, dicom)
        self._report_labels(root, labels)

    def _has_nnunet_json(self, folder: Path) -> bool:
        """Return whether ``dataset.json`` is nnU-Net's.

        In a folder that was not given as a dataset it may be anything.
        """
        try:
            read_dataset_json(folder)
        except UsageError as error:
            log.warning(
                "a dataset.json is not nnU-Net's; its folder is searched like any other",
                extra=terminal_only(f" ({error})"),
            )
            return False
        return True

    def _num_volumes(self, path: Path, member: str = "") -> int:
        """Return the number of scans that a file, or a member of an archive, is listed as."""
        # Without --split-4d the file need not be opened: a 4D one is left out when it is read.
        if not self.split_4d:
            return 1
        if not member:
            return num_volumes(path)
        try:
            with unpacked(path, [member]) as files:
                return num_volumes(files[member])
        except ScanError:
            # It is one candidate, whose row gives the reason when it is read.
            return 1

    def add_dataset(self, folder: Path, only: str | None = None) -> None:
        """Add the images of an nnU-Net raw dataset.

        These are imagesTr and imagesTs (or one of them), and dataset.json's own list.
        """
        described = read_dataset_json(folder)
        if described.reader:
            log.warning(
                "%s: nnU-Net reads these images by %s (overwrite_image_reader_writer in "
                "dataset.json), but this command reads them by SimpleITK; make sure that the "
                "voxel values agree",
                folder.name,
                shown(described.reader),
            )
        if described.listed and not only:
            self._add_listed(folder, described)

        parts = [only] if only else ["imagesTr", "imagesTs"]
        for part in parts:
            if part.startswith("images") and (folder / part).is_dir():
                self._add_images(folder, part, described)

        # Everything else in the dataset's folder is counted, so that nothing is left out silently.
        others: Counter[str] = Counter()
        for path in sorted(folder.iterdir(), key=lambda p: p.name):
            if path.is_file() and not only and path.name != "dataset.json":
                others[_ending(path.name)] += 1
            is_asked_for = only is None or path.name == only
            if not path.is_dir() or not is_asked_for or path.name in ("imagesTr", "imagesTs"):
                continue

            # One row for all images of a folder that is not read.
            count = 0
            for _, _, names in os.walk(path):
                count += sum(map(_is_volume_file, names))
            if count:
                status, kind = "ignored", "images outside imagesTr and imagesTs"
                if path.name.startswith("labels"):
                    status, kind = "labels", "label maps"
                reason = (
                    f"{count} {kind} of an nnU-Net dataset; only imagesTr and imagesTs are read"
                )
                self.scans.leave_out(path, folder.name, path.name, status, reason)
        self.scans.leave_out_others(folder, folder.name, "(other files)", others)

    def _add_images(self, folder: Path, part: str, described: DatasetJson) -> None:
        others: Counter[str] = Counter()
        images: list[Path] = []
        for path in _listing(folder / part):
            if path.name.startswith("."):
                others["hidden"] += 1
            elif self._is_wanted(path.name):
                images.append(path)
            elif not _is_img_of_pair(path):
                others[_ending(path.name)] += 1

        positions = channel_positions(images, len(described.channels))
        for path in images:
            base_id = f"{folder.name}/{_without_ending(path.name)}"
            case, number = case_and_channel(path)
            channel = described.channel_name(positions[number])
            facts = _of_dataset(folder, case, channel)
            if is_picture(path.name):
                facts["modality"] = IMAGE_MODALITY
            self.scans.add_volumes(path, base_id, folder.name, case, facts, self._num_volumes(path))
        self.scans.leave_out_others(folder / part, folder.name, f"{part}/(other files)", others)

    def _add_listed(self, folder: Path, described: DatasetJson) -> None:
        """Add the images that a dataset.json lists by their paths."""
        for case in sorted(described.listed, key=natural_key):
            label = described.listed[case].label
            if label is not None:
                self.listed_labels.add(os.path.realpath(label))

            for number, path in enumerate(described.listed[case].images):
                name = f"{case}_{number:04d}"
                if not path.exists():
                    reason = (
                        "dataset.json lists it, but there is no such file; restore it, or correct "
                        "the list"
                    )
                    unset = unset_variables(path)
                    if unset:
                        reason = (
                            f"dataset.json lists it below {unset[0]}, but this environment "
                            "variable is not set; export it"
                        )
                    self.scans.leave_out(path, folder.name, name, "unreadable", reason)
                    continue

                facts = _of_dataset(folder, case, described.channel_name(number))
                facts["listed_in"] = str(folder)
                base_id = f"{folder.name}/{name}"
                self.scans.add_volumes(
                    path,
                    base_id,
                    folder.name,
                    case,
                    facts,
                    self._num_volumes(path),
                )

    def add_folder(self, root: Path) -> None:
        """Add everything below a plain folder."""
        others: Counter[str] = Counter()
        labels: Counter[Path] = Counter()
        dicom = DicomCollector(self.salt, self.split_4d, self.images)

        # A stack instead of recursion: exports may be nested deeper than Python calls may be.
        pending = [root]
        while pending:
            folder = pending.pop()
            if is_dataset(folder) and self._has_nnunet_json(folder):
                self.add_dataset(folder)
                continue
            deeper = self._visit(root, folder, others, labels, dicom)
            pending.extend(reversed(deeper))

        # A series may be spread over folders, so DICOM is sorted after everything was visited.
        self._add_dicom(root, dicom)
        self._report_labels(root, labels)
        self.scans.leave_out_others(root, root.name, "(other files)", others)

    def _visit(
        self,
        root: Path,
        folder: Path,
        others: Counter[str],
        labels: Counter[Path],
        dicom: DicomCollector,
    ) -> list[Path]:
        """List the candidates of one folder; returns the folders to continue with."""
        where = _below(folder, root)
        real = os.path.realpath(folder)
        if real in self.folders:
            # A link may lead back to a folder above itself.
            reason = "it leads to a folder that is searched anyway"
            self.scans.leave_out(folder, root.name, where, "link", reason)
            return []
        self.folders.add(real)

        try:
            entries = _listing(folder)
        except OSError as error:
            reason = f"the folder cannot be listed: {error.strerror}"
            self.scans.leave_out(folder, root.name, where, "unreadable", reason)
            return []

        deeper = []
        for path in entries:
            if path.name.startswith("."):
                if _is_volume_file(path.name) or path.is_dir():
                    reason = "its name begins with a dot; rename it to use it"
                    self.scans.leave_out(path, root.name, _below(path, root), "hidden", reason)
                else:
                    others["hidden"] += 1
            elif self._is_wanted(path.name):
                self.add_file(path, root, labels)
            elif path.is_dir():
                deeper.append(path)
            elif _is_img_of_pair(path):
                continue
            elif is_archive(path.name):
                self.add_archive(path, root, dicom)
            elif _is_dicomdir(path.name):
                others[DICOMDIR] += 1
            elif not (may_be_dicom(path.name) and dicom.add_file(path)):
                others[_ending(path.name)] += 1
        return deeper

    def add_file(self, path: Path, root: Path, labels: Counter[Path]) -> None:
        """Add one file of a plain folder; a label map by its name is counted instead."""
        inside = _without_ending(_below(path, root))
        base_id = f"{root.name}/{inside}"
        if is_label_name(base_id):
            labels[path.parent] += 1
            return
        facts = _of_name(root.name, inside, path.name)
        self.scans.add_volumes(path, base_id, root.name, inside, facts, self._num_volumes(path))

    def add_archive(self, path: Path, root: Path, dicom: DicomCollector) -> None:
        """Add the scans inside a .zip: images by their names, DICOM by series."""
        where = _below(path, root)
        others: Counter[str] = Counter()
        problems: Counter[tuple[str, str]] = Counter()
        try:
            with opened(path) as archive:
                good, dangerous = members(archive)
                problems.update(dangerous)
                for info in good:
                    self._add_member(archive, info, path, root, dicom, others)
        except ScanError as error:
            problems[error.status, str(error)] += 1

        # One row for each kind of problem: an archive may hold thousands of damaged members.
        for number, ((status, reason), count) in enumerate(problems.items()):
            what = f"{where}/(left out {number})" if number else f"{where}/(left out)"
            counted = reason if count == 1 else f"{reason} ({count} files)"
            self.scans.leave_out(path, root.name, what, status, counted)
        self.scans.leave_out_others(path, root.name, f"{where}/(other files)", others)

    def _add_member(
        self,
        archive: zipfile.ZipFile,
        info: zipfile.ZipInfo,
        path: Path,
        root: Path,
        dicom: DicomCollector,
        others: Counter[str],
    ) -> None:
        """Add one file of an archive, or count it among the others."""
        member = PurePosixPath(info.filename)
        name = member.name
        inside = _without_ending(info.filename)
        # __MACOSX holds a hidden twin of every file that macOS has packed.
        if name.startswith(".") or member.parts[0] == "__MACOSX":
            others["hidden"] += 1
        elif member.suffix.lower() in VOXEL_ENDINGS:
            others[f"{member.suffix.lower()} (its data is another file: unpack the archive)"] += 1
        elif self._is_wanted(name) and is_label_name(inside):
            others["label maps"] += 1
        elif self._is_wanted(name):
            where = _below(path, root)
            case = f"{where}/{inside}"
            facts = _of_name(f"{root.name}/{where}", inside, name)
            count = self._num_volumes(path, info.filename)
            base_id = f"{root.name}/{case}"
            part = ScanPart(member=info.filename)
            self.scans.add_volumes(path, base_id, root.name, case, facts, count, part)
        elif _is_dicomdir(name) or not (
            may_be_dicom(name) and dicom.add_member(archive, info, path)
        ):
            others[_ending(name)] += 1

    def _add_dicom(self, root: Path, dicom: DicomCollector) -> None:
        for path, radiograph in dicom.radiographs:
            # The name of a file may name a patient. Its series does not, once it is salted.
            identity = f"{radiograph.series} {path}"
            name = f"{radiograph.what}-{salted(identity, self.salt)}"
            self.scans.add(
                path,
                f"{root.name}/{name}",
                root.name,
                name,
                modality=radiograph.what,
                subject=radiograph.subject,
            )
        for row in dicom.rows():
            # A manifest may overrule that images are derived, so they keep what a scan has.
            is_scan = row.status in ("", "derived") and row.part
            self.scans.add(
                row.path,
                f"{root.name}/{row.name}",
                root.name,
                row.name if is_scan else "",
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
            maps = "map" if count == 1 else "maps"
            reason = f"{count} label {maps} by name (a folder labels..., or _dseg, _mask)"
            what = f"{_below(folder, root)}/(label maps)"
            self.scans.leave_out(folder, root.name, what, "labels", reason)


def channel_positions(images: Iterable[Path], num_channels: int) -> dict[int, int]:
    """Return channel number -> position of its name in dataset.json.

    nnU-Net sorts the files of a case and takes names in order, so numbers may begin at 1. Where
    files and names differ in number, no order is certain, and a number is its own position.
    """
    numbers = sorted({case_and_channel(path)[1] for path in images})
    if len(numbers) != num_channels:
        return {number: number for number in numbers}
    return {number: position for position, number in enumerate(numbers)}


def _of_dataset(folder: Path, case: str, channel: str) -> dict[str, str]:
    """Return the facts that an nnU-Net dataset states about an image."""
    return {"channel": channel, "subject": f"{folder.name}/{case}", "contrast": channel}


def _of_name(scope: str, inside: str, name: str) -> dict[str, str]:
    """Return the facts in the BIDS name ``inside`` of the file ``name``.

    Subjects of different datasets are different people, so ``scope`` is part of their names.
    """
    subject, session, contrast = bids_names(inside)
    return {
        "subject": f"{scope}/{subject}" if subject else "",
        "session": session,
        "contrast": contrast,
        "modality": IMAGE_MODALITY if is_picture(name) else modality_of_contrast(contrast),
    }


def _without_ending(name: str) -> str:
    """Return a file name without the ending of a scan or a 2D image."""
    if is_picture(name):
        return name[: name.rindex(".")]
    return strip_ending(name)


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda p: natural_key(p.name))


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else "."


def _is_volume_file(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _is_img_of_pair(path: Path) -> bool:
    """Return whether a file is the .img of a NIfTI pair, whose .hdr is listed for both."""
    name = path.name
    stem = name[: -len(".gz")] if name.lower().endswith(".img.gz") else name
    if not stem.lower().endswith(".img"):
        return False
    headers = [path.with_name(stem[: -len(".img")] + ending) for ending in (".hdr", ".HDR")]
    return any(voxel_file(header) == path for header in headers if header.is_file())


def _is_dicomdir(name: str) -> bool:
    return name.upper() == DICOMDIR


def _ending(name: str) -> str:
    """Return the ending of a file that is not a scan, if it is a usual one; else a general word.

    An unusual ending may be a part of a name or a UID.
    """
    ending = Path(name).suffix.lower()
    if ending in USUAL_ENDINGS:
        return ending
    return "with other endings" if ending else ""
