"""Find, check and load the weights that ``--init`` names.

They are those of a finished run, or of another project. The latter are imported into the run's own
folder first, like ``autoreg_weights import`` does.
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.io.addresses import is_address
from nnunet_autoreg.model.card import (
    CARD_NAME,
    WEIGHTS_NAME,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import Plan

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

IMPORT_NAME = "initial"
"""Folder in a run's folder, and name in its log, of imported weights."""
INIT_SHARE = 0.95
"""Share of the encoder's weights that a file named by ``--init`` has to hold."""

WIDTHS = ("features_per_stage", "n_blocks_per_stage")


def starting_point(init: str, run: Path) -> Path:
    """Return the ``encoder.safetensors`` that a planned run starts from.

    Args:
        init: what ``--init`` named: a path, or the address of a repository on Hugging Face.
        run: the run's folder.
    """
    path = Path(init)
    if not is_address(init):
        # Other safetensors files have no card of ours beside them.
        is_ours = path.name == WEIGHTS_NAME or (path.parent / CARD_NAME).is_file()
        if path.suffix == ".safetensors" and is_ours:
            return path
        if (path / WEIGHTS_NAME).is_file():
            return path / WEIGHTS_NAME
    return run / IMPORT_NAME / WEIGHTS_NAME


def prepare_starting_point(init: str, run: Path) -> EncoderCard:
    """Return the card of the weights that ``--init`` named; import them first if they need it.

    Raises:
        WeightsError: they cannot be downloaded, read or imported.
    """
    weights = starting_point(init, run)
    if weights.parent != run / IMPORT_NAME:
        return read_card(weights.parent)

    # Imported here, because finished runs need no torch to be found.
    from nnunet_autoreg.convert.hub import local_weights
    from nnunet_autoreg.convert.imported import ImportOptions, write_run
    from nnunet_autoreg.convert.importing import converted
    from nnunet_autoreg.convert.source import open_source

    # Nothing was trained yet, so an earlier import may be of another file.
    shutil.rmtree(run / IMPORT_NAME, ignore_errors=True)
    imported = converted(open_source(local_weights(init)), ImportOptions())
    for note in imported.notes:
        log.info("--init: %s", note)
    card = write_run(imported, run, IMPORT_NAME)
    log.info("starting from %s: %s", card.objective, card.encoder)
    return card


def initial_weights(plan: Plan, folder: Path) -> tuple[Path, EncoderCard] | None:
    """Return the verified file that ``--init`` named, and its card; None if it named none.

    Args:
        folder: of the run, which holds weights that were imported from another project.

    Raises:
        WeightsError: either is missing or damaged.
    """
    source = plan.request.get("init")
    if not source:
        return None
    weights = starting_point(str(source), folder)
    card = read_card(weights.parent)
    verify_weights(weights, card.sha256)
    return weights, card


def check_initial_weights(plan: Plan, folder: Path) -> None:
    """Refuse weights named by ``--init`` that this plan cannot start from.

    Raises:
        WeightsError: they are missing, damaged, or of another encoder.
    """
    named = initial_weights(plan, folder)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import check_same_encoder, read_tensors

    weights, card = named
    check_same_encoder(card, plan.encoder)
    read_tensors(weights)


def load_initial_weights(network: "nn.Module", plan: Plan, folder: Path) -> None:
    """Load the weights that ``--init`` named into the fresh encoder.

    Raises:
        WeightsError: they are damaged, or of another encoder.
    """
    named = initial_weights(plan, folder)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import Target, load_encoder

    weights, card = named
    target = Target(1, plan.sequence.crop_size_vox)
    table = load_encoder(network, weights, card, target, INIT_SHARE)
    for line in table.lines():
        log.info(line)


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
