"""The scans of a folder as nnU-Net's readers take them: cases by their names, or else whatever pretraining would find there.

Whatever is no file that the dataset's reader takes - a DICOM series, a volume of a 4D file, another format - is written as a temporary
NIfTI file of the same geometry. Nothing is turned: a network expects the orientation of the files it was trained on.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunet_autoreg.corpus.archive import unpacked
from nnunet_autoreg.corpus.dicom import find_stack, pick_volume, read_volume
from nnunet_autoreg.corpus.find import CHANNEL_SUFFIX, Candidate, find_scans, natural_key
from nnunet_autoreg.corpus.parts import Part, parse_part
from nnunet_autoreg.corpus.read import check_file, quiet_stderr
from nnunet_autoreg.errors import ScanError, UsageError

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


def find(folder: Path, file_ending: str, num_channels: int, split_4d: bool = False) -> list[Scan]:
    """The scans of a folder, in natural order; what is left out is logged with its reason.

    Args:
        file_ending: of the dataset the model was trained on.
        num_channels: the model's.

    Raises:
        UsageError: no folder, no scan, channels missing, or files that do not say their channel for a model of several.
    """
    if not folder.exists():
        raise UsageError(f"-i {folder} does not exist; check the path")
    cases = _named_cases(folder, file_ending) if folder.is_dir() else {}
    if cases:
        return [_of_case(name, cases[name], num_channels, folder) for name in sorted(cases, key=natural_key)]
    if num_channels > 1:
        raise UsageError(f"-i {folder} holds no files named like case_0000{file_ending}, and the model needs {num_channels} channels of "
                         "each scan; name them as nnU-Net does")
    found = find_scans([], [folder], split_4d=split_4d)
    for left in (c for c in found if c.status and c.status != "duplicate"):
        log.warning("left out: %s (%s: %s)", left.id, left.status, left.reason)
    scans = [_of_candidate(c, file_ending) for c in found if not c.status]
    if not scans:
        raise UsageError(f"-i {folder} holds no scan")
    return scans


def _named_cases(folder: Path, file_ending: str) -> dict[str, dict[int, Path]]:
    """Case -> channel -> file, of files named as nnU-Net does."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in folder.iterdir():
        named = CHANNEL_SUFFIX.match(file.name.removesuffix(file_ending)) if file.name.endswith(file_ending) else None
        if named and not file.name.startswith("."):
            found[named["case"]][int(named["channel"])] = file
    return found


def _of_case(name: str, channels: dict[int, Path], num_channels: int, folder: Path) -> Scan:
    missing = [n for n in range(num_channels) if n not in channels]
    if missing:
        raise UsageError(f"-i {folder}: case {name} lacks channel {', '.join(f'{n:04}' for n in missing)} of {num_channels}")
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
            raise ScanError("unreadable", f"SimpleITK cannot read it ({str(error).splitlines()[-1].strip()}); copy it again") from error
    image = image[..., int(part.t)] if part.t else image
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError("not3d", "no 3D image with one value per voxel; --split-4d takes every volume of a 4D file as a scan")
    return image
