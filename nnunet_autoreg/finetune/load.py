"""Load pretrained weights into a network.

Everything is checked, adapted on the CPU and described in one table; then it is copied.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.adapt import fit_channels, fit_kernel, fit_positions
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.finetune.decoder import DECODER, fit_decoder, has_decoder_stages, num_stages
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.finetune.network import encoder_prefixes
from nnunet_autoreg.finetune.table import (
    ADAPTED,
    LOADED,
    RANDOM,
    UNUSED,
    TensorEntry,
    WeightTable,
    some,
)
from nnunet_autoreg.geometry import Size, grid_of, volume
from nnunet_autoreg.model.card import DECODER_PREFIXES, EncoderCard, read_card, verify_weights
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import atomic_path, differences, regular

OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The end of safetensors' messages about the file system."""


@dataclass(frozen=True)
class Target:
    """What the weights are loaded for: the images and the patch of the fine-tuning.

    Attributes:
        num_image_channels: number of image channels, without the one-hot channels of a cascade.
        patch_size_vox: (z, y, x); divided by the token size it is the token grid.
        channel_names: names of the image channels, in order; empty if they are not known.
    """

    num_image_channels: int
    patch_size_vox: Size
    channel_names: tuple[str, ...] = ()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a .safetensors file, on the CPU, in single precision.

    Raises:
        WeightsError: the file is missing, truncated or not a safetensors file (code
            "weights-unreadable"), or its values cannot be used (see ``as_float``).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(regular(file), device="cpu")
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}): restore the file, or plan again with "
            "other weights",
            code="weights-unreadable",
        ) from error

    return as_float(tensors, file)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The bytes must be the same in every process, but safetensors writes several metadata entries
    # in a random order. Therefore there is only one.
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with atomic_path(file) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors states the number of the system's error in its text only.
            found = OS_ERROR.search(str(error))
            if found is None:
                raise
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error


def check_same_encoder(card: EncoderCard, planned: EncoderPlan) -> None:
    """Check that the weights are of the plan's encoder.

    Raises:
        WeightsError: class, arguments or token size differ (code "weights-other-encoder").
    """
    theirs = {
        "class": card.class_path,
        "arguments": card.arguments,
        "token_size_vox": card.token_size_vox,
    }
    ours = {
        "class": planned.class_path,
        "arguments": planned.arguments,
        "token_size_vox": planned.token_size_vox,
    }
    found = differences(ours, theirs)
    if found:
        raise WeightsError(
            f"the weights '{card.name}' are of another encoder than the plan's "
            f"({'; '.join(found)}); plan again",
            code="weights-other-encoder",
        )


def load_encoder(
    network: nn.Module,
    file: Path,
    card: EncoderCard,
    target: Target,
    expected_share: float,
    with_decoder: bool = True,
) -> WeightTable:
    """Copy the pretrained weights into ``network``, and return a table of the tensors.

    If anything does not fit, nothing is copied.

    Args:
        network: without wrappers such as DDP or torch.compile. Its attributes name its encoder,
            stem, input projection and positions.
        file: .safetensors with the network's own keys.
        expected_share: smallest share of the encoder's parameters, without decoder, that must come
            from the file, 0 to 1.
        with_decoder: whether a decoder that the card lists is loaded as well.

    Raises:
        WeightsError: the file is damaged, belongs to another encoder (code
            "weights-other-encoder"), or gives less than the expected share (code "weights-share").
    """
    # Sort what the file holds by what the network needs.
    live = _encoder_tensors(network)
    use_decoder = with_decoder and card.has_decoder and has_decoder_stages(network)
    sorted_file = _sort_tensors(read_tensors(file), live, network, use_decoder)
    if sorted_file.foreign:
        raise WeightsError(
            f"{file} is of another encoder: {len(sorted_file.foreign)} of its tensors have no "
            f"counterpart in the network ({some(sorted_file.foreign)}); plan again with these "
            "weights",
            code="weights-other-encoder",
        )

    # Bring every tensor into the network's shape.
    ready, entries = _fit_encoder(network, live, sorted_file.encoder, card, target)
    decoder: tuple[TensorEntry, ...] = ()
    unused = sorted_file.unused
    if use_decoder:
        fitted = fit_decoder(network, sorted_file.decoder, num_stages(card.arguments))
        ready |= fitted.ready
        decoder = fitted.entries
        unused = (*unused, *fitted.unused)

    known = [*live, *[entry.key for entry in decoder]]
    table = WeightTable(
        source=f"'{card.name}' (sha256 {card.sha256[:12]}...)",
        entries=tuple(entries),
        rest=_rest_of(network, known, use_decoder),
        decoder=decoder,
        unused=unused,
        licences=card.licence_line,
    )
    _require_share(table, expected_share, file)

    # Nothing was written so far, so that an error leaves the network as it was.
    state = network.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in ready.items():
            state[key].copy_(value)
    return table


