"""Compiled layers are the layers: one graph for all of a kind, same loss and gradient, same keys.

FlexAttention runs as a formula.
"""

from dataclasses import replace

import narrow_cnn
import pytest
import torch

from nnunet_autoreg.errors import InterruptedRunError
from nnunet_autoreg.model import attention, compilation
from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.compilation import (
    cannot_compile,
    fast_path,
    is_compiled,
    put_channels_last,
    run_by,
)
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.autoregressive import Autoregressive
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
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.sampling.sample import Batch

CPU = torch.device("cpu")
TINY = encoder_size("primus_tiny")
# Width 48 with 2 heads is small enough to be compiled on a CPU in seconds.
ARGUMENTS = {**TINY.arguments, "embed_dim": 48, "eva_numheads": 2}


def make_plan(recompute: bool = False, depth: int = 1, **sequence: object) -> Plan:
    arguments = {**ARGUMENTS, "eva_depth": depth}
    return Plan(
        "t",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan("primus_tiny", TINY.class_path, arguments, TINY.token_size),
        SequencePlan((16, 16, 16), **sequence),
        PredictionPlan(query_depth=2),  # type: ignore[arg-type]
        OptimPlan(4, 2, 1e-2, 1, checkpoint_activations=recompute),
        RunPlan(0, 2, 2),
    )


def make_batch(order: str = "raster") -> Batch:
    """Return 2 crops of 8 tokens, the second one with padding, and prefixes of 2 and 3 tokens."""
    generator = torch.Generator().manual_seed(0)
    order_index = torch.arange(8).repeat(2, 1)
    if order == "random":
        order_index = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)])
    valid_mask = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    valid_mask[1, :, 9:] = False
    voxels = torch.randn(2, 1, 1, 16, 16, 16, generator=generator) * valid_mask[:, :, None]
    return Batch(voxels, valid_mask, order_index, torch.tensor([2, 3]))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled path with FlexAttention on the CPU; torch refuses its gradient there only
    because no CPU kernel has one.
    """
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    monkeypatch.setattr(attention, "FLEX_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    # Compiled code of other tests would be reused otherwise.
    torch._dynamo.reset()


def value_and_gradient(
    loss: object,
    module: torch.nn.Module,
    batch: Batch,
) -> tuple[float, torch.Tensor]:
    module.zero_grad()
    terms = loss(batch)  # type: ignore[operator]
    terms.total.backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return float(terms.total.detach()), torch.cat(gradients)


WAYS = [("raster", "next", False), ("random", "query", False), ("raster", "next", True)]


@pytest.mark.parametrize(("order", "predictor", "recompute"), WAYS)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_flexattention_gives_the_loss_and_gradient_of_plain_attention(
    order: str,
    predictor: str,
    recompute: bool,
) -> None:
    plan = make_plan(recompute, order=order, predictor=predictor)
    batch = make_batch(order)
    torch.manual_seed(0)
    objective = Autoregressive(plan)
    plain, gradient = value_and_gradient(objective.loss, objective.module, batch)

    compiled_loss = run_by(fast_path(plan, CPU), objective.loss)
    found, compiled_gradient = value_and_gradient(compiled_loss, objective.module, batch)

    # Sums are made in another order, so float32 results agree to about 6 digits.
    assert found == pytest.approx(plain, rel=1e-5)
    relative_error = (gradient - compiled_gradient).norm() / gradient.norm()
    assert float(relative_error) < 1e-5


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def losses(plan: Plan, num_steps: int = 2) -> list[float]:
    """Losses of a fresh network's first steps on one batch, by a separate training step."""
    torch.manual_seed(0)
    step = TrainingStep(plan, Autoregressive(plan), CPU)
    batch = make_batch(plan.sequence.order)
    return [float(step(number, batch)[0]) for number in range(num_steps)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("order", "predictor", "kinds"),
    # With queries a decoder of other layers follows the encoder.
    [("raster", "next", 1), ("random", "query", 2)],
)
def test_all_layers_share_a_graph_and_a_second_trainer_compiles_nothing(
    order: str,
    predictor: str,
    kinds: int,
) -> None:
    # Three layers: without sharing there would be three graphs.
    plan = make_plan(order=order, predictor=predictor, depth=3)
    before = num_graphs()

    first = losses(plan)
    after_dry_step = num_graphs()
    second = losses(plan)

    assert after_dry_step - before == kinds
    assert num_graphs() == after_dry_step
    assert first == second


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_mask_is_made_inside_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    block_mask = AttentionRule.block_mask

    def watched(rule: AttentionRule, num_heads: int = 1) -> object:
        made.append(torch.compiler.is_compiling())
        return block_mask(rule, num_heads)

    monkeypatch.setattr(AttentionRule, "block_mask", watched)

    losses(make_plan(order="random", predictor="query", depth=3), num_steps=1)

    assert made == [False, False]  # one for all blocks of the encoder, one for the decoder


