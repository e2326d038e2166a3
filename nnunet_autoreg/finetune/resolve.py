"""Decide which pretrained weights a plan uses.

The environment variable ``autoreg_weights`` decides if it is set; otherwise the newest finished run
that suits the dataset is used. torch is imported only to check the values of the chosen weights.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.errors import PlanError, WeightsError, did_you_mean
from nnunet_autoreg.families import PRIMUS, family_of
from nnunet_autoreg.finetune.block import PlannedWeights, check_class
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.geometry import Spacing, size_text, spacing_ratio
from nnunet_autoreg.io.addresses import advice_for, is_address
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
from nnunet_autoreg.model.verdict import NO_VERDICT, NOT_LEARNT
from nnunet_autoreg.planning.tokens import objection_to_flat_tokens

VARIABLE = "autoreg_weights"
MAX_SPACING_RATIO = 2.0
"""Weights of a run with a spacing that differs more are not chosen automatically."""


@dataclass(frozen=True)
class DatasetTraits:
    """Hold the facts about a dataset on which the choice of weights depends.

    Attributes:
        name: name of the dataset.
        channel_names: names of the channels, in order.
        spacing_mm: target spacing, (z, y, x).
    """

    name: str
    channel_names: tuple[str, ...]
    spacing_mm: Spacing

    @property
    def is_ct(self) -> bool:
        """Return whether one of the channels is CT, by nnU-Net's own rule."""
        return any(is_ct(name) for name in self.channel_names)


@dataclass(frozen=True)
class Choice:
    """Hold the weights of a plan.

    Attributes:
        card, file: description and location; both None for training from scratch only.
        reason: why these weights were chosen.
        rejected: one line for each newer run that does not suit.
        warnings: reasons against the weights that the user has chosen.
    """

    card: EncoderCard | None
    file: Path | None
    reason: str
    rejected: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def is_ct(channel_name: str) -> bool:
    """Return whether nnU-Net treats a channel of this name as CT."""
    return channel_name.casefold() == "ct"


def setting_of_environment() -> str | None:
    """Return the value of ``autoreg_weights``, or None if it is unset or empty."""
    setting = os.environ.get(VARIABLE, "").strip()
    return setting or None


def choose_weights(results: Path, dataset: DatasetTraits, setting: str | None) -> Choice:
    """Return the weights that ``setting`` names; without a setting, the newest suitable run.

    Args:
        results: nnU-Net's folder of results.
        setting: name of a run, a folder, a .safetensors file, or ``none`` for training from
            scratch.

    Raises:
        WeightsError: the setting names no weights, the named weights cannot be used (code
            "weights-unusable") or are damaged, or no run suits the dataset (code
            "weights-none-suits").
    """
    if setting is None:
        return _newest_that_suits(results, dataset)
    if setting.casefold() == NO_WEIGHTS:
        return Choice(None, None, f"{VARIABLE}={NO_WEIGHTS}: for training from scratch only")

    file = locate(results, setting)
    card = read_card(file.parent)
    # Weights that the user names are checked before anything is planned with them.
    verify_weights(file, card.sha256)
    _check_values(file)

    reason_against = (
        _objection_to_network(card)
        or _objection_to_channels(card, dataset)
        or _objection_to_tokens(card, dataset)
    )
    if reason_against:
        raise WeightsError(
            f"{VARIABLE}={setting} cannot be used for {dataset.name}: {reason_against}",
            code="weights-unusable",
        )

    # The user may know better than these rules: they only warn.
    doubts = (
        objection_to_verdict(card),
        _objection_to_modality(card, dataset),
        _objection_to_spacing(card, dataset),
    )
    warnings = tuple(f"{card.name}: {doubt}" for doubt in doubts if doubt)
    return Choice(card, file, f"{VARIABLE}={setting}", warnings=warnings)


def _check_values(file: Path) -> None:
    """Refuse weights with values that are not finite.

    The hash of the file does not exclude them: pretraining may have written them.

    Raises:
        WeightsError: a tensor holds NaN or infinity; the message names it.
    """
    from nnunet_autoreg.finetune.load import read_tensors

    read_tensors(file)


