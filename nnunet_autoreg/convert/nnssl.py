"""Convert nnssl's checkpoints (OpenMind, nnFoundation).

A checkpoint holds an adaptation plan and the weights of a whole pretraining network.

Source: the format as found in the projects' files (github.com/MIC-DKFZ/nnssl, and the pretraining
trainers of nnU-Net's master branch). None of their code is used.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nnunet_autoreg.convert.choices import KEEP, OURS, PERMUTE
from nnunet_autoreg.convert.imported import Imported, ImportOptions
from nnunet_autoreg.convert.licences import licences_of, modalities_of, stated_by_user
from nnunet_autoreg.convert.source import OWN_KEY, WeightsFile, plain
from nnunet_autoreg.convert.token_order import swap_plane_axes
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import (
    CLASS_PATHS,
    PRIMUS,
    PRIMUS_V2,
    PRIMUS_V3,
    RESENC,
    family_of,
    token_size_of,
)
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, grid_of, volume
from nnunet_autoreg.model.card import EncoderCard
from nnunet_autoreg.model.sizes import ENCODERS, PRIMUS_WIDTHS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import from_jsonable, sha256_of

PrimusSizes = tuple[int, int, int]
"""Width, depth and number of heads of a Primus."""

PRIMUS_PRESETS: dict[str, PrimusSizes] = {
    **{f"Primus{size.upper()}": PRIMUS_WIDTHS[size] for size in ("s", "b", "m", "l")},
    "PrimusX": (1056, 40, 16),
}
CNN_PRESETS = ("ResEncL", "NoSkipResEncL")
KEYS: dict[str, tuple[str, str]] = {
    RESENC: ("encoder.stages.", "encoder.stem."),
    **{family: ("eva.", "down_projection.") for family in (PRIMUS, PRIMUS_V2, PRIMUS_V3)},
}
"""Family -> prefixes of the keys of encoder and stem in the downstream network."""
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


def import_nnssl(source: WeightsFile, options: ImportOptions) -> Imported:
    """Return the encoder of an nnssl checkpoint under our names.

    Raises:
        WeightsError: the plan is incomplete, the network is not supported, or plan and weights
            contradict each other.
    """
    plan = source.adaptation_plan
    citations = source.rest.get("citations")

    # A file of our own export carries the whole card, files of others have none.
    own = source.rest.get(OWN_KEY)
    own_card: EncoderCard | None = None
    if isinstance(own, Mapping) and "card" in own:
        content = dict(own["card"]) if isinstance(own["card"], Mapping) else own["card"]
        own_card = from_jsonable(EncoderCard, content, f"{source.file}: {OWN_KEY}.card")

    num_channels = plan.get("pretrain_num_input_channels") or 1
    if not isinstance(num_channels, int) or num_channels < 1:
        raise WeightsError(
            f"{source.file}: pretrain_num_input_channels {num_channels!r} of the adaptation plan "
            "is not a number of channels",
            code="weights-bad-adaptation-plan",
        )

    family = _family(plan, source)
    tensors, notes = _encoder_tensors(source, plan, family)
    encoder = _encoder(family, plan, tensors, options)
    crop, crop_notes = _patch_size(source, encoder, tensors, options)

    # Only transformers have an order of tokens.
    order_notes: list[str] = []
    if family != RESENC:
        grid = grid_of(crop, encoder.token_size_vox)
        tensors, order_notes = _in_our_order(tensors, grid, encoder, own, options)

    imported = Imported(
        encoder=encoder,
        tensors=tensors,
        crop_size_vox=crop,
        spacing_mm=options.spacing_mm or (1.0, 1.0, 1.0),
        modalities=options.modalities,
        num_input_channels=num_channels,
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
    if own_card is None:
        return _with_stated_data(imported, source, options)
    return _with_data_of_card(imported, own_card, options)


def _with_data_of_card(imported: Imported, card: EncoderCard, options: ImportOptions) -> Imported:
    """Add what a card of ours states about the data; what the user states comes first."""
    licences = card.licences
    if options.licence:
        licences = dict.fromkeys(licences, stated_by_user(options.licence))
    return replace(
        imported,
        spacing_mm=options.spacing_mm or card.spacing_mm,
        modalities=options.modalities or card.modalities,
        licences=licences,
        normalization=card.normalization,
        objective=card.objective,
        card=card,
    )


def _with_stated_data(imported: Imported, source: WeightsFile, options: ImportOptions) -> Imported:
    """Add what the plan states about the data, and a note about everything that it does not."""
    plan = source.adaptation_plan
    configuration = configuration_of(plan)
    notes = list(imported.notes)

    # Spacing: of the user, of the plan, or the median of scans that were not resampled.
    spacing = options.spacing_mm or _triple(configuration.get("spacing"))
    if spacing is None:
        spacing = _triple(_pretraining(plan).get("original_median_spacing_after_transp"))
        if spacing is not None:
            notes.append(
                "spacing: the weights were pretrained without resampling; the median of the plan, "
                f"{list(spacing)} mm, is used",
            )

    if spacing is None:
        spacing = (1.0, 1.0, 1.0)
        notes.append(
            "spacing: the plan states none; 1 x 1 x 1 mm is assumed (--spacing states another)",
        )

    # Normalisation: nnssl's usual z-score has a name in nnU-Net; anything else is nnU-Net's choice.
    schemes = configuration.get("normalization_schemes")
    names: list[str] = []
    if isinstance(schemes, Sequence) and not isinstance(schemes, str):
        names = sorted({str(scheme) for scheme in schemes})
    normalization: str | None = Z_SCORE
    if not names:
        notes.append("normalisation: the plan states none; nnssl's usual z-score is assumed")
    elif names != [Z_SCORE]:
        normalization = None
        notes.append(
            f"normalisation {', '.join(names)}: nnU-Net's own choice per channel is used instead",
        )

    modalities = options.modalities
    modalities = modalities or modalities_of(plan, source.rest.get("citations"), source.file)
    if not modalities:
        modalities = ("CT", "MR")
        notes.append(
            "modalities: the file does not name them; CT and MR are assumed (--modality states "
            "others)",
        )

    trainer = str(source.rest.get("trainer_name") or plan.get("trainer_name") or "")
    suffix = f" ({trainer})" if trainer else ""
    return replace(
        imported,
        spacing_mm=spacing,
        modalities=modalities,
        normalization=normalization,
        objective=f"imported from nnssl{suffix}",
        notes=tuple(notes),
    )


def _pretraining(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    found = plan.get("pretrain_plan")
    return found if isinstance(found, Mapping) else {}


def configuration_of(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the only configuration of nnssl's pretraining plan; empty if there is none."""
    configurations = _pretraining(plan).get("configurations")
    if not isinstance(configurations, Mapping):
        return {}
    first = next(iter(configurations.values()), None)
    return first if isinstance(first, Mapping) else {}


