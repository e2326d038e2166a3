"""Pretrained encoder weights into a network: everything checked on the CPU first, then copied, then shown in one table."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.geometry import Size, grid_of, volume
from nnunet_autoreg.model.card import EncoderCard, read_card, verify_weights
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import atomic_path, differences
from nnunet_autoreg.transfer.adapt import fit_channels, fit_kernel, fit_positions
from nnunet_autoreg.transfer.block import AutoregBlock
from nnunet_autoreg.transfer.channels import map_channels
from nnunet_autoreg.transfer.network import encoder_prefixes

LOADED, ADAPTED, RANDOM, UNUSED = "loaded", "adapted", "random", "unused"
MAX_NAMES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of the encoder: key, parameters in it, where its values come from, and how they were adapted."""

    key: str
    num_parameters: int
    status: str
    note: str = ""


@dataclass(frozen=True)
class WeightTable:
    """What became of every encoder tensor; ``decoder`` are the other parameters, which always start at random.

    ``unused`` are tensors of the file that this network has no place for: stages deeper than its own. ``licences`` is a line about
    those of the weights, "" where none is stated.
    """

    source: str
    entries: tuple[Entry, ...]
    decoder: Entry
    unused: tuple[Entry, ...] = ()
    licences: str = ""

    @property
    def encoder_share(self) -> float:
        """Share of the encoder's parameters that come from the file, 0 to 1."""
        total = sum(e.num_parameters for e in self.entries)
        return sum(e.num_parameters for e in self.entries if e.status != RANDOM) / total

    def lines(self) -> list[str]:
        """The table as text, one line per status."""
        rows = [f"encoder weights from {self.source}"]
        for status in (LOADED, ADAPTED, RANDOM, UNUSED):
            chosen = [e for e in (*self.entries, *self.unused) if e.status == status]
            if chosen or status != UNUSED:
                told = _by_note(chosen) if status != LOADED else ""
                rows.append(_row(status, len(chosen), sum(e.num_parameters for e in chosen), told))
        rows.append(_row("decoder", 1, self.decoder.num_parameters, f"{self.decoder.key} (random, as always)", unit="part"))
        if self.licences:
            rows.append(f"  {self.licences}")
        rows.append(f"  {100 * self.encoder_share:.1f} % of the encoder's parameters come from the file")
        return rows


def _row(status: str, count: int, parameters: int, notes: str, unit: str = "tensors") -> str:
    return f"  {status:<8} {count:>4} {unit:<7} {parameters:>12,} parameters  {notes}".rstrip()


def _by_note(entries: Sequence[Entry]) -> str:
    """The keys, those of one note together."""
    keys: dict[str, list[str]] = {}
    for entry in entries:
        keys.setdefault(entry.note, []).append(entry.key)
    return "; ".join(f"{_some(names)} ({note})" if note else _some(names) for note, names in keys.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return "; ".join(names[:MAX_NAMES]) + more


@dataclass(frozen=True)
class Target:
    """The network's side of adapting: image channels (a cascade's one-hot channels come after them) and token grid.

    ``channel_names`` are those of the image channels, in order; empty where they are unknown.
    """

    num_image_channels: int
    patch_size_vox: Size
    channel_names: tuple[str, ...] = ()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, on the CPU, in single precision.

    Raises:
        WeightsError: it is missing, truncated, no safetensors file, or holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file, device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors ({error}): restore the file, or plan again with other weights"
        ) from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{file}: '{key}' holds NaN or infinity; the pretraining went wrong: use other weights")
    return {key: tensor.float() for key, tensor in tensors.items()}


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    # One entry only: safetensors writes several in an order that changes from process to process, and the bytes have to repeat.
    with atomic_path(file) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def check_same_encoder(card: EncoderCard, planned: EncoderPlan) -> None:
    """Hold the weights' encoder against the plan's.

    Raises:
        WeightsError: class, arguments or token size differ.
    """
    theirs = {"class": card.class_path, "arguments": card.arguments, "token_size_vox": card.token_size_vox}
    ours = {"class": planned.class_path, "arguments": planned.arguments, "token_size_vox": planned.token_size_vox}
    found = differences(ours, theirs)
    if found:
        raise WeightsError(f"the weights '{card.name}' are of another encoder than the plan's ({'; '.join(found)}); plan again")


def load_encoder(network: nn.Module, file: Path, card: EncoderCard, target: Target, expected_share: float) -> WeightTable:
    """Copy the encoder's weights into ``network``, all or nothing, and say what became of each tensor.

    Args:
        network: unwrapped (no DDP, no compiled module); its own keys name its encoder, stem, input projection, positions.
        file: .safetensors with the network's own keys.
        expected_share: smallest share of the encoder's parameters that must come from the file, 0 to 1.

    Raises:
        WeightsError: the file is damaged or of another encoder, or gives less than the expected share.
    """
    live = _encoder_tensors(network)
    tensors, unused = _matched(read_tensors(file), live, network, file)
    ready: dict[str, Tensor] = {}
    entries = []
    for key, tensor in live.items():
        status, note = RANDOM, ""
        if key in tensors:
            ready[key], note = _fit((key, tensors[key], tensor), network, card, target)
            status = ADAPTED if note else LOADED
        entries.append(Entry(key, tensor.numel(), status, note))
    source = f"'{card.name}' (sha256 {card.sha256[:12]}...)"
    table = WeightTable(source, tuple(entries), _decoder_of(network, live), unused, card.licence_line)
    if table.encoder_share < expected_share:
        missing = [e.key for e in entries if e.status == RANDOM]
        raise WeightsError(
            f"{file} gives {100 * table.encoder_share:.1f} % of the encoder's parameters, {100 * expected_share:.0f} % are "
            f"expected (missing: {_some(missing)}); plan again with weights of this encoder, or lower expected_encoder_share "
            "in the recipe of the plans file"
        )
    with torch.no_grad():
        for key, value in ready.items():
            live[key].copy_(value)
    return table


