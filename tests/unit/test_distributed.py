"""Two processes are one: the same global batch gives the same losses, weights and checkpoints,
summed by DDP or spread by FSDP2.
"""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from sequence_cases import Ramp, Shifted
from torch import Tensor
from torch import distributed as dist

from nnunet_autoreg.errors import PlanError, UsageError
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.alice import Alice
from nnunet_autoreg.objectives.alice_plan import AlicePlan
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.objectives.joint import Joint
from nnunet_autoreg.objectives.joint_plan import JointPlan
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.checkpointing import restore, shareable, snapshot
from nnunet_autoreg.pretrain.distributed import (
    SINGLE_PROCESS,
    DeferredTensor,
    World,
    is_lost_peer,
    join,
    leave,
    process_share,
)
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.sampling.sampler import SequenceSampler

TINY = encoder_size("primus_tiny")
ARGUMENTS = {**TINY.arguments, "embed_dim": 24, "eva_depth": 2, "eva_numheads": 2}
PLAN = Plan(
    "t",
    DataPlan((1.0, 1.0, 1.0)),
    EncoderPlan("primus_tiny", TINY.class_path, ARGUMENTS, TINY.token_size),
    SequencePlan(
        (16, 16, 16),
        weights={"spatial": 1.0, "semantic": 1.0},
        semantic_members=2,
        member_crop_vox=(8, 16, 16),
    ),
    PredictionPlan(),
    OptimPlan(8, 5, 1e-2, 1),
    RunPlan(0, 2, 2, log_every=2),
)
# Four steps, so that a step after the spoiled one shows that training continues on all processes.
STEPS = 4
SPOILED = 2
"""At this step only process 1 meets an infinite voxel; all skip the step."""


WAYS = {
    "ddp": (None, "none", 5),
    "ddp in parts": (2, "none", 5),
    "ddp, even": (None, "none", 6),
    "fsdp": (None, "full", 6),
    "fsdp in parts": (1, "full", 6),
}
"""Name -> crops at once, how weights are spread, crops of a step."""


ALICE_PLAN = replace(
    PLAN,
    sequence=SequencePlan(
        (16, 16, 16),
        order="random",
        prefix="fixed",
        prefix_share=0.25,
        weights={"semantic": 1.0},
        semantic_members=2,
        member_crop_vox=(16, 16, 16),
    ),
    objective=AlicePlan("alice", width=16, hidden=24, num_prototypes=32, decoder_depth=1),
)
NARROW_CNN = {
    **encoder_size("resenc_tiny").arguments,
    "features_per_stage": [4, 6, 8, 8],
    "n_blocks_per_stage": [1, 1, 1, 1],
}
ALICE_WAYS = {
    "alice, ddp in parts": ("transformer", 2, "none", 5),
    "alice, fsdp in parts": ("transformer", 2, "full", 6),
    "alice, ddp, cnn": ("cnn", None, "none", 5),
}
"""Name -> network, crops at once, how weights are spread, crops of a step."""

JOINT_PLAN = replace(
    PLAN,
    sequence=SequencePlan(
        (16, 16, 16),
        order="random",
        weights={"views": 1.0, "images": 1.0},
        spatial_share=0.5,
    ),
    objective=JointPlan(
        "joint",
        width=16,
        num_heads=2,
        depth=1,
        slab_vox=8,
        slab_step_vox=4,
        num_slab_clusters=8,
        num_volume_clusters=4,
        bank_cases=16,
        slabs_first=0.0,
    ),
)
JOINT_WAYS = {
    "joint, ddp in parts": (2, "none", 5),
    "joint, fsdp in parts": (2, "full", 6),
}
"""Name -> crops at once, how weights are spread, crops of a step."""


class Views:
    """Views of four volumes or of six 2D images; one view of one step is infinite."""

    def __init__(self, plan: Plan):
        self.sampler = SequenceSampler(plan)
        volumes = tuple(Shifted((20, 24, 20), by=float(9000 * n)) for n in range(4))
        images = tuple(Ramp((1, 30 + n, 28)) for n in range(6))
        self.pool = SamplingPool(volumes, images=images)  # type: ignore[arg-type]

    def draw(self, cases: Any, purpose: str, step: int, number: int = 0) -> Sample:
        sample = self.sampler.draw(self.pool, purpose, step, number)
        sources = []
        for source in sample.sources:
            # Trained scans have a mean of about 0 and a deviation of about 1.
            voxels = (source.voxels - source.voxels.mean()) / source.voxels.std()
            if step == SPOILED and number == 4:
                voxels = torch.full_like(voxels, torch.inf)
            sources.append(replace(source, voxels=voxels))
        return replace(sample, sources=tuple(sources))


