"""``autoreg_weights import``: other people's weights as if they were a finished pretraining."""

from pathlib import Path

from nnunet_autoreg.convert.ar_ssl4m import import_ar_ssl4m
from nnunet_autoreg.convert.imported import Imported, ImportOptions, write_run
from nnunet_autoreg.convert.nnssl import import_nnssl
from nnunet_autoreg.convert.source import (
    AR_SSL4M,
    NNSSL,
    RUN,
    TRAINED,
    Source,
    open_source,
    trained_model_line,
    trained_model_next,
)
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.model.card import EncoderCard


def import_weights(
    path: Path, name: str, results: Path, options: ImportOptions, plan_file: Path | None = None
) -> tuple[EncoderCard, Imported]:
    """Write ``$nnUNet_results/autoreg_pretraining/NAME`` from a file or folder.

    Args:
        plan_file: nnssl's ``adaptation_plan.json`` where it is neither in the file nor beside it.

    Raises:
        WeightsError: the file cannot be read safely, is of no known kind, or contradicts itself.
    """
    source = open_source(path, plan_file)
    imported = converted(source, options)
    return write_run(imported, results, name), imported


def converted(source: Source, options: ImportOptions) -> Imported:
    """A source in our terms, nothing written.

    Raises:
        WeightsError: as ``import_weights``.
    """
    if source.kind == AR_SSL4M:
        return import_ar_ssl4m(source.file, source.tensors, options)
    if source.kind == NNSSL:
        return import_nnssl(source, options)
    if source.kind == RUN:
        raise WeightsError(
            f"{source.file} is a finished pretraining already; use it as it is: export "
            f"autoreg_weights={source.file.parent}"
        )
    if source.kind == TRAINED:
        raise WeightsError(
            f"{source.file} is {trained_model_line(source)}; to start from it: "
            f"{trained_model_next(source)}"
        )
    raise WeightsError(
        f"{source.file} is of no known kind ({source.kind}); what can be imported: AR-SSL4M "
        "checkpoints, and nnssl's with their "
        "adaptation plan (--adaptation-plan FILE)"
    )
