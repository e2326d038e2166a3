"""The deeper decoder keeps causality bit for bit, old plans keep their networks, and the masked
twin never sees hidden voxels.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import grid_of
from nnunet_autoreg.model.attention import AttentionRule, strictly_earlier
from nnunet_autoreg.model.predictors import BlockAttention
from nnunet_autoreg.model.sequence import from_blocks, to_blocks
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
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.sampling.blocks import block_ids
from nnunet_autoreg.sampling.corruption import Corruption, stacked
from nnunet_autoreg.sampling.sample import Batch

CROP, TOKEN, BLOCK = (8, 16, 16), (4, 4, 4), (2, 2, 2)
NEW = PredictionPlan(query_depth=4, query_attention=True, head="mlp")
SMALL = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2, "patch_embed_size": list(TOKEN)}
MASKED = {"prefix": "fixed", "prefix_share": 0.5}


def make_plan(objective: PredictionPlan = NEW, **sequence: object) -> Plan:
    tiny = encoder_size("primus_tiny")
    encoder = EncoderPlan("primus_tiny", tiny.class_path, {**tiny.arguments, **SMALL}, TOKEN)
    values = {"block_tokens": BLOCK, "order": "random", "predictor": "query", **sequence}
    chosen = SequencePlan(CROP, **values)  # type: ignore[arg-type]
    return check(
        Plan(
            "t",
            DataPlan((1.0, 1.0, 1.0)),
            encoder,
            chosen,
            objective,
            OptimPlan(10, 2, 1e-3, 1),
            RunPlan(0, 10, 10),
        ),
    )


def make_batch(prefix: int, num_samples: int = 2) -> Batch:
    """Crops of four blocks of eight tokens in a random order."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(block_ids(grid_of(CROP, TOKEN), BLOCK))
    orders = [torch.randperm(4, generator=generator) for _ in range(num_samples)]
    order_index = torch.stack([order[ids] for order in orders])
    voxels = torch.randn(num_samples, 1, 1, *CROP, generator=generator)
    valid_mask = torch.ones(num_samples, 1, *CROP, dtype=torch.bool)
    return Batch(voxels, valid_mask, order_index, torch.full((num_samples,), prefix))


def with_other_voxels(batch: Batch, chosen_BT: Tensor) -> Batch:
    tokens = to_blocks(batch.voxels[:, 0], TOKEN).clone()
    generator = torch.Generator().manual_seed(9)
    tokens[chosen_BT] = torch.randn(tokens[chosen_BT].shape, generator=generator)
    return replace(batch, voxels=from_blocks(tokens, grid_of(CROP, TOKEN))[:, None])


def predict(objective: Autoregressive, batch: Batch) -> Tensor:
    objective.module.eval()
    valid_BT = to_blocks(batch.valid_mask.float(), TOKEN).flatten(2).any(-1)
    with torch.no_grad():
        predicted: Tensor = objective.module(batch, valid_BT)
    return predicted


def leaks(objective: Autoregressive, batch: Batch) -> bool:
    """Return whether a prediction that is asked for depends on its own block or a later one."""
    before = predict(objective, batch)
    prefix = int(batch.prefix[0])
    for position_in_order in range(prefix, 4):
        after = predict(objective, with_other_voxels(batch, batch.order_index >= position_in_order))
        kept = (batch.order_index >= prefix) & (batch.order_index <= position_in_order)
        if not torch.equal(before[kept], after[kept]):
            return True
    return False


def test_later_blocks_change_no_earlier_prediction_bit_for_bit() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan())

    assert not any(leaks(objective, make_batch(prefix)) for prefix in (1, 2, 3))


def test_padding_leaves_the_deeper_decoder_causal() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan())
    batch = make_batch(1)
    valid_mask = batch.valid_mask.clone()
    valid_mask[:, :, :, :, 10:] = False

    assert not leaks(objective, replace(batch, valid_mask=valid_mask))


def test_without_the_mask_the_causality_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan())
    batch = make_batch(1)
    dense = AttentionRule.dense

    # Everybody sees everything: the check must notice, or it would prove nothing.
    monkeypatch.setattr(AttentionRule, "dense", lambda rule: torch.ones_like(dense(rule)))

    assert leaks(objective, batch)


def test_queries_across_blocks_would_fail_the_causality_test() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan())
    batch = make_batch(1)

    # All 32 tokens as one block, so that queries of later blocks are seen.
    for layer in objective.module.modules():
        if isinstance(layer, BlockAttention):
            layer.block_tokens = 32

    assert leaks(objective, batch)


def test_queries_of_one_block_see_each_other_and_no_others() -> None:
    torch.manual_seed(0)
    attention = BlockAttention(48, 2, 8)
    queries = torch.randn(2, 32, 48)
    changed = queries.clone()
    changed[0, 9] += 1.0

    before = attention(queries, None)
    after = attention(changed, None)

    # Query 9 belongs to the second block of eight, of the first sample.
    reacts = (before != after).any(dim=-1)
    assert reacts[0].tolist() == [8 <= query < 16 for query in range(32)]
    assert not reacts[1].any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_rule_for_reordered_queries_has_its_rows_reordered(fused: bool) -> None:
    batch = make_batch(1)
    rule = strictly_earlier(batch.order_index, torch.ones_like(batch.order_index, dtype=torch.bool))
    order = torch.argsort(batch.order_index, dim=1, stable=True)
    expected = torch.take_along_dim(rule.dense(), order[:, None, :, None], dim=2)

    moved = rule.with_queries(order)

    if fused:
        # The fused kernel asks a function about each pair of query and key.
        allowed = moved.block_mask().mask_mod
        pairs = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
        for b, head, q, k in itertools.product(*map(range, pairs.shape)):
            pairs[b, head, q, k] = allowed(*map(torch.tensor, (b, head, q, k)))
        assert torch.equal(pairs, expected)
    else:
        assert torch.equal(moved.dense(), expected)


