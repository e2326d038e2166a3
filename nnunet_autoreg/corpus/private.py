"""Keep names of patients in one file only: ``paths_do_not_share.csv``.

All other outputs (plan, ``scans.csv``, checkpoints, card of the weights, logs, report, pictures,
metrics) contain no patient's name, birth date or UID, and no name of a folder or file of the
inputs. There, scans are named by a salted hash and datasets by their number.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import atomic_path, from_cell, regular, to_cell

PRIVATE_NAME = "paths_do_not_share.csv"
COLUMNS = ("id", "name", "dataset", "case", "part", "source", "listed_in", "reason")
PATH_FIELDS = ("folders", "exclude", "manifest", "init", "boxes")
"""Fields of a request that hold paths."""
HIDDEN = "hidden:"
"""Prefix of what replaces a path in the plan: the rest is the id of its line in the private
file."""
HIDDEN_NAME = "[name]"
NUMBERED_DATASET = re.compile(r"(Dataset\d{3,}|folder-[0-9a-f]{3})(?:_\S+)?")
TERMINAL_ONLY = "terminal_only"
"""Attribute of a log record: text after the message that is shown on a terminal only."""
CHANNEL_WORDS = frozenset(
    """
    adc angio arterial art asl attn axial b b0 b1000 blood bold c cbct cbf cbv ce contrast cor
    coronal ct cta ctp dce delayed diffusion dixon dsc dti dwi ep2d fat fd fdg fdgpet flair fmri fs
    g gad gd hbv hr in inphase inv inversion km late magnitude map mip mra mprage mr mri mrt native
    noncontrast nonct nonorm no none norm normalization opp opphase out pd pdw perfusion pet phase
    portal post pre psma pt pwi r rescale rgb rgb_to_0_1 s sag sagittal space spgr spect stir suv
    sub subtraction swi t t1 t1c t1ce t1gd t1n t1w t2 t2f t2star t2starw t2w tof tra transverse us
    uspio venous vibe w water xray zscore to mtr fa md petct tirm subtracted dynamic early image
    channel modality scan highres lowres
    """.split(),  # noqa: SIM905
)
"""Words that occur in names of channels; none of them is a person's name."""
_LONG_WORDS = "|".join(
    sorted((word for word in CHANNEL_WORDS if len(word) > 1), key=len, reverse=True),
)
KNOWN_WORD = re.compile(rf"(?:{_LONG_WORDS})+\d{{0,4}}|[a-z]?\d{{0,4}}")
"""Several words in one, as in T1post, a word with a short number, or a single letter."""


def is_harmless_word(name: str) -> bool:
    """Return whether a channel's name has only imaging terms; other words may be a person's
    name."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    is_known = all(KNOWN_WORD.fullmatch(word) for word in words)
    return any(map(str.isalpha, name)) and name.isascii() and is_known


def public_channel(name: str, number: int) -> str:
    """Return a channel's name if it consists of imaging terms, else its number."""
    return name if is_harmless_word(name) else str(number)


def public_dataset(name: str) -> str:
    """Return the name of a dataset in outputs.

    It is nnU-Net's number, or three digits that distinguish folders.
    """
    numbered = NUMBERED_DATASET.fullmatch(name)
    if numbered:
        return numbered[1]
    if not name:
        return ""
    # So few digits that nobody can learn the name by hashing all names there are.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"folder-{digest[:3]}"


def folder_of_dataset(parent: Path, dataset: str) -> Path:
    """Return the folder for results about a dataset, which is named after the dataset's number.

    In earlier versions it had the dataset's full name; such a folder is used if it exists.
    """
    earlier = parent / dataset
    return earlier if earlier.is_dir() else parent / public_dataset(dataset)


def without_names(text: str, names: Iterable[str]) -> str:
    """Return a message without the names and paths of the scan that it is about.

    Paths are replaced everywhere, single words only between quotes: the name of a folder may be
    an ordinary word.
    """
    # The longest first: a folder's name may be a part of a path.
    for name in sorted({name for name in names if name}, key=len, reverse=True):
        if "/" in name.strip("/") or "." in name:
            text = text.replace(name, HIDDEN_NAME)
        text = text.replace(f"'{name}'", HIDDEN_NAME)
    return text


def terminal_only(text: str) -> dict[str, str]:
    """Return the ``extra`` of a log call whose line names files only on a terminal.

    Log files, and output that is redirected into a file, have the message without ``text``.
    """
    return {TERMINAL_ONLY: text}


def hide_paths(
    request: Mapping[str, Any],
    fields: Iterable[str],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a request whose paths are replaced by ids, and the paths by id."""
    hidden = dict(request)
    paths: dict[str, str] = {}
    for field in fields:
        value = request.get(field)
        values = [value] if isinstance(value, str) else list(value or ())
        placeholders = []
        for number, path in enumerate(values):
            key = f"{field}:{number}"
            placeholders.append(HIDDEN + key)
            # A plan that is written again holds placeholders, whose paths are known.
            if not path.startswith(HIDDEN):
                paths[key] = path
        if values:
            hidden[field] = placeholders[0] if isinstance(value, str) else placeholders
    return hidden, paths


def show_paths(request: Mapping[str, Any], fields: Iterable[str], folder: Path) -> dict[str, Any]:
    """Return the inverse of ``hide_paths``, from the private file of a run.

    Raises:
        UsageError: the private file is missing, or lacks a path.
    """
    shown = dict(request)
    known: dict[str, str] | None = None
    for field in fields:
        value = request.get(field)
        # Values of an edited plan that are not text are refused when the request is read.
        values: Any = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            continue
        are_texts = all(isinstance(path, str) for path in values)
        if not are_texts or not any(path.startswith(HIDDEN) for path in values):
            continue
        # Read only if it is needed: runs of earlier versions have no such file.
        if known is None:
            known = {cells["id"]: cells["source"] for cells in read_private(folder)}

        keys = [path.removeprefix(HIDDEN) for path in values]
        lost = [key for key in keys if key not in known]
        if lost:
            raise missing_line(folder, lost[0])
        paths = [known[key] for key in keys]
        shown[field] = paths[0] if isinstance(value, str) else paths
    return shown


def missing_line(folder: Path, key: str) -> UsageError:
    """Return the error about a private file that lacks the line of an id."""
    return UsageError(
        f"{folder / PRIVATE_NAME} has no line '{key}'; restore it, or use another --name",
        code="private-line-missing",
    )


def write_private(folder: Path, lines: Iterable[Mapping[str, str]]) -> None:
    """Write the private file atomically, readable by its owner only."""
    path = folder / PRIVATE_NAME
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as handle,
    ):
        writer = csv.DictWriter(handle, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({name: to_cell(value) for name, value in line.items()})
    path.chmod(0o600)


def read_private(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of the private file.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = folder / PRIVATE_NAME
    try:
        with regular(path).open(encoding="utf-8", errors="surrogateescape", newline="") as handle:
            reader = csv.DictReader(handle)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            for cells in reader:
                if None in cells or None in cells.values():
                    raise ValueError(f"line {reader.line_num} has not {len(COLUMNS)} cells")
                yield {name: from_cell(cell) for name, cell in cells.items()}
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is missing, so the names and files of the scans are unknown; put it back, or "
            "start again under another name",
            code="private-file-missing",
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); restore it, or start again under another name",
            code="private-file-unreadable",
        ) from error
