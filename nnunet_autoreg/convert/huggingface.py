"""Write and read the folder of a repository on Hugging Face.

``model.safetensors`` holds encoder and decoder, byte for byte as the pretraining run has them.
``config.json`` holds the whole ``encoder.json``, so that nothing is lost on the way. ``README.md``
is the model card.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_autoreg.convert.imported import Imported, ImportOptions
from nnunet_autoreg.convert.licences import stated_by_user
from nnunet_autoreg.convert.model_card import model_card
from nnunet_autoreg.convert.source import CONFIG_NAME, MODEL_NAME, OWN_KEY, WeightsFile
from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.finetune.block import check_arguments
from nnunet_autoreg.io.addresses import repository_of
from nnunet_autoreg.model.card import IMPORTED, EncoderCard, card_from, verify_weights
from nnunet_autoreg.plan import EncoderPlan

README_NAME = "README.md"
MODEL_TYPE = "nnunet_autoreg"


def huggingface_contents(
    card: EncoderCard,
    weights: Path,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of each file of the folder, by name.

    Args:
        weights: ``encoder.safetensors`` of the run, which is copied.
        own: what only this package reads.
    """
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [card.class_path.rpartition(".")[2]],
        OWN_KEY: own,
    }
    return {README_NAME: model_card(card), CONFIG_NAME: config, MODEL_NAME: weights}


def import_huggingface(source: WeightsFile, options: ImportOptions) -> Imported:
    """Return the encoder of such a folder.

    Raises:
        WeightsError: config and weights contradict each other, the network is unknown, or the user
            states what the folder states already (code "weights-option-unused").
    """
    card = _card_of(source)
    verify_weights(source.file, card.sha256)

    # config.json is complete, so that such an option could only contradict it.
    unused = {
        "--token-order": options.token_order,
        "--heads": options.num_heads,
        "--patch-size": options.patch_size_vox,
    }
    given = [flag for flag, value in unused.items() if value]
    if given:
        raise WeightsError(
            f"{' and '.join(given)}: {CONFIG_NAME} beside {source.file} states this; leave it out",
            code="weights-option-unused",
        )

    # model.safetensors holds both parts together.
    encoder: dict[str, Any] = {}
    decoder: dict[str, Any] = {}
    for key, tensor in source.tensors.items():
        part = decoder if key.startswith(card.adaptation.keys_to_decoder) else encoder
        part[key] = tensor

    licences = card.licences
    if options.licence:
        names = list(licences) or [card.name]
        licences = dict.fromkeys(names, stated_by_user(options.licence))

    # What ``encoder.json`` will say about the folder.
    origin: dict[str, Any] = {
        "format": "Hugging Face",
        "file": source.file.name,
        "sha256": card.sha256,
    }
    repository, commit = repository_of(source.file)
    if repository:
        origin.update(repository=repository, commit=commit)

    # Weights that were imported before they were exported pass their own sources on.
    earlier = card.extra.get(IMPORTED)
    if isinstance(earlier, Mapping) and earlier.get("citations"):
        origin["citations"] = earlier["citations"]

    return Imported(
        encoder=EncoderPlan(card.encoder, card.class_path, card.arguments, card.token_size_vox),
        tensors=encoder,
        decoder=decoder,
        crop_size_vox=card.crop_size_vox,
        spacing_mm=options.spacing_mm or card.spacing_mm,
        modalities=options.modalities or card.modalities,
        num_input_channels=card.num_input_channels,
        licences=licences,
        objective=card.objective,
        normalization=card.normalization,
        origin=origin,
        card=card,
    )


def _card_of(source: WeightsFile) -> EncoderCard:
    """Return the checked card in ``config.json``, which comes from anywhere."""
    where = source.file.parent / CONFIG_NAME
    own = source.rest[OWN_KEY]
    if not isinstance(own, Mapping) or "card" not in own:
        raise WeightsError(
            f"{where}: '{OWN_KEY}' holds no card; download the repository again",
            code="weights-bad-config",
        )

    card = card_from(own["card"], where)
    try:
        # Names of layers are imported when the network is built.
        check_arguments(card.arguments, str(where))
    except PlanError as error:
        raise WeightsError(str(error), code="weights-bad-config") from error
    return card
