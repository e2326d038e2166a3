import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.block import PlannedWeights
from nnunet_autoreg.finetune.resolve import (
    DatasetTraits,
    choose_weights,
    ignored_setting,
    list_runs,
    locate,
    setting_of_environment,
)
from nnunet_autoreg.model.card import IMPORTED, read_card
from nnunet_autoreg.model.verdict import LEARNT, NOT_LEARNT, UNKNOWN, Verdict
from nnunet_autoreg.plan import SpacingGroup
from nnunet_autoreg.records import sha256_of

MR = DatasetTraits("Dataset004_Hippocampus", ("MRI",), (1.0, 1.0, 1.0))
CT = DatasetTraits("Dataset052_SarcomaCT", ("CT",), (3.0, 1.0, 1.0))
Write = Callable[..., Path]


def test_the_newest_run_of_similar_modality_and_spacing_is_chosen(
    tmp_path: Path,
    write_run: Write,
) -> None:
    write_run(tmp_path, "old", finished_at="2026-01-01T00:00:00Z")
    write_run(tmp_path, "new", finished_at="2026-03-01T00:00:00Z")
    write_run(tmp_path, "chest", finished_at="2026-05-01T00:00:00Z", modalities=("CT",))
    write_run(tmp_path, "coarse", finished_at="2026-04-01T00:00:00Z", spacing_mm=(1.0, 1.0, 2.5))

    choice = choose_weights(tmp_path, MR, None)

    file = tmp_path / "autoreg_pretraining" / "new" / "encoder.safetensors"
    assert choice.card is not None
    assert choice.card.name == "new"
    assert choice.file == file.resolve()
    assert "the newest finished run that suits: MR, spacing ratio 1.00" in choice.reason
    chest, coarse = choice.rejected[:2]
    assert chest == "chest: pretrained on CT, but the channels are MRI"
    assert coarse.startswith("coarse: its spacing 1 x 1 x 2.5 mm differs by a factor of 2.5")


def test_ct_needs_a_run_with_ct_and_axes_are_compared_sorted(
    tmp_path: Path,
    write_run: Write,
) -> None:
    # The run stores its coarse axis last and the data set first; the run of MR is newer.
    write_run(tmp_path, "mr")
    write_run(
        tmp_path,
        "both",
        modalities=("MR", "CT"),
        spacing_mm=(1.0, 1.0, 3.0),
        finished_at="2025-01-01T00:00:00Z",
    )
    choice = choose_weights(tmp_path, CT, None)

    assert choice.card is not None
    assert choice.card.name == "both"


NOT_BETTER = Verdict(NOT_LEARNT, "the validation error 1.2000 is not below 1.0000", min_scans=10)
FINE = Verdict(LEARNT, "the validation error 0.5000 is below 1.0000", min_scans=10)


@pytest.mark.parametrize(
    ("verdict", "num_scans", "values"),
    [(NOT_BETTER, 50, ["not learnt", "1.2000"]), (FINE, 9, ["9 scans", "10", "data.min_scans"])],
)
def test_a_run_that_learnt_nothing_or_saw_few_scans_needs_a_name(
    tmp_path: Path,
    write_run: Write,
    verdict: Verdict,
    num_scans: int,
    values: list[str],
) -> None:
    write_run(tmp_path, "weak", verdict=verdict, num_scans=num_scans)

    # Nobody gets such weights without asking for them; by name they are used, with a warning.
    with refused(WeightsError, "weights-none-suits", "export autoreg_weights=weak", *values):
        choose_weights(tmp_path, MR, None)
    named = choose_weights(tmp_path, MR, "weak")

    assert named.card is not None
    assert named.card.verdict == verdict
    (warning,) = named.warnings
    for value in values:
        assert value in warning


def test_runs_with_a_good_or_unknown_or_without_a_verdict_are_chosen(
    tmp_path: Path,
    write_run: Write,
) -> None:
    unknown = Verdict(UNKNOWN, "no scan was left for validation", min_scans=10)
    for number, verdict in enumerate((FINE, unknown, None), start=1):
        # Cards of earlier releases do not say how many scans are enough.
        num_scans = 10 if verdict else 3
        date = f"2026-0{number}-01T00:00:00Z"
        write_run(tmp_path, f"r{number}", finished_at=date, verdict=verdict, num_scans=num_scans)

        choice = choose_weights(tmp_path, MR, None)

        assert choice.card is not None
        assert (choice.card.name, choice.card.verdict) == (f"r{number}", verdict)


def test_several_channels_suit_one_but_not_another_number(tmp_path: Path, write_run: Write) -> None:
    four = DatasetTraits("Dataset061_MSLesions", ("T1", "T1post", "T2", "FLAIR"), (1.0, 1.0, 1.0))
    write_run(tmp_path, "two", channels=2, num_input_channels=2, finished_at="2026-05-01T00:00:00Z")
    write_run(tmp_path, "one")

    choice = choose_weights(tmp_path, four, None)

    assert choice.card is not None
    assert choice.card.name == "one"
    assert choice.rejected == ("two: its 2 input channels cannot be adapted to 4",)


