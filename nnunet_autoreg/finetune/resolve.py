"""Which pretrained weights a plan uses: the user's word if there is one, else the newest finished
run that suits. Torch-free.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.errors import PlanError, WeightsError, did_you_mean
from nnunet_autoreg.families import PRIMUS, family_of
from nnunet_autoreg.finetune.block import PlannedWeights, check_class
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.geometry import Spacing, spacing_ratio
from nnunet_autoreg.model.card import (
    CARD_NAME,
    IMPORTED,
    NO_WEIGHTS,
    RUNS_FOLDER,
    WEIGHTS_NAME,
    EncoderCard,
    read_card,
    verify_weights,
)
from nnunet_autoreg.planning.tokens import objection_to_flat_tokens

VARIABLE = "autoreg_weights"
MAX_SPACING_RATIO = 2.0


@dataclass(frozen=True)
class DatasetTraits:
    """What suits depends on: name, channel names in order, target spacing in mm."""

    name: str
    channel_names: tuple[str, ...]
    spacing_mm: Spacing

    @property
    def is_ct(self) -> bool:
        """Whether one of the channels is CT, by nnU-Net's own rule."""
        return any(is_ct(name) for name in self.channel_names)


@dataclass(frozen=True)
class Choice:
    """The weights of a plan.

    Attributes:
        card, file: what they are and where they lie; both None for training from scratch only.
        reason: why these.
        rejected: one line per newer run that was passed over.
        warnings: what speaks against weights that the user chose.
    """

    card: EncoderCard | None
    file: Path | None
    reason: str
    rejected: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def is_ct(channel_name: str) -> bool:
    """nnU-Net's rule for Hounsfield channels."""
    return channel_name.casefold() == "ct"


def setting_of_environment() -> str | None:
    """The value of ``autoreg_weights``, None where it is unset or empty."""
    return os.environ.get(VARIABLE, "").strip() or None


def choose_weights(results: Path, dataset: DatasetTraits, setting: str | None) -> Choice:
    """Decide by ``setting`` (a run's name, a folder, a .safetensors file, ``none``) or by the rule
    for None.

    Raises:
        WeightsError: the setting leads nowhere, or no run suits the dataset.
    """
    if setting is None:
        return _newest_that_suits(results, dataset)
    if setting.casefold() == NO_WEIGHTS:
        return Choice(None, None, f"{VARIABLE}={NO_WEIGHTS}: for training from scratch only")
    file = locate(results, setting)
    card = read_card(file.parent)
    verify_weights(file, card.sha256)
    impossible = (
        _objection_to_network(card)
        or _objection_to_channels(card, dataset)
        or _objection_to_tokens(card, dataset)
    )
    if impossible:
        raise WeightsError(f"{VARIABLE}={setting} cannot be used for {dataset.name}: {impossible}")
    doubts = (_objection_to_modality(card, dataset), _objection_to_spacing(card, dataset))
    return Choice(
        card,
        file,
        f"{VARIABLE}={setting}",
        warnings=tuple(f"{card.name}: {d}" for d in doubts if d),
    )


def locate(results: Path, setting: str) -> Path:
    """The weights file that a run's name, a folder or a path means.

    Raises:
        WeightsError: there is none.
    """
    for place in (results / RUNS_FOLDER / setting, Path(setting).expanduser()):
        if (place / WEIGHTS_NAME).is_file():
            return (place / WEIGHTS_NAME).resolve()
        if place.is_file() and place.suffix == ".safetensors":
            return place.resolve()
        if place.is_file():
            raise WeightsError(
                f"{VARIABLE}={setting} is no .safetensors file; give a run, its folder, or its "
                f"{WEIGHTS_NAME}"
            )
        if place.is_dir():
            raise WeightsError(
                f"{VARIABLE}={setting}: {place} holds no {WEIGHTS_NAME}; has its pretraining "
                "finished?"
            )
    names = [folder.name for folder in _run_folders(results)]
    known = (
        did_you_mean(setting, names) if names else f"{results / RUNS_FOLDER} holds no finished run"
    )
    raise WeightsError(f"{VARIABLE}={setting} is neither a run nor a folder nor a file; {known}")


def ignored_setting(results: Path, planned: PlannedWeights, setting: str | None) -> str | None:
    """A warning when the environment asks for other weights than the plan, which decides; None when
    they agree.
    """
    if setting is None or setting == planned.name:
        return None
    try:
        if (
            setting.casefold() != NO_WEIGHTS
            and locate(results, setting) == (results / planned.file).resolve()
        ):
            return None
    except WeightsError:
        pass
    return (
        f"{VARIABLE}={setting} is ignored: the plan decides, and it uses '{planned.name}'; plan "
        "again to change that"
    )


