"""Nothing wrong is called finished: what ends a run at its last step, and what can never end
one.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from stand_in import PLAN, Collapsing, Linear, trainer

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.licences import read_licences, stated_licences, write_licences
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import AutoregError, PlanError, UsageError
from nnunet_autoreg.model.card import check_run_name
from nnunet_autoreg.objectives.base import LossTerms
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.training_step import StepStatistics
from nnunet_autoreg.pretrain.validation import Health, failure_messages

GOOD = StepStatistics(0, 0, 0, 1.0)
HEALTHY = Health({"error": 0.5, "mean": 1.0}, 0.5, 20.0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.draw_progress", lambda *_: None)


class Unreal(Linear):
    """Its error on held-out scans is NaN."""

    def loss(self, batch: Any, references: bool = False) -> LossTerms:
        loss: LossTerms = super().loss(batch, references)
        if not references:
            return loss
        nan = replace(loss.terms["error"], total=loss.total * torch.nan)
        return replace(loss, terms={"error": nan})


def weights_of_checkpoint(folder: Path) -> tuple[int, torch.Tensor]:
    found = checkpoint.load_newest(folder)
    assert found is not None
    return found[1]["step"], found[1]["network_weights"]["weight"]


@pytest.mark.parametrize("objective", [Collapsing(4), Unreal()])
def test_a_failed_run_keeps_its_last_good_state_and_fails_again(
    tmp_path: Path,
    objective: Linear,
) -> None:
    # The second run starts from the checkpoint of the first and must fail just the same.
    for _ in range(2):
        with pytest.raises(AutoregError) as caught:
            trainer(tmp_path, objective).run()

        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
        step, weights = weights_of_checkpoint(tmp_path)
        assert step == 4
        assert bool(torch.isfinite(weights).all())


def test_a_collapse_that_the_user_wants_is_finished_with_a_lower_limit(tmp_path: Path) -> None:
    with pytest.raises(AutoregError):
        trainer(tmp_path, Collapsing(4)).run()
    wanted = replace(PLAN, run=replace(PLAN.run, min_token_variance=0.0, min_effective_rank=0.0))

    trainer(tmp_path, Collapsing(4), wanted).run()

    # All six steps.
    assert weights_of_checkpoint(tmp_path)[0] == 6


def test_a_run_without_an_accepted_step_fails(tmp_path: Path) -> None:
    with pytest.raises(AutoregError):
        trainer(tmp_path, Linear(lambda step, total: total * torch.nan)).run()

    assert not (tmp_path / checkpoint.LATEST_NAME).exists()


def test_a_state_saved_by_an_older_version_is_looked_at_before_export(tmp_path: Path) -> None:
    # As if a version that did not look had trained to the last step.
    trainer(tmp_path, Linear()).run()

    with pytest.raises(AutoregError):
        trainer(tmp_path, Unreal()).run()


@pytest.mark.parametrize(
    ("health", "finite", "statistics"),
    [
        # Weights that are not finite; all six steps skipped, for one reason or for two; a bad last
        # step without a validation scan; errors that are not numbers; features of no variety.
        (HEALTHY, False, GOOD),
        (HEALTHY, True, StepStatistics(6, 0, 6, 0.0)),
        (HEALTHY, True, StepStatistics(3, 3, 1, 0.0)),
        (None, True, StepStatistics(1, 0, 1, 0.0)),
        (replace(HEALTHY, errors={"error": float("nan"), "mean": 1.0}), True, GOOD),
        (replace(HEALTHY, errors={"error": float("inf"), "mean": 1.0}), True, GOOD),
        (replace(HEALTHY, token_variance=0.0), True, GOOD),
        (replace(HEALTHY, token_variance=float("nan")), True, GOOD),
        (replace(HEALTHY, effective_rank=1.0), True, GOOD),
    ],
)
def test_every_kind_of_failure_is_found(
    health: Health | None,
    finite: bool,
    statistics: StepStatistics,
) -> None:
    # Such runs once ended with exit code 0 and an encoder of NaN.
    assert len(failure_messages(health, PLAN.run, finite, statistics, 6)) == 1


def test_a_good_run_and_one_without_features_or_scans_have_not_failed() -> None:
    # An error above that of the mean is a matter of the verdict: the run is finished.
    for health in (HEALTHY, Health({"error": 2.0, "mean": 1.0}), None):
        assert failure_messages(health, PLAN.run, True, StepStatistics(2, 0, 0, 1.0), 6) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_plan_with_numbers_that_are_none_is_refused_by_key(value: float) -> None:
    # A NaN that was typed into a plan once gave a run of NaN.
    encoder = replace(PLAN.encoder, arguments={**PLAN.encoder.arguments, "init_values": value})

    with refused(PlanError, "plan-wrong-type", "encoder.arguments.init_values", value):
        check(replace(PLAN, encoder=encoder))


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE"])
def test_no_run_is_called_none_in_any_case(name: str) -> None:
    # autoreg_weights=none means random weights, so a run of this name could never be chosen.
    with pytest.raises(UsageError):
        check_run_name(name)


class Removing(Linear):
    """Removes the run's folder, or puts another in its place, while step 3 is trained."""

    def __init__(self, folder: Path, is_replaced: bool):
        super().__init__()
        self.follows_steps = True
        self.folder, self.is_replaced = folder, is_replaced

    def after_step(self, step: int, *_: object) -> None:
        if step == 2:
            self.folder.rename(self.folder.with_name("elsewhere"))
            if self.is_replaced:
                self.folder.mkdir()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_removed_in_training_is_noticed_at_the_next_write(
    tmp_path: Path,
    is_replaced: bool,
) -> None:
    # Once a traceback.
    folder = tmp_path / "run"
    folder.mkdir()

    with pytest.raises(AutoregError) as caught:
        trainer(folder, Removing(folder, is_replaced)).run()

    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    # Nothing is written into a folder that is not the run's, and none is made.
    if is_replaced:
        assert list(folder.iterdir()) == []
    else:
        assert not folder.exists()