def test_a_damaged_run_is_not_chosen_and_the_reason_is_given(
    tmp_path: Path,
    write_run: Write,
) -> None:
    damaged = write_run(tmp_path, "damaged", finished_at="2026-05-01T00:00:00Z")
    (damaged / "encoder.safetensors").write_bytes(b"short")
    (write_run(tmp_path, "broken") / "encoder.json").write_text("{")
    write_run(tmp_path, "good")

    choice = choose_weights(tmp_path, MR, None)

    assert choice.card is not None
    assert choice.card.name == "good"
    broken = next(line for line in choice.rejected if line.startswith("broken: "))
    assert "not valid JSON" in broken
    short = next(line for line in choice.rejected if line.startswith("damaged: "))
    assert "damaged or was replaced" in short


def test_without_a_run_the_remedies_are_named(tmp_path: Path, write_run: Write) -> None:
    with refused(WeightsError, "weights-none-suits", "autoreg_pretrain", "autoreg_weights=none"):
        choose_weights(tmp_path, MR, None)

    write_run(tmp_path, "chest", modalities=("CT",))

    with refused(WeightsError, "weights-none-suits", "Dataset004_Hippocampus", "chest: "):
        choose_weights(tmp_path, MR, None)


def test_none_means_random_weights_even_if_a_run_suits(tmp_path: Path, write_run: Write) -> None:
    write_run(tmp_path, "brain")

    choice = choose_weights(tmp_path, MR, "None")

    assert choice.card is None
    assert choice.file is None


def test_the_user_may_name_a_run_a_folder_or_a_file(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain")
    file = (folder / "encoder.safetensors").resolve()
    for setting in ("brain", str(folder), str(file)):
        assert choose_weights(tmp_path, MR, setting).file == file


def test_unsuitable_weights_that_the_user_names_cause_warnings(
    tmp_path: Path,
    write_run: Write,
) -> None:
    write_run(tmp_path, "coarse", spacing_mm=(4.0, 4.0, 4.0), modalities=("CT",))
    choice = choose_weights(tmp_path, MR, "coarse")

    assert choice.card is not None
    assert len(choice.warnings) == 2
    assert "pretrained on CT" in choice.warnings[0]
    assert "a factor of 4.0" in choice.warnings[1]


def test_impossible_settings_are_refused(tmp_path: Path, write_run: Write) -> None:
    write_run(tmp_path, "brain")
    (tmp_path / "model.pth").touch()
    (tmp_path / "autoreg_pretraining" / "unfinished").mkdir()

    with refused(WeightsError, "weights-not-found", "autoreg_weights=brian", "'brain'"):
        choose_weights(tmp_path, MR, "brian")
    with refused(WeightsError, "weights-not-safetensors", tmp_path / "model.pth"):
        locate(tmp_path, str(tmp_path / "model.pth"))
    with refused(WeightsError, "weights-unfinished", "unfinished"):
        locate(tmp_path, "unfinished")


def test_weights_that_cannot_be_used_are_refused(tmp_path: Path, write_run: Write) -> None:
    write_run(tmp_path, "two", channels=2, num_input_channels=2)
    three = DatasetTraits("D", ("A", "B", "C"), (1.0, 1.0, 1.0))
    with refused(WeightsError, "weights-unusable", "autoreg_weights=two", "D", "2 input channels"):
        choose_weights(tmp_path, three, "two")

    write_run(tmp_path, "evil", class_path="os.system")
    with pytest.raises(WeightsError) as caught:
        choose_weights(tmp_path, MR, "evil")
    assert "os.system" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_with_a_value_that_is_not_finite_are_refused(
    tmp_path: Path,
    write_run: Write,
    value: float,
) -> None:
    folder = write_run(tmp_path, "brain")
    tensor = spoil(folder, value)

    with refused(WeightsError, "weights-not-finite", folder / "encoder.safetensors", tensor):
        choose_weights(tmp_path, MR, "brain")


def test_a_run_with_a_value_that_is_not_finite_is_not_chosen(
    tmp_path: Path,
    write_run: Write,
) -> None:
    # The planner once could choose such weights.
    write_run(tmp_path, "good", finished_at="2026-01-01T00:00:00Z")
    # The hash in the card is right, as after a training that diverged and was exported all the
    # same.
    tensor = spoil(write_run(tmp_path, "newer", finished_at="2026-05-01T00:00:00Z"), float("nan"))

    choice = choose_weights(tmp_path, MR, None)

    assert choice.card is not None
    assert choice.card.name == "good"
    assert len(choice.rejected) == 1
    assert choice.rejected[0].startswith("newer: ")
    assert tensor in choice.rejected[0]


def spoil(folder: Path, value: float) -> str:
    """Set one value of a run's weights, with the hash in its card; return the tensor's name."""
    file = folder / "encoder.safetensors"
    name = "eva.blocks.3.attn.q_proj.weight"
    tensors = load_file(file)
    tensors[name][1, 2] = value
    save_file(tensors, file)
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**card, "sha256": sha256_of(file)}))
    return name


