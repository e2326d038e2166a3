"""Which steps are bad, by hand, and that skipping one leaves no trace."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from nnunet_autoreg.plan import RunPlan
from nnunet_autoreg.pretrain.training_step import (
    WINDOW,
    LossSpikeGuard,
    StepStatistics,
    skip_if,
    skipped_message,
    update_running,
)

CPU = torch.device("cpu")


def guard_after(losses, **values):
    guard = LossSpikeGuard(RunPlan(0, 1, 1, **values), CPU)
    for loss in losses:
        guard.judge(torch.tensor(loss), torch.tensor(1.0))
    return guard


def verdict(guard, loss, norm=1.0):
    return float(deepcopy(guard).judge(torch.tensor(loss), torch.tensor(norm)))


def test_the_running_mean_and_variance_are_exact_at_first():
    statistics = torch.zeros(3)
    for value in (1.0, 2.0, 6.0):
        statistics = update_running(statistics, torch.tensor(value))

    # Mean 3, variance (4 + 1 + 9) / 3, and three values.
    assert statistics.tolist() == pytest.approx([3.0, 14 / 3, 3.0])


def test_later_values_count_with_the_weight_of_the_window():
    full = torch.tensor([1.0, 0.0, float(WINDOW)])

    statistics = update_running(full, torch.tensor(1.0 + WINDOW))

    # The value lies WINDOW above the mean and counts 1 / WINDOW: the mean moves by 1, and the
    # variance becomes w (1 - w) WINDOW^2 with w = 1 / WINDOW.
    assert statistics.tolist() == pytest.approx([2.0, (1 - 1 / WINDOW) * WINDOW, WINDOW + 1])


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)],
)
def test_losses_that_are_not_finite_are_bad_from_the_first_step_on(loss, norm):
    assert verdict(guard_after([]), loss, norm) == 1
    # A large loss is not judged yet: nothing is known about what is usual.
    assert verdict(guard_after([]), 1e9) == 0


def test_a_spike_passes_both_limits_and_needs_a_hundred_steps_before():
    # Mean 1, standard deviation 0.1: the limits are 1 + 8 * 0.1 and 2 * 1.
    alternating = [0.9, 1.1] * (WINDOW // 2)
    guard = guard_after(alternating, spike_sigmas=8)

    assert verdict(guard, 1.79) == 0
    assert verdict(guard, 1.99) == 0
    assert verdict(guard, 2.01) == 1
    # 20 deviations are 3, so 2.5 passes only one of the limits.
    assert verdict(guard_after(alternating, spike_sigmas=20), 2.5) == 0
    assert verdict(guard_after(alternating[:-1]), 100.0) == 0


def test_bad_steps_do_not_move_the_mean_and_a_good_one_ends_the_row():
    guard = guard_after([1.0] * WINDOW + [5.0, math.nan, 7.0])
    assert guard.statistics() == StepStatistics(nonfinite=1, spikes=2, in_row=3, usual=1.0)

    guard.judge(torch.tensor(1.0), torch.tensor(1.0))
    assert guard.statistics() == StepStatistics(1, 2, 0, 1.0)

    guard.reset()
    assert guard.statistics() == StepStatistics(1, 2, 0, 0.0)
    assert verdict(guard, 100.0) == 0


def test_a_guard_continues_from_its_state_bit_for_bit():
    losses = torch.rand(150, generator=torch.Generator().manual_seed(0)).tolist()
    whole = guard_after(losses)
    begun = guard_after(losses[:70])
    resumed = guard_after([])
    resumed.load_state_dict(begun.state_dict())
    for loss in losses[70:]:
        resumed.judge(torch.tensor(loss), torch.tensor(1.0))

    assert torch.equal(resumed.loss, whole.loss)
    assert torch.equal(resumed.counts, whole.counts)


def test_a_skipped_step_leaves_no_trace_in_weights_moments_or_counts():
    def stepped(*bad):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        for number, is_bad in enumerate(bad):
            optimizer.zero_grad()
            value = 1.0 if is_bad else 1.0 + number
            module(torch.full((1, 3), value)).square().sum().backward()
            if is_bad:
                module.weight.grad.fill_(math.nan)
            skip_if(optimizer, torch.tensor(float(is_bad)))
            optimizer.step()
        return module, optimizer

    module, optimizer = stepped(False, True)
    before, optimizer_before = stepped(False)

    assert torch.equal(module.weight, before.weight)
    for a, b in zip(optimizer.state.values(), optimizer_before.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a[key], b[key])
        # AdamW corrects its moments by the number of steps: a skipped one must not count.
        assert float(a["step"]) == 1


def test_skipped_steps_are_reported_in_one_sentence_or_not_at_all():
    before = StepStatistics(1, 0, 0, 0.8)
    now = StepStatistics(3, 1, 2, 0.8)

    assert skipped_message(now, now, 9) == ""
    # 3 - 1 = 2 not finite and 1 - 0 = 1 spike since the last line, 3 + 1 = 4 in all; step 9 is the
    # tenth.
    assert skipped_message(before, now, 9) == (
        "up to step 10 these steps were skipped and changed nothing: 2 with a loss or gradient "
        "that was infinite or NaN and 1 with a loss far above the usual 0.8; 4 since the start"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_a_bad_bf16_step_is_skipped_without_waiting():
    device = torch.device("cuda")
    module = nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    guard = LossSpikeGuard(RunPlan(0, 1, 1), device)
    weights = []
    for number, spoil in enumerate((1.0, 1.0, math.nan, 1.0)):
        # The first step allocates; after it torch raises an error if the CPU waits for the GPU.
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = module(torch.ones(4, 64, device=device)).float().square().mean() * spoil
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        skip_if(optimizer, guard.judge(loss.detach(), norm))
        optimizer.step()
        weights.append(module.weight.detach().clone())

    torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert guard.statistics().nonfinite == 1
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())
