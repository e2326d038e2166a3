"""Weights that a run starts from, where ``--init`` named some."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.model.card import EncoderCard, read_card, verify_weights
from nnunet_autoreg.plan import Plan

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

INIT_SHARE = 0.95


def named_weights(plan: Plan) -> tuple[Path, EncoderCard] | None:
    """The verified file that ``--init`` named and its card; None if it named none.

    Raises:
        WeightsError: either is missing or damaged.
    """
    source = plan.request.get("init")
    if not source:
        return None
    weights = Path(str(source))
    card = read_card(weights.parent)
    verify_weights(weights, card.sha256)
    return weights, card


def check_start(plan: Plan) -> None:
    """Refuse weights named by ``--init`` that this plan cannot start from.

    Raises:
        WeightsError: they are missing, damaged, or of another encoder.
    """
    named = named_weights(plan)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import check_same_encoder, read_tensors

    weights, card = named
    check_same_encoder(card, plan.encoder)
    read_tensors(weights)


def start_from(network: "nn.Module", plan: Plan) -> None:
    """Load the weights that ``--init`` named into the fresh encoder.

    Raises:
        WeightsError: they are damaged, or of another encoder.
    """
    named = named_weights(plan)
    if named is None:
        return
    from nnunet_autoreg.finetune.load import Target, load_encoder

    weights, card = named
    table = load_encoder(network, weights, card, Target(1, plan.sequence.crop_size_vox), INIT_SHARE)
    for line in table.lines():
        log.info(line)
