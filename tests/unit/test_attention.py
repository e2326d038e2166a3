"""The attention rule in its three forms - dense, by tiles, inside a compiled loss - and blocks run
under it.
"""

import pytest
import torch
from timm.models.eva import EvaBlock
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nnunet_autoreg.model import attention
from nnunet_autoreg.model.attention import (
    TILE,
    AttentionRule,
    attend,
    block_causal,
    strictly_earlier,
)
from nnunet_autoreg.model.trunk import run_block, run_blocks

# The plain formula, uncompiled, for the comparison.
torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def cases():
    """Name -> order of the tokens (B, T), prefixes, validity: raster and random orders, blocks,
    padding, several tiles, a length that is not a multiple of a tile.
    """
    generator = torch.Generator().manual_seed(0)
    # 300 tokens are two tiles of 128 and a rest of 44.
    raster = torch.arange(300).expand(2, -1)
    mixed = torch.stack([torch.randperm(300, generator=generator) for _ in range(2)])
    # Blocks of 4 tokens: side by side here, 75 tokens apart in ``members``.
    blocks = torch.stack(
        [torch.randperm(75, generator=generator).repeat_interleave(4) for _ in range(2)],
    )
    members = torch.arange(75).repeat(4).expand(2, -1)
    valid_mask = torch.ones(2, 300, dtype=torch.bool)
    holes = torch.rand(2, 300, generator=generator) > 0.3
    # Padding that ends inside the second tile, that fills it, and that leaves a sample without
    # tokens.
    first_missing = valid_mask.clone()
    tile_missing = valid_mask.clone()
    first_missing[:, :150] = False
    tile_missing[1, 128:256] = False
    none_left = valid_mask.clone()
    none_left[1] = False
    prefix = torch.tensor([1, 40])
    return {
        "raster": (raster, prefix, valid_mask),
        "random": (mixed, prefix, valid_mask),
        "random, padded": (mixed, prefix, holes),
        "blocks": (blocks, prefix, valid_mask),
        "blocks, padded": (blocks, prefix, holes),
        "members": (members, prefix, valid_mask),
        "padding first": (raster, prefix, first_missing),
        "a tile of padding": (raster, torch.tensor([299, 200]), tile_missing),
        "only padding": (members, prefix, none_left),
        "one rank": (torch.zeros_like(raster), prefix, holes),
        "one tile": (raster[:, :24], torch.tensor([2, 23]), holes[:, :24]),
    }


CASES = cases()
RULES = {
    "encoder": block_causal,
    "decoder": lambda order_index, prefix, valid: strictly_earlier(order_index, valid),
}


def by_hand(kind, order_index, prefix, valid):
    """The rule in words, pair by pair."""
    B, T = order_index.shape
    allow = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        order = order_index[b].tolist()
        is_valid = valid[b].tolist()
        last_of_prefix = int(prefix[b]) - 1
        for q in range(T):
            if kind == "encoder":
                # The prefix is visible to every token, even to the tokens inside it.
                last_seen = max(order[q], last_of_prefix)
                seen = [is_valid[k] and order[k] <= last_seen for k in range(T)]
            else:
                seen = [is_valid[k] and order[k] < order[q] for k in range(T)]
            # A token always sees itself; a query that sees nothing is given the first block, so
            # that the
            # softmax is defined.
            if kind == "encoder":
                seen[q] = True
            elif not any(seen):
                seen = [position_in_order == 0 for position_in_order in order]
            allow[b, q] = torch.tensor(seen)
    return allow[:, None]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ["blocks, padded", "padding first", "only padding"])
def test_the_dense_mask_is_the_rule_in_words(kind, name):
    # 160 tokens are enough for two tiles; the loops by hand take T^2 steps.
    order_index, prefix, valid = (t[:, :160] if t.dim() == 2 else t for t in CASES[name])

    mask = RULES[kind](order_index, prefix, valid).dense()

    assert torch.equal(mask, by_hand(kind, order_index, prefix, valid))


