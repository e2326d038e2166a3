"""``encoder.json``: what a pretrained encoder is and what it needs to be used well. Torch-free."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_autoreg.errors import PlanError, UsageError, WeightsError
from nnunet_autoreg.families import missing_arguments
from nnunet_autoreg.geometry import Size, Spacing, grid_of
from nnunet_autoreg.model.verdict import Verdict
from nnunet_autoreg.plan import IntensityWindow, SpacingGroup
from nnunet_autoreg.records import from_jsonable, read_json, sha256_of, write_json

RUNS_FOLDER = "autoreg_pretraining"
NO_WEIGHTS = "none"
CARD_NAME = "encoder.json"
WEIGHTS_NAME = "encoder.safetensors"
CARD_VERSION = 1
MAX_CARD_BYTES, MAX_LEVELS, MAX_VALUES, MAX_NUMBER, MAX_PARAMETERS = 2**24, 20, 10_000, 100_000, 2e9
"""Limits of a card, which may come from anywhere.

A card beyond them describes no encoder, and building its network would take all memory.
"""
IMPORTED = "imported"
"""Key of ``EncoderCard.extra`` that says where imported weights come from."""
DECODER_PREFIXES = ("decoder.stages.", "decoder.transpconvs.")
"""Prefixes of the tensors of a U-Net's decoder that are transferred.

Its segmentation heads are new in every task, and keys under ``decoder.encoder.`` are second names
of the encoder's own tensors.
"""


@dataclass(frozen=True)
class Adaptation:
    """Where the parts that fine-tuning may have to adapt live in the state dict.

    Attributes:
        key_to_encoder: prefix of the encoder.
        key_to_stem: prefix of the part that reads the image.
        keys_to_in_proj: every convolution that reads the image.
        key_to_lpe: the learned positions; None if there are none.
        keys_to_decoder: prefixes of a pretrained decoder, ``DECODER_PREFIXES``; empty if the
            weights contain only the encoder.
    """

    key_to_encoder: str
    key_to_stem: str
    keys_to_in_proj: tuple[str, ...]
    key_to_lpe: str | None
    keys_to_decoder: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderCard:
    """The contract between pretraining and fine-tuning.

    Attributes:
        name: name of the run.
        encoder: value of ``--encoder``.
        class_path: module and class of the network that fine-tuning builds.
        arguments: arguments of that class, without channels, classes and input shape.
        token_size_vox: size of a token, (z, y, x).
        crop_size_vox: size of a crop, (z, y, x). Crop / token is the grid of ``eva.pos_embed``.
        spacing_mm: target spacing of pretraining, (z, y, x).
        modalities: "CT", "MR", ... Every scan that is not CT is z-scored.
        channel_names: channel names of the pretraining scans.
        ct_window: intensities of CT; None if there was no CT among the scans.
        num_input_channels: channels of the stem.
        adaptation: the parts that fine-tuning may have to adapt.
        objective: name of the objective and its settings that matter to a user.
        licences: dataset name -> licence text found beside it ("" if none was).
        num_scans, num_steps: number of scans and steps of the run; 0 for imported weights.
        finished_at: end of the run, or time of the import, as ISO 8601 UTC.
        sha256: hash of ``encoder.safetensors`` beside this card.
        version: version of this format.
        extra: ``imported`` says where imported weights come from.
        spacing_groups: target spacings, if there was more than one; ``spacing_mm`` is that of the
            largest group.
        normalization: nnU-Net's name of the normalisation of every channel. None: nnU-Net's choice
            per channel (CT by the window, all others z-scored).
        verdict: what validation showed; None for weights that were not pretrained here, or by an
            earlier release.
    """

    name: str
    encoder: str
    class_path: str
    arguments: dict[str, Any]
    token_size_vox: Size
    crop_size_vox: Size
    spacing_mm: Spacing
    modalities: tuple[str, ...]
    channel_names: tuple[str, ...]
    ct_window: IntensityWindow | None
    num_input_channels: int
    adaptation: Adaptation
    objective: str
    licences: dict[str, str]
    num_scans: int
    num_steps: int
    finished_at: str
    sha256: str
    version: int = CARD_VERSION
    extra: dict[str, Any] = field(default_factory=dict)
    spacing_groups: tuple[SpacingGroup, ...] = ()
    normalization: str | None = None
    verdict: Verdict | None = None

    @property
    def has_decoder(self) -> bool:
        """Whether the weights hold a pretrained decoder beside the encoder."""
        return bool(self.adaptation.keys_to_decoder)

    @property
    def channels_text(self) -> str:
        """Number and names of the channels: "1 (MRI)". Scans of plain folders have no name."""
        given = [name for name in self.channel_names if name]
        names = ", ".join(given) or "unnamed"
        return f"{self.num_input_channels} ({names})"

    @property
    def licence_line(self) -> str:
        """Licences of the weights as one line for the user; "" if none is stated."""
        stated = [f"{name}: {text}" for name, text in self.licences.items() if text]
        if not stated:
            return ""
        return f"licences of the weights: {'; '.join(stated)}"

    def save(self, folder: Path) -> None:
        """Write ``encoder.json`` into ``folder``."""
        write_json(folder / CARD_NAME, self)


def check_run_name(name: str) -> None:
    """Refuse names that a run's folder, nnU-Net's folder names or ``autoreg_weights`` cannot hold.

    Raises:
        UsageError: it is such a name.
    """
    if name.casefold() == NO_WEIGHTS:
        raise UsageError(
            f"--name {name}: autoreg_weights={NO_WEIGHTS} means training from scratch; use another "
            "name",
            code="run-name",
        )
    has_only_allowed = re.fullmatch(r"[\w.-]+", name) is not None
    if not has_only_allowed or "__" in name or name.startswith("."):
        raise UsageError(
            f"--name {name!r}: use letters, digits, '-', '_' and '.', no '__' and no leading dot",
            code="run-name",
        )


def read_card(folder: Path) -> EncoderCard:
    """Read ``encoder.json`` from a run's folder.

    Raises:
        WeightsError: it is missing, unreadable, of a newer format, or describes no possible
            encoder.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        raise WeightsError(
            f"{folder} holds no {CARD_NAME}; has its pretraining finished?",
            code="card-missing",
        )

    try:
        content = read_json(path, max_bytes=MAX_CARD_BYTES)
    except PlanError as error:
        raise WeightsError(str(error), code="card-unreadable") from error
    return card_from(content, path)


