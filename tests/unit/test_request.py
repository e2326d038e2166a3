"""What the line typed says about length, memory and spacing, and whether a changed line continues a
run.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import PlanError, UsageError, WeightsError
from nnunet_autoreg.model.card import CARD_NAME, read_card
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.pretrain.checkpointing import prepare_starting_point
from nnunet_autoreg.pretrain.request import (
    PLAN_NAME,
    REPLACED_PLAN_NAME,
    Request,
    continued_plan,
    is_planned_anew,
    overrides_of,
)
from nnunet_autoreg.records import from_jsonable, read_json, to_jsonable, write_json

REQUEST = Request("run", datasets=("4",))
# What the plans of the first version did not have.
NEW_KEYS = {
    "data": ("spacing_groups", "min_scans"),
    "optim": ("micro_batch_size",),
    "run": ("seconds_per_step",),
}
NEW_REQUEST_KEYS = ("num_epochs", "num_hours", "gpu_memory_gib", "spacing")


def test_weights_to_start_from_bring_their_encoder_unless_one_is_named(
    tmp_path: Path,
    write_run: Callable[..., Path],
) -> None:
    folder = write_run(tmp_path, "brain")
    card = prepare_starting_point(str(folder / "encoder.safetensors"), tmp_path / "run")

    other = replace(REQUEST, encoder="resenc_tiny")

    assert prepare_starting_point(str(folder), tmp_path / "run") == card
    assert overrides_of(REQUEST).encoder == "auto"
    assert overrides_of(REQUEST, card).encoder == "primus_tiny"
    assert overrides_of(other, card).encoder == "resenc_tiny"


def test_a_cnn_to_start_from_keeps_its_strides_kernels_and_depth(
    tmp_path: Path,
    write_run: Callable[..., Path],
) -> None:
    arguments = {
        **encoder_size("resenc_tiny").arguments,
        "n_stages": 3,
        "features_per_stage": [16, 32, 64],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
    }
    folder = write_run(
        tmp_path,
        "other",
        encoder="resenc_tiny",
        arguments=arguments,
        token_size_vox=(2, 4, 4),
    )
    # A trained nnU-Net model has no name of ours.
    card = replace(read_card(folder), encoder="resenc")

    overrides = overrides_of(REQUEST, card)
    pool = Pool(9, (1.0, 1.0, 1.0), (32, 32, 32), 9 * 32**3, None)
    plan = make_plan("run", pool, Hardware("cpu", 8.0), overrides, 0, {}, lambda *_: (0.0, 0.0))

    assert plan.encoder.name == "resenc_tiny"
    assert (plan.encoder.arguments, plan.encoder.token_size_vox) == (arguments, (2, 4, 4))


def test_weights_of_unknown_widths_cannot_be_pretrained_further(
    tmp_path: Path,
    write_run: Callable[..., Path],
) -> None:
    card = read_card(write_run(tmp_path, "other", encoder="resenc_tiny"))
    narrow = {**card.arguments, "features_per_stage": [8, 16, 32, 64]}

    with refused(WeightsError, "weights-other-encoder", "autoreg_weights import"):
        overrides_of(REQUEST, replace(card, encoder="resenc", arguments=narrow))


def planned(folder: Path, request: Request) -> Plan:
    pool = Pool(9, (1.0, 1.0, 1.0), (32, 32, 32), 9 * 32**3, None)
    overrides = Overrides("auto", 2, 100)
    plan = make_plan(
        "run",
        pool,
        Hardware("cpu", 8.0),
        overrides,
        0,
        to_jsonable(request),
        lambda encoder, crop, recompute: (0.0, 0.0),
    )
    write_json(folder / PLAN_NAME, plan)
    return plan


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"num_steps": 5, "num_hours": 1.0}, "request-two-lengths", ["--steps", "--hours"]),
        ({"num_epochs": 5.0, "num_hours": 1.0}, "request-two-lengths", ["--epochs", "--hours"]),
        (
            {"num_epochs": 5.0, "settings": ("optim.batch_size=4",)},
            "request-epochs-batch",
            ["optim.batch_size", "--batch"],
        ),
        ({"num_hours": 0.0}, "request-number", ["--hours 0"]),
        ({"num_epochs": float("nan")}, "request-number", ["--epochs nan"]),
        ({"gpu_memory_gib": -1.0}, "request-number", ["--gpu-memory -1"]),
        ({"num_steps": 0}, "request-number", ["--steps 0"]),
        ({"seed": -1}, "request-number", ["--seed -1"]),
    ],
)
def test_impossible_lengths_and_numbers_are_refused(
    changes: dict[str, object],
    code: str,
    values: list[str],
) -> None:
    with refused(UsageError, code, *values):
        replace(REQUEST, **changes).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", ["isotrop", "1,1"])
def test_an_impossible_spacing_is_refused(spacing: str) -> None:
    with pytest.raises(UsageError) as caught:
        replace(REQUEST, spacing=spacing).check()

    assert spacing in str(caught.value)


@pytest.mark.parametrize(
    "length",
    [{}, {"num_hours": 1.0}, {"num_epochs": 2.0}, {"num_steps": 100}],
)
def test_the_line_typed_again_continues_and_more_steps_may_be_asked_for(
    tmp_path: Path,
    length: dict[str, float],
) -> None:
    begun = replace(REQUEST, **length)  # type: ignore[arg-type]
    plan = planned(tmp_path, begun)

    assert continued_plan(tmp_path, begun) == plan

    more = replace(begun, num_hours=None, num_epochs=None, num_steps=150)

    # The longer plan is written, so the same line continues it.
    assert continued_plan(tmp_path, more).optim.num_steps == 150
    assert continued_plan(tmp_path, more).optim.num_steps == 150


@pytest.mark.parametrize(
    ("then", "difference"),
    [
        (replace(REQUEST, num_hours=2.0), "num_hours: 1.0 -> 2.0"),
        (replace(REQUEST, num_epochs=2.0), "num_epochs: None -> 2.0"),
        (REQUEST, "num_hours: 1.0 -> None"),
        (replace(REQUEST, num_steps=50), "num_steps: 100 -> 50"),
        (replace(REQUEST, num_hours=1.0, spacing="finest"), "spacing: 'median' -> 'finest'"),
        (replace(REQUEST, num_hours=1.0, gpu_memory_gib=8.0), "gpu_memory_gib: None -> 8.0"),
    ],
)
def test_another_length_memory_or_spacing_is_another_run(
    tmp_path: Path,
    then: Request,
    difference: str,
) -> None:
    planned(tmp_path, replace(REQUEST, num_hours=1.0))

    with refused(UsageError, "run-other-settings", difference, "--name"):
        continued_plan(tmp_path, then)


def test_a_plan_without_a_checkpoint_gives_way_to_other_settings(tmp_path: Path) -> None:
    planned(tmp_path, REQUEST)
    before = (tmp_path / PLAN_NAME).read_bytes()
    other = replace(REQUEST, spacing="finest")

    # More steps are the same run; nothing is trained yet, so another spacing replaces the plan.
    assert not is_planned_anew(tmp_path, REQUEST)
    assert not is_planned_anew(tmp_path, replace(REQUEST, num_steps=150))
    assert not (tmp_path / REPLACED_PLAN_NAME).exists()
    assert is_planned_anew(tmp_path, other)
    assert (tmp_path / REPLACED_PLAN_NAME).read_bytes() == before


@pytest.mark.parametrize("file", [checkpoint.LATEST_NAME, CARD_NAME])
def test_a_plan_that_was_trained_by_keeps_its_settings(tmp_path: Path, file: str) -> None:
    plan = planned(tmp_path, REQUEST)
    checkpoint.save_checkpoint(tmp_path / file, {"plan": to_jsonable(plan)})

    assert not is_planned_anew(tmp_path, replace(REQUEST, spacing="finest"))


def without_new_keys(plan: Plan) -> dict[str, dict[str, object]]:
    data = to_jsonable(plan)
    for part, keys in NEW_KEYS.items():
        for key in keys:
            del data[part][key]
    for key in NEW_REQUEST_KEYS:
        del data["request"][key]
    return data


def test_a_run_of_the_first_version_is_read_and_continued(tmp_path: Path) -> None:
    plan = planned(tmp_path, REQUEST)
    old = without_new_keys(plan)
    write_json(tmp_path / PLAN_NAME, old)
    checkpoint.save_checkpoint(tmp_path / checkpoint.LATEST_NAME, {"plan": old})

    found = continued_plan(tmp_path, REQUEST)

    assert found.data.spacing_groups == ()
    assert found.optim.micro_batch_size is None
    assert found.run.seconds_per_step is None
    assert found.optim.lr == plan.optim.lr
    assert from_jsonable(Plan, read_json(tmp_path / PLAN_NAME), "plan.json") == found


def test_a_plan_changed_after_training_began_is_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, REQUEST)
    checkpoint.save_checkpoint(tmp_path / checkpoint.LATEST_NAME, {"plan": to_jsonable(plan)})
    write_json(tmp_path / PLAN_NAME, replace(plan, optim=replace(plan.optim, micro_batch_size=1)))

    with refused(PlanError, "plan-changed", "optim.micro_batch_size: 2 -> 1", PLAN_NAME):
        continued_plan(tmp_path, REQUEST)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (('encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8]}',), (8, 8, 8)),
        (("encoder.arguments.patch_embed_size=2,8,8",), (2, 8, 8)),
        (("encoder.arguments.patch_embed_size=[4,4,4]", "optim.lr=1e-3"), (4, 4, 4)),
        # Nothing is said about tokens, or nothing that could be planned with: checked later.
        (("encoder.arguments={}", "optim.lr=1e-3"), None),
        (("encoder.arguments.patch_embed_size=0,8,8",), None),
    ],
)
def test_tokens_that_the_user_sets_are_planned_for(
    settings: tuple[str, ...],
    expected: tuple[int, int, int] | None,
) -> None:
    request = Request("run", ("4",), encoder="primus_tiny", settings=settings)

    assert overrides_of(request).token_size_vox == expected
