"""Scans inside .zip archives, which are unpacked into a temporary folder while they are read.

Nothing is written under a name that an archive gives, so no member can leave that folder; sizes are
checked before unpacking.
"""

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from nnunet_autoreg.errors import ScanError

# Deflate can shrink a file 1030 times. Scans shrink about 3 times; label maps and empty scans a few
# hundred times, while they are small.
MAX_RATIO, SMALL_BYTES = 200, 1 << 26
MAX_MEMBERS = 1_000_000
FREE_SHARE = 0.8
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading.

    Raises:
        ScanError: ``unreadable``: it is damaged, or no archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED as error:
        raise ScanError(
            "unreadable",
            f"not a zip archive, or a damaged one ({type(error).__name__}); copy it again",
        ) from error
    with archive:
        yield archive


def members(archive: zipfile.ZipFile) -> tuple[list[zipfile.ZipInfo], list[tuple[str, str]]]:
    """Return the files that may be read, and (status, reason) of those that must not."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > MAX_MEMBERS:
        reason = (
            f"the archive lists {len(infos)} files, more than {MAX_MEMBERS}; unpack it by hand if "
            "you trust it"
        )
        return [], [("unreadable", reason)]
    good, bad = [], []
    for info in infos:
        why = _danger(info)
        if why:
            bad.append(why)
        else:
            good.append(info)
    return good, bad


def _danger(info: zipfile.ZipInfo) -> tuple[str, str] | None:
    """Return (status, reason) of a member that must not be unpacked; None for others."""
    # Programs on Windows write backslashes.
    name = PurePosixPath(info.filename.replace("\\", "/"))
    has_drive = bool(name.parts) and ":" in name.parts[0]
    if name.is_absolute() or ".." in name.parts or has_drive:
        return (
            "unreadable",
            "a name in the archive leads out of it (/ or ..): made to harm, or broken; unpack it "
            "by hand if you trust it",
        )
    if info.flag_bits & 0x1:
        return "unreadable", "encrypted with a password; unpack it first"
    if would_fill_the_disk(info):
        return "unreadable", (
            f"would unpack from {info.compress_size / 2**20:.1f} to {info.file_size / 2**20:.0f} "
            "MiB, as zip bombs do; unpack it by hand if you trust it"
        )
    return None


def would_fill_the_disk(info: zipfile.ZipInfo) -> bool:
    """Return whether a member is packed as tightly as in archives that are made to do harm.

    The sizes are those that the archive claims, and unpacking stops if they are exceeded.
    """
    is_large = info.file_size > SMALL_BYTES
    return is_large and info.file_size > MAX_RATIO * max(info.compress_size, 1)


@contextmanager
def unpacked(path: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Unpack members of an archive into a temporary folder.

    They get new names with their endings, so that none can leave that folder.

    Raises:
        ScanError: ``unreadable``: a member is missing, damaged or dangerous, or there is no room
            for it.
    """
    with opened(path) as archive, tempfile.TemporaryDirectory(prefix="autoreg_") as folder:
        good, bad = members(archive)
        known = {info.filename: info for info in good}
        missing = [name for name in names if name not in known]
        if missing:
            raise ScanError(
                "unreadable",
                bad[0][1] if bad else "a file is no longer in the archive; run again",
            )

        num_bytes = sum(known[name].file_size for name in names)
        free = shutil.disk_usage(folder).free
        if num_bytes > FREE_SHARE * free:
            raise ScanError(
                "unreadable",
                f"unpacking needs {num_bytes / 2**30:.1f} GiB, the temporary folder has "
                f"{free / 2**30:.1f}; set TMPDIR to a larger disk",
            )

        files = {}
        for number, name in enumerate(names):
            files[name] = Path(folder) / f"{number}{_ending(name)}"
            _copy(archive, known[name], files[name])
        yield files


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    try:
        with archive.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except DAMAGED as error:
        raise damaged_member(error) from error


def damaged_member(error: Exception) -> ScanError:
    """Return the reason why a member of an archive cannot be read."""
    return ScanError(
        "unreadable",
        f"damaged in the archive ({type(error).__name__}); copy the archive again",
    )


def _ending(name: str) -> str:
    """Return the ending of a name, such as .nii.gz.

    A doubled ending counts only if the last one is a compression.
    """
    suffixes = PurePosixPath(name).suffixes
    is_compressed = suffixes and suffixes[-1].lower() == ".gz"
    joined = "".join(suffixes[-2:] if is_compressed else suffixes[-1:])
    # The ending comes from an untrusted source, and becomes a part of a name on the disk.
    is_plain = joined.isascii() and len(joined) < 12 and "/" not in joined
    return joined.lower() if is_plain else ""
