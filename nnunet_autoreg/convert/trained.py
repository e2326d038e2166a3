"""Import the network of a trained nnU-Net model, so that other trainings can start from it.

The checkpoint of a trained model holds everything that is needed: the plans, the configuration, the
description of the dataset, and the weights. A CNN's decoder is imported as well.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
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
from nnunet_autoreg.geometry import as_size, as_spacing
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
    arguments = source.rest["init_args"]
    with _errors_in_one_line(source):
        plans: dict[str, Any] = arguments["plans"]
        manager = _configuration(plans, str(arguments["configuration"]))
        crop = as_size([int(side) for side in manager.patch_size])
        spacing = as_spacing([float(side) for side in manager.spacing])
        schemes = [str(scheme) for scheme in manager.normalization_schemes]
        channel_names = _channel_names(arguments["dataset_json"])
        window = _ct_window(plans, channel_names)
        is_cascade = manager.previous_stage_name is not None
    if is_cascade:
        raise WeightsError(
            f"{source.file} is the second stage of a cascade, which also reads the result of the "
            "first; give the model of 3d_lowres or 3d_fullres",
            code="weights-unknown-network",
        )

    encoder = _encoder(manager, source)
    network = network_of(encoder, crop, len(channel_names))
    tensors = as_float(source.tensors, source.file)
    decoder: dict[str, Tensor] = {}
    if encoder.class_path == CLASS_PATHS[RESENC]:
        decoder = _beginning_with(tensors, DECODER_PREFIXES)

    modalities, notes = options.modalities, []
    if not modalities:
        modalities = _modalities(channel_names)
        notes.append(
            f"modalities: {'/'.join(modalities)}, from the channels {', '.join(channel_names)} "
            "(--modality states others)",
        )
    normalization, normalization_notes = _normalization(schemes, channel_names)

    # The rest of a dataset's name may say more than the user wants to pass on.
    dataset = public_dataset(str(plans.get("dataset_name")))
    trainer = str(source.rest["trainer_name"])
    return Imported(
        encoder=encoder,
        tensors=_beginning_with(tensors, encoder_prefixes(network)),
        decoder=decoder,
        crop_size_vox=options.patch_size_vox or crop,
        spacing_mm=options.spacing_mm or spacing,
        modalities=modalities,
        channel_names=channel_names,
        num_input_channels=len(channel_names),
        ct_window=window,
        licences={dataset: options.licence or NONE_STATED},
        objective=f"supervised segmentation of {dataset} ({trainer})",
        normalization=normalization,
        notes=(*notes, *normalization_notes),
        origin={
            "format": "nnU-Net",
            "file": source.file.name,
            "fold": PurePosixPath(source.member or source.file.as_posix()).parent.name,
            "sha256": sha256_of(source.file),
        },
    )


@contextmanager
def _errors_in_one_line(source: WeightsFile) -> Iterator[None]:
    """Turn the errors that follow from plans of an unknown form into one line."""
    try:
        yield
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


def _configuration(plans: dict[str, Any], name: str) -> ConfigurationManager:
    """Return a configuration with the values that it inherits, and in today's form."""
    with warnings.catch_warnings():
        # About plans of nnU-Net before 2.4, which it converts.
        warnings.simplefilter("ignore")
        return PlansManager(copy.deepcopy(plans)).get_configuration(name)


def _encoder(manager: ConfigurationManager, source: WeightsFile) -> EncoderPlan:
    """Return the network of a configuration as an encoder of ours."""
    with _errors_in_one_line(source):
        name = str(manager.network_arch_class_name).rpartition(".")[2]
        stated: dict[str, Any] = dict(manager.network_arch_init_kwargs)

    family_class = CLASS_PATHS[RESENC]
    if name == GUARD_NAME:
        # Our own trainers, for transformers and in earlier releases for CNNs as well.
        class_path, arguments = str(stated.get("class_path")), own_arguments(stated)
    elif name == family_class.rpartition(".")[2]:
        class_path = family_class
        arguments = {key: listed(stated.get(key)) for key in (*CNN_ARGUMENTS, *OPTIONAL_ARGUMENTS)}
    else:
        raise WeightsError(
            f"{source.file} holds a {name}, which cannot be fine-tuned here; supported are the "
            "networks of nnU-Net's ResEnc planners and of our own trainers. To start from it, use "
            "nnUNetv2_train with -pretrained_weights and the plans of the same network",
            code="weights-unknown-network",
        )

    try:
        where = f"{source.file}: architecture"
        check_arguments(arguments, where)
        check_argument_types(class_path, arguments, where)
        token_size = token_size_of(class_path, arguments)
    except PlanError as error:
        raise WeightsError(f"{error}", code="weights-bad-plans") from error
    return EncoderPlan(name_of(class_path, arguments), class_path, arguments, token_size)


def _channel_names(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    # Older datasets call the channels "modality".
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    return tuple(str(name) for name in names.values())


def _beginning_with(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors with these prefixes; rotary tables are built for each grid."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefixes) and ".rope." not in key
    }


def _modalities(channel_names: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities of channels; only CT is distinguished, as in nnU-Net."""
    found = {"CT" if is_ct(name) else "MR" for name in channel_names}
    return tuple(sorted(found))


def _normalization(
    schemes: Sequence[str],
    channel_names: Sequence[str],
) -> tuple[str | None, list[str]]:
    """Return the one normalisation of all channels, None for nnU-Net's usual ones, and notes."""
    usual = [CT_SCHEME if is_ct(name) else Z_SCORE for name in channel_names]
    if list(schemes) == usual:
        return None, []
    if len(set(schemes)) == 1:
        return schemes[0], []
    return None, [
        f"normalisation: {', '.join(schemes)} cannot be kept, as it differs between channels; "
        "nnU-Net's usual one is planned",
    ]


def _ct_window(plans: Mapping[str, Any], channel_names: Sequence[str]) -> IntensityWindow | None:
    """Return the intensities by which nnU-Net has normalised CT; None without CT."""
    properties = plans["foreground_intensity_properties_per_channel"]
    for index, name in enumerate(channel_names):
        if is_ct(name):
            values = {key: float(value) for key, value in properties[str(index)].items()}
            return from_jsonable(IntensityWindow, values, "foreground_intensity_properties")
    return None
