"""Carry out ``autoreg_weights inspect``: describe a weights file, its needs and its licence."""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.imported import ImportOptions, checked
from nnunet_autoreg.convert.importing import converted
from nnunet_autoreg.convert.licences import NONE_STATED
from nnunet_autoreg.convert.source import (
    AR_SSL4M,
    HUGGING_FACE,
    NNSSL,
    NO_PLAN,
    RUN,
    TRAINED,
    WeightsFile,
    open_source,
    trained_model_line,
    trained_model_next,
)
from nnunet_autoreg.errors import WeightsError, shell_quoted
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.model.card import IMPORTED, read_card, verify_weights
from nnunet_autoreg.records import sha256_of

Facts = list[tuple[str, str]]
MAX_LISTED = 8
HIDDEN_ARGUMENTS = ("conv_bias", "kernel_sizes", "n_conv_per_stage_decoder")
"""Arguments that are too long for the line that describes an encoder."""


def inspect_weights(
    path: Path,
    options: ImportOptions,
    plan_file: Path | None = None,
) -> tuple[Facts, str]:
    """Return facts about a file as (name, text), and what to type next.

    Raises:
        WeightsError: the file cannot be read safely.
    """
    source = open_source(path, plan_file)
    head: Facts = [("file", str(source.file)), ("sha256", sha256_of(source.file))]
    if source.kind == RUN:
        return _run_facts(source.file, head)
    if source.kind in (AR_SSL4M, HUGGING_FACE, NNSSL, TRAINED):
        return _foreign_facts(source, head, options, plan_file)
    return _unknown_facts(source, head)


def _run_facts(file: Path, head: Facts) -> tuple[Facts, str]:
    """Describe a finished run, or an import that is used as one."""
    card = read_card(file.parent)
    verify_weights(file, card.sha256)
    tensors = read_tensors(file)

    # An import is used as a finished run, and only our own exports say how they were pretrained.
    history = []
    origin = card.extra.get(IMPORTED)
    if card.num_steps or not isinstance(origin, Mapping):
        history.append(
            f"pretrained in {card.num_steps} steps on {card.num_scans} scans, finished "
            f"{card.finished_at}",
        )
    if isinstance(origin, Mapping):
        when = "" if card.num_steps else f" {card.finished_at}"
        origin_name = origin.get("repository") or origin.get("file")
        history.append(
            f"imported{when} from {origin_name} ({origin.get('format')}, sha256 "
            f"{str(origin.get('sha256'))[:12]}...)",
        )

    normalization = card.normalization or "z-score"
    if card.normalization is None and card.ct_window is not None:
        normalization = "CT by its window, all else z-scored"
    channels = f"{card.channels_text}; {', '.join(card.modalities)}"

    decoder = "none: fine-tuning starts from a random one"
    decoder_sizes = []
    for key, tensor in tensors.items():
        if key.startswith(card.adaptation.keys_to_decoder):
            decoder_sizes.append(tensor.numel())

    if decoder_sizes:
        decoder = (
            f"pretrained too, {len(decoder_sizes)} tensors with {sum(decoder_sizes):,} parameters"
        )

    verdict = [("verdict", card.verdict.message)] if card.verdict else []
    facts = [
        *head,
        ("what", f"a finished pretraining, '{card.name}': {', '.join(history)}"),
        *verdict,
        ("encoder", _encoder_text(card.encoder, card.class_path, card.arguments)),
        ("objective", card.objective),
        ("spacing", size_text(card.spacing_mm, "g") + " mm (z, y, x)"),
        ("patch", _patch_text(card.crop_size_vox, card.token_size_vox)),
        ("channels", channels),
        ("normalisation", normalization),
        ("licence", _licences(card.licences)),
        ("decoder", decoder),
        *_shape_facts(tensors),
    ]
    following = (
        f"export autoreg_weights={card.name}; nnUNetv2_plan_and_preprocess -d DATASET -pl "
        "AutoregPlanner -c 3d_fullres"
    )
    return facts, following


def _encoder_text(name: str, class_path: str, arguments: Mapping[str, Any]) -> str:
    shown = []
    for key, value in arguments.items():
        if isinstance(value, (int, float, list)) and key not in HIDDEN_ARGUMENTS:
            shown.append(f"{key} {value}")
    return f"{name}: {class_path.rpartition('.')[2]} {', '.join(shown)}"


def _patch_text(patch: tuple[int, ...], token: tuple[int, ...]) -> str:
    return f"{size_text(patch)} voxels in tokens of {size_text(token)}"


