"""Match the decoder of a pretrained U-Net to the decoder of another U-Net.

Both decoders end at full resolution, so their stages are counted from the finest: stage i of n
belongs to stage i - n of the other network. (A decoder numbers its stages from the coarsest.) An
encoder is counted from its first stage, which is its finest as well.

A convolution and its norm are both loaded, or both stay random.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.finetune.adapt import CONV_AXES, fit_kernel, times
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.finetune.table import ADAPTED, LOADED, RANDOM, UNUSED, TensorEntry
from nnunet_autoreg.model import encoders
from nnunet_autoreg.model.card import DECODER_PREFIXES

DECODER = "decoder."
"""The prefix of all keys of a U-Net's decoder."""
_STAGE = re.compile(r"(decoder\.(?:stages|transpconvs)\.)(\d+)\.(.+)")
_PART = re.compile(r"decoder\.(?:stages\.\d+\.convs|transpconvs)\.\d+\.")
"""A convolution with its norm, or a transposed convolution."""


@dataclass(frozen=True)
class FittedDecoder:
    """Hold a pretrained decoder, fitted to a network.

    Attributes:
        ready: values in the network's shapes, by its own keys.
        entries: one for every tensor of the network's decoder, in its order.
        unused: tensors of the pretrained decoder that have no counterpart in the network.
    """

    ready: dict[str, Tensor]
    entries: tuple[TensorEntry, ...]
    unused: tuple[TensorEntry, ...]


def fit_decoder(network: nn.Module, given: Mapping[str, Tensor], num_given: int) -> FittedDecoder:
    """Fit a pretrained decoder to a network; nothing is written into the network.

    Only names and shapes decide what fits, so tensors on the meta device are enough.

    Args:
        network: a U-Net, unwrapped.
        given: the pretrained decoder's tensors, by their keys in the network that was pretrained.
        num_given: number of stages of that decoder.
    """
    live, first_names = _live_tensors(network)
    matches = [_STAGE.match(key) for key in live]
    stage_numbers = [int(found[2]) for found in matches if found]
    num_live = 1 + max(stage_numbers, default=-1)
    sources, unused = _matched(given, num_given, num_live, first_names)

    # A part does not fit if one of its tensors does not; the reason is kept for each part.
    fitted: dict[str, tuple[Tensor, str]] = {}
    misfits: dict[str, str] = {}
    for key, tensor in live.items():
        if key not in sources:
            misfits.setdefault(_part_of(key), "not in the weights")
            continue

        # The kernel of a transposed convolution is as large as its stride and is never changed: it
        # would spread its input over other voxels than in pretraining.
        value, note = sources[key], ""
        is_transposed = key.startswith("decoder.transpconvs.")
        if not is_transposed:
            value, note = fit_kernel(value, tensor.shape[2:])
        if value.shape == tensor.shape:
            fitted[key] = value, note
            continue

        differing, theirs, ours = "shape", value.shape, tensor.shape
        is_kernel = value.ndim == tensor.ndim == CONV_AXES
        if is_kernel and value.shape[:2] == tensor.shape[:2]:
            differing = "stride" if is_transposed else "kernel"
            theirs, ours = value.shape[2:], tensor.shape[2:]
        misfit = f"{differing} {times(theirs)} in the weights, {times(ours)} here"
        misfits.setdefault(_part_of(key), misfit)

    # A part is loaded as a whole or not at all.
    ready: dict[str, Tensor] = {}
    entries = []
    for key, tensor in live.items():
        part = _part_of(key)
        if part in misfits:
            entries.append(TensorEntry(key, tensor.numel(), RANDOM, misfits[part]))
            continue
        ready[key], note = fitted[key]
        status = ADAPTED if note else LOADED
        entries.append(TensorEntry(key, tensor.numel(), status, note))
    return FittedDecoder(ready, tuple(entries), unused)


def transferred_keys(network: nn.Module, block: AutoregBlock) -> frozenset[str]:
    """Return the keys of the decoder's parameters that start from the plan's weights.

    Only the plan decides this, because a resumed training needs the same groups of parameters even
    if the weights file no longer exists.
    """
    if not block.transfers_decoder or family_of(block.encoder.class_path) != RESENC:
        return frozenset()

    # The network that was pretrained, without memory for its values.
    encoder = block.encoder
    with torch.device("meta"):
        pretrained = encoders.build_network(
            encoder.class_path,
            encoder.arguments,
            encoder.token_size_vox,
            num_input_channels=1,
            num_classes=1,
        )

    tensors, _ = _live_tensors(pretrained)
    fitted = fit_decoder(network, tensors, num_stages(block.encoder.arguments))
    return frozenset(fitted.ready)


def has_decoder_stages(network: nn.Module) -> bool:
    """Return whether a network has a U-Net's decoder, whose stages can be transferred."""
    tensors, _ = _live_tensors(network)
    return bool(tensors)


def num_stages(arguments: Mapping[str, Any]) -> int:
    """Return the number of decoder stages of a U-Net with these arguments."""
    # The deepest stage of the encoder has no counterpart.
    return int(arguments["n_stages"]) - 1


def _live_tensors(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the decoder's tensors by their first names, and the first name of every name."""
    tensors: dict[str, Tensor] = {}
    first_names: dict[str, str] = {}
    name_of: dict[int, str] = {}

    for key, tensor in network.state_dict(keep_vars=True).items():
        if not key.startswith(DECODER_PREFIXES):
            continue
        first_names[key] = name_of.setdefault(id(tensor), key)
        if first_names[key] == key:
            tensors[key] = tensor
    return tensors, first_names


def _matched(
    given: Mapping[str, Tensor],
    num_given: int,
    num_live: int,
    first_names: Mapping[str, str],
) -> tuple[dict[str, Tensor], tuple[TensorEntry, ...]]:
    """Return the given tensors by the network's keys, and those without a counterpart."""
    matched: dict[str, Tensor] = {}
    unused = []

    # Stages count from the finest, so that a shallower network has the finest ones.
    for key, tensor in given.items():
        found = _STAGE.match(key)
        note = "stages that this network does not have"
        if found is not None:
            number = int(found[2]) - num_given + num_live
            name = first_names.get(f"{found[1]}{number}.{found[3]}")
            if name is not None:
                matched[name] = tensor
                continue
            if number >= 0:
                note = "no such part in this network"
        unused.append(TensorEntry(key, tensor.numel(), UNUSED, note))
    return matched, tuple(unused)


def _part_of(key: str) -> str:
    """Return the beginning that the keys of a convolution and its norm share."""
    found = _PART.match(key)
    return key if found is None else found[0]
