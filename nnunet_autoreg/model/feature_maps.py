"""The encoder of a downstream network without its decoder: an image becomes feature maps.

Parts keep the names that they have in the downstream network, so that pretrained weights load in
the same way.

Shape suffixes: B samples, C channels, Z Y X voxels, z y x positions of a feature map, N tokens,
    T tokens with others in front, V width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.families import RESENC, VIT, family_of, token_size_of
from nnunet_autoreg.geometry import Size, as_size, round_up, size_text, volume

NAMES_OF_PARTS = ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")
"""Attributes by which the loader of weights finds the parts of a network."""
TRANSFORMER_DEPTHS = (1 / 3, 2 / 3)
"""Inner layers of a transformer whose outputs are feature maps too, as shares of its depth."""


class FeatureEncoder(nn.Module):
    """The encoder of a network of any family; its output is a list of feature maps.

    A CNN gives the output of every stage, the finest first. A transformer gives, on the grid of its
    tokens, the output of the tokenizer, of the layers at a third and two thirds of its depth, and
    of the last layer after the final normalisation. So the last map is always the deepest.

    Args:
        network: as ``encoders.build_network`` makes it.
        class_path, arguments: class and arguments of the network.
        input_shape: (z, y, x) voxels that a transformer was built for.
    """

    def __init__(
        self,
        network: nn.Module,
        class_path: str,
        arguments: Mapping[str, Any],
        input_shape: Sequence[int],
    ):
        super().__init__()
        self.family = family_of(class_path)
        self.token_size: Size = token_size_of(class_path, arguments)
        self.built_for: Size = as_size(input_shape)
        for name in NAMES_OF_PARTS:
            setattr(self, name, getattr(network, name))

        source: Any = network
        if self.family == RESENC:
            self.encoder = source.encoder
        elif self.family == VIT:
            self.model = source.model
            self.register_buffer("positions", source.positions, persistent=False)
        else:
            self.down_projection = source.down_projection
            self.eva = source.eva
            self.register_tokens = source.register_tokens

    @property
    def is_cnn(self) -> bool:
        """Whether it reads images of any size, as long as its strides divide them."""
        return self.family == RESENC

    @property
    def num_features(self) -> tuple[int, ...]:
        """Channels of every feature map."""
        parts: Any = self
        if self.is_cnn:
            return tuple(int(channels) for channels in parts.encoder.output_channels)
        layer = parts.model.norm if self.family == VIT else parts.eva.norm
        return (int(layer.weight.shape[0]),) * (len(TRANSFORMER_DEPTHS) + 2)

    def forward(self, volume_BCZYX: Tensor) -> list[Tensor]:
        """Return every feature map (B, V, z, y, x), the finest first.

        Raises:
            UsageError: the encoder cannot read images of this size (code "encoder-input-shape").
        """
        if self.is_cnn:
            return self._stages(volume_BCZYX)

        parts: Any = self
        layers: Sequence[nn.Module] = parts.model.layers if self.family == VIT else parts.eva.blocks
        chosen = [max(0, round(share * len(layers)) - 1) for share in TRANSFORMER_DEPTHS]

        # The inner layers give their outputs to hooks while the whole encoder runs.
        inner: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                inner[index] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [layers[index].register_forward_hook(keep(index)) for index in chosen]
        try:
            tokenized, last = self._tokens(volume_BCZYX)
        finally:
            for handle in handles:
                handle.remove()

        grid = as_size(tokenized.shape[2:])
        maps = [on_grid(inner[index], grid) for index in chosen]
        return [tokenized, *maps, last]

    def deepest(self, volume_BCZYX: Tensor) -> Tensor:
        """Return only the last feature map, (B, V, z, y, x).

        Raises:
            UsageError: as ``forward``.
        """
        if self.is_cnn:
            return self._stages(volume_BCZYX)[-1]
        return self._tokens(volume_BCZYX)[1]

    def _stages(self, volume_BCZYX: Tensor) -> list[Tensor]:
        """Return the map of every stage of a CNN, the finest first."""
        shape = as_size(volume_BCZYX.shape[2:])
        wanted = round_up(shape, self.token_size)
        if shape != wanted:
            raise UsageError(
                f"the encoder cannot read {size_text(shape)} voxels, because its total stride is "
                f"{size_text(self.token_size)}; pad the image to {size_text(wanted)}",
                code="encoder-input-shape",
            )
        stages: list[Tensor] = self.encoder(volume_BCZYX)
        return stages

    def _tokens(self, volume_BCZYX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokenizer's map and the deepest map, both (B, V, z, y, x)."""
        shape = as_size(volume_BCZYX.shape[2:])
        if shape != self.built_for:
            raise UsageError(
                f"the encoder was built for {size_text(self.built_for)} voxels, because a "
                f"transformer has fixed positions, and cannot read {size_text(shape)}; load it "
                f"with input_shape=({', '.join(map(str, shape))})",
                code="encoder-input-shape",
            )
        parts: Any = self
        if self.family == VIT:
            tokenized: Tensor = parts.model.patchifier(volume_BCZYX)
            tokens_BNV = tokenized.flatten(2).transpose(1, 2) + parts.positions
            tokens_BTV = parts.model.with_start(tokens_BNV)
            *_, last_BTV = parts.model.hidden(tokens_BTV)
        else:
            tokenized = parts.down_projection(volume_BCZYX)
            tokens_BTV = tokenized.flatten(2).transpose(1, 2)
            if parts.register_tokens is not None:
                registers = parts.register_tokens.expand(len(tokens_BTV), -1, -1)
                tokens_BTV = torch.cat([registers, tokens_BTV], 1)
            last_BTV, _ = parts.eva(tokens_BTV)
        return tokenized, on_grid(last_BTV, as_size(tokenized.shape[2:]))


def on_grid(tokens_BTV: Tensor, grid: Size) -> Tensor:
    """Return the tokens of the image as a map (B, V, z, y, x).

    START and register tokens come before those of the image, and are left out.
    """
    num_tokens = volume(grid)
    tokens_BNV = tokens_BTV[:, -num_tokens:]
    return tokens_BNV.transpose(1, 2).reshape(tokens_BTV.shape[0], -1, *grid)
