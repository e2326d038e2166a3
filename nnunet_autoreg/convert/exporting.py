"""``autoreg_weights export``: a finished pretraining in other people's formats.

nnssl's, which nnU-Net's master branch, its fork and nnDetection read: ``checkpoint_final.pth``,
``adaptation_plan.json`` and ``config.json``. A ViT, which nnssl's format cannot name, goes out as
AR-SSL4M's own checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_autoreg import __version__
from nnunet_autoreg.convert.ar_ssl4m import to_theirs
from nnunet_autoreg.convert.imported import checked_tensors, names_of, network_of
from nnunet_autoreg.convert.nnssl import OWN_KEY, PRIMUS_PRESETS
from nnunet_autoreg.convert.source import ADAPTATION_NAME, CHECKPOINT_NAME, PLAN_KEY, WEIGHTS_KEY
from nnunet_autoreg.convert.token_order import OURS
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import PRIMUS, PRIMUS_V2, PRIMUS_V3, RESENC, VIT, family_of
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.model.card import (
    DECODER_PREFIXES,
    IMPORTED,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.model.encoders import IMPORTED_ARGUMENTS
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import atomic_path, to_jsonable, write_json

CONFIG_NAME = "config.json"
CLASS_NAMES = {PRIMUS_V2: "PrimusV2", PRIMUS_V3: "PrimusV3", RESENC: "ResidualEncoderUNet"}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
MASK_RESAMPLING = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Exported:
    """What was written, and what the format could not say."""

    files: tuple[Path, ...]
    card: EncoderCard
    warnings: tuple[str, ...]


def export_weights(weights: Path, folder: Path) -> Exported:
    """Write a run's encoder into ``folder``.

    Args:
        weights: ``encoder.safetensors`` of a finished run.

    Raises:
        WeightsError: the run is damaged, or the folder holds files of these names already.
    """
    card = read_card(weights.parent)
    verify_weights(weights, card.sha256)
    there = [
        name for name in (CHECKPOINT_NAME, ADAPTATION_NAME, CONFIG_NAME) if (folder / name).exists()
    ]
    if there:
        raise WeightsError(
            f"-o {folder} holds {', '.join(there)} already; choose another folder, or remove them"
        )
    encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
    network = network_of(encoder, card.crop_size_vox, card.num_input_channels)
    encoder_tensors, num_decoder = _without_decoder(read_tensors(weights), card)
    card = replace(card, adaptation=replace(card.adaptation, keys_to_decoder=()))
    tensors = checked_tensors(network, encoder_tensors, str(weights))
    if family_of(card.class_path) == VIT:
        return _export_vit(card, tensors, folder)
    # Their loaders read encoder and stem strictly, by every name that a tensor has.
    aliased = {name: tensors[first] for first, names in names_of(network).items() for name in names}
    plan, warnings = adaptation_plan(card, aliased)
    if num_decoder:
        left_out = (
            f"the {num_decoder} tensors of the pretrained decoder are left out: readers of this "
            "format use the encoder alone"
        )
        warnings = (*warnings, left_out)
    content = {
        WEIGHTS_KEY: aliased,
        PLAN_KEY: plan,
        "citations": _citations(card),
        "trainer_name": "autoreg_pretrain",
        OWN_KEY: _own(card),
    }
    _save(folder / CHECKPOINT_NAME, content)
    write_json(folder / ADAPTATION_NAME, {**plan, "trainer_name": "autoreg_pretrain"})
    write_json(
        folder / CONFIG_NAME,
        {"model_type": "nnssl", "architectures": [plan["architecture_plans"]["arch_class_name"]]},
    )
    return Exported(
        tuple(folder / name for name in (CHECKPOINT_NAME, ADAPTATION_NAME, CONFIG_NAME)),
        card,
        warnings,
    )


def _without_decoder(
    tensors: Mapping[str, Tensor], card: EncoderCard
) -> tuple[dict[str, Tensor], int]:
    """Return the encoder's tensors, and how many of the decoder's that the card lists were left
    out.
    """
    encoder = dict(tensors)
    if card.has_decoder:
        encoder = {
            key: value for key, value in tensors.items() if not key.startswith(DECODER_PREFIXES)
        }
    return encoder, len(tensors) - len(encoder)


def _export_vit(card: EncoderCard, tensors: Mapping[str, Tensor], folder: Path) -> Exported:
    _save(
        folder / CHECKPOINT_NAME,
        {"state_dict": to_theirs(tensors), "citations": _citations(card), OWN_KEY: _own(card)},
    )
    warnings = (
        "nnssl's format names no ViT: this is AR-SSL4M's own form, for volumes (x, y, z); of its "
        "163 tensors the 2 of the head of "
        "pretraining, which fine-tuning drops, are not there",
    )
    return Exported((folder / CHECKPOINT_NAME,), card, warnings)


def _save(file: Path, content: dict[str, Any]) -> None:
    with atomic_path(file) as temporary:
        torch.save(content, temporary)


def adaptation_plan(
    card: EncoderCard, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """nnssl's adaptation plan for an encoder, and what it cannot say, one line each."""
    architecture, warnings = _architecture(card)
    patch = [int(v) for v in card.crop_size_vox]
    keys = card.adaptation
    plan = {
        "architecture_plans": architecture,
        "pretrain_plan": _pretrain_plan(card),
        "pretrain_num_input_channels": int(card.num_input_channels),
        "recommended_downstream_patchsize": patch,
        "pretrain_patch_size": patch,
        "key_to_encoder": keys.key_to_encoder,
        "key_to_stem": keys.key_to_stem,
        "keys_to_in_proj": _input_projection(keys.keys_to_in_proj, tensors),
        "key_to_lpe": keys.key_to_lpe,
    }
    if card.ct_window is not None:
        warnings.append(
            f"CT was pretrained with a Hounsfield window of {card.ct_window.percentile_00_5:g} to "
            f"{card.ct_window.percentile_99_5:g}, "
            "which nnssl's format cannot say and its readers z-score instead; it is kept under "
            f"'{OWN_KEY}'"
        )
    if len(card.spacing_groups) > 1:
        more = len(card.spacing_groups)
        warnings.append(
            f"it was pretrained at {more} target spacings; nnssl's format names one, "
            f"{list(card.spacing_mm)} mm"
        )
    return plan, tuple(warnings)


