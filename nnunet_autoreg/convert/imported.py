"""Write another project's encoder in the form that a finished pretraining has.

That form is a folder with ``encoder.safetensors`` and ``encoder.json``.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.finetune.load import write_tensors
from nnunet_autoreg.finetune.network import encoder_prefixes
from nnunet_autoreg.finetune.table import some
from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.model.card import (
    DECODER_PREFIXES,
    IMPORTED,
    WEIGHTS_NAME,
    Adaptation,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.plan import EncoderPlan, IntensityWindow
from nnunet_autoreg.records import sha256_of


@dataclass(frozen=True)
class ImportOptions:
    """Hold the user's statements about a file; None means that the file itself decides.

    Attributes:
        token_order: "permute" corrects nnssl's order of tokens, "keep" loads them uncorrected.
        num_heads: number of attention heads.
        patch_size_vox: (z, y, x) voxels of a crop of pretraining.
        spacing_mm: (z, y, x) voxel size of pretraining.
        modalities: for example ("CT", "MR"); empty means that the file decides.
        licence: licence of the weights.
    """

    token_order: str | None = None
    num_heads: int | None = None
    patch_size_vox: Size | None = None
    spacing_mm: Spacing | None = None
    modalities: tuple[str, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Imported:
    """Hold an encoder of another project under our names.

    Attributes:
        tensors: single precision, under the keys of the downstream network.
        normalization: nnU-Net's name of the normalisation that every channel had in pretraining;
            None for nnU-Net's own choice per channel.
        notes: one line for the user about each thing that was assumed, changed or left out.
        origin: what ``encoder.json`` records about the file.
        card: the ``encoder.json`` that our own export carried. It knows more than nnssl's format
            can express. None for everybody else's files.
        decoder: a CNN's decoder, under the same keys; empty if the file holds none.
        channel_names: names of the input channels; empty if they are not known.
        ct_window: intensity window by which CT was normalised; None if it was not, or by z-score.
    """

    encoder: EncoderPlan
    tensors: dict[str, Tensor]
    crop_size_vox: Size
    spacing_mm: Spacing
    modalities: tuple[str, ...]
    num_input_channels: int
    licences: dict[str, str]
    objective: str
    normalization: str | None = None
    notes: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    card: EncoderCard | None = None
    decoder: dict[str, Tensor] = field(default_factory=dict)
    channel_names: tuple[str, ...] = ()
    ct_window: IntensityWindow | None = None


def network_of(encoder: EncoderPlan, crop: Size, num_channels: int) -> nn.Module:
    """Return the downstream network on the meta device, which has names and shapes but no values.

    Raises:
        WeightsError: it cannot be built (code "weights-network").
    """
    try:
        # Only names and shapes are compared, so that the largest networks need no memory here.
        with torch.device("meta"):
            return build_network(encoder.class_path, encoder.arguments, crop, num_channels, 2)
    except (
        PlanError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        RuntimeError,
    ) as error:
        # The arguments come from an unknown file, and torch's constructors fail in many ways.
        raise WeightsError(
            f"the network that the file describes cannot be built "
            f"({type(error).__name__}: {error})",
            code="weights-network",
        ) from error


def names_of(network: nn.Module, prefixes: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return all names of every encoder tensor, by its first name.

    nnU-Net's convolution blocks register each of their layers twice.

    Args:
        prefixes: prefixes of another part of the network; empty for encoder and stem.
    """
    chosen = prefixes or encoder_prefixes(network)
    # Without keep_vars, every name would get a separate tensor object, with another id.
    groups: dict[int, list[str]] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        if key.startswith(chosen):
            groups.setdefault(id(tensor), []).append(key)
    return {names[0]: names for names in groups.values()}


