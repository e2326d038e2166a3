"""Checkpoints of a pretraining run.

They are written whole or not at all, checked by a hash, and read without running any code in them.

A run keeps the newest two and the best. The file is torch's own zip, with the SHA-256 of all that
precedes as the zip's comment, so that hash and content cannot part.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import CheckpointError, WeightsError
from nnunet_autoreg.records import atomic_path, regular
from nnunet_autoreg.safe_load import load_plain

log = logging.getLogger(__name__)

LATEST_NAME = "checkpoint_latest.pth"
PREVIOUS_NAME = "checkpoint_previous.pth"
BEST_NAME = "checkpoint_best.pth"
RESUMABLE = (LATEST_NAME, PREVIOUS_NAME, BEST_NAME)
CHECKPOINT_VERSION = 2

_MARK = b"sha256="
_COMMENT_BYTES = len(_MARK) + 64
_NO_COMMENT = b"\0\0"
"""How torch's zip ends: the length of its comment, which it leaves empty."""


def save_checkpoint(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write tensors and plain values to ``path``.

    Args:
        previous: where the file that is there now goes, once the new one is complete; None replaces
            it.

    Raises:
        CheckpointError: the disk is full or the folder not writable; the previous files are
            untouched.
    """
    try:
        with atomic_path(path) as temporary:
            _write(temporary, content)
            if previous is not None and path.exists():
                path.replace(previous)
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(
            f"{path} cannot be written ({why}); the last good checkpoint is kept: free some space "
            "and rerun",
            code="checkpoint-unwritable",
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only (``weights_only=True``).

    Raises:
        CheckpointError: it is damaged, holds anything but tensors and plain values, or is of
            another format.
    """
    damage = damage_of(path)
    if damage:
        raise CheckpointError(
            f"{path} cannot be read ({damage}); move it away to start from the beginning",
            code="checkpoint-damaged",
        )
    return _read(path)


def exists(folder: Path) -> bool:
    """Return whether a run's folder holds a checkpoint to continue from, whole or not."""
    return any((folder / name).exists() for name in RESUMABLE)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a run and its content; None if there is none.

    Damaged ones that are newer are renamed to ``<name>.damaged``, with one line each, so that they
    take no whole one's place.

    Raises:
        CheckpointError: all are damaged (none is touched), or the newest whole one is of another
            format.
    """
    damaged: list[tuple[Path, str]] = []
    for name in RESUMABLE:
        path = folder / name
        if not path.exists():
            continue
        damage = damage_of(path)
        if damage:
            damaged.append((path, damage))
            continue
        content = _read(path)
        for lost, why in damaged:
            aside = lost.with_name(f"{lost.name}.damaged")
            lost.replace(aside)
            log.warning(
                "%s cannot be read (%s) and is now %s; continuing from %s, step %s",
                lost,
                why,
                aside.name,
                path.name,
                content.get("step"),
            )
        return path, content
    if damaged:
        (path, why), *more = damaged
        names = ", ".join(other.name for other, _ in more)
        others = f", nor can {names}" if more else ""
        raise CheckpointError(
            f"{path} cannot be read ({why}){others}; move the checkpoints away to start from the "
            "beginning",
            code="checkpoint-all-damaged",
        )
    return None


def newest_scheduled(folder: Path) -> dict[str, Any] | None:
    """Return the content of the newest whole checkpoint made at a planned step.

    It is marked ``"scheduled"``. None if there is none.
    """
    for name in (LATEST_NAME, PREVIOUS_NAME):
        path = folder / name
        if path.exists() and not damage_of(path):
            content = _read(path)
            if content.get("scheduled"):
                return content
    return None


def damage_of(path: Path) -> str:
    """Return what is wrong with a checkpoint's bytes; "" if nothing is.

    Raises:
        CheckpointError: the disk does not give them.
    """
    digest = hashlib.sha256()
    try:
        with regular(path).open("rb") as handle:
            left = os.fstat(handle.fileno()).st_size - _COMMENT_BYTES - len(_NO_COMMENT)
            while left > 0 and (piece := handle.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
            ending = handle.read()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); solve this and run the same line "
            "again",
            code="checkpoint-unreadable",
        ) from error
    has_mark = ending.startswith(_COMMENT_BYTES.to_bytes(2, "little") + _MARK)
    if left < 0 or not has_mark:
        return "its end is missing"
    digest.update(_NO_COMMENT)
    return "" if ending[-64:] == digest.hexdigest().encode() else "its checksum differs"


def _write(path: Path, content: dict[str, Any]) -> None:
    import torch

    with path.open("wb") as handle:
        writer = _HashingWriter(handle)
        try:
            torch.save({"version": CHECKPOINT_VERSION, **content}, writer)  # type: ignore[arg-type]
        except RuntimeError as error:
            if writer.error is not None:  # torch reports a failed write as its own bug
                raise writer.error from error
            raise
        handle.seek(-len(_NO_COMMENT), os.SEEK_END)
        comment = _MARK + writer.digest.hexdigest().encode()
        handle.write(_COMMENT_BYTES.to_bytes(2, "little") + comment)
        handle.flush()
        os.fsync(handle.fileno())


class _HashingWriter:
    """What torch.save needs of a file; hashes what passes and keeps the disk's own error."""

    def __init__(self, handle: Any):
        self.handle, self.digest = handle, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written: int = self.handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        self.handle.flush()


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file whose bytes are whole."""
    try:
        content: dict[str, Any] = load_plain(path)
    except WeightsError as error:
        raise CheckpointError(
            f"{error}; move it away to start from the beginning",
            code="checkpoint-not-plain",
        ) from error
    if not isinstance(content, dict) or content.get("version") != CHECKPOINT_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is of format {found}, {CHECKPOINT_VERSION} is needed; update nnunet-autoreg, "
            "or move it away",
            code="checkpoint-other-format",
        )
    return content
