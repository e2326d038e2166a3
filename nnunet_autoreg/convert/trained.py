"""Import the network of a trained nnU-Net model, so that other trainings can start from it.

The checkpoint of a trained model holds everything that is needed: the plans, the configuration, the
description of the dataset, and the weights. A CNN's decoder is imported as well.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_autoreg.convert.imported import Imported, ImportOptions, network_of
from nnunet_autoreg.convert.licences import NONE_STATED
from nnunet_autoreg.convert.nnssl import Z_SCORE, listed, name_of
from nnunet_autoreg.convert.source import WeightsFile
from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.families import (
    CLASS_PATHS,
    CNN_ARGUMENTS,
    RESENC,
    check_argument_types,
    token_size_of,
)
from nnunet_autoreg.finetune.block import check_arguments
from nnunet_autoreg.finetune.floats import as_float
from nnunet_autoreg.finetune.network import GUARD_NAME, encoder_prefixes, own_arguments
from nnunet_autoreg.finetune.resolve import is_ct
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.model.card import DECODER_PREFIXES
from nnunet_autoreg.plan import EncoderPlan, IntensityWindow
from nnunet_autoreg.records import from_jsonable, sha256_of

OPTIONAL_ARGUMENTS = ("dropout_op", "dropout_op_kwargs")
CT_SCHEME = "CTNormalization"


def import_trained(source: WeightsFile, options: ImportOptions) -> Imported:
    """Return encoder and decoder of a trained nnU-Net model under our names.

    Raises:
        WeightsError: the plans in the checkpoint cannot be read (code "weights-bad-plans"), or the
            network cannot be fine-tuned here (code "weights-unknown-network").
    """
    stated = _read_plans(source)
    channel_names = stated.channel_names
    if stated.is_cascade:
        raise WeightsError(
            f"{source.file} is the second stage of a cascade, which also reads the result of the "
            "first; give the model of 3d_lowres or 3d_fullres",
            code="weights-unknown-network",
        )

    # The network shows which tensors belong to the encoder.
    encoder = _encoder(stated, source)
    network = network_of(encoder, stated.crop_size_vox, len(channel_names))
    tensors = as_float(source.tensors, source.file)
    decoder: dict[str, Tensor] = {}
    if encoder.class_path == CLASS_PATHS[RESENC]:
        decoder = _beginning_with(tensors, DECODER_PREFIXES)

    modalities, notes = options.modalities, []
    if not modalities:
        # Only CT is distinguished, as in nnU-Net.
        found = {"CT" if is_ct(name) else "MR" for name in channel_names}
        modalities = tuple(sorted(found))
        notes.append(
            f"modalities: {'/'.join(modalities)}, from the channels {', '.join(channel_names)} "
            "(--modality states others)",
        )

    # None means nnU-Net's usual normalisation of every channel.
    normalization = None
    usual = [CT_SCHEME if is_ct(name) else Z_SCORE for name in channel_names]
    if len(set(stated.schemes)) == 1 and stated.schemes != usual:
        normalization = stated.schemes[0]
    elif stated.schemes != usual:
        notes.append(
            f"normalisation: {', '.join(stated.schemes)} cannot be kept, as it differs between "
            "channels; nnU-Net's usual one is planned",
        )

    # The rest of a dataset's name may say more than the user wants to pass on.
    dataset = public_dataset(stated.dataset)
    trainer = str(source.rest["trainer_name"])
    return Imported(
        encoder=encoder,
        tensors=_beginning_with(tensors, encoder_prefixes(network)),
        decoder=decoder,
        crop_size_vox=options.patch_size_vox or stated.crop_size_vox,
        spacing_mm=options.spacing_mm or stated.spacing_mm,
        modalities=modalities,
        channel_names=channel_names,
        num_input_channels=len(channel_names),
        ct_window=stated.ct_window,
        licences={dataset: options.licence or NONE_STATED},
        objective=f"supervised segmentation of {dataset} ({trainer})",
        normalization=normalization,
        notes=tuple(notes),
        origin={
            "format": "nnU-Net",
            "file": source.file.name,
            "fold": PurePosixPath(source.member or source.file.as_posix()).parent.name,
            "sha256": sha256_of(source.file),
        },
    )


@dataclass(frozen=True)
class _Stated:
    """Hold what a checkpoint states about network and data.

    Attributes:
        network: class name without its package.
        arguments: of the network.
        schemes: nnU-Net's normalisation of every channel.
        ct_window: intensities by which CT was normalised; None without CT.
        is_cascade: whether the network reads the result of another one.
    """

    network: str
    arguments: dict[str, Any]
    crop_size_vox: Size
    spacing_mm: Spacing
    dataset: str
    channel_names: tuple[str, ...]
    schemes: list[str]
    ct_window: IntensityWindow | None
    is_cascade: bool


def _read_plans(source: WeightsFile) -> _Stated:
    """Return what the plans in a checkpoint state.

    Raises:
        WeightsError: they have an unknown form (code "weights-bad-plans").
    """
    arguments = source.rest["init_args"]
    try:
        plans: dict[str, Any] = arguments["plans"]
        with warnings.catch_warnings():
            # About plans of nnU-Net before 2.4, which it converts.
            warnings.simplefilter("ignore")
            manager = PlansManager(copy.deepcopy(plans))
            configuration = manager.get_configuration(str(arguments["configuration"]))

        # Older datasets call the channels "modality".
        dataset = arguments["dataset_json"]
        names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
        channel_names = tuple(str(name) for name in names.values())

        # All channels of CT have one window in our plans: that of the first.
        window = None
        properties = plans["foreground_intensity_properties_per_channel"]
        ct_channels = [str(index) for index, name in enumerate(channel_names) if is_ct(name)]
        if ct_channels:
            intensities = properties[ct_channels[0]]
            values = {key: float(value) for key, value in intensities.items()}
            window = from_jsonable(IntensityWindow, values, "foreground_intensity_properties")

        return _Stated(
            network=str(configuration.network_arch_class_name).rpartition(".")[2],
            arguments=dict(configuration.network_arch_init_kwargs),
            crop_size_vox=as_size([int(side) for side in configuration.patch_size]),
            spacing_mm=as_spacing([float(side) for side in configuration.spacing]),
            dataset=str(plans.get("dataset_name")),
            channel_names=channel_names,
            schemes=[str(scheme) for scheme in configuration.normalization_schemes],
            ct_window=window,
            is_cascade=configuration.previous_stage_name is not None,
        )
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        AssertionError,
        PlanError,
    ) as error:
        raise WeightsError(
            f"the plans in {source.file} cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]}); give a checkpoint that nnU-Net v2 has written",
            code="weights-bad-plans",
        ) from error


def _encoder(stated: _Stated, source: WeightsFile) -> EncoderPlan:
    """Return the network of a trained model as an encoder of ours.

    Raises:
        WeightsError: it cannot be fine-tuned here (code "weights-unknown-network"), or arguments
            are missing or wrong (code "weights-bad-plans").
    """
    cnn_class = CLASS_PATHS[RESENC]
    if stated.network == GUARD_NAME:
        # Our own trainers, for transformers and in earlier releases for CNNs as well.
        class_path = str(stated.arguments.get("class_path"))
        arguments = own_arguments(stated.arguments)
    elif stated.network == cnn_class.rpartition(".")[2]:
        class_path = cnn_class
        names = (*CNN_ARGUMENTS, *OPTIONAL_ARGUMENTS)
        arguments = {name: listed(stated.arguments.get(name)) for name in names}
    else:
        raise WeightsError(
            f"{source.file} holds a {stated.network}, which cannot be fine-tuned here; supported "
            "are the networks of nnU-Net's ResEnc planners and of our own trainers. To start from "
            "it, use nnUNetv2_train with -pretrained_weights and the plans of the same network",
            code="weights-unknown-network",
        )

    where = f"{source.file}: architecture"
    try:
        check_arguments(arguments, where)
        check_argument_types(class_path, arguments, where)
        token_size = token_size_of(class_path, arguments)
    except PlanError as error:
        raise WeightsError(f"{error}", code="weights-bad-plans") from error
    return EncoderPlan(name_of(class_path, arguments), class_path, arguments, token_size)


def _beginning_with(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors with these prefixes; rotary tables are built for each grid."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefixes) and ".rope." not in key
    }
