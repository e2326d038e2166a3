"""Pseudonyms of subjects: a keyed hash, constant on this machine and meaningless elsewhere."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from nnunet_autoreg.errors import UsageError

SALT_NAME = ".identity_salt"
NUM_SALT_BYTES, NUM_HEX = 32, 16


def salted(text: str, salt: str) -> str:
    """Return 16 hex digits that represent ``text``; "" (unknown) stays "".

    They are the first digits of HMAC-SHA256 with the key ``salt``.

    Without the salt, the text cannot be found by hashing all possible names or numbers. Spaces
    around the text do not count: DICOM pads its values with them. Among a million subjects two
    share their digits with a chance of 3e-8.
    """
    stripped = text.strip().strip("\0").strip()
    if not stripped:
        return ""
    encoded = stripped.encode("utf-8", "surrogateescape")
    digest = hmac.new(salt.encode(), encoded, hashlib.sha256)
    return digest.hexdigest()[:NUM_HEX]


def load_salt(folder: Path) -> str:
    """Return the secret of the store in ``folder``.

    It is random, made once, readable by its owner only, and the same for all processes.

    Raises:
        UsageError: it cannot be made, read, or is damaged.
    """
    path = folder / SALT_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made ({error.strerror}); set nnUNet_preprocessed to a folder that "
            "can be written",
            code="salt-folder",
        ) from error
    try:
        if not path.exists():
            _make(path)
        salt = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or "it is not text"
        raise UsageError(
            f"{path} cannot be made or read ({why}); it belongs to the first user of this "
            "nnUNet_preprocessed: ask this user, or set nnUNet_preprocessed to your own folder",
            code="salt-unreadable",
        ) from error
    if len(salt) != 2 * NUM_SALT_BYTES:
        raise UsageError(
            f"{path} is damaged: {len(salt)} characters instead of {2 * NUM_SALT_BYTES}; put it "
            "back, or remove it (subjects then get new hashes)",
            code="salt-damaged",
        )
    return salt


def _make(path: Path) -> None:
    """Write a new salt and link it to ``path``.

    Only the first of several processes can do that, and other processes never read an unfinished
    file.
    """
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"
    fresh = path.with_name(f"{path.name}.{unique}.tmp")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(NUM_SALT_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())

        try:
            os.link(fresh, path)
        except FileExistsError:
            pass  # Another process was first.
        except OSError:
            # A file system without hard links: the rename is whole too, but the last of several
            # processes wins, so look first.
            if not path.exists():
                fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
