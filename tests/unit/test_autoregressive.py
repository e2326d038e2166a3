"""Exactness of block-causal prediction: the tests T1-T3, T5-T7 of the method, on every family of
encoders, in float32.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import token_size_of
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.model.attention import block_causal
from nnunet_autoreg.model.sequence import from_blocks, to_blocks
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.autoregressive import Autoregressive, supervised_tokens
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.objectives.targets import normalised_target
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.sampling.blocks import (
    block_ids,
    draw_order_index,
    sequence_ids,
    window_positions,
)
from nnunet_autoreg.sampling.kinds import member_codes, member_crop
from nnunet_autoreg.sampling.sample import Batch

NARROW = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2}
ENCODERS = {
    "primus": ("primus_tiny", NARROW),
    "primus_v2": ("primus_v2_tiny", NARROW),
    "primus_v3": ("primus_v3_tiny", {**NARROW, "ch_per_level": [8, 12, 16, 24]}),
    "vit": ("vit_b16", {**NARROW, "patch_embed_size": [8, 8, 8], "decoder_features": 4}),
}
"""What of a named encoder is made smaller: all keep tokens of 8^3 voxels, or 4 x 8 x 8."""


def make_plan(encoder="primus", **sequence):
    name, smaller = ENCODERS[encoder]
    size = encoder_size(name)
    arguments = {**size.arguments, **smaller}
    settings = {"crop_size_vox": (16, 32, 24), **sequence}
    planned = EncoderPlan(
        name,
        size.class_path,
        arguments,
        token_size_of(size.class_path, arguments),
    )
    plan = Plan(
        "t",
        DataPlan((1.0, 1.0, 1.0)),
        planned,
        SequencePlan(**settings),
        PredictionPlan(),
        OptimPlan(10, 2, 1e-3, 1),
        RunPlan(0, 10, 10),
    )
    return check(plan)


def make_batch(plan, prefix, seed=0, num_samples=1):
    """Random crops with the plan's blocks in a random or raster order."""
    generator = torch.Generator().manual_seed(seed)
    size = plan.sequence.crop_size_vox
    voxels = torch.randn(num_samples, 1, 1, *size, generator=generator)
    grid = grid_of(size, plan.encoder.token_size_vox)
    ids = torch.from_numpy(block_ids(grid, plan.sequence.block_tokens))
    num_blocks = int(ids.max()) + 1
    order_index = ids.expand(num_samples, -1).clone()
    if plan.sequence.order == "random":
        # Tokens of one block keep one position in the order.
        orders = [torch.randperm(num_blocks, generator=generator) for _ in range(num_samples)]
        order_index = torch.stack([order[ids] for order in orders])

    valid_mask = torch.ones(num_samples, 1, *size, dtype=torch.bool)
    return Batch(voxels, valid_mask, order_index, torch.tensor([prefix] * num_samples))


def predict(objective, batch):
    objective.module.eval()
    with torch.no_grad():
        return objective.module(batch, torch.ones_like(batch.order_index, dtype=torch.bool))


def noise_like(tokens):
    """Other voxels, not just brighter ones: instance normalisation would make those equal."""
    return torch.randn(tokens.shape, generator=torch.Generator().manual_seed(99))


def change_block(batch, plan, position_in_order):
    """The same batch with other voxels in one block of the first sample."""
    token = plan.encoder.token_size_vox
    tokens = to_blocks(batch.voxels[:, 0], token).clone()
    chosen = batch.order_index[0] == position_in_order
    tokens[0, chosen] = noise_like(tokens[0, chosen])
    voxels = from_blocks(tokens, grid_of(plan.sequence.crop_size_vox, token))
    return replace(batch, voxels=voxels[:, None])