def test_an_interrupted_import_is_not_a_run(tmp_path: Path, write_run: Write) -> None:
    write_run(tmp_path, "brain").rename(tmp_path / "autoreg_pretraining" / ".brain.importing")

    with refused(WeightsError, "weights-none-suits", "holds no finished pretraining run"):
        choose_weights(tmp_path, MR, None)


def test_another_setting_at_training_time_is_ignored_with_a_warning(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain")
    planned = PlannedWeights("brain", "autoreg_pretraining/brain/encoder.safetensors", "00")

    assert ignored_setting(tmp_path, planned, None) is None
    assert ignored_setting(tmp_path, planned, "brain") is None
    assert ignored_setting(tmp_path, planned, str(folder)) is None

    warning = ignored_setting(tmp_path, planned, "other")

    assert warning is not None
    assert "autoreg_weights=other is ignored" in warning
    assert "'brain'" in warning
    assert ignored_setting(tmp_path, planned, "none") is not None


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("autoreg_weights", "")
    assert setting_of_environment() is None
    monkeypatch.setenv("autoreg_weights", " brain ")
    assert setting_of_environment() == "brain"


def test_the_nearest_spacing_of_the_same_modality_counts(tmp_path: Path, write_run: Write) -> None:
    groups = (
        SpacingGroup("MR", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        SpacingGroup("MR", (10.0, 1.5, 1.5), (10.0, 1.5, 1.5)),
        SpacingGroup("CT", (3.0, 1.0, 1.0), (3.0, 1.0, 1.0)),
    )
    write_run(tmp_path, "pool", modalities=("CT", "MR"), spacing_groups=groups)
    cine = DatasetTraits("Dataset027_ACDC", ("cineMRI",), (10.0, 1.5, 1.5))
    thick_ct = DatasetTraits("Dataset099_Cardiac", ("CT",), (10.0, 1.5, 1.5))

    assert "spacing ratio 1.00" in choose_weights(tmp_path, cine, None).reason
    assert "spacing ratio 1.00" in choose_weights(tmp_path, CT, None).reason
    # A group of MR has this spacing, but for CT the nearest is 3 mm: 10 / 3 = 3.3.
    with refused(WeightsError, "weights-none-suits", "3 x 1 x 1 mm", "3.3"):
        choose_weights(tmp_path, thick_ct, None)


def test_the_next_step_of_a_run_follows_from_its_verdict(tmp_path: Path, write_run: Write) -> None:
    from nnunet_autoreg.cli.pretrain import next_step

    card = read_card(write_run(tmp_path, "brain", verdict=FINE, num_scans=22))

    good = next_step(card, "PLAN")
    small = next_step(replace(card, num_scans=3), "PLAN")
    weak = next_step(replace(card, verdict=NOT_BETTER), "PLAN")
    older = next_step(replace(card, verdict=None, num_scans=3), "PLAN")

    # Cards of earlier releases have no verdict, and nothing speaks against their weights.
    assert good == older == "PLAN"
    assert small.startswith("export autoreg_weights=brain; PLAN")
    assert f"--steps than {card.num_steps}" in weak
    assert "autoreg_weights=brain; PLAN" in weak


def test_the_list_names_every_encoder_and_how_it_may_be_used(
    tmp_path: Path,
    write_run: Write,
) -> None:
    write_run(tmp_path, "good", verdict=FINE, num_scans=22, spacing_mm=(3.0, 1.0, 1.0))
    write_run(tmp_path, "weak", verdict=NOT_BETTER)
    write_run(tmp_path, "older", modalities=("CT", "MR"))
    write_run(tmp_path, "theirs", extra={IMPORTED: {"file": "x"}}, num_scans=0)
    (write_run(tmp_path, "broken") / "encoder.json").write_text("{")
    (tmp_path / "autoreg_pretraining" / "unfinished").mkdir()

    rows = {row[0]: row for row in list_runs(tmp_path)}

    assert sorted(rows) == ["broken", "good", "older", "theirs", "weak"]
    assert rows["good"] == (
        "good", "primus_tiny", "MR", "3 x 1 x 1 mm", "22", "2026-01-01", "learnt",
    )  # fmt: skip
    assert rows["weak"][-1] == "not learnt, used by name only"
    assert (rows["older"][2], rows["older"][-1]) == ("CT/MR", "unknown")
    assert rows["theirs"][-3:] == ("-", "2026-01-01", "imported, used by name only")
    assert "not valid JSON" in rows["broken"][1]


def test_the_list_is_printed_in_columns(
    tmp_path: Path,
    write_run: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    from nnunet_autoreg.cli.weights import main

    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    assert main(["list"]) == 0
    nothing = capsys.readouterr().out.splitlines()
    write_run(tmp_path, "a_long_name", verdict=FINE, num_scans=22)
    write_run(tmp_path, "b")
    assert main(["list"]) == 0
    head, first, second, following = capsys.readouterr().out.splitlines()

    assert nothing[-1].startswith("next: autoreg_pretrain")
    column = head.index("verdict")
    assert (first[column:], second[column:]) == ("learnt", "unknown")
    assert following == "next: autoreg_weights inspect NAME"
