"""Continue a folder of results, which has one JSON file per scan. Torch-free.

An earlier run may have done some of the scans. Its results are kept if they are of the same model,
inputs and options.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import differences

MOST_NAMED = 3
"""Largest number of differences that a message lists."""

FROM_SEG = "from_seg"
"""Key of the model in results of ``--from-seg``."""

NUM_HEX = 16


def public_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a model for results, without the name of a folder.

    A dataset is named by its number, and a folder of segmentations by a digest, which is the same
    in the next run. A description that is public already does not change.
    """
    public = dict(model)
    if "dataset" in public:
        public["dataset"] = public_dataset(str(public["dataset"]))

    segmentations = str(public.get(FROM_SEG, ""))
    if Path(segmentations).is_absolute():
        public[FROM_SEG] = hashlib.sha256(segmentations.encode()).hexdigest()[:NUM_HEX]
    return public


def make_output_folder(folder: Path) -> None:
    """Make the folder of ``-o``.

    Raises:
        UsageError: it cannot be made (code "results-output-folder").
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"-o {folder} cannot be made ({error.strerror or error}); give a folder that you may "
            "write to",
            code="results-output-folder",
        ) from error


def scans_with_results(folder: Path, names: Sequence[str], overwrite: bool) -> list[str]:
    """Return the scans that have a JSON file in ``folder``; none if all are done again."""
    if overwrite:
        return []
    return [name for name in names if (folder / f"{name}.json").is_file()]


def check_same_run(
    file: Path,
    present: Mapping[str, Any],
    wanted: Mapping[str, Any],
    is_minor: Callable[[str], bool] = lambda change: False,
) -> None:
    """Refuse results that another model, another input or other options have made.

    Args:
        file: file of the results.
        present, wanted: ``model``, ``settings`` and ``inputs`` of the file, and of this run.
        is_minor: whether a difference, as ``records.differences`` words it, does not matter.

    Raises:
        UsageError: they differ (code "results-of-another-run"); the message lists differences.
    """
    # A file that was edited may hold anything, and is then not a result of this model. Files of
    # earlier versions name the folders of their models.
    model = present.get("model")
    known = public_model(model) if isinstance(model, Mapping) else {}
    present = {**present, "model": known}
    changes = [change for change in differences(present, wanted) if not is_minor(change)]
    if changes:
        raise UsageError(
            f"{file} was made by another model, of another input or with other options "
            f"({'; '.join(changes[:MOST_NAMED])}); give another -o, or --overwrite, or remove that "
            "file to have the scan done again",
            code="results-of-another-run",
        )
