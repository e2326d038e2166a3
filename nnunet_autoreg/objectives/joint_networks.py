"""The networks of joint clustering: one 3D encoder for slabs and images, and attention over slabs.

Shape suffixes: B samples, R slabs of a volume, N slabs of a batch, C channels, Z Y X voxels, T
tokens of a slab, V features of the encoder, D features of an embedding, H heads, E features of a
head, J keys.

Source: joint image-volume clustering (its released code, described in the project's own words); 1D
deformable attention after DAT (arXiv 2201.00520). The released code attends over channels; here
attention is over slabs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.families import family_of, has_transformer
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.model.attention import VisibleKeys
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.encoders import build_sequence_encoder
from nnunet_autoreg.model.parameters import weights_under
from nnunet_autoreg.model.sequence import counted_mean
from nnunet_autoreg.model.trunk import recomputed
from nnunet_autoreg.model.unet import ENCODER_PREFIX, adaptation_of, build_unet
from nnunet_autoreg.objectives.joint_plan import JointPlan, joint_of
from nnunet_autoreg.objectives.targets import full_precision
from nnunet_autoreg.plan import Plan

BIAS_FEATURES = 32
FEED_FORWARD = 2
"""Hidden features of a layer, as a multiple of its features."""


class SlabTransformer(nn.Module):
    """A transformer encoder that reads slabs, each by itself."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.encoder = build_sequence_encoder(
            plan.encoder,
            plan.sequence.crop_size_vox,
            plan.sequence.block_tokens,
            1,
            plan.optim.checkpoint_activations,
        )
        self.width = self.encoder.width

    @property
    def network(self) -> nn.Module:
        """The downstream network."""
        network: nn.Module = self.encoder.network
        return network

    def forward(self, voxels_NCZYX: Tensor, valid_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Return the features of all tokens (N, T, V), which attend to each other."""
        starts = self.encoder.num_starts
        rule = VisibleKeys(functional.pad(valid_NT, (starts, 0), value=True))
        whole = as_size(voxels_NCZYX.shape[2:])
        local_NTV = self.encoder.tokens(voxels_NCZYX[:, None], whole)
        features: Tensor = self.encoder.contextual(local_NTV, rule, positions_NT)
        return features[:, starts:]

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights that fine-tuning loads, under the downstream keys."""
        return self.encoder.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.encoder.adaptation()


class SlabCnn(nn.Module):
    """The encoder of a U-Net that reads slabs, each by itself. The decoder is not trained."""

    def __init__(self, plan: Plan):
        super().__init__()
        network = build_unet(plan)
        # Weights that nothing trains would take memory, and would be exported as if they had been.
        del network.decoder
        self.network: Any = network
        self.recompute = plan.optim.checkpoint_activations
        self.width = int(network.encoder.output_channels[-1])

    def forward(self, voxels_NCZYX: Tensor, valid_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Return the deepest features (N, T, V)."""
        encoder = self.network.encoder
        x_NVZYX = encoder.stem(voxels_NCZYX)
        for stage in encoder.stages:
            x_NVZYX = recomputed(stage, self.recompute, x_NVZYX)
        features_NTV: Tensor = x_NVZYX.flatten(2).transpose(1, 2)
        return features_NTV

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights of the encoder under the downstream network's keys."""
        return weights_under(self.network, (ENCODER_PREFIX,))

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return adaptation_of(self.network)


class SlabAttention(nn.Module):
    """Attention over the slabs of a volume, with keys that move along it.

    There is one key for every ``key_every`` slabs and for every head. Its place is moved by an
    offset that depends on the queries around it; keys and values are interpolated between the two
    nearest slabs. A bias depends on the distance of query and key. No weight depends on the number
    of slabs.
    """

    def __init__(self, settings: JointPlan):
        super().__init__()
        width, heads, every = settings.width, settings.num_heads, settings.key_every
        features = width // heads
        self.num_heads, self.key_every = heads, every
        self.max_offset = settings.max_offset

        # Without biases, a projection of an interpolated slab is the interpolated projection.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width)
        # With this kernel and padding, R slabs give R / key_every keys.
        self.near_queries = nn.Conv1d(
            features,
            features,
            kernel_size=every + 2,
            stride=every,
            padding=1,
            groups=features,
        )
        self.to_offset = nn.Linear(features, 1, bias=False)
        self.distance = nn.Linear(1, BIAS_FEATURES)
        self.to_bias = nn.Parameter(torch.empty(heads, BIAS_FEATURES))
        nn.init.trunc_normal_(self.to_bias, std=0.02)

    def forward(self, slabs_BRD: Tensor, valid_BR: Tensor) -> Tensor:
        """Return the output of attention for every slab, (B, R, D).

        Args:
            valid_BR: False where a slab holds padding only; such slabs are not keys.
        """
        # Padding is 0 before it is projected, so that its neighbours gather nothing of it.
        slabs_BRD = slabs_BRD * valid_BR[:, :, None].to(slabs_BRD.dtype)
        query_BHRE, key_BHRE, value_BHRE = (
            self._heads(layer(slabs_BRD)) for layer in (self.query, self.key, self.value)
        )
        with full_precision(slabs_BRD.device):
            # In float32: bf16 would round a position in a long volume to whole slabs.
            place_BHJ = self.places(query_BHRE.float())

            # The slabs before and after each place, and the share of the one after. The last slab
            # has none after it, and is its own neighbour.
            last = slabs_BRD.shape[1] - 1
            lower_BHJ = place_BHJ.detach().floor().long().clamp(0, last)
            upper_BHJ = (lower_BHJ + 1).clamp(max=last)
            share_BHJ = place_BHJ - lower_BHJ

            # Projections are linear, so that they may be interpolated instead of the slabs.
            key_BHJE = _between(key_BHRE.float(), lower_BHJ, upper_BHJ, share_BHJ)
            value_BHJE = _between(value_BHRE.float(), lower_BHJ, upper_BHJ, share_BHJ)
            is_valid_BHR = valid_BR[:, None].expand(-1, self.num_heads, -1).float()
            valid_BHJ1 = _between(is_valid_BHR[..., None], lower_BHJ, upper_BHJ, share_BHJ)

            scale = 1 / math.sqrt(query_BHRE.shape[-1])
            scores_BHRJ = query_BHRE.float() @ key_BHJE.transpose(2, 3) * scale
            # The order of slabs is known only by distances.
            scores_BHRJ = scores_BHRJ + self.bias(place_BHJ, slabs_BRD.shape[1])
            # A key between a slab and padding counts as far as it is not padding.
            log_valid_BHJ = valid_BHJ1.squeeze(3).clamp(min=1e-6).log()
            scores_BHRJ = scores_BHRJ + log_valid_BHJ[:, :, None]
            gathered_BHRE = scores_BHRJ.softmax(dim=-1) @ value_BHJE

        # (B, H, R, E) -> (B, R, H E)
        gathered_BRD = gathered_BHRE.transpose(1, 2).flatten(2)
        out: Tensor = self.project(gathered_BRD)
        return out

    def places(self, query_BHRE: Tensor) -> Tensor:
        """Return where the keys of each head lie, in slabs from the first one, (B, H, J)."""
        B, H, R, _ = query_BHRE.shape
        queries = query_BHRE.flatten(0, 1).transpose(1, 2)  # (B * H, E, R)
        if self.key_every > R:
            # Fewer slabs than one key stands for: the last one is repeated.
            queries = functional.pad(queries, (0, self.key_every - R), mode="replicate")
        # tanh bounds how far a key may move from its usual position.
        near = functional.gelu(self.near_queries(queries)).transpose(1, 2)  # (B * H, J, E)
        offset_BHJ = self.max_offset * self.to_offset(near).tanh().reshape(B, H, -1)

        # Without an offset, a key lies in the middle of the slabs that it stands for.
        first = (self.key_every - 1) / 2
        base_J = torch.arange(offset_BHJ.shape[2], device=query_BHRE.device) * self.key_every
        place_BHJ: Tensor = (base_J + first + offset_BHJ).clamp(0, R - 1)
        return place_BHJ

    def bias(self, place_BHJ: Tensor, num_slabs: int) -> Tensor:
        """Return the bias for every distance of a query and a key, (B, H, R, J)."""
        slab_R = torch.arange(num_slabs, device=place_BHJ.device)
        distance_BHRJ = slab_R[:, None] - place_BHJ[:, :, None]
        # The logarithm separates near slabs more finely than far ones.
        signed_log = distance_BHRJ.sign() * distance_BHRJ.abs().log1p()
        hidden = functional.relu(self.distance(signed_log[..., None])).float()  # (B, H, R, J, F)
        return torch.einsum("bhrjf,hf->bhrj", hidden, self.to_bias)

    def _heads(self, x_BRD: Tensor) -> Tensor:
        heads_BRHE: Tensor = x_BRD.reshape(*x_BRD.shape[:2], self.num_heads, -1)
        return heads_BRHE.transpose(1, 2)


def _between(x_BHRE: Tensor, lower_BHJ: Tensor, upper_BHJ: Tensor, share_BHJ: Tensor) -> Tensor:
    """Return values interpolated between two slabs each, (B, H, J, E)."""
    shape = (-1, -1, -1, x_BHRE.shape[3])
    lower_BHJE = lower_BHJ[..., None].expand(shape)
    upper_BHJE = upper_BHJ[..., None].expand(shape)
    before_BHJE = x_BHRE.gather(2, lower_BHJE)
    after_BHJE = x_BHRE.gather(2, upper_BHJE)
    # The share carries the gradient of the offset; the choice of the neighbours has none.
    return before_BHJE + share_BHJ[..., None] * (after_BHJE - before_BHJE)


class SlabLayer(nn.Module):
    """Attention over slabs and an MLP, each followed by a norm (post-norm, as published)."""

    def __init__(self, settings: JointPlan):
        super().__init__()
        width = settings.width
        self.attention = SlabAttention(settings)
        self.norm_attention = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, FEED_FORWARD * width),
            nn.GELU(),
            nn.Linear(FEED_FORWARD * width, width),
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, slabs_BRD: Tensor, valid_BR: Tensor) -> Tensor:
        """Return (B, R, D)."""
        # Residual branches, normalised after the sum.
        x_BRD = self.norm_attention(slabs_BRD + self.attention(slabs_BRD, valid_BR))
        out: Tensor = self.norm_out(x_BRD + self.feed_forward(x_BRD))
        return out


