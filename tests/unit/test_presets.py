"""``--preset faithful`` and ``--objective masked``: the values they set, what they refuse, and the
original model's own numbers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from nnunet_autoreg.errors import PlanError, UsageError
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.objective_kinds import with_objective
from nnunet_autoreg.objectives.registered.autoregressive import faithful
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import OptimPlan, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.length import with_hours
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.pretrain.request import Request, check_inputs, overrides_of, with_presets
from nnunet_autoreg.pretrain.training_step import learning_rate, parameter_groups
from nnunet_autoreg.sampling.blocks import sequence_ids
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import TRAINING, SequenceSampler

POOL = Pool(192, (1.0, 1.0, 1.0), (200, 200, 200), 400_000_000, None)


def planned(encoder: str, **overrides) -> Plan:
    return make_plan(
        "run",
        POOL,
        Hardware("cpu", 24.0),
        Overrides(encoder, **overrides),
        0,
        {},
        lambda *_: (0.0, 0.0),
    )


def test_faithful_is_what_ar_ssl4m_does() -> None:
    plan = check(faithful(planned("vit_b16", num_steps=1000)))
    s = plan.sequence
    o = plan.optim

    assert (s.order, s.predictor, s.prefix) == ("interleaved", "next", "uniform_from_0")
    assert s.block_tokens == (1, 1, 1)
    assert not s.flip
    assert not s.swap_axes
    assert s.weights == {"strided": 1.0}
    assert (s.num_subvolumes, s.stride_vox, s.mask_seen) == (4, 8, False)
    assert plan.objective.variance_floor == 0.0
    assert plan.objective.variance_epsilon == 1e-6
    assert plan.objective.target_smoothing == 0.0
    assert (o.lr, o.betas, o.weight_decay) == (1e-4, (0.9, 0.999), 0.01)
    assert o.decay_all
    assert o.batch_size == 288
    # A cosine from the first step on, without a warm-up: half the rate halfway.
    assert [learning_rate(o, step) for step in (0, 500, 1000)] == pytest.approx([1e-4, 5e-5, 0.0])
    assert s.crop_size_vox == (128, 128, 128)
    for key in ("optim.lr", "optim.warmup_steps"):
        assert plan.reasons[key] == "as AR-SSL4M has it (--preset faithful)"


def test_epochs_asked_for_are_counted_in_batches_of_the_preset() -> None:
    def plan(batch_size: int | None) -> Plan:
        request = Request(
            "run",
            ("4",),
            encoder="vit_b16",
            num_epochs=90.0,
            preset="faithful",
            batch_size=batch_size,
        )
        made = make_plan(
            "run",
            POOL,
            Hardware("cpu", 24.0),
            overrides_of(request),
            0,
            {},
            lambda *_: (0.0, 0.0),
        )
        return with_presets(made, request)

    of_preset = plan(None)
    of_user = plan(8)

    # 400 million voxels are 191 crops of 128^3: less than a batch of 288, which counts as one, and
    # 23.8 batches of 8. 90 epochs of these are 90 and 2146 steps.
    assert (of_preset.optim.batch_size, of_preset.optim.num_steps) == (288, 90)
    assert of_preset.reasons["optim.batch_size"] == "as AR-SSL4M has it (--preset faithful)"
    assert (of_user.optim.batch_size, of_user.optim.num_steps) == (8, 2146)
    assert of_user.reasons["optim.batch_size"] == "set by the user"


def test_faithful_on_primus_gives_a_block_and_cuts_four_sub_volumes() -> None:
    plan = check(faithful(planned("primus_tiny", num_steps=10)))

    # Without a START token something must be given; four sub-volumes of whole tokens of 8.
    assert plan.sequence.prefix == "uniform"
    assert plan.sequence.crop_size_vox[0] % 32 == 0


def test_faithful_refuses_convolutional_encoders_with_the_way_out() -> None:
    for encoder in ("primus_v2_tiny", "resenc_tiny"):
        with refused(PlanError, "preset-encoder", encoder, "vit_b16"):
            faithful(planned(encoder, num_steps=10))


def test_hours_do_not_change_a_presets_warm_up() -> None:
    assert with_hours(faithful(planned("primus_tiny")), 1.0, 1.0, "cpu").optim.warmup_steps == 0


def test_what_is_typed_counts_more_than_a_preset() -> None:
    request = Request(
        "run",
        ("4",),
        preset="faithful",
        batch_size=4,
        sequences=("spatial",),
    ).check()
    plan = planned("primus_tiny", num_steps=10, batch_size=4)
    made = override(with_presets(plan, request), ["optim.lr=3e-4"])

    assert made.optim.batch_size == 4
    assert made.sequence.weights == {"spatial": 1.0}
    assert made.optim.lr == 3e-4
    assert made.optim.weight_decay == 0.01


def test_masked_hides_three_quarters_and_excludes_the_preset() -> None:
    plan = check(with_objective(planned("primus_tiny", num_steps=10), "masked"))
    s = plan.sequence

    assert plan.objective.name == "masked"
    assert (s.order, s.predictor) == ("random", "query")
    assert (s.prefix, s.prefix_share) == ("fixed", 0.25)

    with refused(UsageError, "request-preset-objective", "faithful", "masked"):
        Request("run", ("4",), preset="faithful", objective="masked").check()
    with refused(UsageError, "request-unknown-preset", "'faithful'"):
        Request("run", ("4",), preset="faithfull").check()
    with refused(UsageError, "request-unknown-objective", "'masked'"):
        Request("run", ("4",), objective="mask").check()


def test_start_predicts_one_token_by_next_only() -> None:
    plan = faithful(planned("vit_b16", num_steps=10))

    blocks = replace(plan.sequence, block_tokens=(2, 2, 2), num_subvolumes=2)
    with refused(PlanError, "plan-start-token", "8 tokens", "sequence.prefix=uniform"):
        check(replace(plan, sequence=blocks))
    with refused(PlanError, "plan-start-token", "predictor query", "sequence.predictor=next"):
        check(replace(plan, sequence=replace(plan.sequence, predictor="query")))


def test_decay_on_everything_leaves_nothing_out() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    both = parameter_groups(module, 0.01)
    everything = parameter_groups(module, 0.01, decay_all=True)

    # The matrix is decayed; its bias, and weight and bias of the norm, only on request.
    assert [len(g["params"]) for g in both] == [1, 3]
    assert [len(g["params"]) for g in everything] == [4, 0]


@pytest.mark.parametrize("prefix", [0, 1, 5, 23])
def test_the_faithful_objective_gives_the_original_models_loss(
    shared_data: Path,
    prefix: int,
) -> None:
    from ar_ssl4m_head import head_to_ours

    from nnunet_autoreg.convert.ar_ssl4m import to_ours

    with np.load(shared_data / "golden" / "ar_ssl4m_small.npz") as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files}
    weights = {}
    for key, value in numbers.items():
        if key.startswith("weights/"):
            weights[key.removeprefix("weights/")] = value
    # The original stores (x, y, z).
    voxels = numbers["input_xyz"].permute(0, 3, 2, 1)[:, None, None].contiguous()
    crop = tuple(voxels.shape[-3:])
    plan = faithful(planned("vit_b16", num_steps=10))
    arguments = {**plan.encoder.arguments, "embed_dim": 96, "eva_depth": 3, "eva_numheads": 12}
    encoder = replace(plan.encoder, arguments=arguments)
    sequence = replace(plan.sequence, crop_size_vox=crop)
    objective = build_objective(check(replace(plan, encoder=encoder, sequence=sequence)))
    network = objective.model.encoder.network
    missing, unexpected = network.load_state_dict(to_ours(weights), strict=False)
    assert not missing
    assert not unexpected
    weight, bias = head_to_ours(weights, (16, 16, 16))
    objective.model.head.project.load_state_dict({"weight": weight, "bias": bias})
    ids = torch.from_numpy(sequence_ids(grid_of(crop, (16, 16, 16)), (1, 1, 1), 1, "interleaved"))
    batch = Batch(
        voxels,
        torch.ones_like(voxels[:, :, 0], dtype=torch.bool),
        ids.expand(len(voxels), -1),
        torch.full((len(voxels),), prefix),
    )

    with torch.no_grad():
        terms = objective.loss(batch)

    # 24 tokens of 16^3 = 4096 voxels, less those that are given.
    assert float(terms.count) == len(voxels) * (24 - prefix) * 4096
    expected = float(numbers[f"prefix{prefix}/loss"])
    assert float(terms.total / terms.count) == pytest.approx(expected, abs=1e-4)


def test_faithful_draws_prefixes_from_0_and_overlapping_sub_volumes() -> None:
    class NumberedSlices:
        shape_vox = (140, 140, 140)
        spacing_mm = (1.0, 1.0, 1.0)

        def read_padded(self, start, size):
            z = np.arange(size[0], dtype=np.float32)[None, :, None, None]
            return np.broadcast_to(z, (1, *size)).copy(), np.ones(size, bool)

    sampler = SequenceSampler(faithful(planned("vit_b16", num_steps=10)))

    samples = [sampler.draw([NumberedSlices()], TRAINING, step, 0) for step in range(12)]

    # Four sub-volumes of 32 slices, each 8 slices after the one before.
    expected = [first + i for first in (0, 8, 16, 24) for i in range(32)]
    assert samples[0].voxels[0, 0, :, 0, 0].tolist() == expected
    assert all(0 <= sample.prefix < 512 for sample in samples)
    assert len({sample.prefix for sample in samples}) > 6
    assert isinstance(sampler.plan.optim, OptimPlan)


def test_with_start_the_first_prediction_knows_no_voxel() -> None:
    plan = faithful(planned("vit_b16", num_steps=10))
    arguments = {
        **plan.encoder.arguments,
        "embed_dim": 48,
        "eva_depth": 2,
        "eva_numheads": 2,
        "patch_embed_size": [8, 8, 8],
    }
    encoder = replace(plan.encoder, arguments=arguments, token_size_vox=(8, 8, 8))
    sequence = replace(plan.sequence, crop_size_vox=(32, 16, 8))
    plan = check(replace(plan, encoder=encoder, sequence=sequence))
    torch.manual_seed(0)
    objective = build_objective(plan)
    order_index = torch.from_numpy(sequence_ids((4, 2, 1), (1, 1, 1), 1, "interleaved"))[None]
    voxels = torch.randn(1, 1, 1, 32, 16, 8)
    valid_mask = torch.ones(1, 1, 32, 16, 8, dtype=torch.bool)
    batch = Batch(voxels, valid_mask, order_index, torch.tensor([0]))
    valid = torch.ones_like(order_index, dtype=torch.bool)
    objective.module.eval()
    with torch.no_grad():
        # Nothing is given: all eight tokens are predicted, the first from START.
        assert float(objective.loss(batch).count) == 8 * 512
        before = objective.module(batch, valid)
        for position_in_order in range(8):
            # Tokens lie in a grid of 4 x 2 x 1.
            token = int((order_index[0] == position_in_order).nonzero())
            z = 8 * (token // 2)
            y = 8 * (token % 2)
            other = voxels.clone()
            other[..., z : z + 8, y : y + 8, :] = torch.randn(8, 8, 8)

            after = objective.module(replace(batch, voxels=other), valid)

            is_later = order_index[0] > position_in_order
            assert torch.equal(before[0, ~is_later], after[0, ~is_later])
            assert (before[0, is_later] != after[0, is_later]).any(dim=-1).all()


def test_a_preset_for_another_encoder_is_refused_before_scans_are_read() -> None:
    with refused(PlanError, "preset-encoder", "--preset faithful", "resenc_tiny"):
        check_inputs(Request("run", ("4",), encoder="resenc_tiny", preset="faithful").check())


def test_a_preset_that_goes_token_by_token_plans_an_encoder_that_can() -> None:
    request = Request("run", ("4",), preset="faithful").check()
    check_inputs(request)
    made = make_plan(
        "run",
        POOL,
        Hardware("cpu", 24.0),
        overrides_of(request),
        0,
        {},
        lambda *_: (0.0, 0.0),
    )

    assert check(with_presets(made, request)).encoder.name == "primus_tiny"


@pytest.mark.parametrize(
    "setting",
    [
        "encoder.arguments.init_values=0.2",
        "encoder.arguments.n_stages=3",
        "sequence.predictor=network",
    ],
)
def test_a_setting_of_either_family_passes_while_the_encoder_is_open(setting: str) -> None:
    # Which of the encoders will be planned is not known yet: these belong to a transformer or to a
    # CNN.
    check_inputs(Request("run", ("4",), settings=(setting,)).check())

    with refused(PlanError, "plan-unknown-key", "optim.lrr", "optim.lr"):
        check_inputs(Request("run", ("4",), settings=("optim.lrr=1",)).check())


def test_an_unknown_value_of_a_setting_is_refused_before_scans_are_read() -> None:
    request = Request("run", ("4",), settings=("sequence.order=randm",)).check()

    with refused(PlanError, "plan-unknown-name", "sequence.order", "'randm'", "random"):
        check_inputs(request)
