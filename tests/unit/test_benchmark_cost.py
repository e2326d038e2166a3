"""What a pretraining cost, counted by hand where that is possible."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sequence_cases import contrast_plan, make_plan, semantic_plan

from nnunet_autoreg.benchmark.cost import flops_per_sample, pretraining_cost
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.records import write_json
from nnunet_autoreg.sampling.noise import NoiseCase


def test_a_step_counts_forward_and_backward_of_every_layer() -> None:
    plan = make_plan()
    # 2 x 3 x 2 tokens. Each weight matrix costs 2 operations per entry and token forward, and twice
    # that backward. Layers of width 264: attention 4 x 264^2, gated MLP 3 x 264 x 704 at most.
    per_token_of_layers = 6 * (4 * 264**2 + 2 * 264 * 1056)

    found = flops_per_sample(plan)

    # The embedding, the head and the products of attention come on top, hence the range.
    expected = 6 * 12 * per_token_of_layers
    assert 0.8 * expected < found < 1.6 * expected


def test_a_crop_of_twice_the_tokens_costs_about_twice_as_much() -> None:
    small = flops_per_sample(make_plan())
    large = flops_per_sample(make_plan(crop_size_vox=(32, 24, 16)))

    # Only the products of attention grow faster than the number of tokens.
    assert large / small == pytest.approx(2, rel=0.1)


def test_counting_is_the_same_every_time() -> None:
    assert flops_per_sample(make_plan()) == flops_per_sample(make_plan())


def test_sequences_of_contrasts_and_structures_are_counted() -> None:
    assert flops_per_sample(contrast_plan()) > 0
    assert flops_per_sample(semantic_plan()) > 0


def test_the_cost_of_a_run_is_that_of_its_samples(tmp_path: Path) -> None:
    plan = make_plan()
    write_json(tmp_path / "plan.json", plan)
    # 10 steps of 2 samples: the first 8 took 0.5 s each, and the last 2 took 1 s each. Steps of
    # metrics are counted from 0.
    times = [
        {"step": 7, "name": "step_time", "value": 0.5, "unit": "s"},
        {"step": 9, "name": "step_time", "value": 1.0, "unit": "s"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))

    cost = pretraining_cost(tmp_path)

    assert cost is not None
    assert cost.samples == 10 * 2
    assert cost.flops == pytest.approx(20 * flops_per_sample(plan))
    # 8 x 0.5 s + 2 x 1 s. The mean of both entries times 10 would be 7.5 s.
    assert cost.seconds == pytest.approx(6.0)


def test_weights_without_a_plan_have_no_known_cost(tmp_path: Path) -> None:
    assert pretraining_cost(tmp_path) is None


def test_a_masked_twin_is_counted_by_its_own_objective() -> None:
    plan = make_plan()
    twin = replace(
        plan,
        objective=PredictionPlan(name="masked"),
        sequence=replace(plan.sequence, order="random", predictor="query", prefix="fixed"),
    )

    assert flops_per_sample(twin) > 0


def test_a_case_of_noise_separates_padding_from_voxels() -> None:
    case = NoiseCase((4, 5, 6), (1.0, 1.0, 1.0))

    voxels, is_real = case.read_padded((-1, 0, 2), (4, 5, 6))

    # One plane of z lies before the case, two of x behind it.
    assert is_real.sum() == 3 * 5 * 4
    assert not voxels[0][~is_real].any()
    assert bool(np.isfinite(voxels).all())
