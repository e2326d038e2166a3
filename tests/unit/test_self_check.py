"""The self-check finds compiled layers that attend to the wrong tokens; right ones stay."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_cases import WORDS, Ramp, contrast_material, semantic_material
from torch import Tensor, nn

from nnunet_autoreg.errors import InterruptedRunError
from nnunet_autoreg.model import attention, compilation
from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.model.trunk import FastPath
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.pretrain import dry_run
from nnunet_autoreg.pretrain.dry_run import fit_to_device
from nnunet_autoreg.pretrain.trainer import Trainer, TrainingJob
from nnunet_autoreg.records import from_jsonable, to_jsonable
from nnunet_autoreg.sampling.pool import SamplingPool

CPU = torch.device("cpu")
NARROW = {
    "primus_tiny": {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2},
    "vit_b16": {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2},
}
OBJECTIVE = PredictionPlan(query_depth=2)
MATERIAL = SamplingPool(
    (Ramp((40, 40, 40)),),
    contrast_material().groups,
    semantic_material().structures,
)


def make_plan(
    encoder: str = "primus_tiny",
    objective: PredictionPlan = OBJECTIVE,
    **sequence: Any,
) -> Plan:
    size = encoder_size(encoder)
    arguments = {**size.arguments, **NARROW[encoder]}
    settings = {"crop_size_vox": (16, 32, 16), "order": "random", "predictor": "query", **sequence}
    return Plan(
        "t",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan(encoder, size.class_path, arguments, size.token_size),
        SequencePlan(**settings),
        objective,
        OptimPlan(4, 3, 1e-2, 1),
        RunPlan(0, 2, 2),
    )


@dataclass
class Trainers:
    """Makes trainers of one process on a CPU, as a training would, and keeps them."""

    folder: Path
    made: list[Trainer]

    def __call__(self, plan: Plan) -> Trainer:
        torch.manual_seed(plan.run.seed)
        objective = build_objective(plan)
        trainer = Trainer(plan, self.folder, objective, MATERIAL, SamplingPool(()), CPU, 0)
        self.made.append(trainer)
        return trainer


@pytest.fixture
def trainers(tmp_path: Path) -> Trainers:
    return Trainers(tmp_path, [])


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile on the CPU, with FlexAttention as a formula."""
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(attention, "FLEX_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()


def as_sample_0(rule: AttentionRule) -> AttentionRule:
    """Return the rule of a kernel that reads the mask of sample 0 for every sample."""
    parts = (rule.order_index, rule.max_visible_block, rule.valid, rule.sees_first_block_only)
    return AttentionRule(*[x if x is None else x[:1].expand_as(x) for x in parts])


@pytest.fixture
def broken_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention reads the mask of sample 0 for every sample; the dense mask is right."""
    made = AttentionRule.block_mask

    def mask_of_sample_0(rule: AttentionRule, num_heads: int = 1) -> Any:
        return made(as_sample_0(rule), num_heads)

    monkeypatch.setattr(AttentionRule, "block_mask", mask_of_sample_0)


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled reads the mask of sample 0 for every sample, tiles or dense."""

    def wrong(by: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def layer_of_sample_0(layer: nn.Module, *inputs: Any) -> Tensor:
            changed = []
            for x in inputs:
                is_mask = isinstance(x, Tensor) and x.dtype == torch.bool
                changed.append(x[:1].expand_as(x) if is_mask else x)
            return by(layer, *changed)

        return layer_of_sample_0

    monkeypatch.setattr(
        "nnunet_autoreg.pretrain.training_step.fast_path",
        lambda plan, *_: FastPath(wrong, False) if plan.run.compile else None,
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.usefixtures("broken_flex")
def test_wrong_flexattention_makes_the_run_take_the_dense_mask(
    trainers: Trainers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = dry_run.fit_plan(make_plan(), trainers, CPU)

    assert (plan.run.flex_attention, plan.run.compile) == (False, True)
    # The second trainer tries the plan with the dense mask, and measures its memory.
    assert len(trainers.made) == 2
    assert plan.run.peak_memory_gib is not None
    assert warnings_of(caplog) == [plan.reasons["run.flex_attention"]]
    assert torch.__version__ in plan.reasons["run.flex_attention"]


@pytest.mark.usefixtures("broken_compiler")
def test_wrong_compiled_layers_make_the_run_eager(
    trainers: Trainers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = dry_run.fit_plan(make_plan(), trainers, CPU)

    assert plan.run.compile is False
    assert warnings_of(caplog) == [plan.reasons["run.compile"]]


@pytest.mark.usefixtures("broken_flex")
def test_without_the_self_check_nothing_is_found_and_nothing_changes(trainers: Trainers) -> None:
    plan = make_plan()
    plan = replace(plan, run=replace(plan.run, self_check=False))

    kept = dry_run.fit_plan(plan, trainers, CPU)

    assert replace(kept, run=plan.run) == plan
    assert kept.run.flex_attention is True


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def ways() -> dict[str, Plan]:
    masked = PredictionPlan("masked", query_depth=2)
    blocks = PredictionPlan(query_depth=2, query_attention=True)
    raster = make_plan(order="raster", predictor="next")
    checkpointed = replace(raster.optim, checkpoint_activations=True)
    return {
        "raster": raster,
        "random": make_plan(),
        "blocks": make_plan(objective=blocks, block_tokens=(2, 2, 1)),
        "masked": make_plan(objective=masked, prefix="fixed", prefix_share=0.25),
        "vit": make_plan("vit_b16", order="raster", predictor="next", prefix="uniform_from_0"),
        "checkpointed": replace(raster, optim=checkpointed),
    }


@pytest.mark.parametrize("way", list(ways()))
def test_right_layers_agree_and_nothing_is_compiled_for_it(
    way: str,
    trainers: Trainers,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", logger="nnunet_autoreg.model.compilation")
    plan = ways()[way]
    graphs = []
    check = compilation.self_check

    def counted(*arguments: Any) -> object:
        graphs.append(num_graphs())
        found = check(*arguments)
        graphs.append(num_graphs())
        return found

    monkeypatch.setattr(dry_run, "self_check", counted)
    kept = dry_run.fit_plan(plan, trainers, CPU)

    assert replace(kept, run=plan.run) == plan
    assert (kept.run.compile, kept.run.flex_attention, kept.run.self_check) == (True, True, True)
    assert len(trainers.made) == 1
    assert not warnings_of(caplog)
    # The check repeats calls of the dry step, so their graphs exist already.
    assert len(graphs) == 2
    assert graphs[0] == graphs[1] > 0
    assert len([r for r in caplog.records if r.name == compilation.__name__]) == 1


def calls_of(plan: Plan, trainers: Trainers) -> tuple[FastPath, compilation.CallRecorder]:
    """What the dry step of a plan called."""
    trainer = trainers(plan)
    path = trainer.train_step.fast_path
    assert path is not None
    recorder = path.recorder = compilation.CallRecorder(path)
    dry_run.dry_step(trainer)
    path.recorder = None
    return path, recorder


def test_every_kind_of_sequence_and_of_layer_is_checked(trainers: Trainers) -> None:
    weights = {"spatial": 1.0, "strided": 1.0, "contrast": 1.0, "semantic": 1.0}
    plan = make_plan(
        weights=weights,
        contrasts=WORDS,
        contrast_members=4,
        num_subvolumes=2,
        stride_vox=8,
    )

    _, recorder = calls_of(plan, trainers)

    found = {(kind, layer.__name__) for kind, _, layer in recorder.calls}
    assert found == {(kind, layer) for kind in weights for layer in ("EvaBlock", "CrossLayer")}
    assert all(call.rules for call in recorder.calls.values())


@pytest.mark.parametrize("way", ["raster", "random", "blocks", "vit"])
def test_a_wrong_mask_shows_far_above_what_is_allowed(
    way: str,
    trainers: Trainers,
    request: pytest.FixtureRequest,
) -> None:
    path, recorder = calls_of(ways()[way], trainers)
    # Broken only after the right layers were recorded.
    request.getfixturevalue("broken_flex")

    for call in recorder.calls.values():
        found = compilation.self_check(path, [("spatial", call)], CPU)
        assert found is not None
        # The limit must lie well between rounding and a wrong mask.
        assert found.error > 10 * found.allowed


def test_weights_and_generators_are_the_same_bits_with_and_without(trainers: Trainers) -> None:
    plan = make_plan()
    states = []
    for is_checked in (True, False):
        dry_run.fit_plan(replace(plan, run=replace(plan.run, self_check=is_checked)), trainers, CPU)
        states.append((trainers.made[-1].module.state_dict(), torch.get_rng_state()))

    (with_check, generator), (without, other_generator) = states
    assert torch.equal(generator, other_generator)
    assert all(torch.equal(with_check[key], without[key]) for key in without)


def test_a_run_that_was_tried_is_not_checked_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> Any:
        raise AssertionError("tried again")

    monkeypatch.setattr(dry_run, "fit_plan", refused)
    plan = make_plan()
    measured = replace(plan, run=replace(plan.run, peak_memory_gib=1.0))
    # A run that has measured its memory, and one that continues.
    for kept, is_new in ((measured, True), (plan, False)):
        job = TrainingJob(tmp_path, kept, "cpu", MATERIAL, SamplingPool(()), (), is_new)
        assert fit_to_device(job, refused, 1) is job


def test_plans_of_earlier_runs_are_read() -> None:
    data = to_jsonable(make_plan())
    del data["run"]["self_check"]

    assert from_jsonable(Plan, data, "plan.json") == make_plan()


def test_a_check_that_cannot_be_done_stops_no_training_but_a_stop_does(
    trainers: Trainers,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def failed(*_: object) -> None:
            raise error

        return failed

    plan = make_plan()
    monkeypatch.setattr(dry_run, "self_check", failing(RuntimeError("no copy")))

    kept = dry_run.fit_plan(plan, trainers, CPU)

    assert replace(kept, run=plan.run) == plan
    assert len(warnings_of(caplog)) == 1

    monkeypatch.setattr(dry_run, "self_check", failing(InterruptedRunError("stopped")))

    with pytest.raises(InterruptedRunError):
        dry_run.fit_plan(plan, trainers, CPU)
