"""Blocks, ranks, crops and batches."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from nnunet_autoreg import rng
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.plan import DataPlan, EncoderPlan, ObjectivePlan, OptimPlan, Plan, RunPlan, SequencePlan
from nnunet_autoreg.pretrain.batches import StepBatches, heldout_batches, training_batches
from nnunet_autoreg.pretrain.run import split
from nnunet_autoreg.sequences import spatial
from nnunet_autoreg.sequences.blocks import block_ids, draw_prefix, token_ranks
from nnunet_autoreg.sequences.kinds import num_blocks
from nnunet_autoreg.sequences.sampler import HELDOUT, TRAINING, SequenceSampler

TINY = encoder_size("primus_tiny")


@dataclass(frozen=True)
class Ramp:
    """A case whose voxels are their own raster index."""

    shape_vox: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def read_padded(self, start, size):
        whole = np.arange(np.prod(self.shape_vox), dtype=np.float32).reshape(self.shape_vox) + 1
        crop, real = np.zeros(size, np.float32), np.zeros(size, bool)
        low = [max(0, -s) for s in start]
        high = [min(n, m - s) for n, m, s in zip(size, self.shape_vox, start, strict=True)]
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        crop[inside] = whole[tuple(slice(s + a, s + b) for s, a, b in zip(start, low, high, strict=True))]
        real[inside] = True
        return crop[None], real


def make_plan(**sequence):
    settings = {"crop_size_vox": (16, 24, 16), **sequence}
    return Plan("t", DataPlan((1.0, 1.0, 1.0)), EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
                SequencePlan(**settings), ObjectivePlan(), OptimPlan(10, 2, 1e-3, 1), RunPlan(7, 10, 10))


def test_block_ids_go_in_raster_order_of_blocks():
    assert block_ids((1, 2, 3), (1, 1, 1)).tolist() == [0, 1, 2, 3, 4, 5]
    assert block_ids((1, 2, 4), (1, 2, 2)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert block_ids((2, 2, 2), (1, 2, 2)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_random_ranks_permute_blocks_and_keep_tokens_together():
    ids = block_ids((2, 2, 4), (1, 1, 2))
    ranks = token_ranks(ids, "random", rng.generator(0, "x"))
    assert sorted(set(ranks.tolist())) == list(range(8))
    assert all(len(set(ranks[ids == block])) == 1 for block in range(8))
    assert token_ranks(ids, "raster", rng.generator(0, "x")).tolist() == ids.tolist()


def test_prefixes_cover_1_to_one_less_than_the_blocks_evenly():
    generator = rng.generator(0, "prefix")
    counts = np.bincount([draw_prefix(5, generator) for _ in range(4000)], minlength=6)
    assert counts[0] == counts[5] == 0
    assert counts[1:5].min() > 900


def test_a_draw_replays_to_the_same_sample_and_flips_voxels_and_padding_alike():
    plan, case = make_plan(), Ramp((20, 30, 20))
    drawn = spatial.draw(plan, case.shape_vox, rng.generator(0, "x"))
    first, again = spatial.apply(plan, case, drawn), spatial.apply(plan, case, drawn)
    assert np.array_equal(first.voxels, again.voxels)
    plain = spatial.apply(plan, case, replace(drawn, flips=(False, False, False), axes=(0, 1, 2)))
    flipped = spatial.apply(plan, case, replace(drawn, flips=(True, False, True), axes=(0, 1, 2)))
    assert np.array_equal(flipped.voxels[0, 0], plain.voxels[0, 0, ::-1, :, ::-1])
    small = spatial.apply(plan, Ramp((10, 30, 20)), replace(drawn, start=(-3, 0, 0), flips=(True, False, False), axes=(0, 1, 2)))
    assert small.real[0, :, 0, 0].tolist() == [False] * 3 + [True] * 10 + [False] * 3
    assert np.array_equal(small.real[0], small.voxels[0, 0] > 0)


def test_crops_stay_inside_large_cases_and_small_cases_stay_inside_crops():
    plan = make_plan()
    for number in range(50):
        drawn = spatial.draw(plan, (40, 24, 9), rng.generator(0, "x", number))
        assert 0 <= drawn.start[0] <= 24
        assert drawn.start[1] == 0
        assert -7 <= drawn.start[2] <= 0


def test_axes_swap_only_where_length_and_spacing_are_equal():
    orders = {spatial.draw(make_plan(), (40, 40, 40), rng.generator(0, "x", i)).axes for i in range(60)}
    assert orders == {(0, 1, 2), (2, 1, 0)}
    anisotropic = replace(make_plan(), data=DataPlan((3.0, 1.0, 1.0)))
    assert {spatial.draw(anisotropic, (40, 40, 40), rng.generator(0, "x", i)).axes for i in range(60)} == {(0, 1, 2)}


def test_samples_depend_on_seed_step_and_number_alone():
    sampler, cases = SequenceSampler(make_plan()), [Ramp((30, 30, 30)), Ramp((16, 40, 20))]
    one, same, other = (sampler.draw(cases, TRAINING, step, 0) for step in (3, 3, 4))
    assert np.array_equal(one.voxels, same.voxels) and one.prefix == same.prefix
    assert not np.array_equal(one.voxels, other.voxels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_number_of_workers_changes_no_batch(num_workers):
    batches = StepBatches(SequenceSampler(make_plan()), [Ramp((30, 30, 30)), Ramp((16, 40, 20))], 2)
    prepared = list(training_batches(batches, range(2, 6), num_workers, pin_memory=False))
    assert len(prepared) == 4
    for step, batch in zip(range(2, 6), prepared, strict=True):
        assert batch.voxels.equal(batches[step].voxels) and batch.prefix.equal(batches[step].prefix)


def test_heldout_samples_take_the_same_four_prefixes_every_time():
    plan = make_plan()
    assert num_blocks(plan) == 12
    first, second = (heldout_batches(SequenceSampler(plan), [Ramp((30, 30, 30))], 4, 1)[0] for _ in range(2))
    assert first.prefix.tolist() == second.prefix.tolist() == [1, 3, 6, 9]
    assert SequenceSampler(plan).draw([Ramp((30, 30, 30))], HELDOUT, 4).prefix == 1


@dataclass(frozen=True)
class Row:
    id: str
    dataset: str
    case: str
    subject: str = ""


def test_channels_of_a_case_are_held_out_together_and_more_cases_move_none_back():
    rows = [Row(f"{case}_{channel}", "D", f"case{case}") for case in range(40) for channel in range(4)]
    training, heldout = split(rows, 0.1, 0)
    assert len(heldout) == 16 and len({row.case for row in heldout}) == 4
    assert not {row.case for row in training} & {row.case for row in heldout}
    assert split(rows[:4], 0.05, 0) == (rows[:4], [])


def test_scans_of_a_subject_are_held_out_together_whatever_hash_it_has():
    ways = []
    for salt in ("x", "y"):
        rows = [Row(f"{case}", f"D{case % 2}", f"case{case}", f"{salt}{case // 4}") for case in range(80)]
        training, heldout = split(rows, 0.1, 0)
        assert len(heldout) == 8 and not {row.subject for row in training} & {row.subject for row in heldout}
        ways.append([row.id for row in heldout])
    assert ways[0] == ways[1]
