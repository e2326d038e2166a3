"""Carry out ``autoreg_weights export``: write a finished pretraining in a format for others.

Hugging Face's form is a folder for a repository (``huggingface.py``). nnssl's format is
``checkpoint_final.pth``, ``adaptation_plan.json`` and ``config.json``, for the trainers
``PretrainedTrainer*`` of nnU-Net's master branch. It has no name for a ViT, so a ViT is written as
AR-SSL4M's own checkpoint.
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_autoreg import __version__
from nnunet_autoreg.convert.ar_ssl4m import to_theirs
from nnunet_autoreg.convert.choices import HUGGINGFACE_FORM, NNSSL_FORM, NNSSL_ORDER, OURS
from nnunet_autoreg.convert.huggingface import huggingface_contents
from nnunet_autoreg.convert.imported import checked_tensors, names_of, network_of
from nnunet_autoreg.convert.licences import NONE_STATED
from nnunet_autoreg.convert.nnssl import PRIMUS_PRESETS
from nnunet_autoreg.convert.source import (
    ADAPTATION_NAME,
    CHECKPOINT_NAME,
    CONFIG_NAME,
    MODEL_NAME,
    OWN_KEY,
    PLAN_KEY,
    WEIGHTS_KEY,
)
from nnunet_autoreg.convert.token_order import swap_plane_axes
from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.families import (
    PRIMUS,
    PRIMUS_V2,
    PRIMUS_V3,
    RESENC,
    VIT,
    family_of,
    has_transformer,
)
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.model.card import (
    DECODER_PREFIXES,
    IMPORTED,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.model.encoders import IMPORTED_ARGUMENTS
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.objectives.registered.autoregressive import NAME as AUTOREGRESSIVE
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import (
    atomic_path,
    read_json,
    sha256_of,
    to_jsonable,
    write_json,
    write_text,
)
from nnunet_autoreg.safe_load import load_plain

EXPORTED_NAMES = (CHECKPOINT_NAME, MODEL_NAME, ADAPTATION_NAME, CONFIG_NAME)
"""Names of files of all forms. A folder that holds two forms would be ambiguous."""
TRANSFORMERS = (PRIMUS, PRIMUS_V2, PRIMUS_V3)
CLASS_NAMES = {PRIMUS_V2: "PrimusV2", PRIMUS_V3: "PrimusV3", RESENC: "ResidualEncoderUNet"}
PRESET_ARGUMENTS = {
    "embed_dim",
    "patch_embed_size",
    "eva_depth",
    "eva_numheads",
    "init_values",
    "scale_attn_inner",
}
"""Arguments that a preset fixes by its name; a network with others is not a preset."""
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
MASK_RESAMPLING = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Exported:
    """Hold the files written, and the limits of the format."""

    files: tuple[Path, ...]
    card: EncoderCard
    warnings: tuple[str, ...]


def export_weights(
    weights: Path,
    folder: Path,
    form: str = NNSSL_FORM,
    token_order: str = OURS,
) -> Exported:
    """Write the encoder of a finished run into ``folder``.

    A kill at any moment leaves no checkpoint, or a whole one. The same export can be repeated: it
    writes the files that are missing, if there are any.

    Args:
        weights: ``encoder.safetensors`` of a finished run.
        form: one of ``choices.FORMS``.
        token_order: token order of a transformer in nnssl's form, ``OURS`` or ``NNSSL_ORDER``.

    Raises:
        WeightsError: the run is damaged, the folder holds other files of these names (code
            "weights-export-exists"), or the tokens cannot be reordered (code
            "weights-token-order").
    """
    card = read_card(weights.parent)
    verify_weights(weights, card.sha256)
    encoder = EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox)
    network = network_of(encoder, card.crop_size_vox, card.num_input_channels)

    # Readers of nnssl's format use the encoder only.
    all_tensors = read_tensors(weights)
    encoder_tensors = dict(all_tensors)
    if card.has_decoder:
        for key in all_tensors:
            if key.startswith(DECODER_PREFIXES):
                del encoder_tensors[key]

    num_decoder = len(all_tensors) - len(encoder_tensors)
    whole_card = card
    card = replace(card, adaptation=replace(card.adaptation, keys_to_decoder=()))
    tensors = checked_tensors(network, encoder_tensors, str(weights))

    if token_order == NNSSL_ORDER:
        tensors = _in_nnssl_order(card, tensors, form)

    if form == HUGGINGFACE_FORM:
        # This form is ours, so that it holds the decoder as well.
        contents = huggingface_contents(whole_card, weights, _own(whole_card))
        warnings: tuple[str, ...] = ()
        num_decoder = 0
    elif family_of(card.class_path) == VIT:
        contents, warnings = _vit_contents(card, tensors)
    else:
        contents, warnings = _nnssl_contents(card, tensors, network, token_order)

    if num_decoder:
        warnings = (
            *warnings,
            f"the {num_decoder} tensors of the pretrained decoder are left out: readers of this "
            "format use the encoder only",
        )

    _write_files(folder, contents)
    return Exported(tuple(folder / name for name in contents), card, warnings)


def _in_nnssl_order(card: EncoderCard, tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """Return a transformer's tensors for readers that flatten tokens as (h, w, d).

    Raises:
        WeightsError: there are no such readers of this form or encoder, or the grid of tokens is
            not square (code "weights-token-order").
    """
    flag = "--token-order nnssl"
    if form != NNSSL_FORM or family_of(card.class_path) not in TRANSFORMERS:
        raise WeightsError(
            f"{flag} is only for Primus encoders in nnssl's form, and '{card.name}' is a "
            f"{card.encoder} in the form {form}; leave it out",
            code="weights-token-order",
        )

    grid = grid_of(card.crop_size_vox, card.token_size_vox)
    if grid[0] != grid[1]:
        raise WeightsError(
            f"{flag}: the grid of tokens of '{card.name}' is {grid}, and only grids whose first "
            "two axes are equal can be reordered; leave it out",
            code="weights-token-order",
        )
    return swap_plane_axes(tensors, grid, int(card.arguments["eva_numheads"]))


def _vit_contents(
    card: EncoderCard,
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return AR-SSL4M's checkpoint by its file name, and what it lacks."""
    checkpoint = {
        "state_dict": to_theirs(tensors),
        "citations": _citations(card),
        OWN_KEY: _own(card),
    }
    warning = (
        "nnssl's format has no name for a ViT, so this is AR-SSL4M's own form, for volumes in the "
        "order (x, y, z). It lacks the 2 tensors of the prediction head, which fine-tuning does "
        "not use"
    )
    return {CHECKPOINT_NAME: checkpoint}, (warning,)


