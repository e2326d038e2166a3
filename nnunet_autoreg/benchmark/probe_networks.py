"""Frozen networks for the dense probe: feature maps of all levels, pretrained or random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_autoreg.families import RESENC, VIT, family_of, token_size_of
from nnunet_autoreg.finetune.load import Target, load_encoder
from nnunet_autoreg.finetune.resolve import locate
from nnunet_autoreg.geometry import Size, Spacing, grid_of, round_up, volume
from nnunet_autoreg.model.card import RUNS_FOLDER, read_card, verify_weights
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS, suited_to

ENCODER_LEVELS, ALL_LEVELS = "encoder", "encoder + decoder"
TRANSFORMER_DEPTHS = (1 / 3, 2 / 3, 1.0)
"""Depths of the transformer layers that are read, as shares of the number of layers."""

EXPECTED_SHARE = 0.95
"""Share of the encoder's parameters that must come from the weights file."""


@dataclass(frozen=True)
class Architecture:
    """A network without its weights.

    Attributes:
        name: name of the encoder in ``model.sizes``.
        class_path, arguments: as of ``model.encoders.build_network``.
    """

    name: str
    class_path: str
    arguments: Mapping[str, Any]

    @property
    def is_cnn(self) -> bool:
        """Whether it is a U-Net, whose decoder may be pretrained as well."""
        return family_of(self.class_path) == RESENC

    def build(self, input_shape: Size, num_channels: int, seed: int) -> nn.Module:
        """Return the network with random weights of a seed; the caller's random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_network(
                self.class_path,
                self.arguments,
                input_shape,
                num_channels,
                num_classes=1,
            )
        return network.eval()


@dataclass(frozen=True)
class Encoder:
    """One row of the probe's table.

    Attributes:
        name: a run's name, or "random".
        file: its weights; None for random ones.
        seed: seed of the random weights; also of those that the file does not hold.
        has_decoder: whether the card lists a pretrained decoder, which is then loaded as well.
    """

    name: str
    architecture: Architecture
    file: Path | None = None
    seed: int = 0
    has_decoder: bool = False

    @property
    def level_names(self) -> tuple[str, ...]:
        """Sets of levels worth probing; random levels count only for random networks."""
        has_all = self.architecture.is_cnn and (self.file is None or self.has_decoder)
        return (ENCODER_LEVELS, ALL_LEVELS) if has_all else (ENCODER_LEVELS,)


def find_encoder(results: Path | None, wanted: str, spacing_mm: Spacing) -> Encoder:
    """Return the encoder that the user names.

    Args:
        results: nnU-Net's folder of results, where finished runs are; None if it is not set.
        wanted: a finished run, its folder, a weights file, or an encoder's name in ``model.sizes``,
            which stands for random weights.
        spacing_mm: spacing of the scans; the strides of a random CNN follow it.

    Raises:
        WeightsError: there is no such run or file, or it cannot be read.
    """
    # If a run has the name of an encoder, the run is meant.
    is_run = results is not None and (results / RUNS_FOLDER / wanted).is_dir()
    if wanted in ENCODERS and not is_run:
        size = suited_to(ENCODERS[wanted], spacing_mm)
        return Encoder("random", Architecture(size.name, size.class_path, size.arguments))

    file = locate(results if results is not None else Path(), wanted)
    card = read_card(file.parent)
    verify_weights(file, card.sha256)
    architecture = Architecture(card.encoder, card.class_path, card.arguments)
    return Encoder(card.name, architecture, file, has_decoder=card.has_decoder)


@dataclass
class FrozenNetwork:
    """Computes the feature maps of an encoder, and of its decoder if it is a CNN.

    Attributes:
        encoder: the encoder that is probed.
        largest_shape: largest shape of all scans; a transformer is built for it, since its
            positions are fixed.
        channel_names: channel names of the scans.
    """

    encoder: Encoder
    largest_shape: Size
    channel_names: tuple[str, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        # Every scan is filled up to whole tokens; a transformer is built for the largest.
        architecture = self.encoder.architecture
        self.token_size = token_size_of(architecture.class_path, architecture.arguments)
        self.built_for = round_up(self.largest_shape, self.token_size)
        num_channels = len(self.channel_names)
        network = architecture.build(self.built_for, num_channels, self.encoder.seed)

        if self.encoder.file is not None:
            card = read_card(self.encoder.file.parent)
            target = Target(num_channels, self.built_for, self.channel_names)
            load_encoder(network, self.encoder.file, card, target, EXPECTED_SHARE)
        self.network: Any = network.to(self.device)

    def input_shape(self, shape: Size) -> Size:
        """Return the shape to which a scan is filled up."""
        if self.encoder.architecture.is_cnn:
            return round_up(shape, self.token_size)
        return self.built_for

    def level_sets(self) -> dict[str, Sequence[int]]:
        """Return name -> indices of the feature maps, for ``dense_probe``."""
        if self.encoder.architecture.is_cnn:
            num_encoder = len(self.network.encoder.stages)
            num_all = num_encoder + len(self.network.decoder.stages)
        else:
            num_encoder = num_all = 1 + len(TRANSFORMER_DEPTHS)
        indices_of = {ENCODER_LEVELS: range(num_encoder), ALL_LEVELS: range(num_all)}
        return {name: indices_of[name] for name in self.encoder.level_names}

    def features(self, image: NDArray[np.float32]) -> list[Tensor]:
        """Return feature maps (V, z, y, x) of an image (Z, Y, X) or (channels, Z, Y, X)."""
        num_channels = len(self.channel_names)
        shape = (1, num_channels, *image.shape[-3:])
        volume_1CZYX = torch.from_numpy(image).reshape(shape).to(self.device)
        if not self.encoder.architecture.is_cnn:
            return self._transformer_maps(volume_1CZYX)

        # The encoder's stages, then the decoder's, without the segmentation layers.
        skips = self.network.encoder(volume_1CZYX)
        if ALL_LEVELS not in self.encoder.level_names:
            return [skip[0] for skip in skips]

        decoder = self.network.decoder
        decoded = _outputs_of(list(decoder.stages), lambda: decoder(skips))
        return [features[0] for features in (*skips, *decoded)]

    def _transformer_maps(self, volume_1CZYX: Tensor) -> list[Tensor]:
        """Return the tokenizer's output and that of a few layers, on the grid of tokens."""
        # The two kinds of transformers name their parts differently.
        is_vit = family_of(self.encoder.architecture.class_path) == VIT
        layers = self.network.model.layers if is_vit else self.network.eva.blocks
        tokenizer = self.network.model.patchifier if is_vit else self.network.down_projection
        chosen = []
        for share in TRANSFORMER_DEPTHS:
            index = max(0, round(share * len(layers)) - 1)
            chosen.append(layers[index])
        tokenized, *read = _outputs_of([tokenizer, *chosen], lambda: self.network(volume_1CZYX))

        grid = grid_of(self.built_for, self.token_size)
        num_tokens = volume(grid)
        maps = [tokenized[0]]  # (V, z, y, x)
        for tokens_1TV in read:
            # START and register tokens come before those of the image.
            tokens_NV = tokens_1TV[0, -num_tokens:]
            maps.append(tokens_NV.T.reshape(-1, *grid))  # (V, z, y, x)
        return maps


def _outputs_of(modules: Sequence[nn.Module], run: Any) -> list[Tensor]:
    """Return the output of each module while ``run`` runs the network once."""
    # Hooks read features out of a network that returns its last layer only.
    outputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[id(module)] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[id(module)] for module in modules]
