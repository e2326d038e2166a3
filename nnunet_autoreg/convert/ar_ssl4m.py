"""Convert AR-SSL4M's checkpoints: 163 tensors for 12 blocks, for volumes (x, y, z).

``model.*`` is the encoder and keeps its names; ``decoder_pred`` is the head of pretraining and is
left out. Only the patch kernel has spatial axes: (out, in, x, y, z) becomes (out, in, z, y, x).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.imported import Imported, ImportOptions
from nnunet_autoreg.convert.licences import AR_SSL4M_LICENCE, stated_by_user
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import CLASS_PATHS, VIT
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.finetune.normalization import PERCENTILE_SCHEME
from nnunet_autoreg.finetune.table import some
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import sha256_of

ENCODER, HEAD = "model.", "decoder_pred."
KERNEL = "model.patchifier.proj.weight"
LEARNED_POSITIONS = "model.pos_embed_learn"
CROP: Size = (128, 128, 128)
HEAD_WIDTH = 64
"""Width of an attention head of AR-SSL4M. Its files do not state the number of heads."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LAYER_KEYS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.linear1.weight",
    "mlp.linear1.bias",
    "mlp.linear2.weight",
    "mlp.linear2.bias",
    "input_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
)


def is_ar_ssl4m(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of AR-SSL4M."""
    has_layers = any(_LAYER.match(key) for key in tensors)
    return KERNEL in tensors and has_layers


def expected_keys(depth: int) -> set[str]:
    """Return all keys of a checkpoint of ``depth`` blocks with fixed positions: 163 for 12."""
    layers = {f"model.layers.{i}.{key}" for i in range(depth) for key in _LAYER_KEYS}
    ends = {
        "model.embed_tokens.weight",
        KERNEL,
        "model.patchifier.proj.bias",
        "model.norm.weight",
        "model.norm.bias",
    }
    return layers | ends | {"decoder_pred.weight", "decoder_pred.bias"}


def arguments_of(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Return the arguments of ``model.vit.ViT`` for a checkpoint.

    Args:
        num_heads: None divides the width by AR-SSL4M's 64 channels per head.

    Raises:
        WeightsError: keys are missing or left over (code "weights-mismatch"), positions are learned
            (code "weights-learned-positions"), or the number of heads is not known (code
            "weights-heads").
    """
    matches = [_LAYER.match(key) for key in tensors]
    depth = 1 + max(int(match[1]) for match in matches if match)
    if LEARNED_POSITIONS in tensors:
        raise WeightsError(
            f"'{LEARNED_POSITIONS}': this checkpoint has learned positions, which fit only its own "
            "grid of tokens; only AR-SSL4M's fixed sine-cosine positions can be imported",
            code="weights-learned-positions",
        )

    expected = expected_keys(depth)
    # The head of pretraining is not imported, so that it may be missing.
    missing = {key for key in expected - set(tensors) if not key.startswith(HEAD)}
    left_over = set(tensors) - expected
    problems = []
    if missing:
        problems.append(f"lacks {some(sorted(missing))}")
    if left_over:
        problems.append(f"also holds {some(sorted(left_over))}")
    if problems:
        raise WeightsError(
            f"this is not a complete AR-SSL4M checkpoint of {depth} blocks: it "
            f"{' and '.join(problems)}",
            code="weights-mismatch",
        )

    width = int(tensors[KERNEL].shape[0])
    if num_heads is None and width % HEAD_WIDTH:
        raise WeightsError(
            f"the file does not state how many heads share its width of {width}, and AR-SSL4M's "
            f"{HEAD_WIDTH} channels per head do not divide it; add --heads N",
            code="weights-heads",
        )

    heads = num_heads or width // HEAD_WIDTH
    if width % heads:
        raise WeightsError(
            f"--heads {heads}: the width of {width} is not a multiple of it",
            code="weights-heads",
        )

    # The files do not hold the decoder of fine-tuning, so that its size is ours.
    hidden = int(tensors["model.layers.0.mlp.linear1.weight"].shape[0])
    return {
        "embed_dim": width,
        "patch_embed_size": list(token_size(tensors)),
        "eva_depth": depth,
        "eva_numheads": heads,
        "mlp_ratio": hidden / width,
        "decoder_features": ENCODERS["vit_b16"].arguments["decoder_features"],
    }


def token_size(tensors: Mapping[str, Tensor]) -> Size:
    """Return the voxels of a token, (z, y, x)."""
    size_xyz = tensors[KERNEL].shape[2:]  # the kernel is (V, C, x, y, z)
    return as_size(size_xyz[::-1])


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder of a checkpoint for (z, y, x) volumes, without the head."""
    keys = [key for key in tensors if key.startswith(ENCODER)]
    encoder = {key: tensors[key] for key in keys}
    if KERNEL in encoder:
        # (V, C, x, y, z) -> (V, C, z, y, x), or back.
        encoder[KERNEL] = encoder[KERNEL].permute(0, 1, 4, 3, 2).contiguous()
    return encoder


def to_theirs(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an encoder for (x, y, z) volumes with AR-SSL4M's names.

    This inverts ``to_ours``, because turning the axes twice changes nothing.
    """
    return to_ours(encoder)


def import_ar_ssl4m(
    source_file: Path,
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> Imported:
    """Return the encoder of an AR-SSL4M checkpoint under our names.

    Raises:
        WeightsError: the checkpoint is incomplete, its positions are learned, or the number of
            heads is not known.
    """
    arguments = arguments_of(tensors, options.num_heads)
    base = ENCODERS["vit_b16"].arguments
    is_base = all(arguments[key] == base[key] for key in arguments)
    # The name decides which learning rates are planned.
    name = "vit_b16" if is_base else VIT

    notes = []
    if any(key.startswith(HEAD) for key in tensors):
        notes.append(f"left out: {HEAD.rstrip('.')}, the head of pretraining")
    notes.append(
        "axes turned from (x, y, z) to (z, y, x): the patch kernel here, the positions in the "
        "network",
    )
    if options.spacing_mm is None:
        notes.append(
            "spacing: the weights were pretrained without resampling; 1 x 1 x 1 mm is assumed, at "
            "which the authors fine-tuned (--spacing Z Y X states another)",
        )

    licences = AR_SSL4M_LICENCE
    if options.licence:
        licences = dict.fromkeys(licences, stated_by_user(options.licence))
    return Imported(
        encoder=EncoderPlan(name, CLASS_PATHS[VIT], arguments, token_size(tensors)),
        tensors=as_float(to_ours(tensors), source_file),
        crop_size_vox=options.patch_size_vox or CROP,
        spacing_mm=options.spacing_mm or (1.0, 1.0, 1.0),
        modalities=options.modalities or ("CT", "MR"),
        num_input_channels=int(tensors[KERNEL].shape[1]),
        licences=licences,
        objective="imported from AR-SSL4M (next-patch regression with random start-up)",
        normalization=PERCENTILE_SCHEME,
        notes=tuple(notes),
        origin={"format": "AR-SSL4M", "file": source_file.name, "sha256": sha256_of(source_file)},
    )
