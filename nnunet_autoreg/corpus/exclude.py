"""``--exclude``: scans that the user wants to leave out, by path, id, case or subject."""

import logging
import os
import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.identity import salted
from nnunet_autoreg.corpus.private import terminal_only
from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.io.names import absolute
from nnunet_autoreg.io.parts import parse_part
from nnunet_autoreg.records import parse_json, regular

log = logging.getLogger(__name__)

FORMATS = (
    "a text file with one path, scan id or case id per line, a JSON list of ids, or nnU-Net's "
    "splits_final.json"
)
BY_SERIES = "excluded by the user (an excluded folder holds this series too)"
BY_SUBJECT = "excluded by the user (by its patient)"


def read_exclude(path: Path) -> set[str]:
    """Read names to leave out: paths of files or folders, scan ids, case ids or patients.

    Read from a text file (one per line; # begins a comment), a JSON list of ids, or nnU-Net's
    ``splits_final.json``. From ``splits_final.json`` the ``val`` and ``test`` cases of the
    **first** fold are left out: over all five folds every case is once in ``val``.

    Raises:
        UsageError: the file cannot be read, or is none of these.
    """
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--exclude {path} cannot be read ({error}); give {FORMATS}",
            code="exclude-unreadable",
        ) from error
    if path.suffix.lower() != ".json":
        # "#" begins a comment only after a blank: it may be a part of a name.
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
        return {line for line in lines if line}

    try:
        data = parse_json(text)
    except ValueError as error:
        raise UsageError(
            f"--exclude {path} is not valid JSON ({error}); give {FORMATS}",
            code="exclude-unreadable",
        ) from error
    first = data[0] if isinstance(data, list) and data else None
    if isinstance(first, dict) and "val" in first:
        # Of five folds every case is once in "val", so only the first fold counts.
        held_out, tested = first["val"], first.get("test", [])
        if isinstance(held_out, list) and isinstance(tested, list):
            return {str(name) for name in [*held_out, *tested]}
    elif isinstance(data, list) and all(isinstance(name, str) for name in data):
        return set(data)
    raise UsageError(
        f"--exclude {path} holds neither a list of ids nor splits; give {FORMATS}",
        code="exclude-unknown-form",
    )


def excluded_because(
    candidate: Candidate,
    exclude: set[str],
    series: Container[str] = (),
    salt: str = "",
) -> str:
    """Return why a candidate is excluded; "" if it is not.

    A subject is not repeated: it may be a patient's number.

    Args:
        series: DICOM series that have slices in excluded folders.
        salt: salt of the ids in scans.csv, which may be named as well.
    """
    if not exclude:
        return ""
    named = min(_names(candidate, salt) & exclude, default="")
    if named:
        return f"excluded by the user ('{named}')"
    if series_of(candidate) in series:
        return BY_SERIES
    subject = candidate.subject.strip()
    return BY_SUBJECT if subject and subject in exclude else ""


def outside(exclude: set[str], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return excluded scans that are not candidates themselves, named by their paths.

    They are read, so that copies of them are recognised.
    """
    paths = [entry for entry in exclude if os.sep in entry]
    entries = sorted(path for path in paths if Path(path).exists())
    if not entries:
        return []
    known = {(os.path.realpath(c.path), c.part) for c in candidates}

    new = []
    for entry in entries:
        for found in find_scans([], [absolute(entry)], split_4d=True):
            key = (os.path.realpath(found.path), found.part)
            if not found.status and key not in known:
                known.add(key)
                new.append(replace(found, id=str(found.path), case=entry))
    return new


def warn_unmatched(exclude: set[str], candidates: Sequence[Candidate], salt: str = "") -> None:
    """Log how many names of ``exclude`` match no candidate."""
    if not exclude:
        return
    known = (_names(c, salt) | {c.subject.strip()} for c in candidates)
    unmatched = sorted(exclude.difference(*known))
    if unmatched:
        hint = did_you_mean(
            unmatched[0],
            {c.case for c in candidates} if len(candidates) < 1000 else (),
        )
        log.warning(
            "--exclude: %d of %d names match no scan",
            len(unmatched),
            len(exclude),
            extra=terminal_only(f"; the first is '{unmatched[0]}', {hint}"),
        )


def _names(candidate: Candidate, salt: str) -> set[str]:
    """Return every name under which a candidate may be excluded, except its subject."""
    path = candidate.path
    names = {
        candidate.id,
        salted(candidate.id, salt) if salt else "",
        candidate.case,
        f"{candidate.dataset}/{candidate.case}",
        path.name,
        series_of(candidate),
    }

    # A path may be given as typed, by where its links lead, or relative to the working folder.
    variants = [path, Path(os.path.realpath(path))]
    if path.is_relative_to(Path.cwd()):
        variants.append(path.relative_to(Path.cwd()))
    for variant in variants:
        names.update(map(str, (variant, *variant.parents)))

    # "/" and "." would exclude everything.
    return names - {"", ".", path.anchor}


def series_of(candidate: Candidate) -> str:
    """Return the SeriesInstanceUID of a DICOM series; "" for other scans."""
    return parse_part(candidate.part).series