class VolumeHead(nn.Module):
    """From the slabs of a volume to an embedding of the volume, and to its hidden slabs."""

    def __init__(self, settings: JointPlan):
        super().__init__()
        self.layers = nn.ModuleList(SlabLayer(settings) for _ in range(settings.depth))
        self.mask_token = nn.Parameter(torch.randn(settings.width))
        self.to_slab = nn.Linear(settings.width, settings.width)
        self.prototypes = _prototypes(settings.num_volume_clusters, settings.width)

    def forward(self, slabs_BRD: Tensor, valid_BR: Tensor) -> Tensor:
        """Return slabs that have seen each other, (B, R, D).

        Args:
            slabs_BRD: embeddings of the slabs, of length 1.
        """
        # Entries of about 1, as a layer norm gives them to the later layers.
        x_BRD = slabs_BRD * math.sqrt(slabs_BRD.shape[2])
        for layer in self.layers:
            x_BRD = layer(x_BRD, valid_BR)
        return x_BRD

    def embed(self, slabs_BRD: Tensor, valid_BR: Tensor) -> Tensor:
        """Return the mean of each volume's slabs after attention (B, D), in float32."""
        return counted_mean(self(slabs_BRD, valid_BR).float(), valid_BR)

    def predict(self, slabs_BRD: Tensor, valid_BR: Tensor, hidden_BR: Tensor) -> Tensor:
        """Return predictions (B, R, D) of slabs, from which the hidden ones were taken away."""
        # As long as the embeddings that it stands for.
        token = functional.normalize(self.mask_token, dim=-1).to(slabs_BRD.dtype)
        shown_BRD = torch.where(hidden_BR[:, :, None], token, slabs_BRD)
        out: Tensor = self.to_slab(self(shown_BRD, valid_BR))
        return out


