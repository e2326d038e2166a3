"""Carry out ``autoreg_weights import``: use weights of other projects like a finished run."""

from pathlib import Path

from nnunet_autoreg.convert.ar_ssl4m import import_ar_ssl4m
from nnunet_autoreg.convert.huggingface import import_huggingface
from nnunet_autoreg.convert.imported import (
    Imported,
    ImportOptions,
    checked,
    write_run,
)
from nnunet_autoreg.convert.nnssl import import_nnssl
from nnunet_autoreg.convert.source import (
    AR_SSL4M,
    HUGGING_FACE,
    NNSSL,
    RUN,
    TRAINED,
    WeightsFile,
    open_source,
)
from nnunet_autoreg.convert.trained import import_trained
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.model.card import RUNS_FOLDER, EncoderCard


def import_weights(
    path: Path,
    name: str,
    results: Path,
    options: ImportOptions,
    plan_file: Path | None = None,
) -> tuple[EncoderCard, Imported]:
    """Write ``$nnUNet_results/autoreg_pretraining/NAME`` from a file or folder.

    Returns:
        the card, and what was written: every tensor once, even if the file has two names for it.

    Args:
        plan_file: nnssl's ``adaptation_plan.json``, if it is neither in the file nor beside it.

    Raises:
        WeightsError: the file cannot be read safely, contradicts itself, or is of a kind that is
            not imported (code "weights-not-importable").
    """
    source = open_source(path, plan_file)
    imported = converted(source, options)
    imported = checked(imported)
    return write_run(imported, results / RUNS_FOLDER, name), imported


def converted(source: WeightsFile, options: ImportOptions) -> Imported:
    """Return the encoder of a weights file under our names; nothing is written.

    Raises:
        WeightsError: as ``import_weights``.
    """
    if source.kind == AR_SSL4M:
        return import_ar_ssl4m(source.file, source.tensors, options)
    if source.kind == NNSSL:
        return import_nnssl(source, options)
    if source.kind == HUGGING_FACE:
        return import_huggingface(source, options)
    if source.kind == RUN:
        raise WeightsError(
            f"{source.file} belongs to a finished pretraining run and need not be imported; use "
            f"it as it is: export autoreg_weights={source.file.parent}",
            code="weights-not-importable",
        )
    if source.kind == TRAINED:
        return import_trained(source, options)

    raise WeightsError(
        f"{source.file} is of an unknown kind ({source.kind}); trained nnU-Net models and "
        "checkpoints of AR-SSL4M can be imported, and those of nnssl with their adaptation plan "
        "(--adaptation-plan FILE)",
        code="weights-not-importable",
    )