class Pairs:
    """Two crops of noise; every third pair is half padding, one pair of one step is infinite."""

    def draw(self, cases: Any, purpose: str, step: int, number: int = 0) -> Sample:
        rng = np.random.default_rng([step, number])
        real = np.ones((2, 16, 16, 16), dtype=bool)
        if number % 3 == 0:
            real[:, :, :, 9:] = False
        voxels = (rng.normal(size=real.shape).astype(np.float32) * real)[:, None]
        if step == SPOILED and number == 4:
            voxels[:] = np.inf
        return Sample(voxels, real, rng.permutation(16), 4)


def with_parts(plan: Plan, micro: int | None, sharding: str, batch_size: int) -> Plan:
    """The plan with another batch, parts of it, and sharding."""
    return replace(
        plan,
        optim=replace(plan.optim, micro_batch_size=micro, batch_size=batch_size),
        run=replace(plan.run, sharding=sharding),
    )


def untrained(plan: Plan, objective: Any, world: World) -> Trainer:
    """A trainer without scans: the objective's sampler makes its samples up."""
    return Trainer(plan, Path("nowhere"), objective, [], [], torch.device("cpu"), 0, world=world)


def alice_in(
    world: World,
    network: str,
    micro: int | None,
    sharding: str,
    batch_size: int,
) -> Trainer:
    torch.manual_seed(0)
    plan = with_parts(ALICE_PLAN, micro, sharding, batch_size)
    if network == "cnn":
        size = encoder_size("resenc_tiny")
        encoder = EncoderPlan("resenc_tiny", size.class_path, NARROW_CNN, size.token_size)
        plan = replace(plan, encoder=encoder)
    objective = Alice(plan)
    objective.sampler = Pairs()  # type: ignore[assignment]
    trainer = untrained(plan, objective, world)
    objective.begin()
    return trainer


def joint_in(world: World, micro: int | None, sharding: str, batch_size: int) -> Trainer:
    torch.manual_seed(0)
    plan = with_parts(JOINT_PLAN, micro, sharding, batch_size)
    objective = Joint(plan)
    objective.sampler = Views(plan)  # type: ignore[assignment]
    trainer = untrained(plan, objective, world)
    objective.begin()
    return trainer


class Mixed:
    """Sample i of step n: one crop if n is even, two members if it is odd; every third sample is
    half padding.
    """

    def draw(self, cases: Any, purpose: str, step: int, number: int = 0) -> Sample:
        rng = np.random.default_rng([step, number])
        shape = (1, 16, 16, 16) if step % 2 == 0 else (2, 8, 16, 16)
        real = np.ones(shape, dtype=bool)
        if number % 3 == 0:
            real[:, :, :, 9:] = False
        voxels = (rng.normal(size=shape).astype(np.float32) * real)[:, None]
        if step == SPOILED and number == 4:
            voxels[0, 0, 0, 0, 0] = np.inf
        if step % 2 == 0:
            return Sample(voxels, real, np.arange(8), 1 + number % 4)
        return Sample(voxels, real, np.arange(8), 1, np.tile(np.arange(4), 2), np.repeat([1, 0], 4))


def trainer_in(
    world: World,
    micro: int | None,
    sharding: str = "none",
    batch_size: int = 5,
) -> Trainer:
    torch.manual_seed(0)
    plan = with_parts(PLAN, micro, sharding, batch_size)
    objective = Autoregressive(plan)
    objective.sampler = Mixed()  # type: ignore[assignment]
    return untrained(plan, objective, world)


def trained(trainer: Trainer, first: int = 0, last: int = STEPS) -> list[float]:
    """The losses of some steps."""
    losses = []
    for step in range(first, last):
        loss, *_ = trainer.train_step(step, trainer.batches[step])
        losses.append(float(loss))
    return losses


def state_of(trainer: Trainer, step: int = STEPS) -> dict[str, Any]:
    trainer.progress.step = step
    return snapshot(
        trainer.objective,
        trainer.optimizer,
        trainer.guard,
        trainer.progress,
        trainer.world,
    )


def finished(trainer: Trainer, world: World) -> dict[str, Any]:
    """Train, and return what is compared with a run in one process."""
    losses = trained(trainer)
    state = state_of(trainer)
    weights = [state["network_weights"][key] for key, _ in trainer.module.named_parameters()]
    moments = []
    for moment in state["optimizer"]["state"].values():
        if "exp_avg" in moment:
            moments.append(moment["exp_avg"])
    # How many tensors of the state this process holds: all or, beside the main process, none.
    num_held = sum(value is not None for value in [*weights, *moments])
    return {
        "losses": losses,
        "state": state,
        "held": world.gather((num_held, len(weights) + len(moments))),
        "sharded": trainer.is_sharded,
        "encoder": trainer.objective.transferable_state(),
        "numbers": world.gather(list(trainer.train_step.numbers)),
        "statistics": trainer.guard.statistics(),
    }