def _nnssl_contents(
    card: EncoderCard,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    token_order: str,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the contents of nnssl's three files by name, and what they cannot express."""
    # Readers of the format load encoder and stem strictly, by every name that a tensor has.
    aliased = {}
    for first, names in names_of(network).items():
        aliased.update(dict.fromkeys(names, tensors[first]))

    plan, warnings = adaptation_plan(card, aliased)
    trainer = {"trainer_name": "autoreg_pretrain"}
    checkpoint = {
        WEIGHTS_KEY: aliased,
        PLAN_KEY: plan,
        "citations": _citations(card),
        **trainer,
        OWN_KEY: _own(card, token_order),
    }
    config = {
        "model_type": "nnssl",
        "architectures": [plan["architecture_plans"]["arch_class_name"]],
    }
    contents = {
        CHECKPOINT_NAME: checkpoint,
        ADAPTATION_NAME: {**plan, **trainer},
        CONFIG_NAME: config,
    }
    return contents, warnings


def _write_files(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write the files that are missing, each of them whole or not at all, the weights last.

    Args:
        contents: by name: a text, a file to copy, or what a checkpoint or a JSON file holds.

    Raises:
        WeightsError: a file of one of these names holds something else; nothing was written.
    """
    names = (*EXPORTED_NAMES, *(name for name in contents if name not in EXPORTED_NAMES))
    existing = [name for name in names if (folder / name).exists()]
    foreign = []
    for name in existing:
        # What an interrupted export of the same run has left is kept.
        if name not in contents or not _holds(folder / name, contents[name]):
            foreign.append(name)

    if foreign:
        raise WeightsError(
            f"-o {folder} already holds {', '.join(foreign)} with other content; choose another "
            "folder, or remove these files",
            code="weights-export-exists",
        )

    # What a kill while a file was being written has left.
    for name in names:
        for leftover in folder.glob(f".{name}.*.tmp"):
            leftover.unlink()

    # Nobody reads the other files without the weights, so these complete the export.
    for name in sorted(contents, key=lambda name: name in (CHECKPOINT_NAME, MODEL_NAME)):
        content = contents[name]
        if name in existing:
            continue
        if isinstance(content, str):
            write_text(folder / name, content)
        elif isinstance(content, Path):
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(content, temporary)
        elif name == CHECKPOINT_NAME:
            # Through memory: torch reports a full disk as a bug in torch, and would write the
            # temporary name, with the name of this computer, into the file.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(buffer.getbuffer())
        else:
            write_json(folder / name, content)


def _holds(file: Path, content: Any) -> bool:
    """Return whether a file has the content that an export would write."""
    try:
        if isinstance(content, str):
            return file.read_bytes() == content.encode()
        if isinstance(content, Path):
            return sha256_of(file) == sha256_of(content)
        found = load_plain(file) if file.name == CHECKPOINT_NAME else read_json(file)
    except (WeightsError, PlanError, OSError):
        return False
    return _is_equal(found, content)


def _is_equal(found: Any, expected: Any) -> bool:
    """Return whether two nested values agree; lists and tuples count as the same."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return False
        return all(_is_equal(found[key], expected[key]) for key in found)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return False
        return all(map(_is_equal, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def adaptation_plan(
    card: EncoderCard,
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return nnssl's adaptation plan for an encoder, and one line for what it cannot express."""
    architecture, warnings = _architecture(card)
    patch = [int(v) for v in card.crop_size_vox]
    keys = card.adaptation

    # Readers of the format give all listed layers the value of the first one, but the stem of a
    # PrimusV2 lists a second convolution of another shape.
    shape = tensors[f"{keys.keys_to_in_proj[0]}.weight"].shape
    input_layers = []
    for name in keys.keys_to_in_proj:
        if tensors[f"{name}.weight"].shape == shape:
            input_layers.append(name)

    plan = {
        "architecture_plans": architecture,
        "pretrain_plan": _pretrain_plan(card),
        "pretrain_num_input_channels": int(card.num_input_channels),
        "recommended_downstream_patchsize": patch,
        "pretrain_patch_size": patch,
        "key_to_encoder": keys.key_to_encoder,
        "key_to_stem": keys.key_to_stem,
        "keys_to_in_proj": input_layers,
        "key_to_lpe": keys.key_to_lpe,
    }

    # What the format has no field for.
    if card.ct_window is not None:
        low, high = card.ct_window.percentile_00_5, card.ct_window.percentile_99_5
        warnings.append(
            f"CT was pretrained with a Hounsfield window of {low:g} to {high:g}. nnssl's format "
            f"cannot express it, and its readers z-score CT; the window is kept under '{OWN_KEY}'",
        )

    if len(card.spacing_groups) > 1:
        warnings.append(
            f"it was pretrained at {len(card.spacing_groups)} target spacings; nnssl's format has "
            f"one, {list(card.spacing_mm)} mm",
        )
    return plan, tuple(warnings)


def _architecture(card: EncoderCard) -> tuple[dict[str, Any], list[str]]:
    """Return ``architecture_plans`` of the adaptation plan, and warnings about its readers."""
    family, arguments = family_of(card.class_path), card.arguments
    if family == RESENC:
        if arguments == ENCODERS["resenc_l"].arguments:
            return _described("ResEncL", None, None), []
        return _described(CLASS_NAMES[RESENC], dict(arguments), list(IMPORTED_ARGUMENTS)), []

    # The presets of dynamic_network_architectures have LayerScale, an inner norm and tokens of 8
    # voxels. The first value of LayerScale does not matter, because the weights replace it.
    sizes = (arguments["embed_dim"], arguments["eva_depth"], arguments["eva_numheads"])
    is_preset = (
        arguments.get("init_values") is not None
        and bool(arguments.get("scale_attn_inner"))
        and arguments["patch_embed_size"] == [8, 8, 8]
        and arguments.keys() <= PRESET_ARGUMENTS
    )
    if family == PRIMUS and is_preset:
        for name, preset_sizes in PRIMUS_PRESETS.items():
            if preset_sizes == sizes and name != "PrimusX":
                return _described(name, None, None), []

    # Without a preset that fits, all arguments are written out under the format's names.
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
    }
    for key in ("depth_per_level", "ch_per_level", "add_skips"):
        if key in arguments:
            kwargs[key] = arguments[key]

    if family == PRIMUS:
        warning = (
            "in nnU-Net's master branch use -tr PretrainedTrainer_Primusx: this encoder is none of "
            "the presets PrimusS, B, M and L there"
        )
        return _described("PrimusX", kwargs, []), [warning]

    name = CLASS_NAMES[family]
    warning = f"no trainer of nnU-Net's master branch builds a {name}; the file follows the format"
    return _described(name, kwargs, []), [warning]


def _described(
    name: str,
    arguments: dict[str, Any] | None,
    imported: list[str] | None,
) -> dict[str, Any]:
    return {
        "arch_class_name": name,
        "arch_kwargs": arguments,
        "arch_kwargs_requiring_import": imported,
    }


def _pretrain_plan(card: EncoderCard) -> dict[str, Any]:
    """Return the part of the adaptation plan that describes the pretraining data."""
    # nnssl's two styles of resampling: to 1 mm, or to the median of the data.
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
    """Return the works that users of the file have to cite: this pretraining, then its sources."""
    stated = [f"{name}: {text or NONE_STATED}" for name, text in card.licences.items()]
    licences = "; ".join(stated) or NONE_STATED
    text = (
        f"Encoder '{card.name}' ({card.encoder}), {card.objective}, by nnunet-autoreg "
        f"{__version__}. Licences of what it was made from: {licences}"
    )
    citations: list[dict[str, Any]] = [
        {"type": "Pretraining", "name": card.name, "apa_citations": [text], "bibtex_citations": []},
    ]

    # Weights that were imported themselves pass their sources on.
    origin = card.extra.get(IMPORTED)
    theirs = origin.get("citations") if isinstance(origin, Mapping) else None
    if isinstance(theirs, list):
        citations += [dict(c) for c in theirs if isinstance(c, Mapping)]
    return citations


def _own(card: EncoderCard, token_order: str = OURS) -> dict[str, Any]:
    """Return the part that only this package reads: the whole card."""
    # A card's text begins with the objective's name; see ``ObjectiveKind.summary``. Convolutions of
    # a CNN look in all directions, regardless of the objective.
    objective_name = card.objective.partition(" ")[0]
    is_transformer = has_transformer(family_of(card.class_path))
    return {
        "version": __version__,
        "token_order": token_order,
        "causal": is_transformer and objective_name == AUTOREGRESSIVE,
        "card": _plain(to_jsonable(card)),
    }


def _plain(value: Any) -> Any:
    """Return a value with plain dicts and lists only, which torch's safe loading accepts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
