"""nnssl's checkpoints (OpenMind, nnFoundation): an adaptation plan and the weights of a whole
pretraining network.

Source: facts of the format as read in the projects' files (github.com/MIC-DKFZ/nnssl, the
    pretraining trainers of nnU-Net's master
branch); no code of theirs is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.imported import Imported, ImportOptions
from nnunet_autoreg.convert.licences import licences_of, modalities_of
from nnunet_autoreg.convert.source import Source, plain
from nnunet_autoreg.convert.token_order import KEEP, OURS, PERMUTE, swap_plane_axes
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import CLASS_PATHS, PRIMUS, PRIMUS_V2, PRIMUS_V3, RESENC, token_size_of
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, grid_of, volume
from nnunet_autoreg.model.card import EncoderCard
from nnunet_autoreg.model.sizes import ENCODERS, PRIMUS_WIDTHS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import from_jsonable, sha256_of

OWN_KEY = "nnunet_autoreg"
"""What our own export adds to a file."""
PRIMUS_PRESETS = {
    **{f"Primus{size.upper()}": PRIMUS_WIDTHS[size] for size in ("s", "b", "m", "l")},
    "PrimusX": (1056, 40, 16),
}
"""Preset -> width, depth, heads."""
CNN_PRESETS = ("ResEncL", "NoSkipResEncL")
KEYS: dict[str, tuple[str, str]] = {
    RESENC: ("encoder.stages.", "encoder.stem."),
    **{family: ("eva.", "down_projection.") for family in (PRIMUS, PRIMUS_V2, PRIMUS_V3)},
}
"""Family -> what keys of encoder and stem begin with downstream."""
PRIMUS_OPTIONS = (
    "use_rot_pos_emb",
    "use_abs_pos_embed",
    "mlp_ratio",
    "depth_per_level",
    "ch_per_level",
    "add_skips",
)
Z_SCORE = "ZScoreNormalization"
_BLOCK = re.compile(r"eva\.blocks\.(\d+)\.")


def import_nnssl(source: Source, options: ImportOptions) -> Imported:
    """An nnssl checkpoint as an encoder of ours.

    Raises:
        WeightsError: the plan is incomplete, the network is none of ours, or plan and weights
            contradict each other.
    """
    plan = source.adaptation_plan
    own = source.rest.get(OWN_KEY)
    known = _own_card(own, source)
    family = _family(plan, source)
    tensors, notes = _encoder_tensors(source, plan, family)
    encoder = _encoder(family, plan, tensors, options)
    crop, crop_notes = _patch_size(source, encoder, tensors, options)
    order_notes: list[str] = []
    if family != RESENC:
        tensors, order_notes = _in_our_order(
            tensors, grid_of(crop, encoder.token_size_vox), encoder, own, options
        )
    citations = source.rest.get("citations")
    imported = Imported(
        encoder=encoder,
        tensors=tensors,
        crop_size_vox=crop,
        spacing_mm=options.spacing_mm or (1.0, 1.0, 1.0),
        modalities=options.modalities,
        num_input_channels=_num_channels(plan, source),
        licences=licences_of(plan, citations, source.file, options.licence),
        objective="",
        notes=(*notes, *crop_notes, *order_notes),
        origin={
            "format": "nnssl",
            "file": source.file.name,
            "sha256": sha256_of(source.file),
            "citations": plain(citations),
            "dataset": plain(_pretraining(plan).get("dataset_name")),
            "notes": [*order_notes],
        },
    )
    return (
        _as_stated(imported, source, options)
        if known is None
        else _as_known(imported, known, options)
    )


def _as_stated(imported: Imported, source: Source, options: ImportOptions) -> Imported:
    """With what the plan says of spacing, normalisation and data, and a note where it says
    nothing.
    """
    plan = source.adaptation_plan
    spacing, spacing_notes = _spacing(plan, options)
    normalization, norm_notes = _normalization(plan)
    modalities, modality_notes = _modalities(plan, source.rest.get("citations"), source, options)
    trainer = str(source.rest.get("trainer_name") or plan.get("trainer_name") or "")
    return replace(
        imported,
        spacing_mm=spacing,
        modalities=modalities,
        normalization=normalization,
        objective=f"imported from nnssl{f' ({trainer})' if trainer else ''}",
        notes=(*imported.notes, *spacing_notes, *norm_notes, *modality_notes),
    )


def _as_known(imported: Imported, card: EncoderCard, options: ImportOptions) -> Imported:
    """With what our own export says of itself, unless the user knows better."""
    return replace(
        imported,
        spacing_mm=options.spacing_mm or card.spacing_mm,
        modalities=options.modalities or card.modalities,
        licences={name: f"{options.licence} (stated by the user)" for name in card.licences}
        if options.licence
        else card.licences,
        normalization=card.normalization,
        objective=card.objective,
        card=card,
    )


def _modalities(
    plan: Mapping[str, Any], citations: Any, source: Source, options: ImportOptions
) -> tuple[tuple[str, ...], list[str]]:
    known = options.modalities or modalities_of(plan, citations, source.file)
    if known:
        return known, []
    return ("CT", "MR"), [
        "modalities: the file does not name them; CT and MR assumed (--modality says otherwise)"
    ]


def _own_card(own: Any, source: Source) -> EncoderCard | None:
    if not isinstance(own, Mapping) or "card" not in own:
        return None
    card = own["card"]
    return from_jsonable(
        EncoderCard,
        dict(card) if isinstance(card, Mapping) else card,
        f"{source.file}: {OWN_KEY}.card",
    )


def _num_channels(plan: Mapping[str, Any], source: Source) -> int:
    stated = plan.get("pretrain_num_input_channels") or 1
    if not isinstance(stated, int) or stated < 1:
        raise WeightsError(
            f"{source.file}: pretrain_num_input_channels {stated!r} of the adaptation plan is no "
            "number of channels"
        )
    return stated


def _pretraining(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    found = plan.get("pretrain_plan")
    return found if isinstance(found, Mapping) else {}


def configuration_of(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one configuration of nnssl's pretraining plan; empty where there is none."""
    found = _pretraining(plan).get("configurations")
    first = next(iter(found.values()), None) if isinstance(found, Mapping) else None
    return first if isinstance(first, Mapping) else {}