def tiles(num, index):
    """(B, 1, N, N) bool: which tiles a list of them names."""
    named = torch.arange(index.shape[-1]) < num[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), named)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_that_torch_finds_by_trying_every_pair(kind, name):
    rule = RULES[kind](*CASES[name])
    made = rule.block_mask()
    B, T = rule.order_index.shape
    expected = create_block_mask(made.mask_mod, B, None, T, T, device="cpu")

    full = tiles(made.full_kv_num_blocks, made.full_kv_indices)
    expected_full = tiles(expected.full_kv_num_blocks, expected.full_kv_indices)
    partly = tiles(made.kv_num_blocks, made.kv_indices)
    expected_partly = tiles(expected.kv_num_blocks, expected.kv_indices)

    assert torch.equal(full | partly, expected_full | expected_partly)
    assert not (full & partly).any()
    if (kind, name) == ("decoder", "one rank"):
        # These tiles are full only because queries that see nothing are given the first block.
        # The list treats them as partly visible, which costs time but changes no result.
        assert not full.any()
        assert expected_full.any()
    else:
        assert torch.equal(full, expected_full)

    b, q, k = torch.meshgrid(torch.arange(B), torch.arange(T), torch.arange(T), indexing="ij")
    assert torch.equal(made.mask_mod(b, b, q, k), rule.dense()[:, 0])


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", CASES)
def test_flexattention_agrees_with_the_dense_mask(kind, name):
    rule = RULES[kind](*CASES[name])
    generator = torch.Generator().manual_seed(1)
    num_tokens = rule.order_index.shape[1]
    q, k, v = (torch.randn(2, 2, num_tokens, 6, generator=generator) for _ in range(3))

    by_tiles = flex_attention(q, k, v, block_mask=rule.block_mask())

    assert torch.allclose(by_tiles, attend(q, k, v, rule.dense()), atol=1e-6)


def test_early_tiles_of_a_raster_sequence_see_no_late_ones():
    raster = torch.arange(512)[None]
    everything_valid = torch.ones(1, 512, dtype=torch.bool)
    mask = block_causal(raster, torch.tensor([1]), everything_valid).block_mask()

    # 4 tiles of 128 tokens: the tile on the diagonal is partly visible, those before it fully.
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]


def test_the_mask_is_made_of_tiles_only_on_request():
    rule = block_causal(*CASES["one tile"])

    assert isinstance(rule.mask(), torch.Tensor)
    assert isinstance(rule.mask(flex=True), BlockMask)
    # On the CPU the dense mask is used.
    assert "cpu" not in attention.FLEX_DEVICES


received = {}


@torch.library.custom_op(
    "autoreg_test::receive",
    mutates_args=(),
    tags=(torch.Tag.flexible_layout,),
)
def receive(values: torch.Tensor, name: str) -> torch.Tensor:
    """Note a list as a kernel inside compiled code gets it, in any strides that the compiler
    chose.
    """
    assert torch.Tag.flexible_layout in torch.ops.autoreg_test.receive.default.tags
    # The whole memory behind the tensor, also the part that its strides skip.
    storage = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())
    received[name] = (
        tuple(values.shape),
        values.stride(),
        values.storage_offset(),
        storage.clone(),
    )
    return values.new_zeros(())


@receive.register_fake
def _(values, name):
    return values.new_empty(())


def as_the_kernels_read(name):
    """A list of shape (B, H, ...) at the addresses that the kernels compute:

    (b * H + h) times the head's stride.
    """
    shape, strides, offset, storage = received[name]
    B, H = shape[:2]
    flat = torch.as_strided(storage, (B * H, *shape[2:]), strides[1:], offset)
    return flat.reshape(shape)


def hand_over(order_index, prefix, valid, kind, num_heads):
    mask = RULES[kind](order_index, prefix, valid).block_mask(num_heads)
    return sum(receive(getattr(mask, name), name) for name in attention.LISTS)


