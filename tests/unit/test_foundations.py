"""Records, plans, geometry, randomness, schedule and planning rules."""

import errno
import json
from dataclasses import replace

import pytest
from refusals import refused

from nnunet_autoreg import rng
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.geometry import grid_of, round_up, spacing_ratio
from nnunet_autoreg.model.card import EncoderCard
from nnunet_autoreg.plan import IntensityWindow, OptimPlan, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.pretrain.training_step import learning_rate
from nnunet_autoreg.records import (
    append_json_line,
    atomic_path,
    differences,
    from_jsonable,
    read_json,
    to_jsonable,
    whole_lines,
    write_json,
)
from nnunet_autoreg.store.case import CaseRecord

POOL = Pool(192, (1.0, 1.0, 1.0), (35, 50, 36), 12_000_000, None)
CPU = Hardware("cpu", 24.0)


def plan_for(pool=POOL, hardware=CPU, **overrides):
    asked = Overrides(**{"encoder": "primus_tiny", **overrides})
    return make_plan(
        "run",
        pool,
        hardware,
        asked,
        0,
        {},
        lambda encoder, crop, recompute: (1e9, 5e8),
    )


def test_a_plan_survives_json_unchanged(tmp_path):
    window = IntensityWindow(40.0, 60.0, 45.0, -1000.0, 2000.0, -150.0, 250.0)
    plan = plan_for(replace(POOL, ct_window=window))
    write_json(tmp_path / "plan.json", plan)

    assert from_jsonable(Plan, read_json(tmp_path / "plan.json"), "plan.json") == plan


def test_unknown_plan_keys_are_refused_with_a_close_match():
    data = to_jsonable(plan_for())
    data["optim"]["learning_rte"] = 1
    with refused(PlanError, "plan-unknown-key", "plan.json", "learning_rte"):
        from_jsonable(Plan, data, "plan.json")


@pytest.mark.parametrize(
    ("kind", "newest"),
    [(Plan, 2), (EncoderCard, 1), (AutoregBlock, 1), (DetectionPlan, 1), (CaseRecord, 2)],
)
def test_a_record_of_a_newer_format_is_refused_for_its_version(kind, newest):
    # A newer format may have keys that are unknown today; the version explains them better.
    with refused(PlanError, "plan-newer-format", "here", newest + 1, newest):
        from_jsonable(kind, {"version": newest + 1, "a key of then": 1}, "here")
    with refused(PlanError, "plan-unknown-key", "a key of then"):
        from_jsonable(kind, {"version": newest, "a key of then": 1}, "here")


def test_missing_and_mistyped_plan_keys_are_named():
    data = to_jsonable(plan_for())
    del data["sequence"]["crop_size_vox"]

    with refused(PlanError, "plan-missing-key", "crop_size_vox"):
        from_jsonable(Plan, data, "plan.json")

    data = to_jsonable(plan_for())
    data["optim"]["num_steps"] = "many"

    with refused(PlanError, "plan-wrong-type", "num_steps", "'many'"):
        from_jsonable(Plan, data, "plan.json")


def test_settings_are_typed_and_leave_a_reason():
    plan = override(
        plan_for(),
        [
            "optim.lr=3e-4",
            "sequence.crop_size_vox=32,32,16",
            "sequence.flip=false",
            "data.ct_window=null",
        ],
    )

    assert plan.optim.lr == 3e-4
    assert plan.sequence.crop_size_vox == (32, 32, 16)
    assert plan.sequence.flip is False
    assert plan.reasons["optim.lr"] == "set by the user"


@pytest.mark.parametrize(
    ("setting", "code", "value"),
    [
        ("optim.lr", "plan-setting", "optim.lr=3e-4"),
        ("optim.learning=1", "plan-unknown-key", "optim.learning"),
        ("lr=1", "plan-unknown-key", "'optim.lr'"),
        # The plan records what the user typed; that is not a value to set.
        ("request.name=x", "plan-unknown-key", "request.name"),
    ],
)
def test_wrong_settings_are_refused(setting, code, value):
    with refused(PlanError, code, value):
        override(plan_for(), [setting])