def _fit_encoder(
    network: nn.Module,
    live: Mapping[str, Tensor],
    in_file: Mapping[str, Tensor],
    card: EncoderCard,
    target: Target,
) -> tuple[dict[str, Tensor], list[TensorEntry]]:
    """Return the file's tensors in the shapes of the network, and an entry for each tensor.

    Tensors that are not in the file keep their random values.

    Args:
        live: the tensors of the network's encoder.
        in_file: the tensors of the file.
    """
    ready: dict[str, Tensor] = {}
    entries = []
    for key, tensor in live.items():
        status, note = RANDOM, ""
        if key in in_file:
            ready[key], note = _fit(key, in_file[key], tensor, network, card, target)
            status = ADAPTED if note else LOADED
        entries.append(TensorEntry(key, tensor.numel(), status, note))
    return ready, entries


def _require_share(table: WeightTable, expected_share: float, file: Path) -> None:
    """Refuse a file with less of the encoder than is expected."""
    if table.encoder_share >= expected_share:
        return
    missing = [entry.key for entry in table.entries if entry.status == RANDOM]
    raise WeightsError(
        f"{file} holds {100 * table.encoder_share:.1f} % of the encoder's parameters, but "
        f"{100 * expected_share:.0f} % are expected (missing: {some(missing)}); plan again "
        "with weights of this encoder, or lower expected_encoder_share in the recipe of the "
        "plans file",
        code="weights-share",
    )


def load_planned_encoder(
    network: nn.Module,
    block: AutoregBlock,
    results: Path,
    target: Target,
    with_decoder: bool = True,
) -> WeightTable:
    """Load the weights that a plan names, see ``load_encoder``.

    Args:
        with_decoder: False for networks that use only the encoder, regardless of the plan.

    Raises:
        WeightsError: the plan names no weights (code "weights-none-planned"), or they are missing,
            replaced, or do not fit.
    """
    if block.weights is None:
        raise WeightsError(
            "the plan names no pretrained weights; train AutoregScratchTrainer, or plan again with "
            "weights",
            code="weights-none-planned",
        )

    file = results / block.weights.file
    verify_weights(file, block.weights.sha256)
    card = read_card(file.parent)
    check_same_encoder(card, block.encoder)
    if block.weights.has_decoder and not card.has_decoder:
        raise WeightsError(
            f"the plan expects a pretrained decoder, but {file.parent} has none, so its learning "
            "rates would not fit; plan again",
            code="weights-no-decoder",
        )

    use_decoder = with_decoder and block.transfers_decoder
    return load_encoder(
        network,
        file,
        card,
        target,
        block.recipe.expected_encoder_share,
        use_decoder,
    )


def _encoder_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of encoder and stem, each under its first key.

    Rotary tables are left out: the network builds them for its own grid.
    """
    prefixes = encoder_prefixes(network)
    state = network.state_dict(keep_vars=True)

    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(prefixes) and ".rope." not in key and id(tensor) not in seen:
            seen.add(id(tensor))
            found[key] = tensor
    return found


def _rest_of(network: nn.Module, known: Iterable[str], has_decoder: bool) -> TensorEntry:
    """Return the parameters that are in neither the encoder nor a transferred decoder."""
    state = network.state_dict(keep_vars=True)
    known_ids = {id(state[key]) for key in known}
    # If the stages of a decoder are transferred, the word "decoder" would not be precise enough.
    depth = 2 if has_decoder else 1

    parts = set()
    num_parameters = 0
    for name, parameter in network.named_parameters():
        if id(parameter) not in known_ids:
            parts.add(".".join(name.split(".")[:depth]))
            num_parameters += parameter.numel()

    note = "random, as it is new in every task" if has_decoder else "random"
    return TensorEntry(", ".join(sorted(parts)), num_parameters, RANDOM, note)


@dataclass(frozen=True)
class SortedTensors:
    """Hold the tensors of a file by their purpose.

    Attributes:
        encoder: tensors by the network's keys; the file may use another name of the same tensor.
        decoder: tensors by the file's keys.
        unused: tensors that this network does not load, and the reason.
        foreign: keys that prove that the file is of another encoder.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    unused: tuple[TensorEntry, ...]
    foreign: tuple[str, ...]


