"""The trainer's own step on a tiny CNN, without nnU-Net's folders: decoder-first stage, deep
supervision, resuming.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from nnunet_autoreg.finetune.block import AutoregBlock, Recipe
from nnunet_autoreg.finetune.families import recipe_values
from nnunet_autoreg.finetune.network import build_network
from nnunet_autoreg.finetune.recipe import (
    IterationRates,
    encoder_parameters,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

PER_EPOCH = 2
PATCH = (8, 8, 8)
ARGUMENTS = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "kernel_sizes": [[3, 3, 3]] * 2,
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
}


def trainer(num_epochs: int = 5, uses_weights: bool = True, **changes: Any) -> Any:
    """A trainer with a network, an optimiser and rates: what a step needs."""
    from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer

    encoder = EncoderPlan("resenc_tiny", ENCODERS["resenc_tiny"].class_path, ARGUMENTS, (2, 2, 2))
    values = {**recipe_values(encoder), "decoder_first_fraction": 0.4, **changes}
    recipe = Recipe(num_epochs, **values)
    made = AutoregPretrainedTrainer.__new__(AutoregPretrainedTrainer)
    made.block = AutoregBlock(encoder, None, recipe)
    made.is_stock_model = False
    torch.manual_seed(3)
    made.network = build_network(made.block, PATCH, 1, 2, deep_supervision=True)
    made.device, made.grad_scaler, made.loss = torch.device("cpu"), None, squared_error
    made.enable_deep_supervision = recipe.deep_supervision
    made.optimizer = make_optimizer(parameter_groups(made.network, recipe), recipe, 1e-2)
    schedule = make_schedule(recipe, 1e-2, num_epochs, PER_EPOCH, 1, uses_weights)
    made.lr_scheduler = IterationRates(made.optimizer, schedule, PER_EPOCH)
    return made


def squared_error(output: Any, target: Any) -> torch.Tensor:
    outputs = output if isinstance(output, list) else [output]
    targets = target if isinstance(target, list) else [target]
    errors = [(o - t).square().mean() for o, t in zip(outputs, targets, strict=True)]
    return torch.stack(errors).sum()


def epoch(of: Any, number: int) -> None:
    of.current_epoch, of.iteration = number, 0
    for iteration in range(PER_EPOCH):
        generator = torch.Generator().manual_seed(100 * number + iteration)
        image = torch.randn(1, 1, *PATCH, generator=generator)
        of.train_step({"data": image, "target": [image.expand(-1, 2, -1, -1, -1)]})


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in of.network.state_dict().items()}


def test_in_the_first_stage_only_the_decoder_is_trained() -> None:
    run = trainer()
    before = weights(run)
    encoder = [key for key in before if key.startswith("encoder.")]
    parts = ("decoder.stages", "decoder.transpconvs", "decoder.seg_layers")
    decoder = [key for key in before if key.startswith(parts)]

    # 40 % of 5 epochs are the first two.
    epoch(run, 0)
    epoch(run, 1)

    middle = weights(run)

    assert all(torch.equal(before[key], middle[key]) for key in encoder)
    assert any(not torch.equal(before[key], middle[key]) for key in decoder)
    # Momentum of the first stage would push the encoder at the beginning of the second.
    for parameter in encoder_parameters(run.network):
        assert parameter not in run.optimizer.state

    epoch(run, 2)
    after = weights(run)

    assert any(not torch.equal(middle[key], after[key]) for key in encoder)


def test_the_scratch_twin_has_no_first_stage() -> None:
    run = trainer(uses_weights=False)
    before = weights(run)

    epoch(run, 0)

    after = weights(run)
    encoder = [key for key in after if key.startswith("encoder.")]
    assert any(not torch.equal(before[key], after[key]) for key in encoder)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_run_stopped_in_any_stage_continues_bit_for_bit(stop_after: int) -> None:
    whole = trainer()
    for number in range(5):
        epoch(whole, number)
    first = trainer()
    for number in range(stop_after + 1):
        epoch(first, number)
    # A copy, as a checkpoint is; the second trainer starts as a new process does.
    saved_network = copy.deepcopy(first.network.state_dict())
    saved_optimizer = copy.deepcopy(first.optimizer.state_dict())
    second = trainer()
    second.network.load_state_dict(saved_network)
    second.optimizer.load_state_dict(saved_optimizer)
    for number in range(stop_after + 1, 5):
        epoch(second, number)

    expected = weights(whole)
    found = weights(second)

    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_rate_rises_for_the_decoder_then_for_all_then_falls() -> None:
    # 40 iterations: 8 decoder-first, 4 warm-up (10 % of the run), 28 of decay.
    recipe = Recipe(20, 1e-3, 1e-2, decoder_first_fraction=0.2)
    schedule = make_schedule(recipe, 1.0, 20, 2, 2)
    rates = [schedule.rate(i) for i in range(41)]

    assert rates[0] == pytest.approx(1 / 8)
    assert rates[7] == 1.0
    assert rates[8] == pytest.approx(1 / 4)
    assert rates[11] == 1.0
    assert rates[12] == 1.0
    assert rates[26] == pytest.approx(0.5**0.9)
    assert rates[40] == 0.0
    assert [schedule.is_decoder_first(i) for i in (0, 7, 8)] == [True, True, False]


def test_a_cnn_is_trained_by_sgd_that_decays_everything() -> None:
    run = trainer()

    assert isinstance(run.optimizer, torch.optim.SGD)
    (group,) = run.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)

    slowed = trainer(layer_decay=0.5)
    names = {id(p): name for name, p in slowed.network.named_parameters()}
    factor = {}
    for group in slowed.optimizer.param_groups:
        for parameter in group["params"]:
            factor[names[id(parameter)]] = group["rate_factor"]

    # Blocks of all stages are counted through: stem 0, stage 0 block 0, stage 1 block 0, decoder.
    assert factor["encoder.stem.convs.0.conv.weight"] == 0.125
    assert factor["encoder.stages.0.blocks.0.conv1.conv.weight"] == 0.25
    assert factor["encoder.stages.1.blocks.0.conv1.conv.weight"] == 0.5
    assert factor["decoder.stages.0.convs.0.conv.weight"] == 1.0


def test_coarser_outputs_follow_the_trainer_and_the_recipe() -> None:
    image = torch.zeros(1, 1, *PATCH)
    run = trainer()
    outputs = run.network(image)
    # Two stages have one output: the coarsest stage has none.
    assert isinstance(outputs, list)
    assert len(outputs) == 1

    run.set_deep_supervision_enabled(False)
    assert run.network(image).shape == (1, 2, *PATCH)

    # A recipe without deep supervision stays without, even if the trainer asks for it.
    flat = trainer(deep_supervision=False)
    flat.network.decoder.deep_supervision = False
    flat.set_deep_supervision_enabled(True)
    assert flat.network(image).shape == (1, 2, *PATCH)


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # After a power cut a file that was renamed too early can be empty.
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    made = trainer()
    made.local_rank = 0

    def write(_self: object, name: str) -> None:
        Path(name).write_text("weights")

    monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", write)
    file = tmp_path / "checkpoint_latest.pth"
    seen = []

    def fsync(_handle: int) -> None:
        seen.append(file.exists())

    monkeypatch.setattr("os.fsync", fsync)

    made.save_checkpoint(str(file))

    # When the bytes were flushed, the file did not have its name yet.
    assert seen == [False]
    assert file.read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.fixture
def one_process_world(tmp_path: Path) -> Iterator[None]:
    """A process group of only this process, as each GPU of ``-num_gpus`` is in one."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path / 'world'}",
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_with_several_gpus_the_main_process_writes_the_stock_form(
    tmp_path: Path,
    one_process_world: None,
    rank: int,
) -> None:
    run = trainer()
    run.network = DistributedDataParallel(run.network)
    run.is_ddp, run.local_rank, run.is_stock_model = True, rank, True
    run.disable_checkpointing, run.current_epoch, run._best_ema = False, 0, 0.5
    run.my_init_kwargs, run.inference_allowed_mirroring_axes = {}, (0, 1, 2)
    # nnU-Net's logger, as far as saving asks for it.
    run.logger = type("Logger", (), {"get_checkpoint": lambda self: {}})()
    own_class = type(run)
    file = tmp_path / "checkpoint_final.pth"

    run.save_checkpoint(str(file))

    assert type(run) is own_class
    assert file.exists() == (rank == 0)
    if rank == 0:
        saved = torch.load(file, weights_only=True)
        assert saved["trainer_name"] == "nnUNetTrainer"
        assert saved["network_weights"].keys() == run.unwrapped().state_dict().keys()