class JointNetwork(nn.Module):
    """All that is trained: the encoder, its projection, and the heads of slabs and volumes."""

    def __init__(self, plan: Plan):
        super().__init__()
        settings = joint_of(plan)
        is_transformer = has_transformer(family_of(plan.encoder.class_path))
        self.backbone: SlabTransformer | SlabCnn
        self.backbone = SlabTransformer(plan) if is_transformer else SlabCnn(plan)
        self.project = nn.Sequential(
            nn.LayerNorm(self.backbone.width),
            nn.Linear(self.backbone.width, settings.width),
        )
        self.prototypes = _prototypes(settings.num_slab_clusters, settings.width)
        self.volume_head = VolumeHead(settings)

    def embed(self, voxels_NCZYX: Tensor, valid_NT: Tensor, positions_NT: Tensor) -> Tensor:
        """Return the projection of each slab's mean valid token (N, D), in float32."""
        features_NTV = self.backbone(voxels_NCZYX, valid_NT, positions_NT)
        projected_ND: Tensor = self.project(counted_mean(features_NTV, valid_NT)).float()
        return projected_ND


def _prototypes(number: int, width: int) -> nn.Parameter:
    """Return directions, which are of length 1 in use."""
    directions = functional.normalize(torch.randn(number, width), dim=-1)
    return nn.Parameter(directions)


def scores_of(embeddings_ND: Tensor, prototypes_KD: Tensor) -> Tensor:
    """Return the cosines of embeddings of length 1 with prototypes, (..., K), in float32."""
    with full_precision(embeddings_ND.device):
        directions_KD = functional.normalize(prototypes_KD.float(), dim=-1)
        return embeddings_ND.float() @ directions_KD.T


def slabs_of(crops_BZYX: Tensor, slab: int, step: int) -> Tensor:
    """Cut volumes (B, ..., Z, Y, X) into slabs along z, (B, R, ..., slab, Y, X)."""
    cut = crops_BZYX.unfold(-3, slab, step)  # (B, ..., R, Y, X, slab)
    last = cut.ndim - 1
    order = [0, last - 3, *range(1, last - 3), last, last - 2, last - 1]
    return cut.permute(order)