def visible(rule):
    """(B, N, N) bool twice, by tiles of the dense mask: whether any pair is allowed, whether all
    are.
    """
    dense = rule.dense()[:, 0]
    T = rule.order_index.shape[1]
    N = -(-T // TILE)  # rounded up
    some = torch.zeros(len(dense), N, N, dtype=torch.bool)
    every = some.clone()
    for q in range(N):
        for k in range(N):
            tile = dense[:, q * TILE : (q + 1) * TILE, k * TILE : (k + 1) * TILE]
            some[:, q, k] = tile.flatten(1).any(1)
            every[:, q, k] = tile.flatten(1).all(1)
    return some, every


@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("kind", RULES)
def test_kernels_read_every_samples_own_tiles(kind, num_heads, where):
    # Inductor's own strides are the point, and its compiled code is looked up by shape.
    run = torch.compile(hand_over, dynamic=False) if where == "compiled" else hand_over
    generator = torch.Generator().manual_seed(0)
    for B, T in ((1, 300), (2, 300), (4, 520)):
        raster = torch.arange(T).expand(B, -1).contiguous()
        mixed = torch.stack([torch.randperm(T, generator=generator) for _ in range(B)])
        whole = torch.ones(B, T, dtype=torch.bool)
        # The last sample differs from the others, so that reading another sample's list is noticed.
        padded = whole.clone()
        padded[-1, T // 3 :] = False
        prefix = torch.randint(1, T, (B,), generator=generator)
        for order_index in (raster, mixed):
            for valid in (whole, padded):
                run(order_index, prefix, valid, kind, num_heads)
                some, every = visible(RULES[kind](order_index, prefix, valid))
                lists = {name: as_the_kernels_read(name) for name in attention.LISTS}
                for side in ("kv", "q"):
                    partly = tiles(lists[f"{side}_num_blocks"], lists[f"{side}_indices"])
                    full = tiles(lists[f"full_{side}_num_blocks"], lists[f"full_{side}_indices"])
                    # The lists of "q" are indexed by key: the transpose of those of "kv".
                    seen = partly | full
                    all_seen = full
                    if side == "q":
                        seen, all_seen = seen.transpose(-1, -2), all_seen.transpose(-1, -2)
                    for head in range(num_heads):
                        assert torch.equal(seen[:, head], some)
                        # A tile at the end of the sequence is never full for the kernels.
                        assert not (all_seen[:, head] & ~every).any()


def block(fused=False, registers=0, **arguments):
    torch.manual_seed(0)
    made = EvaBlock(
        24,
        2,
        qkv_fused=fused,
        swiglu_mlp=True,
        scale_mlp=True,
        num_prefix_tokens=registers,
        **arguments,
    )
    # All parameters random: timm starts some at 0, where a block would give back its input.
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


BLOCKS = {
    "as in Primus": {"init_values": 0.1, "scale_attn_inner": True},
    "plain": {},
    "fused": {"fused": True},
    "fused, no biases, registers": {"fused": True, "qkv_bias": False, "registers": 2},
}


@pytest.mark.parametrize("arguments", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_gives_what_it_gives_by_itself_bit_for_bit(arguments):
    order_index, prefix, valid = CASES["one tile"]
    made = block(**arguments)
    mask = block_causal(order_index, prefix, valid).dense()
    x = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(2))
    # Registers come before the 24 tokens and have no position.
    rope = torch.randn(
        24 - arguments.get("registers", 0),
        24,
        generator=torch.Generator().manual_seed(3),
    )
    with torch.no_grad():
        for table in (rope, None):
            assert torch.equal(run_block(made, x, table, mask), made(x, rope=table, attn_mask=mask))


def test_blocks_of_our_own_get_the_mask_and_the_positions():
    class Own(torch.nn.Module):
        def forward(self, x, rope, attn_mask):
            return x + rope + attn_mask[:, 0].sum(-1, keepdim=True)

    # Three tokens in raster order, of which two are given. Tokens 0 and 1 see two tokens, 2 sees
    # three. A block adds 1 (the position) and that number: 3, 3 and 4, twice.
    order_index = torch.tensor([[0, 1, 2]])
    prefix = torch.tensor([2])
    rule = block_causal(order_index, prefix, torch.ones(1, 3, dtype=torch.bool))
    tokens = torch.zeros(1, 3, 1)
    rope = torch.ones(3, 1)

    out = run_blocks([Own(), Own()], tokens, rope, rule)

    assert out.flatten().tolist() == [6, 6, 8]


def test_recomputing_changes_neither_features_nor_gradients():
    order_index, prefix, valid = CASES["one tile"]
    blocks = torch.nn.ModuleList([block(**BLOCKS["as in Primus"]), block()])
    x = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(2))
    found = []
    for recompute in (False, True):
        blocks.zero_grad()
        out = run_blocks(blocks, x, None, block_causal(order_index, prefix, valid), recompute)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in blocks.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_rule_is_three_small_tensors_and_no_pairs():
    order_index, prefix = (torch.zeros(1, 4096, dtype=torch.long) for _ in range(2))
    rule = AttentionRule(order_index, prefix, torch.ones(1, 4096, dtype=torch.bool))

    tensors = [t for t in rule.block_mask().as_tuple() if isinstance(t, torch.Tensor)]

    # 4096 tokens are 32 tiles: the largest list has an entry per pair of tiles, not of tokens.
    assert max(t.numel() for t in tensors) == 32 * 32
