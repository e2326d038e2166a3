"""The lines at the start and at the end of a run: few, with their figures, in human units."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sequence_cases import make_plan

from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.model.verdict import LEARNT, Verdict
from nnunet_autoreg.planning.length import with_hours
from nnunet_autoreg.pretrain import pipeline
from nnunet_autoreg.pretrain.pipeline import end_lines, scans_line, start_lines
from nnunet_autoreg.pretrain.request import Request, write_plan

PLAN = make_plan()
INDEX = Path("/results/brain/scans.csv")


def rows(*statuses_and_modalities):
    found = []
    for number, (status, modality) in enumerate(statuses_and_modalities):
        found.append(
            ScanRow(
                id=str(number),
                dataset="Dataset004",
                case=str(number),
                channel="",
                modality=modality,
                source="",
                shape_vox=None,
                spacing_mm=None,
                cropped_shape_vox=None,
                content_hash="",
                status=status,
                reason="",
            ),
        )
    return found


def test_counts_name_modalities_and_reasons():
    line = scans_line(rows(("ok", "CT"), ("ok", "MR"), ("ok", "MR"), ("duplicate", "MR")), INDEX)

    assert "3 usable scans (2 MR, 1 CT)" in line
    assert "1 left out (1 duplicate)" in line
    assert str(INDEX) in line


def test_one_scan_is_singular_and_nothing_is_left_out():
    line = scans_line(rows(("ok", "CT")), INDEX)

    assert "1 usable scan (1 CT), none left out" in line


@pytest.mark.parametrize(("is_new", "word"), [(True, "new"), (False, "continued")])
def test_the_start_has_six_lines(is_new, word):
    plan = replace(PLAN, name="brain", optim=replace(PLAN.optim, num_steps=1, batch_size=4))

    lines = start_lines(Path("/results/brain"), plan, rows(("ok", "CT")), "cpu", is_new)

    assert len(lines) == 6
    text = "\n".join(lines)
    for value in (
        "brain",
        word,
        "/results/brain",
        plan.encoder.name,
        "cpu",
        "4 per step",
        "1 step,",
    ):
        assert value in text


def test_the_end_names_time_files_and_verdict():
    plan = replace(PLAN, optim=replace(PLAN.optim, num_steps=1200))

    lines = end_lines(Path("/results/brain"), plan, 1, 310.0, Verdict(LEARNT, "0.5 is below 1.0"))

    assert len(lines) == 4
    text = "\n".join(lines)
    for value in ("1,200 steps on 1 scan", "5 min", "encoder.safetensors", "report.html"):
        assert value in text
    assert "learnt: 0.5" in text


def test_hours_are_shown_instead_of_steps_until_a_step_is_timed():

    plan = replace(PLAN, request={**PLAN.request, "num_hours": 2.0})

    opened = "\n".join(start_lines(Path("/results/brain"), plan, rows(("ok", "CT")), "cpu", True))
    timed = with_hours(plan, 2.0, 0.9, "cpu")
    settled = "\n".join(start_lines(Path("/results/brain"), timed, rows(("ok", "CT")), "cpu", True))

    assert "2 h" in opened
    assert f"{plan.optim.num_steps:,} step" not in opened
    assert f"{timed.optim.num_steps:,} steps" in settled


def test_the_end_states_the_steps_that_hours_became(tmp_path, monkeypatch, caplog):
    plan = replace(PLAN, request={"name": "brain", "datasets": ["4"], "num_hours": 2.0})
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))

    def train(folder, plan, *_):
        # Only the training is replaced, which would time a step: 2 h of 0.9 s, less 5 %, are 7600
        # steps.
        write_plan(folder, with_hours(plan, 2.0, 0.9, "cpu"))

    monkeypatch.setattr(pipeline, "has_plan", lambda folder: True)
    monkeypatch.setattr(pipeline, "is_planned_anew", lambda folder, request: False)
    monkeypatch.setattr(pipeline, "continue_run", lambda *_: (plan, rows(("ok", "CT"))))
    monkeypatch.setattr(pipeline, "is_finished", lambda folder, plan: False)
    monkeypatch.setattr(pipeline, "preprocess_and_train", train)
    monkeypatch.setattr(pipeline, "read_card", lambda folder: SimpleNamespace(verdict=None))
    (tmp_path / "autoreg_pretraining" / "brain").mkdir(parents=True)

    with caplog.at_level("INFO", logger="nnunet_autoreg"):
        pipeline.pretrain(Request("brain", ("4",), num_hours=2.0), "cpu")

    (finished,) = [text for text in caplog.messages if text.startswith("finished")]
    assert "7,600 steps" in finished
