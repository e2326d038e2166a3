"""The scans of a folder as nnU-Net's readers take them: cases by their names, or else whatever
pretraining would find there.

Whatever is no file that the dataset's reader takes - a DICOM series, a volume of a 4D file, another
format - is written as a temporary
NIfTI file of the same geometry. Nothing is turned: a network expects the orientation of the files
    it was trained on.
"""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunet_autoreg.corpus.dicom import find_stack, pick_volume, read_volume
from nnunet_autoreg.corpus.find import Candidate, find_scans
from nnunet_autoreg.corpus.parts import Part, parse_part
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.io.archive import unpacked
from nnunet_autoreg.io.files import check_file, quiet_stderr
from nnunet_autoreg.io.names import CHANNEL_SUFFIX, IMAGE_ENDINGS, absolute, natural_key

SCAN_ENDINGS = (*IMAGE_ENDINGS, ".dcm", ".zip")
MOST_NAMED = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """One scan to detect in.

    Attributes:
        name: of its results.
        files: one per channel; empty where ``candidate`` has to be converted first.
    """

    name: str
    files: tuple[Path, ...]
    candidate: Candidate | None = None

    @property
    def origin(self) -> str:
        """What to call its input in messages."""
        return self.candidate.id if self.candidate else self.files[0].name

    def inputs(self) -> tuple[dict[str, Any], ...]:
        """As ``facts_of`` has them."""
        return facts_of(self.files or ([self.candidate.path] if self.candidate else []))