def _sort_tensors(
    tensors: dict[str, Tensor],
    live: dict[str, Tensor],
    network: nn.Module,
    use_decoder: bool,
) -> SortedTensors:
    """Sort the tensors of a file by their purpose."""
    # Every name of a tensor of the network, with its first name if it belongs to the encoder.
    name_of = {id(tensor): key for key, tensor in live.items()}
    state = network.state_dict(keep_vars=True)
    names = {alias: name_of.get(id(tensor)) for alias, tensor in state.items()}

    # Stages of a CNN match by position, and a small patch needs fewer of them.
    stages = network.get_submodule(str(network.key_to_encoder))
    num_stages_here = len(stages) if isinstance(stages, nn.Sequential) else None
    stage_pattern = re.compile(re.escape(encoder_prefixes(network)[0]) + r"(\d+)\.")

    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    unused, foreign = [], []
    for key, tensor in tensors.items():
        # First, because a U-Net's decoder names the tensors of its encoder a second time.
        if key.startswith(DECODER):
            if use_decoder and key.startswith(DECODER_PREFIXES):
                decoder[key] = tensor
                continue
            reason = "a decoder that is not transferred"
            if key.startswith(f"{DECODER}encoder."):
                reason = "other names of the encoder's tensors"
            elif key.startswith(f"{DECODER}seg_layers."):
                reason = "segmentation heads are never transferred"
            unused.append(TensorEntry(key, tensor.numel(), UNUSED, reason))
            continue

        name = names.get(key)
        if name is not None:
            encoder[name] = tensor
            continue

        stage = stage_pattern.match(key)
        if num_stages_here is not None and stage and int(stage[1]) >= num_stages_here:
            reason = "stages that this network does not have"
            unused.append(TensorEntry(key, tensor.numel(), UNUSED, reason))
        elif key in names:
            reason = "not a part of the encoder"
            unused.append(TensorEntry(key, tensor.numel(), UNUSED, reason))
        elif ".rope." not in key:
            # The network builds rotary tables for its own grid; anything else has no counterpart.
            foreign.append(key)
    return SortedTensors(encoder, decoder, tuple(unused), tuple(foreign))


def _fit(
    key: str,
    value: Tensor,
    live: Tensor,
    network: nn.Module,
    card: EncoderCard,
    target: Target,
) -> tuple[Tensor, str]:
    """Return a value in the shape of the live tensor, and how it was adapted ("" if it was not).

    Args:
        value: the tensor of this key in the file.
        live: the tensor of this key in the network.

    Raises:
        WeightsError: it cannot be adapted.
    """
    notes = []
    projections = cast(Iterable[str], network.keys_to_in_proj)

    if key == getattr(network, "key_to_lpe", None):
        old = grid_of(card.crop_size_vox, card.token_size_vox)
        new = grid_of(target.patch_size_vox, card.token_size_vox)
        if value.ndim != 3 or value.shape[1] != volume(old):
            raise WeightsError(
                f"'{key}' has shape {tuple(value.shape)}, but a crop of {card.crop_size_vox} in "
                f"tokens of {card.token_size_vox} has {volume(old)} positions: encoder.json and "
                "the weights do not belong together",
                code="weights-card-mismatch",
            )
        value, note = fit_positions(value, old, new)
        notes.append(note)

    elif key in [f"{name}.weight" for name in projections]:
        given, needed = value.shape[1], target.num_image_channels
        channels = map_channels(given, card.channel_names, needed, target.channel_names)
        if channels is None:
            raise WeightsError(
                f"'{key}' has {given} input channels, but the data has {needed}: only 1 -> N, "
                "N -> 1 and channels with equal names can be adapted; use other weights",
                code="weights-channels",
            )
        value, note = fit_channels(value, channels, live.shape[1])
        notes.append(note)

    # Kernels depend on the spacing of the data. Tensors that are not kernels stay as they are.
    value, note = fit_kernel(value, live.shape[2:])
    notes.append(note)

    if value.shape != live.shape:
        raise WeightsError(
            f"'{key}' has shape {tuple(value.shape)} in '{card.name}' and {tuple(live.shape)} in "
            "the network; the weights are of another encoder: plan again",
            code="weights-other-encoder",
        )
    return value, ", ".join(note for note in notes if note)
