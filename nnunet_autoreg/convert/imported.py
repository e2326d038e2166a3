"""Other people's encoders as a finished pretraining leaves one:

``encoder.safetensors`` and ``encoder.json``.
"""

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
from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.model.card import (
    CARD_NAME,
    IMPORTED,
    RUNS_FOLDER,
    WEIGHTS_NAME,
    Adaptation,
    EncoderCard,
    read_card,
)
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import sha256_of


@dataclass(frozen=True)
class Options:
    """What the user may say about a file that does not say it itself; None leaves it to the file.

    Attributes:
        token_order: "permute" mends nnssl's order of tokens, "keep" reproduces the uncorrected
            loading.
        num_heads: attention heads.
        patch_size_vox: (z, y, x) of pretraining.
    """

    token_order: str | None = None
    num_heads: int | None = None
    patch_size_vox: Size | None = None
    spacing_mm: Spacing | None = None
    modalities: tuple[str, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Imported:
    """An encoder in our terms.

    Attributes:
        tensors: under the downstream network's keys, single precision.
        normalization: nnU-Net's name of the normalisation that every channel had; None for
            nnU-Net's own choice.
        notes: one line each about what was assumed, changed or dropped; for the user.
        origin: what ``encoder.json`` keeps of the file.
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
    """The card that our own export carried: it knows more than nnssl's format can say."""


def network_of(encoder: EncoderPlan, crop: Size, num_channels: int) -> nn.Module:
    """The downstream network without memory for its values, to ask it for names and shapes.

    Raises:
        WeightsError: it cannot be built.
    """
    try:
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
        # A stranger's arguments reach torch's own constructors.
        raise WeightsError(
            f"the network that the file describes cannot be built ({type(error).__name__}: {error})"
        ) from error


def names_of(network: nn.Module) -> dict[str, list[str]]:
    """First name -> all names of every encoder tensor: nnU-Net's convolution blocks register each
    of theirs twice.
    """
    groups: dict[int, list[str]] = {}
    prefixes = encoder_prefixes(network)
    for key, tensor in network.state_dict(keep_vars=True).items():
        if key.startswith(prefixes):
            groups.setdefault(id(tensor), []).append(key)
    return {names[0]: names for names in groups.values()}


def checked_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """The encoder's tensors, each once, under its first name.

    Raises:
        WeightsError: some are missing, left over, of another shape, or two names of one tensor
            differ in value.
    """
    state = network.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    missing, left = [], set(tensors)
    for key, names in names_of(network).items():
        given = [name for name in names if name in tensors]
        left -= set(given)
        if not given:
            missing.append(key)
            continue
        value = tensors[given[0]]
        if any(not torch.equal(value, tensors[name]) for name in given[1:]):
            raise WeightsError(
                f"{what}: {' and '.join(given)} are one tensor of the network, but differ in the "
                "file"
            )
        if value.shape != state[key].shape:
            raise WeightsError(
                f"{what}: '{key}' has shape {tuple(value.shape)}, the network that it describes "
                f"{tuple(state[key].shape)}"
            )
        found[key] = value
    if missing or left:
        parts = [
            f"{word} {_some(keys)}"
            for word, keys in (("lacks", missing), ("has besides", sorted(left)))
            if keys
        ]
        raise WeightsError(
            f"{what} does not fit the network that it describes: it {' and '.join(parts)}"
        )
    return found


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def write_run(imported: Imported, results: Path, name: str) -> EncoderCard:
    """Write the two files of a finished run into ``$nnUNet_results/autoreg_pretraining/NAME``; the
    card comes last.

    Raises:
        WeightsError: the name is taken, or the tensors are not those of the network.
    """
    folder = results / RUNS_FOLDER / name
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"--name {name}: {folder} exists; choose another name, or remove it")
    network = network_of(imported.encoder, imported.crop_size_vox, imported.num_input_channels)
    tensors = checked_tensors(network, imported.tensors, "the file")
    weights = folder / WEIGHTS_NAME
    write_tensors(weights, tensors)
    card = replace(_card(imported, name, network), sha256=sha256_of(weights))
    card.save(folder)
    try:
        return read_card(folder)
    except WeightsError:
        (folder / CARD_NAME).unlink()
        raise


def _card(imported: Imported, name: str, network: nn.Module) -> EncoderCard:
    lpe = getattr(network, "key_to_lpe", None)
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
            # An export never holds a decoder, whatever its card says.
            adaptation=replace(known.adaptation, keys_to_decoder=()),
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
        channel_names=(),
        ct_window=None,
        num_input_channels=imported.num_input_channels,
        adaptation=Adaptation(
            str(network.key_to_encoder),
            str(network.key_to_stem),
            tuple(cast(Iterable[str], network.keys_to_in_proj)),
            None if lpe is None else str(lpe),
        ),
        objective=imported.objective,
        licences=imported.licences,
        num_scans=0,
        num_steps=0,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256="",
        extra={IMPORTED: imported.origin},
        normalization=imported.normalization,
    )