def facts_of(files: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Bytes and time of change of every file: what tells that an input is another one.

    No paths, in which names of patients may be.

    Of a folder a digest of its path alone: its DICOM series are told by their UIDs, and others may
        come into it.
    """
    found: list[dict[str, Any]] = []
    for file in files:
        if file.is_file():
            found.append({"bytes": file.stat().st_size, "modified_ns": file.stat().st_mtime_ns})
        else:
            found.append(
                {"folder_sha256": hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}
            )
    return tuple(found)


def find(
    folder: Path,
    file_ending: str,
    num_channels: int,
    split_4d: bool = False,
    output: Path | None = None,
) -> list[Scan]:
    """The scans of a folder, in natural order; what is left out is logged with its reason.

    Args:
        file_ending: of the dataset the model was trained on.
        num_channels: the model's.
        output: the folder of results; what lies in it is no scan.

    Raises:
        UsageError: no folder, no scan, channels missing, files that do not say their channel for a
            model of several, two scans of one name, or results among the scans.
    """
    if not folder.exists():
        raise UsageError(f"-i {folder} does not exist; check the path")
    cases = _named_cases(folder, file_ending) if folder.is_dir() else {}
    if cases:
        scans = [
            _of_case(name, cases[name], num_channels, folder)
            for name in sorted(cases, key=natural_key)
        ]
        _tell_others(folder, file_ending, {file for scan in scans for file in scan.files}, output)
    else:
        scans = _found_scans(folder, file_ending, num_channels, split_4d, output)
    _check_names(scans, folder)
    return scans


def _found_scans(
    folder: Path, file_ending: str, num_channels: int, split_4d: bool, output: Path | None
) -> list[Scan]:
    """Whatever pretraining would find, for models of one channel."""
    if num_channels > 1:
        raise UsageError(
            f"-i {folder} holds no files named like case_0000{file_ending}, and the model needs "
            f"{num_channels} channels of "
            "each scan; name them as nnU-Net does"
        )
    if output is not None and absolute(output) == absolute(folder):
        raise UsageError(
            f"-o {output} is the folder of -i, whose images are all taken for scans; give another "
            "one"
        )
    found = [
        c
        for c in find_scans([], [folder], split_4d=split_4d)
        if not _is_result(c.path, folder, output)
    ]
    for left in (c for c in found if c.status and c.status != "duplicate"):
        log.warning("left out: %s (%s: %s)", left.id, left.status, left.reason)
    scans = [_of_candidate(c, file_ending) for c in found if not c.status]
    if not scans:
        raise UsageError(
            f"-i {folder} holds no scan; name files <case>_0000{file_ending}, or give DICOM, "
            "NIfTI, NRRD or MetaImage"
        )
    return scans


def _is_result(path: Path, folder: Path, output: Path | None) -> bool:
    """Whether a path below ``folder`` belongs to the results of an earlier run, which may lie in
    it.
    """
    if output is None or absolute(folder) not in (inside := absolute(output)).parents:
        return False
    return inside in (absolute(path), *absolute(path).parents)


def _tell_others(folder: Path, file_ending: str, taken: set[Path], output: Path | None) -> None:
    """Warn of scans that nobody looks at, because some of the folder are named as nnU-Net does and
    they are not.
    """
    endings = (*SCAN_ENDINGS, file_ending.lower())
    files = (
        f
        for f in folder.rglob("*")
        if f.name.lower().endswith(endings) and not f.name.startswith(".") and f not in taken
    )
    others = sorted(
        (f.relative_to(folder).as_posix() for f in files if not _is_result(f, folder, output)),
        key=natural_key,
    )
    if others:
        named = ", ".join(others[:MOST_NAMED]) + (", ..." if len(others) > MOST_NAMED else "")
        log.warning(
            "-i %s: %d files are left out (%s): cases are named case_0000%s here, and these are "
            "not, or hold a channel that the "
            "model does not have; put them into another folder",
            folder,
            len(others),
            named,
            file_ending,
        )


def _check_names(scans: Sequence[Scan], folder: Path) -> None:
    """Refuse two scans whose results would lie in the same files, also where a file system does not
    tell a from A.
    """
    known: dict[str, Scan] = {}
    for scan in scans:
        other = known.setdefault(scan.name.casefold(), scan)
        if other is not scan:
            same = (
                f"both be called {scan.name}"
                if scan.name == other.name
                else f"be called {other.name} and {scan.name}"
            )
            raise UsageError(
                f"-i {folder}: the results of {other.origin} and {scan.origin} would {same}, and "
                "one overwrite the other; "
                "rename one, or give each a line and -o of its own"
            )


def _named_cases(folder: Path, file_ending: str) -> dict[str, dict[int, Path]]:
    """Case -> channel -> file, of files named as nnU-Net does."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in folder.iterdir():
        named = (
            CHANNEL_SUFFIX.match(file.name.removesuffix(file_ending))
            if file.name.endswith(file_ending)
            else None
        )
        if named and not file.name.startswith("."):
            found[named["case"]][int(named["channel"])] = file
    return found


def _of_case(name: str, channels: dict[int, Path], num_channels: int, folder: Path) -> Scan:
    missing = [n for n in range(num_channels) if n not in channels]
    if missing:
        raise UsageError(
            f"-i {folder}: case {name} lacks channel {', '.join(f'{n:04}' for n in missing)} of "
            f"{num_channels}"
        )
    return Scan(name, tuple(channels[n] for n in range(num_channels)))


def _of_candidate(candidate: Candidate, file_ending: str) -> Scan:
    inside = candidate.id.partition("/")[2] or candidate.id
    name = re.sub(r"[^\w.-]+", "_", inside)
    is_ready = not candidate.part and candidate.path.name.endswith(file_ending)
    return Scan(name, (candidate.path,) if is_ready else (), candidate)


@contextmanager
def ready(scan: Scan) -> Iterator[list[str]]:
    """The files of a scan for nnU-Net's reader, for the time being.

    Raises:
        ScanError: it cannot be read.
    """
    for file in scan.files:
        check_file(file)
    if scan.candidate is None or scan.files:
        yield [str(file) for file in scan.files]
        return
    with TemporaryDirectory(prefix="autoreg_detect_") as folder:
        file = Path(folder) / "scan_0000.nii.gz"
        _convert(scan.candidate, file)
        yield [str(file)]


def _convert(candidate: Candidate, file: Path) -> None:
    part = parse_part(candidate.part)
    if part.series:
        image = _series_image(candidate.path, part)
    elif part.member:
        with unpacked(candidate.path, [part.member]) as members:
            image = _file_image(members[part.member], part)
    else:
        image = _file_image(candidate.path, part)
    import SimpleITK

    SimpleITK.WriteImage(image, str(file))


def _series_image(path: Path, part: Part) -> Any:
    """A DICOM series as an image in its own orientation."""
    import SimpleITK

    stack = find_stack(path, part)
    slices = pick_volume(stack, part)
    with quiet_stderr():
        image: Any = SimpleITK.GetImageFromArray(read_volume(path, slices))
    image.SetSpacing([float(s) for s in stack.spacing_mm[::-1]])
    image.SetOrigin([float(v) for v in slices[0].position])
    image.SetDirection([float(v) for v in stack.direction.ravel()])
    return image


def _file_image(file: Path, part: Part) -> Any:
    import SimpleITK

    check_file(file)
    with quiet_stderr():
        try:
            image: Any = SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            raise ScanError(
                "unreadable",
                f"SimpleITK cannot read it ({str(error).splitlines()[-1].strip()}); copy it again",
            ) from error
    image = image[..., int(part.t)] if part.t else image
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(
            "not3d",
            "no 3D image with one value per voxel; --split-4d takes every volume of a 4D file as a "
            "scan",
        )
    return image