def test_a_setting_of_the_wrong_type_is_refused():
    with pytest.raises(PlanError) as caught:
        override(plan_for(), ["optim.betas=0.9"])

    assert "0.9" in str(caught.value)
    assert "optim.betas" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "code", "values"),
    [
        ("sequence.crop_size_vox=32,30,32", "plan-crop", ["30 on axis y", "8", "24 or 32"]),
        ("sequence.crop_size_vox=8,8,8", "plan-one-block", ["(8, 8, 8)", "at least 2"]),
        ("sequence.block_tokens=7,1,1", "plan-crop", ["axis z"]),
        ("sequence.order=rastr", "plan-unknown-name", ["sequence.order", "'raster'"]),
        ("optim.lr=0", "plan-out-of-range", ["optim.lr=0.0"]),
        ("run.peak_memory_gib=-1", "plan-out-of-range", ["run.peak_memory_gib=-1.0"]),
        ("run.dry_step_seconds=0", "plan-out-of-range", ["run.dry_step_seconds=0.0"]),
        (
            "run.loader_seconds_per_crop=-1",
            "plan-out-of-range",
            ["run.loader_seconds_per_crop=-1.0"],
        ),
        ("run.seconds_per_step=0", "plan-out-of-range", ["run.seconds_per_step=0.0"]),
        ("run.spike_sigmas=nan", "plan-out-of-range", ["run.spike_sigmas=nan"]),
        ("data.holdout_fraction=1", "plan-out-of-range", ["data.holdout_fraction=1", "[0, 1)"]),
    ],
)
def test_impossible_plans_name_what_is_possible(setting, code, values):
    plan = plan_for(replace(POOL, median_shape_vox=(40, 50, 36)))

    with refused(PlanError, code, *values):
        check(override(plan, [setting]))


def test_the_rate_warms_up_linearly_and_ends_at_zero():
    optim = OptimPlan(num_steps=110, batch_size=1, lr=1.0, warmup_steps=10)

    # (s + 1) / 10 for ten steps, then half a cosine over 100 steps: its middle is at 60.
    assert [learning_rate(optim, s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(optim, 60) == pytest.approx(0.5)
    assert learning_rate(optim, 110) == pytest.approx(0.0)


def test_generators_depend_only_on_seed_purpose_and_ids():
    draw = rng.generator(1, "crop", 5, 2).integers(1 << 60)

    assert draw == rng.generator(1, "crop", 5, 2).integers(1 << 60)

    # Another seed, another purpose, and the same numbers in another order.
    for key in ((2, "crop", 5, 2), (1, "flip", 5, 2), (1, "crop", 2, 5)):
        assert rng.generator(*key).integers(1 << 60) != draw


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    with pytest.raises(InterruptedError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise InterruptedError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_error_in_writing_names_the_file_that_is_wanted(tmp_path):
    # A full disk was once reported with the name of the temporary file.
    path = tmp_path / "a.json"
    other = str(tmp_path / "other")

    named = []
    # An error that names no file, the temporary one, or another.
    for is_temporary in (None, True, False):
        with pytest.raises(OSError) as caught, atomic_path(path) as temporary:
            names = {None: (), True: (str(temporary),), False: (other,)}[is_temporary]
            raise OSError(errno.ENOSPC, "No space left on device", *names)
        named.append(caught.value.filename)

    assert named == [str(path), str(path), other]


def test_lines_are_appended_after_whole_ones_only(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []

    append_json_line(path, {"a": 1})
    # The rest of a process that was killed while it wrote.
    with path.open("a") as handle:
        handle.write('{"a": 2')
    assert whole_lines(path) == ['{"a": 1}']

    append_json_line(path, {"a": 3})
    assert [json.loads(text) for text in whole_lines(path)] == [{"a": 1}, {"a": 3}]

    # NaN is not JSON: other programs could not read the line.
    with pytest.raises(ValueError):
        append_json_line(path, {"a": float("nan")})
    assert len(whole_lines(path)) == 2


def test_differences_name_every_leaf():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_grids_rounding_and_spacing_ratio():
    assert grid_of((40, 56, 40), (8, 8, 8)) == (5, 7, 5)
    with pytest.raises(ValueError) as caught:
        grid_of((8, 8, 30), (8, 8, 8))
    for value in ("30", "axis x", "8", "24", "32"):
        assert value in str(caught.value)
    assert round_up((1, 8, 9), (8, 8, 8)) == (8, 8, 16)
    # Sorted, 10 and 5 differ by a factor of 2.
    assert spacing_ratio((10, 1.5, 1.5), (1.5, 1.5, 5)) == 2.0