def architecture_of(plan: Mapping[str, Any], where: object) -> tuple[str, dict[str, Any]]:
    """Return the class name without its package, and the arguments (empty for a preset).

    Raises:
        WeightsError: the plan names no architecture (code "weights-bad-adaptation-plan").
    """
    described = plan.get("architecture_plans")
    if not isinstance(described, Mapping) or not described.get("arch_class_name"):
        raise WeightsError(
            f"{where}: the adaptation plan has no architecture_plans.arch_class_name; add "
            "--adaptation-plan FILE",
            code="weights-bad-adaptation-plan",
        )

    arguments = described.get("arch_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise WeightsError(
            f"{where}: architecture_plans.arch_kwargs of the adaptation plan is a "
            f"{type(arguments).__name__} instead of a dictionary",
            code="weights-bad-adaptation-plan",
        )

    class_name = str(described["arch_class_name"]).rpartition(".")[2]
    ours = {str(key).removeprefix("encoder_"): value for key, value in arguments.items()}
    return class_name, ours


def _family(plan: Mapping[str, Any], source: WeightsFile) -> str:
    name, _ = architecture_of(plan, source.file)
    if name in CNN_PRESETS or name == "ResidualEncoderUNet":
        return RESENC
    for prefix, family in (("PrimusV2", PRIMUS_V2), ("PrimusV3", PRIMUS_V3)):
        if name.startswith(prefix):
            return family

    if name == "Primus" or name in PRIMUS_PRESETS:
        return PRIMUS

    known = ", ".join(
        [*CNN_PRESETS, "ResidualEncoderUNet", "Primus", *PRIMUS_PRESETS, "PrimusV2", "PrimusV3"],
    )
    raise WeightsError(
        f"{source.file} holds a {name}, which cannot be fine-tuned here; supported are: {known}",
        code="weights-unknown-network",
    )


