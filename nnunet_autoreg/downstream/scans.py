"""Find the scans of a folder, and give them to nnU-Net's readers.

If files are named as cases, these are the scans. Otherwise they are the scans that pretraining
would find in the folder. A DICOM series, a volume of a 4D file or a file of another format is
written as a temporary NIfTI file of the same geometry. Nothing is turned, because a network expects
the orientation of the files that it was trained on.
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

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.private import without_names
from nnunet_autoreg.corpus.read import check_3d
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.geometry import names_text
from nnunet_autoreg.io.archive import unpacked
from nnunet_autoreg.io.dicom import find_stack, pick_volume, read_volume
from nnunet_autoreg.io.files import check_file, quiet_readers
from nnunet_autoreg.io.names import CHANNEL_SUFFIX, IMAGE_ENDINGS, absolute, natural_key, voxel_file
from nnunet_autoreg.io.parts import ScanPart, parse_part

SCAN_ENDINGS = (*IMAGE_ENDINGS, ".dcm", ".zip")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """Hold one scan to predict on.

    Attributes:
        name: name of its results.
        files: one per channel; empty if ``candidate`` has to be converted first.
        candidate: the scan as pretraining finds it; None for files that are named as cases.
    """

    name: str
    files: tuple[Path, ...]
    candidate: Candidate | None = None

    @property
    def origin(self) -> str:
        """Return the name of the scan's input in messages."""
        return self.candidate.id if self.candidate else self.files[0].name

    def inputs(self) -> tuple[dict[str, Any], ...]:
        """Return the sizes and times of its files (``facts_of``)."""
        if self.files or self.candidate is None:
            return facts_of(self.files)
        path = self.candidate.path
        voxels = voxel_file(path)
        return facts_of([path] if voxels is None else [path, voxels])