def continued(world: World, rank: int, sharding: str, file: Path) -> dict[str, Any]:
    """Continue the checkpoint of a run in one process, in the two ways of reading it."""
    start = torch.load(file, weights_only=False)
    trainer = trainer_in(world, None, sharding, 6)
    torch.manual_seed(100 + rank)
    restore(start, trainer.objective, trainer.optimizer, trainer.guard, world)
    losses = trained(trainer, STEPS, STEPS + 2)
    # The main process takes over the generator of the file; the other one keeps its seed of 101.
    states = [state["torch"] for state in state_of(trainer)["generators"]]
    torch.manual_seed(101)
    expected = (start["generators"][0]["torch"], torch.get_rng_state())
    are_equal = [torch.equal(*pair) for pair in zip(states, expected, strict=True)]

    # Only the main process has the file; what it holds afterwards, all do.
    trainer = trainer_in(world, None, sharding, 6)
    content = shareable(torch.load(file, weights_only=False)) if rank == 0 else None
    restore(world.share(content), trainer.objective, trainer.optimizer, trainer.guard, world)
    own = {}
    for name, weights in trainer.module.state_dict().items():
        own[name] = weights.to_local() if hasattr(weights, "to_local") else weights

    return {
        f"from alone, {sharding}": losses,
        f"generators, {sharding}": are_equal,
        f"shareable, {sharding}": (state_of(trainer), world.gather(own)),
    }


def together(rank: int, port: int, folder: Path) -> None:
    """Do what each of two processes does; the main one writes the results."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    world = join(store, rank, 2, torch.device("cpu"))
    found: dict[str, Any] = {
        "shared": world.share(f"of {rank}"),
        "gathered": world.gather(rank),
        "any": (world.any(rank == 1), world.any(False)),
    }

    for name, (micro, sharding, batch_size) in WAYS.items():
        found[name] = finished(trainer_in(world, micro, sharding, batch_size), world)

    # Objectives with state beside the network: teacher and centres, banks of clusters.
    stateful = [(name, alice_in, way) for name, way in ALICE_WAYS.items()]
    stateful += [(name, joint_in, way) for name, way in JOINT_WAYS.items()]
    for name, built_in, way in stateful:
        trainer = built_in(world, *way)
        found[name] = {
            "losses": trained(trainer),
            "extra": world.gather(dict(trainer.objective.extra_state())),
            "encoder": trainer.objective.transferable_state(),
            "sharded": trainer.is_sharded,
            "statistics": trainer.guard.statistics(),
        }

    for sharding in ("none", "full"):
        found |= continued(world, rank, sharding, folder / "alone.pt")

    if rank == 0:
        torch.save(found, folder / "found.pt")
    world.wait()
    leave()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the other processes do: the order of sums depends on the number."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def alone() -> dict[int, dict[str, Any]]:
    """What one process finds, by crops of a step."""
    return {batch_size: run_alone(batch_size) for batch_size in (5, 6)}


def run_alone(batch_size: int) -> dict[str, Any]:
    trainer = trainer_in(SINGLE_PROCESS, None, "none", batch_size)
    losses = trained(trainer)
    state = state_of(trainer)
    # Training changes the tensors of the state in place, so they are copied before the next steps.
    kept = {
        **state,
        "optimizer": copied(state["optimizer"]),
        "network_weights": copied(state["network_weights"]),
    }
    return {"losses": losses, "state": kept, "next": trained(trainer, STEPS, STEPS + 2)}


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def two(
    alone: dict[int, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    # A port that is free now; the first process listens on it.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save(alone[6]["state"], folder / "alone.pt")
    # This file is their program, and it imports what lies beside tests/unit.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    processes = []
    for rank in range(2):
        line = [sys.executable, __file__, str(rank), str(port), str(folder)]
        processes.append(subprocess.Popen(line, env=environment))
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_and_weights_of_one(
    alone: dict[int, dict[str, Any]],
    two: dict[str, Any],
    way: str,
) -> None:
    batch_size = WAYS[way][2]
    one = alone[batch_size]
    both = two[way]
    # An odd batch is shared as evenly as possible.
    numbers = [[0, 1], [2, 3, 4]] if batch_size == 5 else [[0, 1, 2], [3, 4, 5]]
    assert both["numbers"] == numbers
    assert both["sharded"] is way.startswith("fsdp")

    good = [n for n in range(STEPS) if n != SPOILED]
    losses = [both["losses"][n] for n in good]
    assert losses == pytest.approx([one["losses"][n] for n in good], rel=1e-5)

    found = both["state"]["network_weights"]
    assert all(type(value) is torch.Tensor for value in found.values())
    assert_equal_but_for_rounding(found, one["state"]["network_weights"])
    for name, weights in both["encoder"].items():
        assert torch.equal(weights, found[f"encoder.network.{name}"]), name


def assert_equal_but_for_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare weights after a few steps of AdamW, whose sums were rounded differently.

    AdamW divides each gradient by its own size. Where a gradient is hardly more than rounding, its
    rounding error therefore moves the weight by up to the rate, 0.01, in every step. That happens
    to a few weights, and to which ones depends on the processor. A wrong gradient moves most.
    """
    assert found.keys() == expected.keys()
    num_far = num_all = 0
    for name, value in expected.items():
        difference = (found[name] - value).abs()
        assert float(difference.max()) < 1e-3, name
        num_far += int((difference > 2e-5).sum())
        num_all += difference.numel()
    assert num_far <= num_all / 1000


