"""The export of a finished run: the encoder's weights, and the card that describes them."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.model.card import WEIGHTS_NAME, Adaptation, EncoderCard, Verdict
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import sha256_of


def export_encoder(
    folder: Path,
    plan: Plan,
    objective: Objective,
    rows: Sequence[ScanRow],
    licences: dict[str, str],
    verdict: Verdict,
) -> EncoderCard:
    """Write the encoder's weights, then its card, which marks the run as finished.

    Args:
        rows: the scans of the run, validation scans included.
        licences: dataset -> licence text.
        verdict: what validation showed.
    """
    from nnunet_autoreg.finetune.load import write_tensors

    state, adaptation = objective.transferable_state(), objective.adaptation()
    _check_keys(state, adaptation)

    weights = folder / WEIGHTS_NAME
    write_tensors(weights, state)
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
        adaptation=adaptation,
        objective=kind_of(plan.objective.name).summary(plan),
        licences=licences,
        num_scans=len(rows),
        num_steps=plan.optim.num_steps,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=sha256_of(weights),
        verdict=verdict,
    )
    card.save(folder)
    return card


def _check_keys(keys: Iterable[str], adaptation: Adaptation) -> None:
    """Check that a file of weights holds what its card lists and nothing else.

    Segmentation heads and second names of the encoder (``decoder.encoder.``) would mislead every
    reader of the file.
    """
    encoder = (f"{adaptation.key_to_encoder}.", f"{adaptation.key_to_stem}.")
    listed = (*encoder, *adaptation.keys_to_decoder)
    stray = [key for key in keys if not key.startswith(listed)]
    assert not stray, f"the card lists no place for {stray[:3]}"
