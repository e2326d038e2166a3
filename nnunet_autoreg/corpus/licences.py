"""The licence in a dataset's ``dataset.json``: it is optional, read once, and never stops a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.corpus.rows import OK, ScanRow
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.records import read_json, write_json

LICENCES_NAME = "licences.json"
IMAGE_FOLDERS = ("imagesTr", "imagesTs")
KEYS = ("licence", "license")
MAX_LENGTH = 200
"""Characters of a licence that are kept: a name or a link, not its whole text."""


def stated_licences(rows: Iterable[ScanRow]) -> dict[str, str]:
    """Return dataset name -> licence for the usable scans of nnU-Net datasets.

    It is "" if none is stated.

    Plain folders state no licence: a ``dataset.json`` near them may be anything.
    """
    found: dict[str, str] = {}
    for row in rows:
        folder = Path(row.source).parent
        is_of_dataset = folder.name in IMAGE_FOLDERS and folder.parent.name == row.dataset
        if row.status == OK and is_of_dataset and row.dataset not in found:
            content = _read_object(folder.parent / "dataset.json")
            texts = [content[key] for key in KEYS if isinstance(content.get(key), str)]
            words = texts[0].split() if texts else []
            found[row.dataset] = " ".join(words)[:MAX_LENGTH]
    return found


def write_licences(folder: Path, rows: Iterable[ScanRow]) -> None:
    """Write the licences of a run's datasets into its folder, while its scans are indexed."""
    stated = stated_licences(rows)
    write_json(
        folder / LICENCES_NAME,
        {public_dataset(name): text for name, text in stated.items()},
    )


def read_licences(folder: Path) -> dict[str, str]:
    """Return the licences that ``write_licences`` wrote; none if the file is missing or damaged."""
    content = _read_object(folder / LICENCES_NAME)
    return {str(name): text for name, text in content.items() if isinstance(text, str)}


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or damaged."""
    try:
        content: Any = read_json(file) if file.is_file() else {}
    except (AutoregError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