def test_a_cpu_compiles_layers_when_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan()
    plain = losses(plan)
    assert fast_path(plan, CPU) is None

    monkeypatch.setenv(compilation.ON_CPU, "1")
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    path = fast_path(plan, CPU)

    assert path is not None
    assert not path.flex
    assert losses(plan) == pytest.approx(plain, rel=1e-5)


def test_training_continues_eagerly_if_a_layer_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(graph: torch.fx.GraphModule, _: object) -> object:
        raise FileNotFoundError("no compiler")

    plan = make_plan()
    tried = replace(plan, run=replace(plan.run, peak_memory_gib=1.0))
    plain = losses(tried)
    monkeypatch.setenv(compilation.ON_CPU, "1")
    monkeypatch.setattr(compilation, "BACKEND", broken)
    torch._dynamo.reset()

    assert losses(tried) == plain
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    # A plan without a measured peak of memory makes its dry step, which decides for itself.
    with pytest.raises(RuntimeError) as failed:
        losses(plan)
    assert cannot_compile(failed.value)


def test_a_request_to_stop_inside_the_compiler_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(graph: torch.fx.GraphModule, _: object) -> object:
        raise InterruptedRunError("stopped")

    monkeypatch.setenv(compilation.ON_CPU, "1")
    monkeypatch.setattr(compilation, "BACKEND", interrupted)
    torch._dynamo.reset()

    with pytest.raises(InterruptedRunError):
        losses(make_plan())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiling_leaves_the_state_and_its_keys_as_they_are() -> None:
    plan = make_plan()
    objective = Autoregressive(plan)
    before = list(objective.module.state_dict())

    step = TrainingStep(plan, objective, CPU)

    # The loss is run by the compiled path, and torch adds "_orig_mod" to keys if a module is
    # replaced.
    assert step.loss_of.loss is not objective.loss  # type: ignore[union-attr]
    assert list(objective.module.state_dict()) == before
    assert not [key for key in before if "_orig_mod" in key]


def test_nothing_is_compiled_on_a_cpu_by_request_or_if_sharded() -> None:
    plan = make_plan()
    cuda = torch.device("cuda")

    objective = Autoregressive(plan)

    assert run_by(fast_path(plan, CPU), objective.loss) == objective.loss
    assert is_compiled(plan, cuda, sharded=False)
    assert not is_compiled(plan, cuda, sharded=True)
    eager = Plan(**{**vars(plan), "run": RunPlan(0, 2, 2, compile=False)})
    assert not is_compiled(eager, cuda, sharded=False)


def test_failing_to_compile_is_distinguished_from_failing_to_run() -> None:
    def broken(graph: torch.fx.GraphModule, _: object) -> object:
        raise FileNotFoundError("no compiler")

    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as failed:
        torch.compile(lambda x: x + 1, backend=broken)(torch.zeros(1))

    assert cannot_compile(failed.value)
    # Both are RuntimeErrors too.
    assert not cannot_compile(torch.OutOfMemoryError("CUDA out of memory"))
    assert not cannot_compile(RuntimeError("shapes"))


@pytest.mark.parametrize(
    "plan",
    [make_plan(order="random", predictor="query"), narrow_cnn.plan_of()],
)
def test_every_objective_takes_the_layout_of_a_gpu(plan: Plan) -> None:
    """A transformer's tables have four axes, which torch's own conversion of a module refuses."""
    module = build_objective(plan).module
    before = {key: value.clone() for key, value in module.state_dict().items()}

    put_channels_last(module)

    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Without a kernel of a convolution the last line would pass without a check.
    kernels = [p for p in module.parameters() if p.dim() == 5]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)
