"""Read ``dataset.json`` by nnU-Net's rules: channels by position, listed files, labels and
regions.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.private import public_channel
from nnunet_autoreg.errors import PlanError, UsageError
from nnunet_autoreg.records import read_json

NAME = "dataset.json"
STOCK_READERS = (
    "None",
    "SimpleITKIO",
    "SimpleITKIOWithReorient",
    "NibabelIO",
    "NibabelIOWithReorient",
)
MAX_LABEL = 2**31 - 1
"""Label maps hold no larger values."""


@dataclass(frozen=True)
class ListedCase:
    """One entry of the ``dataset`` list: the files of a case.

    Attributes:
        images: one absolute path for each channel.
        label: absolute path of the label map; None if the entry names none.
    """

    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class DatasetJson:
    """The content of a raw dataset's ``dataset.json``.

    Attributes:
        channels: names in the order of the file; nnU-Net ignores the keys, and so do we.
        listed: case -> files, if the dataset lists them; else empty.
        structures: label value -> name, without background and ignored label. A value that occurs
            in several regions has the name of the smallest one.
        reader: the user's own class by which nnU-Net reads the images; "" for nnU-Net's classes,
            which give the same values as our reader.
    """

    channels: tuple[str, ...]
    listed: Mapping[str, ListedCase]
    structures: Mapping[int, str]
    reader: str = ""

    def channel_name(self, position: int) -> str:
        """Return the name of the channel at ``position``.

        It is the number if there is no name that outputs may show.
        """
        if position >= len(self.channels):
            return str(position)
        return public_channel(self.channels[position], position)


def read_dataset_json(folder: Path) -> DatasetJson:
    """Read the ``dataset.json`` of a raw dataset's folder.

    It is parsed once while it does not change.

    Raises:
        UsageError: it cannot be read, or is not an nnU-Net dataset.json.
    """
    file = folder / NAME
    try:
        stamp = file.stat().st_mtime_ns
        # Listed paths depend on the environment, so a parsed file is valid for this one only.
        environment = tuple(sorted(os.environ.items()))
        return _parsed(file, stamp, environment)
    except (OSError, PlanError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file} is not an nnU-Net dataset.json ({error}); correct it",
            code="dataset-json-unreadable",
        ) from error


def lists_its_files(folder: Path) -> bool:
    """Return whether a folder's ``dataset.json`` lists files instead of ``imagesTr``."""
    try:
        return (folder / NAME).is_file() and bool(read_dataset_json(folder).listed)
    except UsageError:
        return False


def unset_variables(path: Path) -> list[str]:
    """Return the parts of a path that still begin with ``$``: variables that are not set."""
    return [part for part in path.parts if part.startswith("$")]


@lru_cache(maxsize=64)
def _parsed(file: Path, _stamp: int, _environment: tuple[tuple[str, str], ...]) -> DatasetJson:
    content = read_json(file)
    names = content.get("channel_names", content.get("modality", {}))
    listed = content.get("dataset", {})
    if not isinstance(listed, dict):
        # The first version of the format had other lists under other keys; nnU-Net v2 has none.
        listed = {}

    cases = {}
    for case, entry in listed.items():
        images = tuple(_expanded(file.parent, name) for name in entry.get("images", []))
        label = entry.get("label")
        label_file = _expanded(file.parent, label) if label else None
        cases[str(case)] = ListedCase(images, label_file)

    channels = tuple(str(name) for name in names.values())
    reader = str(content.get("overwrite_image_reader_writer", "None"))
    structures = structures_of(content.get("labels", {}))
    return DatasetJson(channels, cases, structures, "" if reader in STOCK_READERS else reader)


def _expanded(folder: Path, name: str) -> Path:
    """Return a listed path as nnU-Net finds it.

    Variables are expanded; other paths are relative to the dataset's folder.
    """
    # abspath, not resolve: links stay as they are, so that ids do not depend on where they lead.
    return Path(os.path.abspath(folder / os.path.expandvars(name)))  # noqa: PTH100


def structures_of(labels: Any) -> dict[int, str]:
    """Return label value -> name of the ``labels`` of a dataset.json.

    A label is a number, or a region: a list of numbers. A value that belongs to several regions is
    named after the smallest one. ``{"whole": [1, 2], "core": [2]}`` thus gives 1 -> whole and 2 ->
    core. Entries that are not numbers are ignored: names are optional and do not stop a run.
    """
    if not isinstance(labels, dict):
        return {}
    values_of: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        try:
            values = tuple(int(number) for number in listed)
        except (TypeError, ValueError, OverflowError):
            values = ()
        is_possible = all(0 <= number <= MAX_LABEL for number in values)
        values_of[str(name)] = values if is_possible else ()
    ignored = values_of.pop("ignore", ())

    found: dict[int, str] = {}
    for name, values in sorted(values_of.items(), key=lambda item: len(item[1])):
        for value in values:
            if value != 0 and value not in ignored:
                found.setdefault(value, name)
    return dict(sorted(found.items()))