def test_old_plans_keep_the_parameters_of_their_decoder() -> None:
    head = Autoregressive(make_plan(PredictionPlan())).module.head

    assert isinstance(head, nn.Module)
    names = {name for name, _ in head.named_parameters()}
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"0", "1"}
    assert {"project.weight", "project.bias"} <= names
    assert not [name for name in names if ".block." in name]


def test_the_layers_of_a_decoder_are_of_one_shape() -> None:
    layers = Autoregressive(make_plan()).module.head.layers
    shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in layers]

    assert len(layers) == 4
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("predictor", ["next", "query"])
def test_an_mlp_head_has_a_hidden_layer(predictor: str) -> None:
    order = "random" if predictor == "query" else "raster"
    objective = Autoregressive(make_plan(predictor=predictor, order=order))

    modules = objective.module.head.project.modules()
    linear = [module for module in modules if isinstance(module, nn.Linear)]

    # Twice the width of 48, and then the 4 x 4 x 4 voxels of a token.
    assert [layer.out_features for layer in linear] == [96, 64]


def test_a_head_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PlanError):
        make_plan(PredictionPlan(head="mpl"))


def test_the_decoder_learns_one_batch_by_heart() -> None:
    torch.manual_seed(0)
    objective = Autoregressive(make_plan())
    batch = make_batch(2)
    optimiser = torch.optim.AdamW(objective.module.parameters(), 2e-3)
    errors = []

    for _ in range(40):
        terms = objective.loss(batch)
        optimiser.zero_grad()
        (terms.total / terms.count).backward()
        optimiser.step()
        errors.append(float(terms.total.detach() / terms.count))

    assert errors[-1] < 0.7 * errors[0]


def read_by_encoder(objective: Autoregressive, batch: Batch) -> Tensor:
    """The voxels that go into the encoder."""
    seen: list[Tensor] = []
    hook = objective.model.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]),
    )
    predict(objective, batch)
    hook.remove()
    return seen[0]


def test_the_masked_encoder_reads_the_visible_blocks_only() -> None:
    torch.manual_seed(0)
    objective = build_objective(make_plan(replace(NEW, name="masked"), **MASKED))
    assert isinstance(objective, Autoregressive)
    batch = make_batch(2)

    read = read_by_encoder(objective, batch)

    # Two of four blocks of 8^3 voxels, in the order of their ranks.
    assert read.shape == (2, 2, 1, 8, 8, 8)
    blocks = to_blocks(batch.voxels[:, 0], (8, 8, 8))
    order_index = to_blocks(batch.order_index.reshape(2, 1, 2, 4, 4), BLOCK).flatten(2)[:, :, 0]
    for sample in range(2):
        for position_in_order in range(2):
            (expected,) = blocks[sample, order_index[sample] == position_in_order]
            assert torch.equal(read[sample, position_in_order], expected)


def test_hidden_voxels_change_nothing_in_the_masked_twin() -> None:
    torch.manual_seed(0)
    objective = build_objective(make_plan(replace(NEW, name="masked"), **MASKED))
    assert isinstance(objective, Autoregressive)
    batch = make_batch(2)
    hidden = batch.order_index >= 2

    before = predict(objective, batch)
    with_others_hidden = predict(objective, with_other_voxels(batch, hidden))
    with_others_visible = predict(objective, with_other_voxels(batch, ~hidden))

    assert torch.equal(before, with_others_hidden)
    assert (before != with_others_visible)[hidden].any(dim=-1).all()


def test_padded_visible_tokens_are_not_keys_of_the_masked_twin() -> None:
    torch.manual_seed(0)
    objective = build_objective(make_plan(replace(NEW, name="masked"), **MASKED))
    assert isinstance(objective, Autoregressive)
    batch = make_batch(2)
    valid_mask = batch.valid_mask.clone()
    valid_mask[:, :, 4:] = False
    padded = replace(batch, voxels=batch.voxels * valid_mask[:, :, None], valid_mask=valid_mask)
    is_padding = ~to_blocks(valid_mask.float(), TOKEN).flatten(2).any(-1)

    before = predict(objective, padded)
    after = predict(objective, with_other_voxels(padded, is_padding))

    assert torch.equal(before, after)
    assert bool(before.isfinite().all())


@pytest.mark.parametrize("name", ["autoregressive", "masked"])
def test_corruption_changes_only_given_voxels_and_no_target(name: str) -> None:
    torch.manual_seed(0)
    objective = build_objective(make_plan(replace(NEW, name=name), **MASKED))
    assert isinstance(objective, Autoregressive)
    batch = make_batch(2)
    strong = stacked([Corruption(gamma=1.5, contrast=0.7, noise=0.5, seed=n) for n in range(2)])
    corrupted = replace(batch, corruption=strong.with_noise(batch.voxels))
    seen: list[Tensor] = []
    hook = objective.model.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]),
    )

    clean = objective.loss(batch, references=True)
    dirty = objective.loss(corrupted, references=True)
    hook.remove()

    # Two of four blocks are given. The masked encoder reads only these; the other one reads all.
    changed = (seen[0] != seen[1]).float().mean()
    assert float(changed) == pytest.approx(1.0 if name == "masked" else 0.5, abs=0.01)
    assert float(clean.total.detach()) != float(dirty.total.detach())
    # The targets are those of the clean voxels.
    assert float(clean.references["mean"]) == float(dirty.references["mean"])
