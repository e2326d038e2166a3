"""AR-SSL4M's own checkpoints: 163 tensors for 12 blocks, in (x, y, z).

``model.*`` is the encoder and keeps its names; ``decoder_pred`` is the head of pretraining. Only
what has axes changes: the patch kernel (out, in, x, y, z) -> (out, in, z, y, x), and the rows of
the head, which list a patch's voxels with z running fastest.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.imported import Imported, ImportOptions
from nnunet_autoreg.convert.licences import AR_SSL4M_LICENCE
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import CLASS_PATHS, VIT
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.finetune.normalization import PERCENTILE_SCHEME
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import sha256_of

ENCODER, HEAD = "model.", "decoder_pred."
KERNEL = "model.patchifier.proj.weight"
LEARNED_POSITIONS = "model.pos_embed_learn"
CROP: Size = (128, 128, 128)
HEAD_WIDTH = 64
"""Width of an attention head of AR-SSL4M; its files do not name the number of heads."""

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
    """Whether the keys are AR-SSL4M's."""
    return KERNEL in tensors and any(_LAYER.match(key) for key in tensors)


def expected_keys(depth: int) -> set[str]:
    """All keys of a checkpoint of ``depth`` blocks with fixed positions: 163 for 12."""
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
    """The arguments of ``model.vit.ViT`` for a checkpoint.

    Args:
        num_heads: None takes the width by AR-SSL4M's 64 a head.

    Raises:
        WeightsError: keys are missing or left over, positions are learned, or the number of heads
            cannot be known.
    """
    depth = 1 + max(int(found.group(1)) for key in tensors if (found := _LAYER.match(key)))
    if LEARNED_POSITIONS in tensors:
        raise WeightsError(
            f"'{LEARNED_POSITIONS}': this checkpoint has learned positions, tied to its own grid "
            "of tokens; only AR-SSL4M's fixed "
            "sine-cosine positions can be imported"
        )
    missing, foreign = expected_keys(depth) - set(tensors), set(tensors) - expected_keys(depth)
    missing -= {key for key in missing if key.startswith(HEAD)}
    if missing or foreign:
        lines = [
            f"{word} {', '.join(sorted(keys)[:3])}"
            for word, keys in (("lacks", missing), ("has besides", foreign))
            if keys
        ]
        raise WeightsError(
            f"this is no whole AR-SSL4M checkpoint of {depth} blocks: it {' and '.join(lines)}"
        )
    width = int(tensors[KERNEL].shape[0])
    if num_heads is None and width % HEAD_WIDTH:
        raise WeightsError(
            f"the file does not say how many heads its width of {width} is cut into, and "
            f"AR-SSL4M's {HEAD_WIDTH} a head do not fit; "
            "add --heads N"
        )
    heads = num_heads or width // HEAD_WIDTH
    if width % heads:
        raise WeightsError(f"--heads {heads}: the width of {width} is no multiple of it")
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
    """Voxels of a token, (z, y, x)."""
    return as_size(tuple(reversed(tensors[KERNEL].shape[2:])))


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of a checkpoint for (z, y, x) volumes, without its head."""
    return {key: _turned(key, value) for key, value in tensors.items() if key.startswith(ENCODER)}


def to_theirs(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_ours``: an encoder for (x, y, z) volumes under AR-SSL4M's names."""
    return to_ours(encoder)


def _turned(key: str, value: Tensor) -> Tensor:
    return value.permute(0, 1, 4, 3, 2).contiguous() if key == KERNEL else value


def head_to_ours(tensors: Mapping[str, Tensor], token: Size) -> tuple[Tensor, Tensor]:
    """Weight (P, V) and bias (P) of AR-SSL4M's head, so that a token's voxels come in raster order
    (z, y, x).

    Args:
        token: (z, y, x) voxels of a token.
    """
    z, y, x = token
    weight, bias = tensors[f"{HEAD}weight"], tensors[f"{HEAD}bias"]
    turned_weight = weight.reshape(x, y, z, -1).permute(2, 1, 0, 3).reshape(math.prod(token), -1)
    return turned_weight.contiguous(), bias.reshape(x, y, z).permute(2, 1, 0).reshape(
        -1
    ).contiguous()


def import_ar_ssl4m(
    source_file: Path, tensors: Mapping[str, Tensor], options: ImportOptions
) -> Imported:
    """An AR-SSL4M checkpoint as an encoder of ours.

    Raises:
        WeightsError: it is incomplete, its positions are learned, or its heads cannot be known.
    """
    arguments = arguments_of(tensors, options.num_heads)
    token = token_size(tensors)
    same = ENCODERS["vit_b16"].arguments
    is_base = all(arguments[key] == same[key] for key in arguments)
    crop = options.patch_size_vox or CROP
    notes = (
        [f"left out: {HEAD.rstrip('.')}, the head of pretraining"]
        if any(key.startswith(HEAD) for key in tensors)
        else []
    )
    notes.append(
        "axes turned from (x, y, z) to (z, y, x): the patch kernel here, the positions in the "
        "network"
    )
    if options.spacing_mm is None:
        notes.append(
            "spacing: pretrained without resampling; 1 x 1 x 1 mm, at which its authors "
            "fine-tuned, assumed (or --spacing Z Y X)"
        )
    return Imported(
        encoder=EncoderPlan("vit_b16" if is_base else VIT, CLASS_PATHS[VIT], arguments, token),
        tensors=as_float(to_ours(tensors), source_file),
        crop_size_vox=crop,
        spacing_mm=options.spacing_mm or (1.0, 1.0, 1.0),
        modalities=options.modalities or ("CT", "MR"),
        num_input_channels=int(tensors[KERNEL].shape[1]),
        licences={"AR-SSL4M": f"{options.licence} (stated by the user)"}
        if options.licence
        else AR_SSL4M_LICENCE,
        objective="imported from AR-SSL4M (next-patch regression with random start-up)",
        normalization=PERCENTILE_SCHEME,
        notes=tuple(notes),
        origin={"format": "AR-SSL4M", "file": source_file.name, "sha256": sha256_of(source_file)},
    )