def _foreign_facts(
    source: WeightsFile,
    head: Facts,
    options: ImportOptions,
    plan_file: Path | None,
) -> tuple[Facts, str]:
    """Describe a file that can be imported, and return the line that imports it."""
    what = f"{source.kind} checkpoint"
    if source.kind == TRAINED:
        what = trained_model_line(source)
    elif source.kind == HUGGING_FACE:
        what = "an encoder of nnunet-autoreg in the form of Hugging Face"
    head = [*head, ("what", what)]

    # The options that the user has given belong to the line, as they are typed.
    flags: dict[str, object] = {
        "--adaptation-plan": plan_file and shell_quoted(str(plan_file)),
        "--token-order": options.token_order,
        "--heads": options.num_heads,
        "--patch-size": " ".join(str(v) for v in options.patch_size_vox or ()),
        "--spacing": " ".join(f"{v:g}" for v in options.spacing_mm or ()),
        "--modality": shlex.join(options.modalities),
        "--licence": options.licence and shell_quoted(options.licence),
    }
    statements = [f"{flag} {value}" for flag, value in flags.items() if value]
    import_line = " ".join(
        ["autoreg_weights import", shell_quoted(str(source.file)), "--name NAME", *statements],
    )

    # All that the import would check, without writing anything.
    try:
        imported = checked(converted(source, options))
    except WeightsError as error:
        facts = [*head, ("cannot be imported", str(error)), *_shape_facts(source.tensors)]
        if source.kind == TRAINED:
            return facts, trained_model_next(source)
        return facts, f"{import_line} (after this problem is solved)"

    encoder = imported.encoder
    normalization = imported.normalization or "nnU-Net's own choice per channel"
    verdict = []
    if imported.card is not None and imported.card.verdict is not None:
        verdict = [("verdict", imported.card.verdict.message)]
    facts = [
        *head,
        ("encoder", _encoder_text(encoder.name, encoder.class_path, encoder.arguments)),
        ("objective", imported.objective),
        ("spacing", size_text(imported.spacing_mm, "g") + " mm (z, y, x)"),
        ("patch", _patch_text(imported.crop_size_vox, encoder.token_size_vox)),
        ("channels", f"{imported.num_input_channels}; {', '.join(imported.modalities)}"),
        ("normalisation", normalization),
        ("licence", _licences(imported.licences)),
        *verdict,
        *_shape_facts({**imported.tensors, **imported.decoder}),
        *[("note", note) for note in imported.notes],
    ]
    return facts, import_line


def _unknown_facts(source: WeightsFile, head: Facts) -> tuple[Facts, str]:
    """Describe a file that cannot be used as it is, and return a remedy."""
    if source.kind == NO_PLAN:
        what = (
            "a checkpoint of nnU-Net or nnssl without an adaptation plan, so its encoder is not "
            "described"
        )
        following = (
            f"autoreg_weights import {shell_quoted(str(source.file))} --name NAME "
            "--adaptation-plan FILE"
        )
    else:
        what = "unknown: neither ours, nor AR-SSL4M's, nor nnssl's"
        following = (
            "look at the keys; nnssl's formats need their adaptation plan (--adaptation-plan FILE)"
        )

    facts: Facts = [*head, ("what", what)]
    if source.rest:
        others = sorted(map(str, source.rest))
        facts.append(("also holds", ", ".join(others[:MAX_LISTED])))
    return [*facts, *_shape_facts(source.tensors)], following


def _shape_facts(tensors: Mapping[str, Tensor]) -> Facts:
    if not tensors:
        return [("tensors", "none")]
    parameters = sum(tensor.numel() for tensor in tensors.values())

    # The first two words of a key name the part of the network.
    parts = Counter(".".join(key.split(".")[:2]) for key in tensors)
    first_parts = list(parts.items())[:MAX_LISTED]
    listed = ", ".join(f"{part} {count}" for part, count in first_parts)
    more = f" and {len(parts) - MAX_LISTED} more parts" if len(parts) > MAX_LISTED else ""

    first = next(iter(tensors))
    return [
        ("tensors", f"{len(tensors)} with {parameters:,} parameters: {listed}{more}"),
        ("first tensor", f"{first} {tuple(tensors[first].shape)}"),
    ]


def _licences(licences: Mapping[str, str]) -> str:
    """Return the licences by what the weights were made from, as one line."""
    stated = [f"{name}: {text or NONE_STATED}" for name, text in licences.items()]
    return "; ".join(stated) or NONE_STATED