def checked_tensors(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    prefixes: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Return the encoder's tensors, each of them once, under its first name.

    Args:
        what: the file, for messages.
        prefixes: prefixes of another part of the network; empty for encoder and stem.

    Raises:
        WeightsError: tensors are missing, left over or of another shape, or two names of one tensor
            differ in value (code "weights-mismatch").
    """
    state = network.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    missing = []
    left_over = set(tensors)
    for key, names in names_of(network, prefixes).items():
        given = [name for name in names if name in tensors]
        left_over -= set(given)
        if not given:
            missing.append(key)
            continue

        # A file may hold a tensor under one of its names, or under several. Then they must agree,
        # because only one of them can be loaded.
        value = tensors[given[0]]
        if any(not torch.equal(value, tensors[name]) for name in given[1:]):
            raise WeightsError(
                f"{what}: {' and '.join(given)} are one tensor of the network, but their values "
                "differ in the file",
                code="weights-mismatch",
            )
        if value.shape != state[key].shape:
            raise WeightsError(
                f"{what}: '{key}' has shape {tuple(value.shape)}, but the network that the file "
                f"describes needs {tuple(state[key].shape)}",
                code="weights-mismatch",
            )
        found[key] = value

    problems = []
    if missing:
        problems.append(f"lacks {some(missing)}")
    if left_over:
        problems.append(f"also holds {some(sorted(left_over))}")
    if problems:
        raise WeightsError(
            f"{what} does not fit the network that it describes: it {' and '.join(problems)}",
            code="weights-mismatch",
        )
    return found


def checked(imported: Imported) -> Imported:
    """Return an import whose tensors were compared with the network that it describes.

    Every tensor is there once, under its first name.

    Raises:
        WeightsError: as ``checked_tensors``.
    """
    network = network_of(imported.encoder, imported.crop_size_vox, imported.num_input_channels)
    decoder = imported.decoder
    if decoder:
        decoder = checked_tensors(network, decoder, "the file", DECODER_PREFIXES)
    tensors = checked_tensors(network, imported.tensors, "the file")
    return replace(imported, tensors=tensors, decoder=decoder)


def write_run(imported: Imported, runs: Path, name: str) -> EncoderCard:
    """Write the two files of a finished run into the folder NAME of ``runs``.

    The folder appears under its name only when both files are complete, so a kill at any moment
    leaves no run that looks finished. Importing the same file under the same name again is not
    an error, because a kill may have come after the last step.

    Raises:
        WeightsError: the name is taken by another run (code "weights-name-taken"), or the tensors
            are not those of the network.
    """
    folder = runs / name
    imported = checked(imported)
    network = network_of(imported.encoder, imported.crop_size_vox, imported.num_input_channels)

    # Names of runs do not begin with a dot, so nobody takes this folder for a run.
    unfinished = runs / f".{name}.importing"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_tensors(unfinished / WEIGHTS_NAME, {**imported.tensors, **imported.decoder})
        sha256 = sha256_of(unfinished / WEIGHTS_NAME)
        replace(_card(imported, name, network), sha256=sha256).save(unfinished)
        card = read_card(unfinished)

        if not folder.exists() or not any(folder.iterdir()):
            unfinished.rename(folder)
            return card
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    # The name is taken, perhaps by the same import. Then only the time differs.
    try:
        existing = read_card(folder)
        verify_weights(folder / WEIGHTS_NAME, card.sha256)
    except WeightsError:
        existing = None

    if existing is None or existing != replace(card, finished_at=existing.finished_at):
        raise WeightsError(
            f"--name {card.name}: {folder} exists and holds something else; choose another name, "
            "or remove the folder",
            code="weights-name-taken",
        )
    return existing


def _card(imported: Imported, name: str, network: nn.Module) -> EncoderCard:
    """Return ``encoder.json`` of an import, still without the hash of the weights."""
    # Our own export knows more than the format that carries it: only what the import found out, or
    # the user stated, is replaced.
    known = imported.card
    if known is not None:
        encoder = imported.encoder
        return replace(
            known,
            name=name,
            class_path=encoder.class_path,
            arguments=encoder.arguments,
            token_size_vox=encoder.token_size_vox,
            crop_size_vox=imported.crop_size_vox,
            num_input_channels=imported.num_input_channels,
            spacing_mm=imported.spacing_mm,
            modalities=imported.modalities,
            licences=imported.licences,
            extra={**known.extra, IMPORTED: imported.origin},
            # nnssl's format holds no decoder, regardless of the card inside.
            adaptation=replace(
                known.adaptation,
                keys_to_decoder=DECODER_PREFIXES if imported.decoder else (),
            ),
        )

    position_key = getattr(network, "key_to_lpe", None)
    adaptation = Adaptation(
        str(network.key_to_encoder),
        str(network.key_to_stem),
        tuple(cast(Iterable[str], network.keys_to_in_proj)),
        None if position_key is None else str(position_key),
        DECODER_PREFIXES if imported.decoder else (),
    )
    return EncoderCard(
        name=name,
        encoder=imported.encoder.name,
        class_path=imported.encoder.class_path,
        arguments=imported.encoder.arguments,
        token_size_vox=imported.encoder.token_size_vox,
        crop_size_vox=imported.crop_size_vox,
        spacing_mm=imported.spacing_mm,
        modalities=imported.modalities,
        channel_names=imported.channel_names,
        ct_window=imported.ct_window,
        num_input_channels=imported.num_input_channels,
        adaptation=adaptation,
        objective=imported.objective,
        licences=imported.licences,
        num_scans=0,
        num_steps=0,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256="",
        extra={IMPORTED: imported.origin},
        normalization=imported.normalization,
    )