def facts_of(files: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Return size and time of change of every file, which differ for another input.

    Paths are left out, because they may hold names of patients. For a folder only a digest of its
    path is returned: its DICOM series are identified by their UIDs, and files of others may be
    added to it.
    """
    found: list[dict[str, Any]] = []
    for file in files:
        if file.is_file():
            status = file.stat()
            found.append({"bytes": status.st_size, "modified_ns": status.st_mtime_ns})
        else:
            digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()
            found.append({"folder_sha256": digest[:16]})
    return tuple(found)


def find(
    folder: Path,
    file_ending: str,
    num_channels: int,
    split_4d: bool = False,
    output: Path | None = None,
) -> list[Scan]:
    """Return the scans of a folder, in natural order.

    The log lists the files that are left out, and the reasons.

    Args:
        file_ending: file ending of the dataset that the model was trained on.
        num_channels: number of channels of the model.
        split_4d: take every volume of a 4D file as a scan.
        output: folder of the results, in which nothing is a scan.

    Raises:
        UsageError: there is no such folder, no scan, or a channel is missing; or the model has
            several channels and files do not name theirs; or two scans have one name; or results
            would be written among the scans.
    """
    if not folder.exists():
        raise UsageError(f"-i {folder} does not exist; check the path", code="scans-no-folder")

    # Case -> channel -> file, of files named as nnU-Net does.
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(file_ending) and not file.name.startswith("."):
            named = CHANNEL_SUFFIX.match(file.name.removesuffix(file_ending))
            if named:
                cases[named["case"]][int(named["channel"])] = file

    if not cases:
        scans = _found_scans(folder, file_ending, num_channels, split_4d, output)
        _check_names(scans, folder)
        return scans

    # A case needs every channel of the model.
    scans = []
    for name in sorted(cases, key=natural_key):
        channels = cases[name]
        missing = [n for n in range(num_channels) if n not in channels]
        if missing:
            listed = ", ".join(f"{n:04}" for n in missing)
            raise UsageError(
                f"-i {folder}: case {name} lacks channel {listed} of {num_channels}; add the file, "
                "or move the case elsewhere",
                code="scans-missing-channel",
            )
        scans.append(Scan(name, tuple(channels[n] for n in range(num_channels))))

    used: set[Path] = set()
    for scan in scans:
        used.update(scan.files)
    _warn_of_others(folder, file_ending, used, output)
    _check_names(scans, folder)
    return scans


def _found_scans(
    folder: Path,
    file_ending: str,
    num_channels: int,
    split_4d: bool,
    output: Path | None,
) -> list[Scan]:
    """Return all scans that pretraining would find, for models of one channel."""
    if num_channels > 1:
        raise UsageError(
            f"-i {folder} holds no files named like case_0000{file_ending}, and the model needs "
            f"{num_channels} channels of each scan; name them as nnU-Net does",
            code="scans-need-channels",
        )
    if output is not None and absolute(output) == absolute(folder):
        raise UsageError(
            f"-o {output} is the folder of -i, and every image in it would be taken for a scan; "
            "give another folder",
            code="scans-output-is-input",
        )

    scans = []
    for candidate in find_scans([], [folder], split_4d=split_4d):
        if _is_result(candidate.path, folder, output):
            continue
        # The name of the folder itself is not part of the name of a result.
        inside = candidate.id.partition("/")[2] or candidate.id
        if not candidate.status:
            name = re.sub(r"[^\w.-]+", "_", inside)
            is_ready = not candidate.part and candidate.path.name.endswith(file_ending)
            scans.append(Scan(name, (candidate.path,) if is_ready else (), candidate))
        elif candidate.status != "duplicate":
            log.warning("left out: %s (%s: %s)", inside, candidate.status, candidate.reason)

    if not scans:
        raise UsageError(
            f"-i {folder} holds no scan; name files <case>_0000{file_ending}, or give DICOM, "
            "NIfTI, NRRD or MetaImage",
            code="scans-none",
        )
    return scans


def _is_result(path: Path, folder: Path, output: Path | None) -> bool:
    """Return whether a path below ``folder`` belongs to the results of an earlier run in it."""
    if output is None or absolute(folder) not in absolute(output).parents:
        return False
    return absolute(path).is_relative_to(absolute(output))


def _warn_of_others(folder: Path, file_ending: str, used: set[Path], output: Path | None) -> None:
    """Warn about scans that are skipped, because others in the folder are named as cases."""
    endings = (*SCAN_ENDINGS, file_ending.lower())
    others = []
    for file in folder.rglob("*"):
        if not file.name.lower().endswith(endings) or file.name.startswith(".") or file in used:
            continue
        if not _is_result(file, folder, output):
            others.append(file.relative_to(folder).as_posix())

    if not others:
        return
    others.sort(key=natural_key)
    log.warning(
        "-i: %d files are left out (%s), because they are not named case_0000%s as others here, "
        "or hold a channel that the model does not have; put them into another folder",
        len(others),
        names_text(others),
        file_ending,
    )


def _check_names(scans: Sequence[Scan], folder: Path) -> None:
    """Refuse two scans whose results would be written into the same files.

    Some file systems do not distinguish a from A.
    """
    known: dict[str, Scan] = {}
    for scan in scans:
        # The first scan of each name.
        other = known.setdefault(scan.name.casefold(), scan)
        if other is not scan:
            names = f"both be called {scan.name}"
            if scan.name != other.name:
                names = f"be called {other.name} and {scan.name}"
            raise UsageError(
                f"-i {folder}: the results of {other.origin} and {scan.origin} would {names}, and "
                "one overwrite the other; rename one, or run the command for each with its own -o",
                code="scans-same-name",
            )


def check_image(image_CZYX: NDArray[np.float32], num_channels: int) -> None:
    """Check the voxels of a scan.

    Raises:
        ScanError: it has another number of channels than the model, or all its voxels are equal, so
            that it shows nothing.
    """
    if len(image_CZYX) != num_channels:
        raise ScanError(
            "channels",
            f"its files hold {len(image_CZYX)} channels and the model needs {num_channels}; is "
            "one of them 4D or in colour?",
        )
    # NaN differs from every value, also from NaN. It is reported elsewhere.
    first = image_CZYX.flat[0]
    if bool((image_CZYX == first).all()):
        raise ScanError("constant", f"every voxel has the value {first:g}; it shows nothing")


@contextmanager
def ready(scan: Scan) -> Iterator[list[str]]:
    """Give the files of a scan to nnU-Net's reader; temporary ones are removed afterwards.

    Yields:
        One file per channel.

    Raises:
        ScanError: the scan cannot be read.
    """
    for file in scan.files:
        check_file(file)
    if scan.candidate is None or scan.files:
        yield [str(file) for file in scan.files]
        return
    with TemporaryDirectory(prefix="autoreg_scan_") as folder:
        import SimpleITK

        path = scan.candidate.path
        part = parse_part(scan.candidate.part)
        image: Any
        if part.series:
            # A DICOM series in its own orientation. SimpleITK counts x, y, z.
            stack = find_stack(path, part)
            slices = pick_volume(stack, part)
            with quiet_readers():
                image = SimpleITK.GetImageFromArray(read_volume(path, slices))
            image.SetSpacing([float(s) for s in stack.spacing_mm[::-1]])
            image.SetOrigin([float(v) for v in slices[0].position])
            image.SetDirection([float(v) for v in stack.direction.ravel()])
        elif part.member:
            with unpacked(path, [part.member]) as members:
                image = file_image(members[part.member], part)
        else:
            image = file_image(path, part)
        file = Path(folder) / "scan_0000.nii.gz"
        SimpleITK.WriteImage(image, str(file))
        yield [str(file)]


def file_image(file: Path, part: ScanPart) -> Any:
    """Return a file, or one volume of a 4D file, as SimpleITK's image.

    Raises:
        ScanError: it cannot be read, or is not 3D.
    """
    import SimpleITK

    check_file(file)
    with quiet_readers():
        try:
            image: Any = SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            # SimpleITK names the path, which may hold the name of a patient.
            reason = without_names(str(error).splitlines()[-1].strip(), [str(file)])
            raise ScanError(
                "unreadable",
                f"SimpleITK cannot read it ({reason}); copy it again",
            ) from error

    if part.t:
        image = image[..., int(part.t)]
    check_3d(image.GetDimension(), remedy="store it as a 3D image, or use --split-4d for a 4D file")
    num_values = image.GetNumberOfComponentsPerPixel()
    if num_values != 1:
        raise ScanError("not3d", f"it has {num_values} values per voxel; split it")
    return image