def _encoder_tensors(
    source: WeightsFile,
    plan: Mapping[str, Any],
    family: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the encoder under its downstream names, and a note about what was left out."""
    try:
        encoder_prefix = _stripped(f"{plan['key_to_encoder']}.", family)
        stem_prefix = _stripped(f"{plan['key_to_stem']}.", family)
    except KeyError as error:
        raise WeightsError(
            f"{source.file}: the adaptation plan has no {error}; add --adaptation-plan FILE",
            code="weights-bad-adaptation-plan",
        ) from error

    # Encoder and stem are two parts of the pretraining network, and of the downstream network.
    chosen: dict[str, Tensor] = {}
    num_left_out: Counter[str] = Counter()
    for full_key, tensor in source.tensors.items():
        key = _stripped(full_key, family)
        for prefix, our_prefix in zip((encoder_prefix, stem_prefix), KEYS[family], strict=True):
            if key.startswith(prefix):
                # The network builds rotary tables for its own grid.
                if ".rope." not in key:
                    chosen[our_prefix + key.removeprefix(prefix)] = tensor
                break
        else:
            num_left_out[key.partition(".")[0]] += 1

    if not chosen:
        raise WeightsError(
            f"{source.file}: no key begins with '{encoder_prefix}' or '{stem_prefix}', contrary to "
            "its adaptation plan",
            code="weights-mismatch",
        )

    # Decoders and heads of pretraining are not used, but the user should know of them.
    left_out = [f"{part} ({count} tensors)" for part, count in sorted(num_left_out.items())]
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    return as_float(chosen, source.file), notes


def _stripped(key: str, family: str) -> str:
    """Return ``key`` without the prefix that some Primus files put before the encoder's keys."""
    return key if family == RESENC else key.removeprefix("encoder.")


def _encoder(
    family: str,
    plan: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> EncoderPlan:
    """Return the encoder that the plan and the weights describe."""
    class_name, stated = architecture_of(plan, "the file")

    if family == RESENC:
        usual = ENCODERS["resenc_l"].arguments
        missing = [key for key in usual if key not in stated and not key.startswith("dropout")]
        if stated and missing:
            raise WeightsError(
                f"the adaptation plan's arch_kwargs lack {', '.join(missing)}; add "
                "--adaptation-plan FILE",
                code="weights-bad-adaptation-plan",
            )
        # A preset states no arguments.
        arguments = dict(usual)
        if stated:
            arguments = {key: listed(stated.get(key)) for key in usual}
    else:
        arguments = _primus_arguments(class_name, stated, tensors, options)

    class_path = CLASS_PATHS[family]
    token_size = token_size_of(class_path, arguments)
    return EncoderPlan(name_of(class_path, arguments), class_path, arguments, token_size)


def name_of(class_path: str, arguments: Mapping[str, Any]) -> str:
    """Return the name of our encoder of the same size, else that of the family.

    The name decides which learning rates are planned.

    Raises:
        PlanError: the class is of no known family.
    """
    family = family_of(class_path)
    if family == RESENC:
        for known_name in ("resenc_l", "resenc_tiny"):
            if ENCODERS[known_name].arguments == arguments:
                return known_name
        return family

    sizes = (arguments["embed_dim"], arguments["eva_depth"], arguments["eva_numheads"])
    for size, known_sizes in PRIMUS_WIDTHS.items():
        if known_sizes == sizes:
            return f"{family}_{size}"
    return family


def listed(value: Any) -> Any:
    """Return a value with lists instead of tuples and 3 instead of 3.0, as in our plans."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [listed(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _primus_arguments(
    name: str,
    stated: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> dict[str, Any]:
    """Return the arguments of a Primus network.

    LayerScale and the inner norm come from the plan, or from the tensors if the plan does not state
    them.
    """
    if stated.get("num_register_tokens"):
        raise WeightsError(
            f"the file's network has {stated['num_register_tokens']} register tokens, which cannot "
            "be imported",
            code="weights-unknown-network",
        )
    width, depth, heads = _primus_sizes(name, stated, tensors, options)

    # A linear tokenizer's kernel is one token. Convolutional tokenizers have no such kernel.
    kernel = tensors.get("down_projection.proj.weight")
    token_shape = stated.get("patch_embed_size", (8, 8, 8)) if kernel is None else kernel.shape[2:]
    token = _size(token_shape)
    if token is None:
        raise WeightsError(
            f"patch_embed_size {stated.get('patch_embed_size')} of the adaptation plan is not a "
            "size of three axes",
            code="weights-bad-adaptation-plan",
        )

    # Its initial value is overwritten by the loaded weights, so nnU-Net's own is used if the plan
    # states none. Some files state one value per block.
    has_layer_scale = "eva.blocks.0.gamma_1" in tensors
    layer_scale = stated.get("init_values", 0.1 if has_layer_scale else None)
    if isinstance(layer_scale, (list, tuple)):
        layer_scale = layer_scale[0] if layer_scale else None
    if layer_scale is not None and not isinstance(layer_scale, (int, float)):
        raise WeightsError(
            f"init_values {layer_scale!r} of the adaptation plan is not a number",
            code="weights-bad-adaptation-plan",
        )

    has_inner_norm = "eva.blocks.0.attn.norm.weight" in tensors
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "patch_embed_size": list(token),
        "eva_depth": depth,
        "eva_numheads": heads,
        "init_values": None if layer_scale is None else float(layer_scale),
        "scale_attn_inner": bool(stated.get("scale_attn_inner", has_inner_norm)),
    }
    for key in PRIMUS_OPTIONS:
        if stated.get(key) is not None:
            arguments[key] = listed(stated[key])
    return arguments


def _primus_sizes(
    name: str,
    stated: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> PrimusSizes:
    """Return width and depth by the tensors, and the number of heads by the user or the plan.

    Raises:
        WeightsError: the encoder is incomplete or contradicts the plan (code "weights-mismatch"),
            or its number of heads is unknown or impossible (code "weights-heads").
    """
    blocks = [_BLOCK.match(key) for key in tensors]
    numbers = [int(found[1]) for found in blocks if found]
    if not numbers or "eva.norm.weight" not in tensors:
        raise WeightsError(
            "the file has no 'eva.blocks.*' and 'eva.norm.weight': it is not a complete Primus "
            "encoder",
            code="weights-mismatch",
        )
    width = int(tensors["eva.norm.weight"].shape[0])
    depth = max(numbers) + 1

    # The number of heads does not follow from the shape of any tensor.
    preset = PRIMUS_PRESETS.get(name.replace("V2", "").replace("V3", ""))
    heads = options.num_heads or stated.get("eva_numheads") or (preset[2] if preset else None)
    if not isinstance(heads, int) or heads < 1:
        raise WeightsError(
            "the adaptation plan does not state the number of attention heads; add --heads N",
            code="weights-heads",
        )

    # Arguments come before the preset of that name.
    planned: dict[str, Any] = {}
    if stated:
        planned = {"width": stated.get("embed_dim"), "depth": stated.get("eva_depth")}
    elif preset:
        planned = {"width": preset[0], "depth": preset[1]}
    found_sizes = {"width": width, "depth": depth}
    for what, size in planned.items():
        if size is not None and size != found_sizes[what]:
            raise WeightsError(
                f"the adaptation plan describes a {name} of {what} {size}, but the weights have "
                f"{what} {found_sizes[what]}",
                code="weights-mismatch",
            )

    # Each of the three axes takes pairs of channels of every head.
    if width % (6 * heads):
        raise WeightsError(
            f"{heads} attention heads do not divide a width of {width} into multiples of 6 "
            "channels, which rotary embedding needs",
            code="weights-heads",
        )
    return width, depth, heads


def _patch_size(
    source: WeightsFile,
    encoder: EncoderPlan,
    tensors: Mapping[str, Tensor],
    options: ImportOptions,
) -> tuple[Size, list[str]]:
    """Return the patch size of pretraining, and notes about a choice between several.

    It is the first stated size whose grid has as many tokens as the weights have positions.
    """
    candidates: list[Size] = []
    if options.patch_size_vox:
        candidates = [options.patch_size_vox]
    else:
        for plan in (source.plan, source.plan_beside):
            if plan is None:
                continue
            # The most reliable first.
            stated = (
                plan.get("pretrain_patch_size"),
                configuration_of(plan).get("patch_size"),
                plan.get("recommended_downstream_patchsize"),
            )
            sizes = [_size(value) for value in stated]
            candidates += [size for size in sizes if size is not None]

    if not candidates:
        raise WeightsError(
            "the adaptation plan states no patch size; add --patch-size Z Y X",
            code="weights-patch-size",
        )

    first = candidates[0]
    positions = tensors.get("eva.pos_embed")  # (1, tokens, width)
    token = encoder.token_size_vox
    if positions is None:
        # A CNN has no positions; its patch must be a multiple of its stride.
        whole = as_size([max(s // t, 1) * t for s, t in zip(first, token, strict=True)])
        if whole == first:
            return whole, []
        return whole, [f"patch size {first} rounded to {whole}, a multiple of the stride {token}"]

    # Learned positions belong to one grid, so their number shows which statement is right.
    rejected: list[Size] = []
    for size in candidates:
        is_whole = not any(s % t for s, t in zip(size, token, strict=True))
        if is_whole and volume(grid_of(size, token)) == positions.shape[1]:
            if not rejected:
                return size, []
            wrong = " and ".join(str(other) for other in dict.fromkeys(rejected))
            note = f"patch size {size}: it fits the {positions.shape[1]} positions, unlike {wrong}"
            return size, [note]
        rejected.append(size)

    tried = " or ".join(str(size) for size in dict.fromkeys(candidates))
    raise WeightsError(
        f"the weights have {positions.shape[1]} positions, but a patch of {tried} in tokens of "
        f"{token} has another number; add --patch-size Z Y X",
        code="weights-patch-size",
    )


def _size(value: Any) -> Size | None:
    """Return a size of three axes, or None for any other value."""
    if not isinstance(value, Sequence) or len(value) != 3:
        return None
    is_size = all(isinstance(v, (int, float)) and v >= 1 for v in value)
    return as_size(value) if is_size else None


def _in_our_order(
    tensors: dict[str, Tensor],
    grid: Size,
    encoder: EncoderPlan,
    own: Any,
    options: ImportOptions,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors in nnU-Net's order of tokens, and a note about what was done."""
    stated = own.get("token_order") if isinstance(own, Mapping) else None
    # The user's word counts most. Files of others have nnssl's order.
    order = options.token_order or (KEEP if stated == OURS else PERMUTE)
    if order == KEEP:
        reason = "not corrected, because of --token-order"
        if stated == OURS:
            reason = "because the file states that it has nnU-Net's order"
        return tensors, [f"token order kept, {reason}"]

    swapped = swap_plane_axes(tensors, grid, int(encoder.arguments["eva_numheads"]))
    note = (
        "token order corrected: positions and rotary channels from nnssl's (h, w, d) to nnU-Net's "
        "(w, h, d)"
    )
    return swapped, [note]


def _triple(value: Any) -> Spacing | None:
    """Return a spacing of three axes, or None for any other value."""
    if not isinstance(value, Sequence) or len(value) != 3:
        return None
    is_spacing = all(isinstance(v, (int, float)) and v > 0 for v in value)
    return as_spacing(value) if is_spacing else None