def locate(results: Path, setting: str, given_as: str = f"{VARIABLE}=") -> Path:
    """Return the weights file for the name of a run, a folder or a path.

    Args:
        given_as: text before ``setting`` in messages.

    Raises:
        WeightsError: there is none (codes "weights-not-found", "weights-not-safetensors" and
            "weights-unfinished"), or it is an address on the web (code "weights-not-a-path").
    """
    if is_address(setting):
        raise WeightsError(f"{given_as}{advice_for(setting)}", code="weights-not-a-path")

    # The name of a run comes before a path of the same name.
    for path in (results / RUNS_FOLDER / setting, Path(setting).expanduser()):
        if (path / WEIGHTS_NAME).is_file():
            return (path / WEIGHTS_NAME).resolve()
        if path.is_file() and path.suffix == ".safetensors":
            return path.resolve()
        if path.is_file():
            raise WeightsError(
                f"{given_as}{setting} is not a .safetensors file; give the name of a run, its "
                f"folder, or its {WEIGHTS_NAME}",
                code="weights-not-safetensors",
            )
        if path.is_dir():
            raise WeightsError(
                f"{given_as}{setting}: {path} holds no {WEIGHTS_NAME}; has its pretraining "
                "finished?",
                code="weights-unfinished",
            )

    names = [folder.name for folder in finished_runs(results)]
    if names:
        advice = did_you_mean(setting, names)
    else:
        advice = f"{results / RUNS_FOLDER} holds no finished run"
    raise WeightsError(
        f"{given_as}{setting} is neither a run nor a folder nor a file; {advice}",
        code="weights-not-found",
    )


def ignored_setting(results: Path, planned: PlannedWeights, setting: str | None) -> str | None:
    """Return a warning if the environment names other weights than the plan, else None.

    The plan decides.
    """
    if setting is None or setting == planned.name:
        return None

    if setting.casefold() != NO_WEIGHTS:
        try:
            is_planned_file = locate(results, setting) == (results / planned.file).resolve()
        except WeightsError:
            is_planned_file = False
        if is_planned_file:
            return None
    return (
        f"{VARIABLE}={setting} is ignored: the plan decides, and it uses '{planned.name}'; plan "
        "again to change this"
    )