def _input_projection(names: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of one convolution: their loaders give all of them the value of the first.

    PrimusV2's stem has a second one.
    """
    shape = tensors[f"{names[0]}.weight"].shape
    return [name for name in names if tensors[f"{name}.weight"].shape == shape]


def _architecture(card: EncoderCard) -> tuple[dict[str, Any], list[str]]:
    family, arguments = family_of(card.class_path), card.arguments
    if family == RESENC:
        if arguments == ENCODERS["resenc_l"].arguments:
            return _described("ResEncL", None, None), []
        return _described(CLASS_NAMES[RESENC], dict(arguments), list(IMPORTED_ARGUMENTS)), []
    sizes = (arguments["embed_dim"], arguments["eva_depth"], arguments["eva_numheads"])
    plain = (
        arguments.get("init_values") is None
        and not arguments.get("scale_attn_inner")
        and arguments["patch_embed_size"] == [8, 8, 8]
    )
    preset = next(
        (
            name
            for name, numbers in PRIMUS_PRESETS.items()
            if numbers == sizes and name != "PrimusX"
        ),
        None,
    )
    if family == PRIMUS and plain and preset:
        return _described(preset, None, None), []
    kwargs: dict[str, Any] = {
        "input_channels": int(card.num_input_channels),
        "output_channels": 1,
        "input_shape": [int(v) for v in card.crop_size_vox],
        "embed_dim": int(sizes[0]),
        "patch_embed_size": [int(v) for v in arguments["patch_embed_size"]],
        "encoder_eva_depth": int(sizes[1]),
        "encoder_eva_numheads": int(sizes[2]),
        "init_values": arguments.get("init_values"),
        "scale_attn_inner": bool(arguments.get("scale_attn_inner")),
        **{
            key: arguments[key]
            for key in ("depth_per_level", "ch_per_level", "add_skips")
            if key in arguments
        },
    }
    if family == PRIMUS:
        return _described("PrimusX", kwargs, []), [
            "in nnU-Net's master branch use -tr "
            "PretrainedTrainer_Primusx: the presets there "
            "have "
            "neither LayerScale nor the inner norm of this "
            "encoder"
        ]
    name = CLASS_NAMES[family]
    return _described(name, kwargs, []), [
        f"no trainer of nnU-Net's master branch builds a {name}; the file keeps to the format"
    ]


def _described(
    name: str, arguments: dict[str, Any] | None, imported: list[str] | None
) -> dict[str, Any]:
    return {
        "arch_class_name": name,
        "arch_kwargs": arguments,
        "arch_kwargs_requiring_import": imported,
    }


def _pretrain_plan(card: EncoderCard) -> dict[str, Any]:
    spacing = [float(v) for v in card.spacing_mm]
    style = "onemmiso" if spacing == [1.0, 1.0, 1.0] else "median"
    configuration = {
        "data_identifier": f"autoreg_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": dict(RESAMPLING),
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": dict(MASK_RESAMPLING),
        "spacing": spacing,
        "patch_size": [int(v) for v in card.crop_size_vox],
    }
    return {
        "dataset_name": card.name,
        "plans_name": "autoreg",
        "original_median_spacing_after_transp": spacing,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {style: configuration},
        "experiment_planner_used": "autoreg_pretrain",
    }


def _citations(card: EncoderCard) -> list[dict[str, Any]]:
    licences = (
        "; ".join(f"{name}: {text or 'none stated'}" for name, text in card.licences.items())
        or "none stated"
    )
    made = (
        f"Encoder '{card.name}' ({card.encoder}), {card.objective}, by nnunet-autoreg "
        f"{__version__}."
    )
    text = f"{made} Licences of what it was made from: {licences}"
    ours = {
        "type": "Pretraining",
        "name": card.name,
        "apa_citations": [text],
        "bibtex_citations": [],
    }
    origin = card.extra.get(IMPORTED)
    theirs = origin.get("citations") if isinstance(origin, Mapping) else None
    return (
        [ours, *(dict(c) for c in theirs if isinstance(c, Mapping))]
        if isinstance(theirs, list)
        else [ours]
    )


def _own(card: EncoderCard) -> dict[str, Any]:
    """What only we understand: the whole card."""
    causal = card.objective.startswith("autoregressive")
    return {
        "version": __version__,
        "token_order": OURS,
        "causal": causal,
        "card": _plain(to_jsonable(card)),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