CONVOLVED = {"primus_v2": (2, 2, 2), "primus_v3": (2, 2, 2)}
"""Tokens of the smallest block."""
VARIANTS = {
    **{
        f"{encoder}, {order}, {predictor}": {
            "encoder": encoder,
            "block_tokens": block,
            "crop_size_vox": (16, 32, 32),
            "order": order,
            "predictor": predictor,
        }
        for encoder, block in CONVOLVED.items()
        for order, predictor in (("raster", "next"), ("random", "query"))
    },
    "vit, raster, next": {"encoder": "vit"},
    "vit, random, query": {"encoder": "vit", "order": "random", "predictor": "query"},
    "raster, single tokens": {},
    "raster, blocks of 2x2x1": {"block_tokens": (2, 2, 1)},
    "random, query": {"order": "random", "predictor": "query"},
    "raster, query, blocks of 1x2x1": {"predictor": "query", "block_tokens": (1, 2, 1)},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def objective(request):
    torch.manual_seed(0)
    return Autoregressive(make_plan(**request.param))


def test_a_block_changes_neither_its_own_nor_an_earlier_prediction(objective):
    num_blocks = objective.module.num_blocks
    for prefix in (1, num_blocks // 2):
        batch = make_batch(objective.plan, prefix)
        before = predict(objective, batch)
        for position_in_order in range(prefix, num_blocks):
            after = predict(objective, change_block(batch, objective.plan, position_in_order))
            # Bit for bit: blocks from the prefix up to the changed one may not have seen it.
            order = batch.order_index[0]
            kept = (order >= prefix) & (order <= position_in_order)
            assert torch.equal(before[0, kept], after[0, kept])


def test_changing_a_block_changes_the_prediction_of_the_next(objective):
    batch = make_batch(objective.plan, prefix=1)
    before = predict(objective, batch)
    for position_in_order in range(objective.module.num_blocks - 1):
        after = predict(objective, change_block(batch, objective.plan, position_in_order))
        following = batch.order_index[0] == position_in_order + 1
        assert (before[0, following] != after[0, following]).any()


def test_only_given_blocks_react_to_later_blocks(objective):
    prefix = objective.module.num_blocks // 2
    encoder = objective.module.encoder.eval()
    plan = objective.plan

    def features(batch):
        with torch.no_grad():
            valid = torch.ones_like(batch.order_index, dtype=torch.bool)
            rule = objective.module.rule(batch.order_index, batch.prefix, valid)
            return encoder(batch.voxels, rule)[:, encoder.num_starts :]

    batch = make_batch(plan, prefix)
    first = batch.order_index[0] == 0
    # The prefix holds the positions 0 to prefix - 1, which all see each other.
    last_given = features(change_block(batch, plan, prefix - 1))
    not_given = features(change_block(batch, plan, prefix))

    assert (features(batch)[0, first] != last_given[0, first]).any()
    assert torch.equal(features(batch)[0, first], not_given[0, first])


def test_a_prefix_of_one_block_is_plain_causal_attention():
    order_index = torch.tensor([[0, 1, 2, 3]])
    valid = torch.ones(1, 4, dtype=torch.bool)

    of_one = block_causal(order_index, torch.tensor([1]), valid).dense()
    of_three = block_causal(order_index, torch.tensor([3]), valid).dense()

    assert torch.equal(of_one[0, 0], torch.tril(torch.ones(4, 4, dtype=torch.bool)))
    # With a prefix of three the first three tokens see each other, also backwards.
    assert of_three[0, 0].int().tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_the_longest_prefix_supervises_exactly_the_last_block(objective):
    num_blocks = objective.module.num_blocks
    batch = make_batch(objective.plan, num_blocks - 1)
    valid = torch.ones_like(batch.order_index, dtype=torch.bool)

    chosen = supervised_tokens(batch.order_index, batch.prefix, valid)

    assert int(chosen.sum()) == objective.module.block_num_tokens
    assert set(batch.order_index[chosen].tolist()) == {num_blocks - 1}


def test_the_loss_of_two_prefixes_equals_a_hand_computation():
    plan = make_plan()
    torch.manual_seed(1)
    objective = Autoregressive(plan)
    batch = replace(make_batch(plan, 1, num_samples=2), prefix=torch.tensor([3, 20]))

    terms = objective.loss(batch)

    predicted = predict(objective, batch).numpy().astype(np.float64)
    crops = batch.voxels[:, 0, 0].numpy().astype(np.float64)
    total, count = 0.0, 0
    for b, prefix in enumerate((3, 20)):
        t = 0
        for z in range(0, 16, 8):
            for y in range(0, 32, 8):
                for x in range(0, 24, 8):
                    token = crops[b, z : z + 8, y : y + 8, x : x + 8].reshape(-1)
                    target = (token - token.mean()) / token.std(ddof=1)
                    if t >= prefix:
                        total += ((predicted[b, t] - target) ** 2).sum()
                        count += 512
                    t += 1

    # 24 tokens of 512 voxels; the prefixes 3 and 20 leave 21 and 4 of them.
    assert float(terms.count) == count == 512 * (21 + 4)
    assert terms.total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("encoder", CONVOLVED)
def test_the_loss_over_blocks_of_several_tokens_equals_a_hand_computation(encoder):
    plan = make_plan(encoder, crop_size_vox=(16, 32, 32), block_tokens=CONVOLVED[encoder])
    torch.manual_seed(1)
    objective = Autoregressive(plan)
    batch = make_batch(plan, 2)
    predicted = predict(objective, batch).numpy().astype(np.float64)
    crop = batch.voxels[0, 0, 0].numpy().astype(np.float64)
    depth = plan.encoder.token_size_vox[0]
    total = 0.0
    count = 0
    t = 0
    for z in range(0, 16, depth):
        for y in range(0, 32, 8):
            for x in range(0, 32, 8):
                token = crop[z : z + depth, y : y + 8, x : x + 8].reshape(-1)
                # Blocks of 16^3 in raster order: 0 and 1 lie at y < 16 and are given.
                if y >= 16:
                    target = (token - token.mean()) / token.std(ddof=1)
                    total += ((predicted[0, t] - target) ** 2).sum()
                    count += token.size
                t += 1

    terms = objective.loss(batch)

    # The supervised half of the crop: z of 16, y from 16 to 32, x of 32.
    assert float(terms.count) == count == 16 * 16 * 32
    assert terms.total.item() == pytest.approx(total, rel=1e-5)


def test_the_head_gets_no_gradient_from_given_blocks():
    plan = make_plan()
    torch.manual_seed(2)
    objective = Autoregressive(plan)
    batch = make_batch(plan, prefix=23)
    features = []
    hook = objective.module.head.register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0].requires_grad_()),
    )

    terms = objective.loss(batch)
    hook.remove()

    (gradient,) = torch.autograd.grad(terms.total, features[0])

    # All but the last of 24 tokens are given. It is predicted from the feature of token 22.
    assert gradient[0, 22].abs().sum() > 0
    assert gradient[0, torch.arange(24) != 22].abs().sum() == 0