def test_only_the_main_process_holds_all_of_sharded_weights(two: dict[str, Any]) -> None:
    (main, num), (other, _) = two["fsdp"]["held"]

    assert num > 0
    assert (main, other) == (num, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_bad_on_one_process_is_skipped_on_all(
    alone: dict[int, dict[str, Any]],
    two: dict[str, Any],
    way: str,
) -> None:
    one = alone[5]
    both = two[way]
    assert not np.isfinite(both["losses"][SPOILED])
    assert not np.isfinite(one["losses"][SPOILED])
    assert (both["statistics"].nonfinite, both["statistics"].in_row) == (1, 0)

    # The optimiser has counted the good steps only.
    steps = [
        {int(entry["step"]) for entry in run["state"]["optimizer"]["state"].values()}
        for run in (one, both)
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("way", WAYS)
def test_one_process_continues_a_checkpoint_of_two(
    alone: dict[int, dict[str, Any]],
    two: dict[str, Any],
    way: str,
) -> None:
    one = alone[WAYS[way][2]]
    trainer = trainer_in(SINGLE_PROCESS, None, "none", WAYS[way][2])
    restore(two[way]["state"], trainer.objective, trainer.optimizer, trainer.guard)

    assert trained(trainer, STEPS, STEPS + 2) == pytest.approx(one["next"], rel=1e-4)

    moments = [list(s["optimizer"]["state"].items()) for s in (one["state"], two[way]["state"])]

    assert [number for number, _ in moments[0]] == [number for number, _ in moments[1]]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_continue_a_checkpoint_of_one(
    alone: dict[int, dict[str, Any]],
    two: dict[str, Any],
    sharding: str,
) -> None:
    assert two[f"from alone, {sharding}"] == pytest.approx(alone[6]["next"], rel=1e-5)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_checkpoint_read_by_the_main_process_reaches_all_exactly(
    alone: dict[int, dict[str, Any]],
    two: dict[str, Any],
    sharding: str,
) -> None:
    state, (main, other) = two[f"shareable, {sharding}"]
    start = alone[6]["state"]

    assert_same(state["network_weights"], start["network_weights"])
    assert_same(state["optimizer"]["state"], start["optimizer"]["state"])

    for name, weights in start["network_weights"].items():
        # A tensor with too few rows to be divided lies whole in the main process.
        parts = [main[name]] if main[name].shape == weights.shape else [main[name], other[name]]
        assert torch.equal(torch.cat(parts) if len(parts) > 1 else parts[0], weights), name
        assert sharding == "full" or torch.equal(other[name], weights), name


def assert_same(found: Any, expected: Any) -> None:
    """Equal trees, tensors bit for bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_shareable_content_is_sent_without_its_weights(
    alone: dict[int, dict[str, Any]],
) -> None:
    start = alone[6]["state"]

    outline = pickle.dumps(shareable(start))

    num_bytes = sum(weights.nbytes for weights in start["network_weights"].values())
    assert len(outline) < 0.2 * num_bytes

    # A tensor is described; its values are sent later, by the collectives of torch.
    received = pickle.loads(outline)
    name, weights = next(iter(start["network_weights"].items()))
    described = DeferredTensor(tuple(weights.shape), weights.dtype, None)
    assert received["network_weights"][name] == described
    assert received["generators"][0]["python"] == start["generators"][0]["python"]
    assert received["step"] == STEPS

    # In one process nothing has to be sent, and the content is whole.

    trainer = trainer_in(SINGLE_PROCESS, None, "none", 6)
    restore(shareable(start), trainer.objective, trainer.optimizer, trainer.guard)
    assert_same(state_of(trainer)["network_weights"], start["network_weights"])


def test_every_process_has_its_own_generators_in_the_checkpoint(
    two: dict[str, Any],
) -> None:
    assert len(two["ddp"]["state"]["generators"]) == 2
    assert two["generators, none"] == two["generators, full"] == [True, True]


def test_processes_share_gather_and_agree(two: dict[str, Any]) -> None:
    assert (two["shared"], two["gathered"], two["any"]) == ("of 0", [0, 1], (True, False))
    assert (
        SINGLE_PROCESS.share("x"),
        SINGLE_PROCESS.gather(3),
        SINGLE_PROCESS.any(True),
        SINGLE_PROCESS.is_main,
    ) == (
        "x",
        [3],
        True,
        True,
    )


@pytest.mark.parametrize(
    ("num", "size"),
    [
        (8, 1),
        (8, 2),
        (8, 3),
        (5, 4),
        (4, 4),
        (33, 7),
    ],
)
def test_shares_have_no_overlap_and_no_gap_and_are_even(num: int, size: int) -> None:
    shares = [process_share(num, rank, size) for rank in range(size)]

    assert [number for share in shares for number in share] == list(range(num))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("way", ALICE_WAYS)
def test_alice_has_one_teacher_in_all_processes_and_that_of_one(
    two: dict[str, Any],
    way: str,
) -> None:
    network, _, sharding, batch_size = ALICE_WAYS[way]
    alone = alice_in(SINGLE_PROCESS, network, None, "none", batch_size)
    losses = trained(alone)
    expected = alone.objective.extra_state()

    found = two[way]

    assert found["sharded"] is (sharding == "full")
    good = [n for n in range(STEPS) if n != SPOILED]
    assert [found["losses"][n] for n in good] == pytest.approx([losses[n] for n in good], rel=1e-4)
    assert found["statistics"].nonfinite == alone.guard.statistics().nonfinite == 1

    # Every process holds all of teacher, centres and temperature, also where weights are sharded.
    first, second = found["extra"]
    assert first.keys() == second.keys() == expected.keys()
    for name in expected:
        assert torch.equal(first[name], second[name]), name
    assert_equal_but_for_rounding(first, expected)
    for name, value in alone.objective.transferable_state().items():
        # The gradient of a bias before a norm is rounding noise, which AdamW makes large.
        if not name.endswith("conv.bias"):
            assert torch.allclose(found["encoder"][name], value, atol=2e-3), name


@pytest.mark.parametrize("way", JOINT_WAYS)
def test_joint_clusters_have_one_bank_in_all_processes_and_that_of_one(
    two: dict[str, Any],
    way: str,
) -> None:
    _, sharding, batch_size = JOINT_WAYS[way]
    alone = joint_in(SINGLE_PROCESS, None, "none", batch_size)
    losses = trained(alone)
    expected = alone.objective.extra_state()

    found = two[way]

    assert found["sharded"] is (sharding == "full")
    good = [n for n in range(STEPS) if n != SPOILED]
    assert [found["losses"][n] for n in good] == pytest.approx([losses[n] for n in good], rel=1e-3)
    assert found["statistics"].nonfinite == alone.guard.statistics().nonfinite == 1

    first, second = found["extra"]
    assert first.keys() == second.keys() == expected.keys()
    assert bool(expected["slab_known"].any())
    assert bool(expected["volume_known"].any())
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].float(), value.float(), atol=1e-3), name


def test_a_batch_smaller_than_the_number_of_processes_is_refused() -> None:
    with refused(UsageError, "batch-too-small", "=3", "4 processes", "--num-gpus"):
        process_share(3, 0, 4)
    with refused(UsageError, "batch-not-even", "=5", "2 processes", "run.sharding"):
        process_share(5, 0, 2, sharded=True)


def test_a_lost_process_is_distinguished_from_an_own_error() -> None:
    # The messages of gloo (CPU) and of NCCL (GPU) when the other side is gone.
    by_gloo = "[third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    assert is_lost_peer(RuntimeError(by_gloo))
    assert is_lost_peer(dist.DistBackendError("NCCL error"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(UsageError("gloo"))


def test_an_unknown_way_of_sharding_is_refused() -> None:
    with refused(PlanError, "plan-unknown-name", "run.sharding", "'full'"):
        check(replace(PLAN, run=replace(PLAN.run, sharding="ful")))


if __name__ == "__main__":
    together(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
