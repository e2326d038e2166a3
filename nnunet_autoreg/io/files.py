"""Check that an image file can be opened, and keep the messages of C++ readers off the terminal."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.io.nifti import check_nifti


def check_file(path: Path) -> None:
    """Check that ``path`` is a readable file with content.

    Raises:
        ScanError: ``unreadable``, or what a NIfTI header says.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise ScanError(
                "unreadable",
                "a link whose target does not exist; mount the target, or remove the link",
            )
        if path.exists() and not path.is_file():
            raise ScanError("unreadable", "not a file (a folder or device with an image's name)")
        with path.open("rb") as handle:
            if not handle.read(1):
                raise ScanError("unreadable", "the file is empty; copy it again")
        if path.name.lower().endswith((".nii", ".nii.gz", ".hdr")):
            check_nifti(path)
    except FileNotFoundError as error:
        raise ScanError(
            "unreadable",
            "the file vanished after it was found; restore it, or run again without it",
        ) from error
    except PermissionError as error:
        raise ScanError("unreadable", "permission denied; grant read access (chmod u+r)") from error
    except OSError as error:
        raise ScanError("unreadable", f"the file system says: {error.strerror or error}") from error


@contextmanager
def quiet_readers() -> Iterator[Any]:
    """Keep the output of C++ libraries off the terminal.

    Yields a function that returns what was written so far.

    ITK and its parts print warnings per file past Python's ``sys.stderr`` (libjpeg: past
    ``sys.stdout``), so the file descriptors themselves are redirected.
    """
    descriptors = (1, 2)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in descriptors]
    with tempfile.TemporaryFile() as caught:

        def captured() -> str:
            caught.seek(0)
            return caught.read().decode("utf-8", "replace")

        for descriptor in descriptors:
            os.dup2(caught.fileno(), descriptor)
        try:
            yield captured
        finally:
            for descriptor, copy in zip(descriptors, saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