def load_planned_encoder(network: nn.Module, block: AutoregBlock, results: Path, target: Target) -> WeightTable:
    """``load_encoder`` with the file, the hash and the share that a plan names.

    Raises:
        WeightsError: the plan names no weights, or they are gone, replaced, or do not fit.
    """
    if block.weights is None:
        raise WeightsError("the plan names no pretrained weights; train AutoregScratchTrainer, or plan again with weights")
    file = results / block.weights.file
    verify_weights(file, block.weights.sha256)
    card = read_card(file.parent)
    check_same_encoder(card, block.encoder)
    return load_encoder(network, file, card, target, block.recipe.expected_encoder_share)


def _encoder_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of encoder and stem by key, aliases of one tensor listed once.

    Rotary tables are no part of it: the network rebuilds them for its own grid.
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


def _decoder_of(network: nn.Module, encoder: dict[str, Tensor]) -> Entry:
    known = {id(t) for t in encoder.values()}
    rest = [(name, p) for name, p in network.named_parameters() if id(p) not in known]
    parts = sorted({name.split(".")[0] for name, _ in rest})
    return Entry(", ".join(parts), sum(p.numel() for _, p in rest), RANDOM)


def _matched(
    tensors: dict[str, Tensor], live: dict[str, Tensor], network: nn.Module, file: Path
) -> tuple[dict[str, Tensor], tuple[Entry, ...]]:
    """The file's tensors under the names of ``live`` (a file may name an alias), and those of stages that the network lacks."""
    name_of = {id(tensor): key for key, tensor in live.items()}
    names = {alias: name_of.get(id(tensor)) for alias, tensor in network.state_dict(keep_vars=True).items()}
    matched: dict[str, Tensor] = {}
    unused, foreign = [], []
    for key, tensor in tensors.items():
        name = names.get(key)
        if name is not None:
            matched[name] = tensor
        elif _is_deeper_stage(key, network):
            unused.append(Entry(key, tensor.numel(), UNUSED, "stages that this network does not have"))
        elif key not in names and ".rope." not in key:
            foreign.append(key)
    if foreign:
        raise WeightsError(
            f"{file} is of another encoder: the network has no place for {len(foreign)} of its {len(tensors)} tensors "
            f"({_some(foreign)}); plan again with these weights"
        )
    return matched, tuple(unused)


def _is_deeper_stage(key: str, network: nn.Module) -> bool:
    """Whether a tensor belongs to a stage beyond the last of a CNN: stages match by position, and a patch may need fewer."""
    stages = network.get_submodule(str(network.key_to_encoder))
    found = re.match(re.escape(encoder_prefixes(network)[0]) + r"(\d+)\.", key)
    return isinstance(stages, nn.Sequential) and found is not None and int(found[1]) >= len(stages)


def _fit(entry: tuple[str, Tensor, Tensor], network: nn.Module, card: EncoderCard, target: Target) -> tuple[Tensor, str]:
    """The value of ``entry`` (key, value, live tensor) in the live shape and how it got there ("" if it was just copied)."""
    key, value, live = entry
    notes = []
    if key == getattr(network, "key_to_lpe", None):
        value, note = _fit_positions(key, value, card, target)
        notes.append(note)
    else:
        if key in [f"{name}.weight" for name in cast(Iterable[str], network.keys_to_in_proj)]:
            value, note = _fit_input(key, value, live, card, target)
            notes.append(note)
        value, note = fit_kernel(value, live.shape[2:])
        notes.append(note)
    if value.shape != live.shape:
        raise WeightsError(
            f"'{key}' has shape {tuple(value.shape)} in '{card.name}' and {tuple(live.shape)} in the network; the weights are of "
            "another encoder: plan again"
        )
    return value, ", ".join(note for note in notes if note)


def _fit_positions(key: str, value: Tensor, card: EncoderCard, target: Target) -> tuple[Tensor, str]:
    old = grid_of(card.crop_size_vox, card.token_size_vox)
    new = grid_of(target.patch_size_vox, card.token_size_vox)
    if value.ndim != 3 or value.shape[1] != volume(old):
        raise WeightsError(
            f"'{key}' has shape {tuple(value.shape)}, but crop {card.crop_size_vox} in tokens of {card.token_size_vox} makes "
            f"{volume(old)} positions: encoder.json and the weights do not belong together"
        )
    return fit_positions(value, old, new)


def _fit_input(key: str, value: Tensor, live: Tensor, card: EncoderCard, target: Target) -> tuple[Tensor, str]:
    given, needed = value.shape[1], target.num_image_channels
    channels = map_channels(given, card.channel_names, needed, target.channel_names)
    if channels is None:
        raise WeightsError(
            f"'{key}' has {given} input channels, the data {needed}: only 1 -> N, N -> 1 and channels of like names can be adapted; "
            "use other weights"
        )
    return fit_channels(value, channels, live.shape[1])