def architecture_of(plan: Mapping[str, Any], where: object) -> tuple[str, dict[str, Any]]:
    """Class name without its package, and the arguments, empty for a preset.

    Raises:
        WeightsError: the plan names no architecture.
    """
    described = plan.get("architecture_plans")
    if not isinstance(described, Mapping) or not described.get("arch_class_name"):
        raise WeightsError(
            f"{where}: the adaptation plan has no architecture_plans.arch_class_name; add "
            "--adaptation-plan FILE"
        )
    arguments = described.get("arch_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise WeightsError(
            f"{where}: architecture_plans.arch_kwargs of the adaptation plan is "
            f"{type(arguments).__name__}, no dictionary"
        )
    return str(described["arch_class_name"]).rpartition(".")[2], {
        str(key).removeprefix("encoder_"): value for key, value in arguments.items()
    }


def _family(plan: Mapping[str, Any], source: Source) -> str:
    name, _ = architecture_of(plan, source.file)
    if name in CNN_PRESETS or name == "ResidualEncoderUNet":
        return RESENC
    for prefix, family in (("PrimusV2", PRIMUS_V2), ("PrimusV3", PRIMUS_V3)):
        if name.startswith(prefix):
            return family
    if name == "Primus" or name in PRIMUS_PRESETS:
        return PRIMUS
    known = ", ".join(
        [*CNN_PRESETS, "ResidualEncoderUNet", "Primus", *PRIMUS_PRESETS, "PrimusV2", "PrimusV3"]
    )
    raise WeightsError(
        f"{source.file} holds a {name}, which cannot be fine-tuned here; what can be is: {known}"
    )