def _run_folders(results: Path) -> Iterator[Path]:
    home = results / RUNS_FOLDER
    if home.is_dir():
        yield from (
            f
            for f in sorted(home.iterdir())
            if (f / CARD_NAME).is_file() and (f / WEIGHTS_NAME).is_file()
        )


def _newest_that_suits(results: Path, dataset: DatasetTraits) -> Choice:
    cards: list[tuple[EncoderCard, Path]] = []
    rejected: list[str] = []
    for folder in _run_folders(results):
        try:
            cards.append((read_card(folder), folder / WEIGHTS_NAME))
        except WeightsError as error:
            rejected.append(f"{folder.name}: {error}")
    for card, file in sorted(cards, key=lambda pair: pair[0].finished_at, reverse=True):
        why_not = objection(card, file, dataset)
        if why_not is None:
            traits = (
                f"{'/'.join(card.modalities)}, spacing ratio "
                f"{_nearest_spacing(card, dataset)[1]:.2f}"
            )
            reason = f"the newest finished run that suits: {traits}, finished {card.finished_at}"
            return Choice(card, file.resolve(), reason, tuple(rejected))
        rejected.append(f"{card.name}: {why_not}")
    raise WeightsError(_none_suits(results, dataset, rejected))


def _none_suits(results: Path, dataset: DatasetTraits, rejected: Sequence[str]) -> str:
    ways_out = (
        f"pretrain on fitting scans (autoreg_pretrain), set {VARIABLE} to a run or file, or set "
        f"{VARIABLE}={NO_WEIGHTS} to train "
        "from scratch"
    )
    if not rejected:
        return f"{results / RUNS_FOLDER} holds no finished pretraining run; {ways_out}"
    return f"no pretraining run suits {dataset.name} ({'; '.join(rejected)}); {ways_out}"


def objection(card: EncoderCard, file: Path, dataset: DatasetTraits) -> str | None:
    """Why a run is not chosen for a dataset without being asked for, or None."""
    found = (
        _objection_to_origin(card)
        or _objection_to_network(card)
        or _objection_to_modality(card, dataset)
        or _objection_to_channels(card, dataset)
        or _objection_to_spacing(card, dataset)
        or _objection_to_tokens(card, dataset)
    )
    if found:
        return found
    try:
        verify_weights(file, card.sha256)
    except WeightsError as error:
        return str(error)
    return None


def _objection_to_origin(card: EncoderCard) -> str | None:
    """Other people's weights, and their licences, are taken by name only."""
    return (
        f"imported weights are used by name only: export {VARIABLE}={card.name}"
        if IMPORTED in card.extra
        else None
    )


def _objection_to_network(card: EncoderCard) -> str | None:
    try:
        check_class(card.class_path, CARD_NAME)
    except PlanError as error:
        return str(error)
    return None


def _objection_to_modality(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    has_ct = any(is_ct(m) for m in card.modalities)
    has_other = any(not is_ct(m) for m in card.modalities)
    if has_ct if dataset.is_ct else has_other:
        return None
    return (
        f"pretrained on {'/'.join(card.modalities)}, but the channels are "
        f"{', '.join(dataset.channel_names)}"
    )


def _objection_to_channels(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    given, needed = card.num_input_channels, len(dataset.channel_names)
    if map_channels(given, card.channel_names, needed, dataset.channel_names) is not None:
        return None
    return f"its {given} input channels cannot be adapted to {needed}"


def _nearest_spacing(card: EncoderCard, dataset: DatasetTraits) -> tuple[Spacing, float]:
    """The spacing of pretraining that is nearest to the dataset's, of groups of its own kind if
    there are any; and the factor.
    """
    groups = [
        group.spacing_mm for group in card.spacing_groups if is_ct(group.modality) == dataset.is_ct
    ]
    found = min(
        groups or [card.spacing_mm], key=lambda spacing: spacing_ratio(spacing, dataset.spacing_mm)
    )
    return found, spacing_ratio(found, dataset.spacing_mm)


def _objection_to_spacing(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    nearest, ratio = _nearest_spacing(card, dataset)
    if ratio <= MAX_SPACING_RATIO:
        return None
    return (
        f"its spacing {_mm(nearest)} is a factor of {ratio:.1f} from the target spacing "
        f"{_mm(dataset.spacing_mm)}; "
        f"beyond {MAX_SPACING_RATIO:g} pretraining may harm"
    )


def _objection_to_tokens(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    if family_of(card.class_path) != PRIMUS:
        return None
    return objection_to_flat_tokens(card.token_size_vox, dataset.spacing_mm)


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