def card_from(content: Any, path: Path) -> EncoderCard:
    """Return the checked card that parsed JSON holds.

    Args:
        path: the file, named in messages.

    Raises:
        WeightsError: it is of a newer format, or describes no possible encoder.
    """
    try:
        card = from_jsonable(EncoderCard, content, str(path))
    except PlanError as error:
        raise WeightsError(str(error), code="card-unreadable") from error

    _check_magnitudes(card, path)
    _check_consistency(card, path)
    return card


def _check_magnitudes(card: EncoderCard, path: Path) -> None:
    """Refuse numbers that no encoder has: a network built from them would take all memory.

    Raises:
        WeightsError: a number is too large or not finite, or a list too long (code "card-huge").
    """
    values: list[tuple[str, object]] = [
        ("arguments", card.arguments),
        ("token_size_vox", list(card.token_size_vox)),
        ("crop_size_vox", list(card.crop_size_vox)),
        ("spacing_mm", list(card.spacing_mm)),
        ("num_input_channels", card.num_input_channels),
    ]

    # A stack instead of recursion: a hostile file may be nested deeper than Python can recurse.
    num_seen = 0
    while values:
        key, value = values.pop()
        num_seen += 1

        num_levels = key.count("[") + key.count(".")
        if num_levels > MAX_LEVELS:
            raise WeightsError(
                f"{path}: arguments has more than {MAX_LEVELS} levels; restore the file",
                code="card-huge",
            )
        if num_seen > MAX_VALUES:
            raise WeightsError(
                f"{path}: arguments has more than {MAX_VALUES} values; restore the file",
                code="card-huge",
            )

        if isinstance(value, dict):
            values += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            values += [(f"{key}[{number}]", inner) for number, inner in enumerate(value)]
        elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
            # NaN fails both comparisons, so that it is refused here too.
            raise WeightsError(
                f"{path}: {key} is larger than any encoder's, at most {MAX_NUMBER:,}; restore the "
                "file",
                code="card-huge",
            )

    num_parameters = _rough_parameters(card.arguments)
    if num_parameters > MAX_PARAMETERS:
        raise WeightsError(
            f"{path}: arguments describe a network of about {num_parameters:.0e} parameters, at "
            f"most {MAX_PARAMETERS:.0e} are possible here; restore the file",
            code="card-huge",
        )


