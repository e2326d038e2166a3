"""An objective is added by one file: nothing else knows its name.

The tiny objective of this file is registered as a file of ``objectives/registered`` would be. It
predicts the mean of each block from the block's corner voxel, with one weight.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from stand_in import Linear

from nnunet_autoreg.cli.pretrain import parser
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.objective_kinds import (
    TRANSFORMER,
    FigureOfMerit,
    ObjectiveKind,
    kind_of,
    objective_kinds,
    presets,
    register,
    unregister,
    with_objective,
)
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import EncoderPlan, ObjectivePlan, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.records import from_jsonable, to_jsonable

PACKAGE = Path(__file__).resolve().parents[2] / "nnunet_autoreg"
POOL = Pool(40, (1.0, 1.0, 1.0), (40, 48, 40), 4_000_000, None)
NAME = "tiny_test"


@dataclass(frozen=True)
class TinyPlan(ObjectivePlan):
    """Attributes:
    strength: a value that no other objective has.
    """

    strength: float = 2.0


def settings(encoder: EncoderPlan) -> tuple[TinyPlan, dict[str, str]]:
    return TinyPlan(NAME, strength=3.0), {"objective.strength": f"planned for {encoder.name}"}


def adapt(plan: Plan) -> Plan:
    return replace(plan, sequence=replace(plan.sequence, flip=False))


def check_strength(plan: Plan) -> None:
    assert isinstance(plan.objective, TinyPlan)
    if plan.objective.strength <= 0:
        raise PlanError(f"objective.strength={plan.objective.strength}", code="tiny-strength")


@pytest.fixture
def tiny() -> Iterator[ObjectiveKind]:
    kind = ObjectiveKind(
        name=NAME,
        help="an objective of a test",
        plan_type=TinyPlan,
        settings=settings,
        adapt=adapt,
        check=check_strength,
        builders={TRANSFORMER: lambda plan: Linear()},
        figure=lambda plan: FigureOfMerit("distance", "1", "Lower is better.", {}),
    )
    # Those of the package are registered at the first call; ours comes after them.
    objective_kinds()
    register(kind)
    yield kind
    unregister(NAME)


def planned(encoder: str = "primus_tiny") -> Plan:
    hardware = Hardware("cpu", 24.0)
    overrides = Overrides(encoder, num_steps=4)
    return make_plan("run", POOL, hardware, overrides, 0, {}, lambda *_: (0.0, 0.0))


def test_a_registered_objective_can_be_typed_and_is_explained(tiny: ObjectiveKind) -> None:
    args = parser().parse_args(["--name", "x", "-d", "4", "--objective", NAME])

    assert args.objective == NAME
    assert "an objective of a test" in " ".join(parser().format_help().split())
    assert Request("x", ("4",), objective=NAME).check().objective == NAME


def test_a_registered_objective_is_planned_written_and_read(tiny: ObjectiveKind) -> None:
    plan = check(with_objective(planned(), NAME))

    assert plan.objective == TinyPlan(NAME, strength=3.0)
    assert plan.reasons["objective.strength"] == "planned for primus_tiny"
    assert not plan.sequence.flip
    assert "objective.query_depth" not in plan.reasons
    assert from_jsonable(Plan, to_jsonable(plan), "plan.json") == plan
    assert isinstance(build_objective(plan), Linear)


def test_its_own_values_are_set_and_checked_by_flat_keys(tiny: ObjectiveKind) -> None:
    plan = with_objective(planned(), NAME)

    changed = check(override(plan, ["objective.strength=5"]))

    assert changed.objective == TinyPlan(NAME, strength=5.0)
    with refused(PlanError, "tiny-strength", "-1"):
        check(override(plan, ["objective.strength=-1"]))
    with refused(PlanError, "plan-unknown-key", "query_depth"):
        override(plan, ["objective.query_depth=2"])


def test_an_encoder_that_it_cannot_train_is_refused(tiny: ObjectiveKind) -> None:
    plan = with_objective(planned("resenc_tiny"), NAME)

    with refused(PlanError, "plan-objective-encoder", NAME, "resenc_tiny", "transformers"):
        check(plan)


def test_set_does_not_turn_one_objective_into_another(tiny: ObjectiveKind) -> None:
    with refused(PlanError, "plan-other-objective", f"--objective {NAME}"):
        override(planned(), [f"objective.name={NAME}"])


def test_plans_without_an_objectives_name_are_those_of_the_default() -> None:
    # Plans of the first version, which had one objective only.
    data = to_jsonable(planned())
    del data["objective"]["name"]

    assert from_jsonable(Plan, data, "plan.json") == planned()


def test_an_unknown_objective_is_refused_with_a_close_name() -> None:
    data: dict[str, Any] = to_jsonable(planned())
    data["objective"]["name"] = "maskd"

    with refused(PlanError, "plan-unknown-name", "'maskd'", "'masked'"):
        from_jsonable(Plan, data, "plan.json")


def test_every_objective_checks_its_own_default_plan() -> None:
    for name, kind in objective_kinds().items():
        for network in kind.builders:
            encoder = "primus_tiny" if network == TRANSFORMER else "resenc_tiny"
            plan = check(with_objective(planned(encoder), name))

            assert type(plan.objective) is kind.plan_type
            assert kind.figure(plan).name


def compared_names(path: Path) -> set[str]:
    """Return the texts that a file compares something with, or looks up in a literal dict."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            values = part.elts if isinstance(part, (ast.Tuple, ast.Set, ast.List)) else [part]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found.add(value.value)
    return found


def test_no_file_decides_by_the_name_of_an_objective() -> None:
    excepted = {PACKAGE / "objectives" / "registered"}
    names = set(objective_kinds()) | set(presets())
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if excepted & set(path.parents):
            continue
        used = compared_names(path) & names
        if used:
            found[str(path.relative_to(PACKAGE))] = used

    assert found == {}


def test_each_registered_file_registers_the_objective_of_its_name() -> None:
    files = {path.stem for path in (PACKAGE / "objectives" / "registered").glob("[a-z]*.py")}

    assert files
    assert files == set(objective_kinds())
    for name in files:
        assert kind_of(name).name == name


def test_networks_are_built_only_when_an_objective_is() -> None:
    with torch.device("meta"):
        # On the meta device a network has shapes and no memory.
        objective = build_objective(check(planned()))

    assert all(parameter.is_meta for parameter in objective.module.parameters())