def finished_runs(results: Path) -> Iterator[Path]:
    """Yield the folders of finished runs, by name."""
    home = results / RUNS_FOLDER
    if not home.is_dir():
        return
    for folder in sorted(home.iterdir()):
        # A name with a dot in front is an import that was interrupted.
        is_finished = (folder / CARD_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
        if is_finished and not folder.name.startswith("."):
            yield folder


LIST_HEAD = ("name", "encoder", "modalities", "spacing", "scans", "finished", "verdict")


def list_runs(results: Path) -> list[tuple[str, ...]]:
    """Return one row for each encoder that a plan can use, by name; columns as ``LIST_HEAD``."""
    rows: list[tuple[str, ...]] = []
    for folder in finished_runs(results):
        try:
            card = read_card(folder)
        except WeightsError as error:
            rows.append((folder.name, f"cannot be read: {error}"))
            continue

        is_imported = IMPORTED in card.extra
        verdict = f"{card.verdict.outcome}, " if card.verdict else ""
        verdict += "imported, used by name only"
        if not is_imported:
            verdict = (card.verdict or NO_VERDICT).outcome
            verdict += ", used by name only" if objection_to_verdict(card) else ""
        rows.append(
            (
                card.name,
                card.encoder,
                "/".join(card.modalities),
                _mm(card.spacing_mm),
                "-" if is_imported else str(card.num_scans),
                card.finished_at[:10],
                verdict,
            ),
        )
    return rows


def _newest_that_suits(results: Path, dataset: DatasetTraits) -> Choice:
    """Return the weights of the newest finished run that suits the dataset.

    Raises:
        WeightsError: no run suits it.
    """
    cards: list[tuple[EncoderCard, Path]] = []
    rejected: list[str] = []
    for folder in finished_runs(results):
        try:
            cards.append((read_card(folder), folder / WEIGHTS_NAME))
        except WeightsError as error:
            rejected.append(f"{folder.name}: {error}")

    # The newest first. Reading cards is cheap; weights are only read once a card suits.
    cards.sort(key=lambda pair: pair[0].finished_at, reverse=True)
    for card, file in cards:
        reason_against = objection(card, file, dataset)
        if reason_against is not None:
            rejected.append(f"{card.name}: {reason_against}")
            continue

        ratio = _nearest_spacing(card, dataset)[1]
        reason = (
            f"the newest finished run that suits: {'/'.join(card.modalities)}, spacing ratio "
            f"{ratio:.2f}, finished {card.finished_at}"
        )
        return Choice(card, file.resolve(), reason, tuple(rejected))

    remedy = (
        f"pretrain on suitable scans (autoreg_pretrain), set {VARIABLE} to a run or a file, or set "
        f"{VARIABLE}={NO_WEIGHTS} to train from scratch"
    )
    found = f"{results / RUNS_FOLDER} holds no finished pretraining run"
    if rejected:
        found = f"no pretraining run suits {dataset.name} ({'; '.join(rejected)})"
    raise WeightsError(f"{found}; {remedy}", code="weights-none-suits")


def objection(card: EncoderCard, file: Path, dataset: DatasetTraits) -> str | None:
    """Return why a run is not chosen automatically for a dataset, or None if it is suitable."""
    # The user has to know whose weights these are, because their licence binds the user.
    if IMPORTED in card.extra:
        return f"imported weights are used by name only: export {VARIABLE}={card.name}"

    found = (
        _objection_by_name_only(card)
        or _objection_to_network(card)
        or _objection_to_modality(card, dataset)
        or _objection_to_channels(card, dataset)
        or _objection_to_spacing(card, dataset)
        or _objection_to_tokens(card, dataset)
    )
    if found:
        return found

    # Last, because both read the whole file.
    try:
        verify_weights(file, card.sha256)
        _check_values(file)
    except WeightsError as error:
        return str(error)
    return None


def objection_to_verdict(card: EncoderCard) -> str | None:
    """Return why a run is used by name only, or None if the planner may choose it.

    Cards without a verdict are from earlier releases: their encoders are used.
    """
    verdict = card.verdict
    if verdict is None:
        return None
    if verdict.outcome == NOT_LEARNT:
        return verdict.message
    if card.num_scans < verdict.min_scans:
        return (
            f"pretrained on {card.num_scans} scans, fewer than the {verdict.min_scans} of its "
            "plan (data.min_scans)"
        )
    return None


def _objection_by_name_only(card: EncoderCard) -> str | None:
    reason_against = objection_to_verdict(card)
    if reason_against is None:
        return None
    return f"{reason_against}; to use it anyway: export {VARIABLE}={card.name}"


def _objection_to_network(card: EncoderCard) -> str | None:
    try:
        check_class(card.class_path, CARD_NAME)
    except PlanError as error:
        return str(error)
    return None


def _objection_to_modality(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    # Mixed pretraining suits both.
    if any(is_ct(modality) == dataset.is_ct for modality in card.modalities):
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
    """Return the spacing of pretraining that is nearest to the dataset's, and the factor.

    Only the spacings of CT count for CT, and those of other modalities for other modalities.
    """
    candidates = []
    for group in card.spacing_groups:
        if is_ct(group.modality) == dataset.is_ct:
            candidates.append(group.spacing_mm)

    def distance(spacing: Spacing) -> float:
        return spacing_ratio(spacing, dataset.spacing_mm)

    nearest = min(candidates or [card.spacing_mm], key=distance)
    return nearest, distance(nearest)


def _objection_to_spacing(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    nearest, ratio = _nearest_spacing(card, dataset)
    if ratio <= MAX_SPACING_RATIO:
        return None
    return (
        f"its spacing {_mm(nearest)} differs by a factor of {ratio:.1f} from the target spacing "
        f"{_mm(dataset.spacing_mm)}; beyond {MAX_SPACING_RATIO:g} pretraining may do harm"
    )


def _objection_to_tokens(card: EncoderCard, dataset: DatasetTraits) -> str | None:
    if family_of(card.class_path) != PRIMUS:
        return None
    return objection_to_flat_tokens(card.token_size_vox, dataset.spacing_mm)


def _mm(spacing: Sequence[float]) -> str:
    return size_text(spacing, ".3g") + " mm"