def _rough_parameters(arguments: dict[str, Any]) -> float:
    """Return a lower bound of the number of parameters that the arguments describe.

    It is 0 if they have no known form.
    """
    # A transformer layer has at least its four projections of width x width.
    width, depth = arguments.get("embed_dim"), arguments.get("eva_depth")
    if isinstance(width, int) and isinstance(depth, int):
        return 4.0 * width * width * depth

    features = arguments.get("features_per_stage")
    num_blocks = arguments.get("n_blocks_per_stage")
    if not isinstance(features, list) or not isinstance(num_blocks, list):
        return 0.0

    # A residual block has at least one convolution with a kernel of 3 x 3 x 3 = 27.
    total = 0.0
    for width, number in zip(features, num_blocks, strict=False):
        if isinstance(width, int) and isinstance(number, int):
            total += 27.0 * width * width * number
    return total


def _check_consistency(card: EncoderCard, path: Path) -> None:
    """Refuse a card whose values contradict each other.

    Raises:
        WeightsError: they do (code "card-invalid").
    """
    sizes: list[float] = [
        *card.token_size_vox,
        *card.crop_size_vox,
        *card.spacing_mm,
        card.num_input_channels,
    ]
    for group in card.spacing_groups:
        sizes += [*group.native_mm, *group.spacing_mm]

    if not all(value > 0 for value in sizes):
        raise WeightsError(
            f"{path}: token size, crop size, spacing and channels have to be greater than 0; "
            "restore the file",
            code="card-invalid",
        )

    decoder = card.adaptation.keys_to_decoder
    if decoder and set(decoder) != set(DECODER_PREFIXES):
        raise WeightsError(
            f"{path}: adaptation.keys_to_decoder is {list(decoder)}; only "
            f"{list(DECODER_PREFIXES)}, or nothing, can be transferred: restore the file",
            code="card-invalid",
        )

    try:
        missing = missing_arguments(card.class_path, card.arguments)
    except PlanError as error:
        raise WeightsError(f"{path}: {error}", code="card-invalid") from error

    if missing:
        raise WeightsError(
            f"{path}: arguments lacks {', '.join(missing)}; restore the file",
            code="card-invalid",
        )

    try:
        grid_of(card.crop_size_vox, card.token_size_vox)
    except ValueError as error:
        raise WeightsError(f"{path}: crop_size_vox: {error}", code="card-invalid") from error


def verify_weights(weights: Path, sha256: str) -> None:
    """Check a weights file against its recorded hash.

    Raises:
        WeightsError: it is missing or its bytes differ.
    """
    if not weights.is_file():
        raise WeightsError(
            f"the weights {weights} do not exist; put the file back, or plan again",
            code="weights-missing",
        )

    found = sha256_of(weights)
    if found != sha256:
        raise WeightsError(
            f"{weights} has sha256 {found[:12]}..., {sha256[:12]}... was expected: the file is "
            "damaged or was replaced; restore it, or plan again",
            code="weights-changed",
        )