def _encoder_tensors(
    source: Source, plan: Mapping[str, Any], family: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder under its downstream names, and what was left out."""
    try:
        theirs = (
            _stripped(f"{plan['key_to_encoder']}.", family),
            _stripped(f"{plan['key_to_stem']}.", family),
        )
    except KeyError as error:
        raise WeightsError(
            f"{source.file}: the adaptation plan has no {error}; add --adaptation-plan FILE"
        ) from error
    chosen: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for full, tensor in source.tensors.items():
        key = _stripped(full, family)
        for prefix, ours in zip(theirs, KEYS[family], strict=True):
            if key.startswith(prefix):
                if ".rope." not in key:
                    chosen[ours + key.removeprefix(prefix)] = tensor
                break
        else:
            part = key.partition(".")[0]
            dropped[part] = dropped.get(part, 0) + 1
    if not chosen:
        raise WeightsError(
            f"{source.file}: no key begins with '{theirs[0]}' or '{theirs[1]}', as its adaptation "
            "plan says they do"
        )
    left_out = ", ".join(f"{part} ({count} tensors)" for part, count in sorted(dropped.items()))
    return as_float(chosen, source.file), [f"left out: {left_out}"] if left_out else []


def _stripped(key: str, family: str) -> str:
    """``key`` without the wrapper that some Primus files have around the encoder."""
    return key if family == RESENC else key.removeprefix("encoder.")


def _encoder(
    family: str, plan: Mapping[str, Any], tensors: Mapping[str, Tensor], options: ImportOptions
) -> EncoderPlan:
    name, stated = architecture_of(plan, "the file")
    arguments = (
        _cnn_arguments(stated)
        if family == RESENC
        else _primus_arguments(family, name, stated, tensors, options)
    )
    class_path = CLASS_PATHS[family]
    return EncoderPlan(
        _known_name(family, arguments), class_path, arguments, token_size_of(class_path, arguments)
    )


def _known_name(family: str, arguments: Mapping[str, Any]) -> str:
    """The encoder of ours of these sizes, which lends its rates; else the family's name."""
    if family == RESENC:
        return next(
            (n for n in ("resenc_l", "resenc_tiny") if ENCODERS[n].arguments == arguments), family
        )
    sizes = (arguments["embed_dim"], arguments["eva_depth"], arguments["eva_numheads"])
    return next(
        (f"{family}_{size}" for size, numbers in PRIMUS_WIDTHS.items() if numbers == sizes), family
    )


def _cnn_arguments(stated: Mapping[str, Any]) -> dict[str, Any]:
    if not stated:
        return dict(ENCODERS["resenc_l"].arguments)
    wanted = ENCODERS["resenc_l"].arguments
    missing = [key for key in wanted if key not in stated and not key.startswith("dropout")]
    if missing:
        raise WeightsError(
            f"the adaptation plan's arch_kwargs lack {', '.join(missing)}; add --adaptation-plan "
            "FILE"
        )
    return {key: _listed(stated.get(key)) for key in wanted}


def _listed(value: Any) -> Any:
    """Lists for tuples and whole numbers for 3.0, as JSON and our plans have them."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [_listed(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _primus_arguments(
    family: str,
    name: str,
    stated: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> dict[str, Any]:
    """The arguments, sizes from the tensors, heads from the plan; LayerScale and inner norm as the
    file has them.
    """
    if stated.get("num_register_tokens"):
        raise WeightsError(
            f"the file's network has {stated['num_register_tokens']} register tokens, which cannot "
            "be imported"
        )
    depths = [int(found[1]) for key in tensors if (found := _BLOCK.match(key))]
    if not depths or "eva.norm.weight" not in tensors:
        raise WeightsError(
            "the file has no 'eva.blocks.*' and 'eva.norm.weight': it is no whole Primus encoder"
        )
    width, depth = int(tensors["eva.norm.weight"].shape[0]), max(depths) + 1
    preset = PRIMUS_PRESETS.get(name.replace("V2", "").replace("V3", ""))
    heads = options.num_heads or stated.get("eva_numheads") or (preset[2] if preset else None)
    if not isinstance(heads, int) or heads < 1:
        raise WeightsError(
            "the adaptation plan does not say how many attention heads there are; add --heads N"
        )
    said = (
        (stated.get("embed_dim"), stated.get("eva_depth"))
        if stated
        else (preset[:2] if preset else (None, None))
    )
    for what, number, there in (("width", said[0], width), ("depth", said[1], depth)):
        if number is not None and number != there:
            raise WeightsError(
                f"the adaptation plan describes a {name} of {what} {number}, but the weights have "
                f"{what} {there}"
            )
    if width % (6 * heads):
        raise WeightsError(
            f"{heads} attention heads do not divide a width of {width} into multiples of 6 "
            "channels, as rotary angles need"
        )
    kernel = tensors.get("down_projection.proj.weight")
    token = _size(
        kernel.shape[2:] if kernel is not None else stated.get("patch_embed_size", (8, 8, 8))
    )
    if token is None:
        raise WeightsError(
            f"patch_embed_size {stated.get('patch_embed_size')} of the adaptation plan is no size "
            "of three axes"
        )
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "patch_embed_size": list(token),
        "eva_depth": depth,
        "eva_numheads": heads,
        "init_values": _layer_scale(stated, tensors),
        "scale_attn_inner": _inner_norm(stated, tensors),
    }
    return arguments | {
        key: _listed(stated[key]) for key in PRIMUS_OPTIONS if stated.get(key) is not None
    }


def _layer_scale(stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> float | None:
    if "init_values" not in stated:
        # Its first value matters to a network that is not loaded, so nnU-Net's own will do.
        return 0.1 if "eva.blocks.0.gamma_1" in tensors else None
    value = stated["init_values"]
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is not None and not isinstance(value, (int, float)):
        raise WeightsError(f"init_values {value!r} of the adaptation plan is no number")
    return None if value is None else float(value)


def _inner_norm(stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return (
        bool(stated["scale_attn_inner"])
        if "scale_attn_inner" in stated
        else "eva.blocks.0.attn.norm.weight" in tensors
    )


def _patch_size(
    source: Source, encoder: EncoderPlan, tensors: Mapping[str, Tensor], options: ImportOptions
) -> tuple[Size, list[str]]:
    """The patch of pretraining: the first that is stated and whose grid has as many tokens as there
    are positions.
    """
    stated = [
        size
        for plan in (source.plan, source.plan_beside)
        if plan is not None
        for size in _stated_sizes(plan)
    ]
    candidates = [options.patch_size_vox] if options.patch_size_vox else stated
    if not candidates:
        raise WeightsError("the adaptation plan states no patch size; add --patch-size Z Y X")
    positions = tensors.get("eva.pos_embed")
    token = encoder.token_size_vox
    if positions is None:
        whole = as_size([max(s // t, 1) * t for s, t in zip(candidates[0], token, strict=True)])
        return whole, [] if whole == candidates[0] else [
            f"patch size {candidates[0]} taken as {whole}, a multiple of the stride {token}"
        ]
    whole_ones = [c for c in candidates if not any(s % t for s, t in zip(c, token, strict=True))]
    fitting = [c for c in whole_ones if volume(grid_of(c, token)) == positions.shape[1]]
    if not fitting:
        sizes = " or ".join(str(c) for c in dict.fromkeys(candidates))
        raise WeightsError(
            f"the weights have {positions.shape[1]} positions, but patch {sizes} in tokens of "
            f"{token} makes another number; "
            "add --patch-size Z Y X"
        )
    others = [
        str(c)
        for c in dict.fromkeys(candidates)
        if c != fitting[0] and c in candidates[: candidates.index(fitting[0])]
    ]
    told = (
        f"patch size {fitting[0]}: {positions.shape[1]} positions make this one right and "
        f"{' and '.join(others)} wrong"
    )
    return fitting[0], [told] if others else []


def _stated_sizes(plan: Mapping[str, Any]) -> list[Size]:
    found = (
        plan.get("pretrain_patch_size"),
        configuration_of(plan).get("patch_size"),
        plan.get("recommended_downstream_patchsize"),
    )
    return [size for value in found if (size := _size(value)) is not None]


def _size(value: Any) -> Size | None:
    is_one = (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(v, (int, float)) and v >= 1 for v in value)
    )
    return as_size(value) if is_one else None


def _in_our_order(
    tensors: dict[str, Tensor], grid: Size, encoder: EncoderPlan, own: Any, options: ImportOptions
) -> tuple[dict[str, Tensor], list[str]]:
    stated = own.get("token_order") if isinstance(own, Mapping) else None
    order = options.token_order or (KEEP if stated == OURS else PERMUTE)
    if order == KEEP:
        why = (
            "as the file says that it is nnU-Net's already"
            if stated == OURS
            else "as asked for: the uncorrected loading"
        )
        return tensors, [f"token order kept, {why}"]
    swapped = swap_plane_axes(tensors, grid, int(encoder.arguments["eva_numheads"]))
    return swapped, [
        "token order mended: positions and rotary channels from nnssl's (h, w, d) to nnU-Net's (w, "
        "h, d)"
    ]


def _spacing(plan: Mapping[str, Any], options: ImportOptions) -> tuple[Spacing, list[str]]:
    if options.spacing_mm is not None:
        return options.spacing_mm, []
    spacing = _triple(configuration_of(plan).get("spacing"))
    if spacing is not None:
        return spacing, []
    median = _triple(_pretraining(plan).get("original_median_spacing_after_transp"))
    if median is not None:
        return median, [
            f"spacing: pretrained without resampling; {list(median)} mm is the plan's median"
        ]
    return (1.0, 1.0, 1.0), [
        "spacing: the plan states none; 1 x 1 x 1 mm assumed (--spacing says otherwise)"
    ]


def _triple(value: Any) -> Spacing | None:
    is_one = (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(v, (int, float)) and v > 0 for v in value)
    )
    return as_spacing(value) if is_one else None


def _normalization(plan: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    schemes = configuration_of(plan).get("normalization_schemes")
    names = (
        sorted({str(scheme) for scheme in schemes})
        if isinstance(schemes, Sequence) and not isinstance(schemes, str)
        else []
    )
    if names == [Z_SCORE]:
        return Z_SCORE, []
    if not names:
        return Z_SCORE, ["normalisation: the plan states none; nnssl's usual z-score assumed"]
    return None, [
        f"normalisation {', '.join(names)}: nnU-Net's own choice per channel is used instead"
    ]
