"""Find the weights that ``--init`` names.

They are those of a finished run, or of another project. The latter are imported into the run's own
folder first, like ``autoreg_weights import`` does.
"""

import logging
import shutil
from pathlib import Path

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.model.card import WEIGHTS_NAME, EncoderCard, read_card
from nnunet_autoreg.model.sizes import ENCODERS

log = logging.getLogger(__name__)

IMPORT_NAME = "initial"
"""Folder in a run's folder, and name in its log, of imported weights."""
WIDTHS = ("features_per_stage", "n_blocks_per_stage")


def starting_point(init: Path, run: Path) -> Path:
    """Return the ``encoder.safetensors`` that a planned run starts from.

    Args:
        init: what ``--init`` named.
        run: the run's folder.
    """
    if init.suffix == ".safetensors":
        return init
    if (init / WEIGHTS_NAME).is_file():
        return init / WEIGHTS_NAME
    return run / IMPORT_NAME / WEIGHTS_NAME


def prepare_starting_point(init: Path, run: Path) -> EncoderCard:
    """Return the card of the weights that ``--init`` named; import them first if they need it.

    Raises:
        WeightsError: they cannot be read or imported.
    """
    weights = starting_point(init, run)
    if weights.parent != run / IMPORT_NAME:
        return read_card(weights.parent)

    # Imported here, because finished runs need no torch to be found.
    from nnunet_autoreg.convert.imported import ImportOptions, write_run
    from nnunet_autoreg.convert.importing import converted
    from nnunet_autoreg.convert.source import open_source

    # Nothing was trained yet, so an earlier import may be of another file.
    shutil.rmtree(run / IMPORT_NAME, ignore_errors=True)
    imported = converted(open_source(init), ImportOptions())
    for note in imported.notes:
        log.info("--init: %s", note)
    card = write_run(imported, run, IMPORT_NAME)
    log.info("starting from %s: %s", card.objective, card.encoder)
    return card


def plannable_name(card: EncoderCard) -> str:
    """Return what is typed after ``--encoder`` for a network of this size.

    A CNN of other strides, kernels or depth has the name of the encoder of the same widths.

    Raises:
        WeightsError: no encoder has these widths (code "weights-other-encoder").
    """
    if card.encoder in ENCODERS:
        return card.encoder

    if family_of(card.class_path) == RESENC:
        for size in ENCODERS.values():
            if size.family == RESENC and _begins_alike(size.arguments, card.arguments):
                return size.name
    raise WeightsError(
        f"--init: no encoder has the widths of '{card.encoder}' ({card.arguments}), so it cannot "
        "be pretrained further; to fine-tune it as it is, use autoreg_weights import",
        code="weights-other-encoder",
    )


def _begins_alike(ours: dict[str, object], theirs: dict[str, object]) -> bool:
    """Return whether two CNNs have the same widths and blocks in the stages that both have."""
    for key in WIDTHS:
        first, second = ours[key], theirs[key]
        if not isinstance(first, list) or not isinstance(second, list):
            return False
        if any(a != b for a, b in zip(first, second, strict=False)):
            return False
    return True
