"""What a finished run leaves for fine-tuning: ``encoder.safetensors`` and ``encoder.json``."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.model.card import WEIGHTS_NAME, EncoderCard
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import sha256_of


def export_encoder(folder: Path, plan: Plan, objective: Objective, rows: Sequence[ScanRow], licences: dict[str, str]) -> EncoderCard:
    """Write the encoder's weights, then its card, which marks the run as finished.

    Args:
        rows: the scans of the run, held-out ones included.
        licences: dataset -> licence text.
    """
    from nnunet_autoreg.transfer.load import write_tensors

    weights = folder / WEIGHTS_NAME
    write_tensors(weights, objective.transferable_state())
    card = EncoderCard(
        name=plan.name,
        encoder=plan.encoder.name,
        class_path=plan.encoder.class_path,
        arguments=plan.encoder.arguments,
        token_size_vox=plan.encoder.token_size_vox,
        crop_size_vox=plan.sequence.crop_size_vox,
        spacing_mm=plan.data.spacing_mm,
        spacing_groups=plan.data.spacing_groups,
        modalities=tuple(sorted({row.modality for row in rows})),
        channel_names=tuple(sorted({row.channel for row in rows})),
        ct_window=plan.data.ct_window,
        num_input_channels=1,
        adaptation=objective.adaptation(),
        objective=f"{plan.objective.name} ({plan.sequence.order} order, {plan.sequence.predictor}-block predictor)",
        licences=licences,
        num_scans=len(rows),
        num_steps=plan.optim.num_steps,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=sha256_of(weights),
    )
    card.save(folder)
    return card