def row_of(source: Path, dataset: str) -> ScanRow:
    size = (4, 4, 4)
    spacing = (1.0, 1.0, 1.0)
    return ScanRow("x", dataset, "x", "CT", "CT", str(source), size, spacing, size, "0", "ok", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1, 2]",
        "null",
        "3",
        "not json",
        '{"licence": {"a": 1}}',
        '{"licence": null}',
        "[" * 100_000,
        "\0",
        "NaN",
    ],
)
def test_a_licence_that_cannot_be_read_stops_nothing(tmp_path: Path, text: str) -> None:
    # Such a file once stopped a run at its end, when the card is written.
    folder = tmp_path / "Dataset001_A"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "dataset.json").write_text(text)
    row = row_of(folder / "imagesTr" / "x_0000.nii.gz", folder.name)

    assert stated_licences([row]) == {folder.name: ""}

    (tmp_path / "licences.json").write_text(text)

    assert all(isinstance(value, str) for value in read_licences(tmp_path).values())


def test_licences_are_read_while_indexing_and_then_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_A"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"license": "CC-BY\n4.0"}))
    (tmp_path / "plain" / "ct").mkdir(parents=True)
    (tmp_path / "plain" / "dataset.json").write_text('["not nnU-Net\'s"]')
    rows = [
        row_of(folder / "imagesTr" / "x_0000.nii.gz", folder.name),
        row_of(tmp_path / "plain" / "ct" / "y.nii.gz", "plain"),
    ]

    write_licences(tmp_path, rows)
    # A licence has one line, and is known after the scans have been moved away.
    shutil.rmtree(folder)

    assert read_licences(tmp_path) == {"Dataset001": "CC-BY 4.0"}


def test_a_dataset_json_of_another_kind_leaves_the_folder_a_plain_one(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "imagesTr" / "a.nii.gz").write_bytes(b"")
    (folder / "dataset.json").write_text('["a list"]')

    for given in (folder, tmp_path, folder / "imagesTr"):
        names = [found.path.name for found in find_scans([], [given]) if not found.status]
        assert names == ["a.nii.gz"]