def test_targets_are_standardised_and_constant_tokens_become_0():
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randn(1, 2, 512, generator=generator) * 7 + 100
    voxels[0, 1] = 42.0

    target = normalised_target(voxels, torch.ones_like(voxels, dtype=torch.bool), 1e-2)

    assert float(target[0, 0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(target[0, 0].std(unbiased=True)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(target[0, 1], torch.zeros(512))


def test_the_variance_floor_keeps_air_quiet():
    noise = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0)) * 0.01

    target = normalised_target(noise, torch.ones_like(noise, dtype=torch.bool), 1e-2)

    # 0.01 / sqrt(0.01^2 + 0.01) = 0.0995; without the floor of the variance it would be 1.
    assert float(target.std()) == pytest.approx(0.1, rel=0.1)


def test_padding_is_neither_context_nor_target():
    plan = make_plan()
    torch.manual_seed(3)
    objective = Autoregressive(plan)
    batch = make_batch(plan, prefix=2)
    valid_mask = batch.valid_mask.clone()
    # Valid are the first of two layers of tokens, and in y 28 of 32 voxels: tokens are cut too.
    valid_mask[:, :, 8:] = False
    valid_mask[:, :, :8, 28:] = False
    padded = replace(batch, voxels=batch.voxels * valid_mask[:, :, None], valid_mask=valid_mask)

    terms = objective.loss(padded)

    # The valid voxels without those of the two given tokens.
    assert float(terms.count) == 8 * 28 * 24 - 2 * 512

    # Other values in the padding: the 4 x 3 = 12 tokens of the first layer must not notice.
    noisy = padded.voxels.clone()
    noisy[:, :, :, 8:] = 5.0
    valid = torch.from_numpy(block_ids((2, 4, 3), (1, 1, 1)) < 12)[None]
    with torch.no_grad():
        clean = objective.module(padded, valid)
        changed = objective.module(replace(padded, voxels=noisy), valid)

    assert torch.equal(clean[0, :12], changed[0, :12])


def test_baselines_predict_the_mean_and_repeat_the_previous_block():
    plan = make_plan(crop_size_vox=(8, 8, 16))
    objective = Autoregressive(plan)
    # Two tokens. The second is the negative of the first, so it is -1 times the standardised first.
    ramp = torch.arange(512.0).reshape(8, 8, 8)
    voxels = torch.cat([ramp, -ramp], dim=2)[None, None, None]
    batch = Batch(
        voxels,
        torch.ones(1, 1, 8, 8, 16, dtype=torch.bool),
        torch.tensor([[0, 1]]),
        torch.tensor([1]),
    )

    terms = objective.loss(batch, references=True)

    # The squares of 512 standardised values add up to 511 (variance with n - 1). To copy the
    # previous token is wrong by twice the value: 4 times that.
    assert float(terms.references["mean"]) == pytest.approx(511, rel=1e-4)
    assert float(terms.references["copy"]) == pytest.approx(4 * 511, rel=1e-4)


def test_cutting_into_blocks_and_back_is_the_identity():
    crop = torch.arange(2 * 16 * 8 * 24.0).reshape(1, 2, 16, 8, 24)
    blocks = to_blocks(crop, (8, 8, 8))

    # The grid is 2 x 1 x 3, so token 4 = 1 * 3 + 1 lies in the second layer, second in x.
    assert blocks.shape == (1, 6, 2, 8, 8, 8)
    assert torch.equal(blocks[0, 4], crop[0, :, 8:16, 0:8, 8:16])
    assert torch.equal(from_blocks(blocks, (2, 1, 3)), crop)


def test_tokens_equal_those_of_the_downstream_network_on_the_whole_crop():
    plan = make_plan()
    encoder = Autoregressive(plan).module.encoder
    voxels = torch.randn(2, 1, 1, 16, 32, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = encoder.network.down_projection(voxels[:, 0]).flatten(2).transpose(1, 2)
        assert torch.allclose(encoder.tokens(voxels), whole, atol=1e-5)
        full = encoder(voxels, None)
        expected, _ = encoder.network.eva(whole)

    assert torch.allclose(full, expected, atol=1e-5)


def test_random_order_with_the_next_predictor_is_refused_with_the_way_out():
    with refused(PlanError, "plan-ill-posed", "sequence.predictor=query"):
        make_plan(order="random")


def test_transferred_weights_have_the_downstream_keys():
    keys = set(Autoregressive(make_plan()).transferable_state())

    assert {
        "down_projection.proj.weight",
        "down_projection.proj.bias",
        "eva.pos_embed",
        "eva.norm.weight",
    } <= keys
    assert not [key for key in keys if "rope" in key or "up_projection" in key or "primus" in key]


def several_members(plan, kind, prefix, seed=0):
    """Random crops for a sequence of several members, laid out as the sampler does, at a window of
    the grid that is not its corner.
    """
    generator = torch.Generator().manual_seed(seed)
    size = member_crop(plan, kind)
    token = plan.encoder.token_size_vox
    codes = list(member_codes(plan)[kind])
    grid = grid_of(size, token)
    whole = grid_of(plan.sequence.crop_size_vox, token)
    ids = sequence_ids(grid, plan.sequence.block_tokens, len(codes), plan.sequence.order)
    order_index = draw_order_index(ids, plan.sequence.order, np.random.default_rng(seed))
    # Not the corner of the grid but its far end, so that an ignored window would be noticed.
    offset = [w - g for w, g in zip(whole, grid, strict=True)]
    place = window_positions(whole, grid, offset)
    voxels = torch.randn(1, len(codes), 1, *size, generator=generator)
    return Batch(
        voxels,
        torch.ones(1, len(codes), *size, dtype=torch.bool),
        torch.from_numpy(order_index)[None],
        torch.tensor([prefix]),
        torch.from_numpy(np.tile(place, len(codes)))[None],
        torch.from_numpy(np.repeat(np.array(codes), len(place)))[None],
    )


WORDS = ("T1w", "T2w", "FLAIR")
KINDS = {
    "contrast": {
        "weights": {"spatial": 1.0, "contrast": 1.0},
        "contrasts": WORDS,
        "contrast_members": 3,
    },
    "semantic": {
        "weights": {"contrast": 1.0, "semantic": 1.0},
        "contrasts": WORDS,
        "contrast_members": 3,
        "semantic_members": 2,
    },
}
WAYS = {
    "raster, next": {},
    "interleaved, next": {"order": "interleaved"},
    "raster, query": {"predictor": "query"},
    "random, query": {"order": "random", "predictor": "query"},
    "interleaved, next, blocks of 1x1x2": {"order": "interleaved", "block_tokens": (1, 1, 2)},
    "primus_v2, random, query": {
        "encoder": "primus_v2",
        "block_tokens": (2, 2, 2),
        "crop_size_vox": (32, 32, 32),
        "order": "random",
        "predictor": "query",
    },
    "vit, raster, next": {"encoder": "vit"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_with_several_images_nothing_leaks_from_later_blocks(kind, way):
    plan = make_plan(**{"crop_size_vox": (16, 32, 32), **KINDS[kind], **way})
    torch.manual_seed(0)
    objective = Autoregressive(plan)
    # The table starts at 0, where members would not differ.
    if objective.model.member is not None:
        torch.nn.init.normal_(objective.model.member.table)
    num_blocks = int(several_members(plan, kind, 1).order_index.max()) + 1
    prefix = num_blocks // 3
    batch = several_members(plan, kind, prefix)
    order = batch.order_index[0]
    before = predict(objective, batch)

    for position_in_order in range(prefix, num_blocks):
        after = predict(objective, change_members(batch, plan, position_in_order))

        kept = (order >= prefix) & (order <= position_in_order)
        assert torch.equal(before[0, kept], after[0, kept])
        is_last = position_in_order + 1 == num_blocks
        following = order == position_in_order + 1
        assert is_last or (before[0, following] != after[0, following]).any()


def change_members(batch, plan, position_in_order):
    """The same batch with other voxels in the block at this position in the order."""
    token = plan.encoder.token_size_vox
    members = batch.voxels.shape[1]
    size = batch.voxels.shape[3:]
    tokens = to_blocks(batch.voxels[0], token).clone()
    assert tokens.shape[0] == members

    # The order counts the tokens of all members one after another.
    chosen = batch.order_index[0] == position_in_order
    flat = tokens.view(-1, *tokens.shape[2:])
    flat[chosen] = noise_like(flat[chosen])
    return replace(batch, voxels=from_blocks(tokens, grid_of(size, token))[None])


def test_members_differ_by_code_and_code_0_is_what_fine_tuning_sees():
    plan = make_plan(crop_size_vox=(16, 32, 32), **KINDS["contrast"])
    torch.manual_seed(0)
    objective = Autoregressive(plan)
    batch = several_members(plan, "contrast", 1)

    as_one = replace(batch, members=torch.zeros_like(batch.members))

    # The table of members starts at 0: before training they do not differ.
    assert torch.equal(predict(objective, batch), predict(objective, as_one))

    torch.nn.init.normal_(objective.model.member.table)
    num_tokens = len(batch.order_index[0]) // 3
    with_codes = predict(objective, batch)
    one = predict(objective, as_one)

    # The first member has code 0 in both; the members after it differ.
    assert torch.equal(with_codes[0, :num_tokens], one[0, :num_tokens])
    assert (with_codes[0, num_tokens + 1 :] != one[0, num_tokens + 1 :]).any()
    assert not [key for key in objective.transferable_state() if "member" in key]


def test_a_window_of_positions_gives_its_features_in_the_whole_grid():
    plan = make_plan(crop_size_vox=(16, 32, 24))
    encoder = Autoregressive(plan).module.encoder
    whole = torch.randn(1, 1, 1, 16, 32, 24, generator=torch.Generator().manual_seed(0))
    positions = torch.from_numpy(window_positions((2, 4, 3), (2, 4, 3), (0, 0, 0)))[None]
    with torch.no_grad():
        assert torch.allclose(encoder(whole, None), encoder(whole, None, positions), atol=1e-6)
        shifted = encoder(whole, None, torch.roll(positions, 1, dims=1))

    assert not torch.allclose(encoder(whole, None), shifted, atol=1e-3)


def test_voxels_that_were_shown_before_carry_no_loss():
    plan = make_plan()
    torch.manual_seed(0)
    objective = Autoregressive(plan)
    batch = make_batch(plan, prefix=20)
    loss_mask = torch.ones_like(batch.valid_mask)
    # One plane of z in the second layer of tokens was shown before.
    loss_mask[:, :, 15] = False

    terms = objective.loss(replace(batch, loss_mask=loss_mask))

    # The last 4 of 24 tokens are supervised, each without 8 x 8 voxels of the plane.
    assert float(terms.count) == 4 * (512 - 64)


def test_a_plan_with_one_kind_has_no_member_embedding():
    names = {name for name, _ in Autoregressive(make_plan()).module.named_parameters()}
    assert not [name for name in names if "member" in name]

    query = Autoregressive(make_plan(predictor="query")).module
    assert query.head.member.shape == (1, 1, 1, 48)
    assert query.member is None
