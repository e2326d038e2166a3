"""A hand-edited plan is carried out or refused in one line, with any value at any key."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from sequence_cases import plan_for

from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.finetune.block import BLOCK_KEY, AutoregBlock, Recipe, read_block
from nnunet_autoreg.objective_kinds import kind_of, with_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.records import from_jsonable, to_jsonable

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# One per family of encoders: CNN, plain transformer, transformer with START.
PLANS = ("tiny", "hippocampus_crops_primus_tiny", "brain_mr_vit_b16")
# JSON as others write it has NaN, infinity (1e400), and whole numbers of any length.
WRONG_VALUES = [json.loads(text) for text in ("null", '"text"', "[1]", "-1", "NaN", "1e400")]
WRONG_VALUES.append(10**400)

Key = tuple[str | int, ...]


def golden(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return parsed


def keys_of(value: Any, above: Key = ()) -> Iterator[Key]:
    """Every key of nested objects and lists, from the outermost on."""
    if above:
        yield above
    inner = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        inner = enumerate(value)
    for key, item in inner:
        yield from keys_of(item, (*above, key))


def replaced(data: dict[str, Any], key: Key, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    holder: Any = changed
    for part in key[:-1]:
        holder = holder[part]
    holder[key[-1]] = value
    return changed


def outcomes(data: dict[str, Any], read: Any) -> tuple[int, int]:
    """Return how many changed plans are read and refused; another exception fails the test."""
    num_read, num_refused = 0, 0
    for key in keys_of(data):
        for value in WRONG_VALUES:
            try:
                read(replaced(data, key, value))
            except AutoregError as error:
                assert "\n" not in str(error)
                num_refused += 1
            else:
                num_read += 1
    return num_read, num_refused


def read_and_check(changed: dict[str, Any]) -> None:
    check(from_jsonable(Plan, changed, "plan.json"))


@pytest.mark.parametrize("name", PLANS)
def test_any_wrong_value_in_a_plan_is_refused_or_harmless(name: str) -> None:
    # About 40 such values once ended in tracebacks.
    data = golden(name)

    read_and_check(data)
    num_read, num_refused = outcomes(data, read_and_check)

    # What is read are texts in reasons and the request, and numbers that may be anything.
    assert num_refused > 3 * num_read


@pytest.mark.parametrize(("objective", "deepest"), [("alice", "decoder_depth"), ("joint", "depth")])
def test_any_wrong_value_in_a_plan_of_other_objectives_is_refused(
    objective: str,
    deepest: str,
) -> None:
    # A great number of layers was once built without end.
    plan = with_objective(plan_for("primus_tiny", (48, 48, 40)), objective)
    data = json.loads(json.dumps(to_jsonable(kind_of(objective).fit(plan, 4, 6))))

    read_and_check(data)
    num_read, num_refused = outcomes(data, read_and_check)

    assert num_refused > 3 * num_read
    # Layers are built one by one: 10^9 of them would keep the command busy for days.
    with refused(PlanError, "plan-out-of-range", f"objective.{deepest}=1000000000"):
        read_and_check(replaced(data, ("objective", deepest), 10**9))


@pytest.mark.parametrize("name", PLANS)
def test_any_wrong_value_in_a_fine_tuning_plan_is_refused_or_harmless(name: str) -> None:
    plan = check(from_jsonable(Plan, golden(name), "plan.json"))
    block = AutoregBlock(plan.encoder, None, Recipe(10, 1e-4, 1e-3, drop_path_rate=0.0))
    data = {"plans_name": "AutoregPlans", BLOCK_KEY: to_jsonable(block)}

    read_block(data)
    num_read, num_refused = outcomes(data, read_block)

    assert num_refused > 3 * num_read


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        (("optim", "lr"), "fast", "plan-wrong-type"),
        (("optim", "batch_size"), 1.5, "plan-wrong-type"),
        (("optim", "batch_size"), True, "plan-wrong-type"),
        (("optim", "betas"), [0.9], "plan-wrong-length"),
        (("optim", "num_steps"), 10**30, "plan-too-large"),
        (("run", "compile"), "yes", "plan-wrong-type"),
        (("data",), None, "plan-wrong-type"),
        (("encoder", "arguments", "n_stages"), "four", "plan-wrong-type"),
        (("encoder", "arguments", "kernel_sizes", 1), [3, 3], "plan-wrong-type"),
        (("encoder", "arguments", "strides"), [[1, 1, 1]], "plan-wrong-length"),
        (("encoder", "arguments", "n_blocks_per_stage"), 10**6, "plan-out-of-range"),
        (("objective", "query_depth"), 10**9, "plan-out-of-range"),
        (("sequence", "crop_size_vox", 0), 10**9, "plan-crop"),
    ],
)
def test_the_error_names_file_key_and_value(key: Key, value: Any, code: str) -> None:
    changed = replaced(golden("tiny"), key, value)
    shown = value if not isinstance(value, int) or isinstance(value, bool) else ""

    with refused(PlanError, code, key[0], shown):
        check(from_jsonable(Plan, changed, "plan.json"))


def test_unknown_missing_and_newer_keys_have_different_codes() -> None:
    data = golden("tiny")
    without_steps = copy.deepcopy(data)
    del without_steps["optim"]["num_steps"]
    cases = {
        "plan-unknown-key": replaced(data, ("optim", "learning_rate"), 1),
        "plan-missing-key": without_steps,
        "plan-newer-format": replaced(data, ("version",), 99),
    }

    for code, changed in cases.items():
        with refused(PlanError, code, "plan.json"):
            from_jsonable(Plan, changed, "plan.json")
