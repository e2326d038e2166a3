"""Compare the seconds of our training step with those of a baseline.

The baseline is measured twice, and the difference between both shows the noise. The steps are
interleaved.

Pretraining: width 768, depth 12, 512 tokens of 16^3 (a 128^3 crop). The baseline is a plain
    re-implementation of the method of AR-SSL4M: START and END tokens, a dense float mask that is
    built per sample on the host, and patches embedded from the raw volume. It computes in float32
    without compilation. On a GPU our step runs as in training (bf16, compiled, FlexAttention), and
    the baseline runs once more in bf16. A line then also holds the memory of a sample, and the
    share of the measured peak of bf16 matrix products.
Fine-tuning: our trainer's step is compared with the step of nnU-Net's own trainer of that network,
    both on the same network and batch.

    python benchmarks/step.py pretraining --repeats 7 --batch 1
    python benchmarks/step.py finetuning  --repeats 7 --patch 64
    python benchmarks/step.py finetuning  --repeats 7 --patch 64 --encoder resenc_tiny

A JSON line is written as soon as an arm has been built and has made three steps, so that a run that
is interrupted keeps the arms that it has measured. The last lines have the interleaved steps and,
on a GPU, memory. They go to ``--out``, by default ``benchmarks/results/step.jsonl``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measuring import peak_bytes, plan_of
from recording import Line, Recorder, commit_of
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.model.compilation import autocast
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import EncoderPlan, Plan
from nnunet_autoreg.pretrain.training_step import TrainingStep, matmul_peak, step_flops
from nnunet_autoreg.sampling.sample import Batch

if TYPE_CHECKING:
    from nnunet_autoreg.finetune.block import AutoregBlock

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
WIDTH, DEPTH, HEADS, TOKEN, SIDE = 768, 12, 12, 16, 128
NUM_TOKENS = (SIDE // TOKEN) ** 3
NUM_FIRST_STEPS = 3


class PlainBlock(nn.Module):
    """Pre-norm attention without q, k, v biases, then a GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)  # (B, T, WIDTH)
        q, k, v = (
            layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, HEADS, T, WIDTH / HEADS)
            for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainModel(nn.Module):
    """[START] + patches + [END] under a prefix mask; output i predicts patch i."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(1, WIDTH, TOKEN, TOKEN)
        self.special = nn.Embedding(4, WIDTH)
        self.register_buffer("position", torch.randn(1, NUM_TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKEN**3)

    def forward(self, volume: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(volume).flatten(2).transpose(1, 2) + self.position  # (B, T, WIDTH)
        start, end = (self.special.weight[i].expand(x.shape[0], 1, -1) for i in (1, 2))
        x = torch.cat([start, x, end], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def host_mask(prefixes: list[int]) -> Tensor:
    """Build the dense additive mask of every sample on the host, (B, 1, T, T) float32."""
    index = torch.arange(NUM_TOKENS + 2)
    masks = []
    for prefix in prefixes:
        last_seen = torch.clamp(index[:, None], min=prefix)
        masks.append(torch.where(index[None, :] <= last_seen, 0.0, float("-inf")))
    return torch.stack(masks)[:, None]


def plain_step(batch: int, device: torch.device, half: bool = False) -> Callable[[Tensor], None]:
    """Return the baseline's step on crops (B, 1, Z, Y, X), in float32 or under bf16 autocast."""
    torch.manual_seed(0)
    model = PlainModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(crops: Tensor) -> None:
        prefixes = torch.randint(0, NUM_TOKENS, (batch,)).tolist()
        mask = host_mask(prefixes).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            predicted = model(crops, mask)[:, :NUM_TOKENS].float()
        patches = (
            crops.unfold(2, TOKEN, TOKEN)
            .unfold(3, TOKEN, TOKEN)
            .unfold(4, TOKEN, TOKEN)
            .reshape(batch, NUM_TOKENS, -1)
        )
        deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (patches - patches.mean(-1, keepdim=True)) / deviation
        is_predicted = torch.stack([torch.arange(NUM_TOKENS) >= prefix for prefix in prefixes])
        weight = is_predicted.to(device)[:, :, None].float()
        loss = ((predicted - target).square() * weight).sum() / (weight.sum() * TOKEN**3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_plan(batch: int, compiled: bool = True) -> Plan:
    """Return a plan of the same width, depth and tokens.

    Positions are learnt: the head width of 64 does not allow a rotary table of three axes.
    """
    arguments = {
        "embed_dim": WIDTH,
        "patch_embed_size": [TOKEN] * 3,
        "eva_depth": DEPTH,
        "eva_numheads": HEADS,
        "init_values": 0.1,
        "scale_attn_inner": True,
        "use_rot_pos_emb": False,
    }
    settings = [
        f"encoder.arguments={json.dumps(arguments)}",
        f"encoder.token_size_vox={TOKEN},{TOKEN},{TOKEN}",
        "sequence.order=raster",
        "sequence.predictor=next",
        f"optim.batch_size={batch}",
        f"run.compile={str(compiled).lower()}",
    ]
    return plan_of(encoder_size("primus_b"), (SIDE,) * 3, batch, *settings)


def our_batch(crops: Tensor) -> Batch:
    """Return crops (B, 1, Z, Y, X) as sequences with random prefixes."""
    batch = crops.shape[0]
    valid_mask = torch.ones((batch, 1, *crops.shape[2:]), dtype=torch.bool)
    order_index = torch.arange(NUM_TOKENS).expand(batch, -1)
    prefix = torch.randint(1, NUM_TOKENS, (batch,))
    return Batch(crops[:, None], valid_mask, order_index, prefix)


def our_step(batch: int, device: torch.device) -> Callable[[Tensor], None]:
    """Return our step as in training.

    It is compiled and in bf16 on a GPU, and has gradient clipping and the loss-spike guard.
    """
    torch.manual_seed(0)
    plan = our_plan(batch)
    training = TrainingStep(plan, build_objective(plan), device)

    def step(crops: Tensor) -> None:
        training(plan.optim.num_steps // 2, our_batch(crops))

    return step


def memory_of(
    make: Callable[..., Callable[[Tensor], None]],
    batch: int,
    device: torch.device,
) -> Line:
    """Return the MiB that one more sample takes on a GPU.

    They follow from the peaks of a batch and of twice that batch.
    """
    peaks = []
    for size in (batch, 2 * batch):
        step = make(size, device)
        crops = torch.randn(size, 1, SIDE, SIDE, SIDE, device=device)
        step(crops)
        peaks.append(peak_bytes(partial(step, crops), [], device))
        del step, crops
        torch.cuda.empty_cache()
    bytes_per_sample = (peaks[1] - peaks[0]) / batch
    return {"mib_per_sample": round(bytes_per_sample / 2**20, 1)}


def share_of_peak(batch: int, seconds: float, device: torch.device) -> Line:
    """Return the share of the measured matrix peak that our step reaches on a GPU."""
    objective = build_objective(our_plan(1, compiled=False))
    objective.module.to(device)
    single = our_batch(torch.randn(1, 1, SIDE, SIDE, SIDE)).to(device)
    with autocast(device):
        flops = batch * step_flops(objective, single)
    peak = matmul_peak(device)
    return {
        "share_of_peak": round(flops / seconds / peak, 3),
        "peak_tflops": round(peak / 1e12, 1),
        "crops_per_second_needed": round(batch / seconds, 1),
    }


def finetuning_steps(
    name: str,
    patch: int,
    batch: int,
    device: torch.device,
) -> dict[str, Callable[[], Callable[[Tensor], None]]]:
    """Return functions that make our step, the stock step, and the stock step again.

    They are the trainers' own ``train_step`` on equal networks, with equal loss and batch.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    from nnunet_autoreg.finetune.block import AutoregBlock, Recipe
    from nnunet_autoreg.finetune.families import recipe_values
    from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer

    size = encoder_size(name)
    encoder = EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)
    block = AutoregBlock(encoder, None, Recipe(num_epochs=150, **recipe_values(encoder)))
    is_deep = block.recipe.deep_supervision

    # One target for each resolution of deep supervision.
    edges = [patch]
    if is_deep:
        edges = [patch >> level for level in range(size.arguments["n_stages"] - 1)]
    targets = [torch.randint(0, 3, (batch, 1, edge, edge, edge)).float() for edge in edges]

    make = partial(finetuning_step, block, patch, targets, device)
    stock = nnUNetTrainer if is_deep else nnUNet_Primus_S_Trainer
    return {
        "ours": partial(make, AutoregPretrainedTrainer, True),
        "baseline": partial(make, stock, False),
        "baseline again": partial(make, stock, False),
    }


def finetuning_step(
    block: "AutoregBlock",
    patch: int,
    targets: list[Tensor],
    device: torch.device,
    trainer_class: type,
    ours: bool,
) -> Callable[[Tensor], None]:
    """Return the step of a trainer on a new network.

    Args:
        targets: label maps (B, 1, Z, Y, X) of every resolution.
        ours: whether it is our trainer, with its optimiser and rates.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from nnunet_autoreg.finetune.network import build_network
    from nnunet_autoreg.finetune.recipe import (
        IterationRates,
        make_optimizer,
        make_schedule,
        parameter_groups,
    )

    recipe = block.recipe
    rate = recipe.pretrained_rate
    is_deep = recipe.deep_supervision
    torch.manual_seed(0)
    network = build_network(block, (patch,) * 3, 1, 3, deep_supervision=is_deep).to(device)

    loss: nn.Module = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        weight_ce=1,
        weight_dice=1,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    if is_deep:
        weights = [0.5**level for level in range(len(targets) - 1)]
        loss = DeepSupervisionWrapper(loss, [*weights, 0.0])

    rates = None
    if ours:
        optimizer = make_optimizer(parameter_groups(network, recipe), recipe, rate)
        schedule = make_schedule(recipe, rate, 150, 250, len(targets[0]))
        rates = IterationRates(optimizer, schedule, 250)
    else:
        optimizer = stock_optimizer(network, rate, is_deep)

    uses_float16 = device.type == "cuda" and not (ours and has_bf16(device))
    trainer = trainer_class.__new__(trainer_class)
    vars(trainer).update(
        device=device,
        network=network,
        optimizer=optimizer,
        block=block,
        has_bf16=has_bf16(device),
        current_epoch=0,
        iteration=0,
        loss=loss,
        lr_scheduler=rates,
        grad_scaler=torch.GradScaler("cuda") if uses_float16 else None,
    )
    target = targets if is_deep else targets[0]
    return lambda crops: trainer.train_step({"data": crops, "target": target})


def stock_optimizer(network: nn.Module, rate: float, is_deep: bool) -> torch.optim.Optimizer:
    """Return the optimiser of nnU-Net's own trainer of a CNN, or of a Primus."""
    if is_deep:
        return torch.optim.SGD(
            network.parameters(),
            rate,
            weight_decay=3e-5,
            momentum=0.99,
            nesterov=True,
        )
    return torch.optim.AdamW(
        network.parameters(),
        rate,
        weight_decay=5e-2,
        betas=(0.9, 0.98),
        fused=True,
    )


def first_steps(step: Callable[[Tensor], None], crops: Tensor, device: torch.device) -> list[float]:
    """Return the seconds of an arm's first steps, the first of which compiles."""
    seconds = []
    for _ in range(NUM_FIRST_STEPS):
        start = time.perf_counter()
        step(crops)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 4))
    return seconds


def measure(
    steps: dict[str, Callable[[Tensor], None]],
    crops: Tensor,
    repeats: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Return the seconds of each step, after one warm-up round.

    A round makes one step of each. Every round begins with another one, because a step may depend
    on the one before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(repeats + 1):
        names = list(steps)
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            step = steps[name]
            start = time.perf_counter()
            step(crops)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("what", choices=["pretraining", "finetuning"])
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--patch", type=int, default=64, help="edge of the fine-tuning patch")
    p.add_argument(
        "--encoder",
        default="primus_s",
        help="encoder of the fine-tuning: primus_s, or a resenc",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="file that every line is appended to at once",
    )
    return p


def arms_of(
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Callable[[], Callable[[Tensor], None]]]:
    """Return functions that make the steps of the arms, in the order in which they are built."""
    if args.what == "finetuning":
        return finetuning_steps(args.encoder, args.patch, args.batch, device)
    arms = {
        "ours": partial(our_step, args.batch, device),
        "baseline": partial(plain_step, args.batch, device),
        "baseline again": partial(plain_step, args.batch, device),
    }
    if device.type == "cuda":
        arms["baseline in bf16"] = partial(plain_step, args.batch, device, half=True)
    return arms


def main() -> None:
    """Measure the first steps of each arm, then the steps of all arms interleaved."""
    args = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    is_finetuning = args.what == "finetuning"
    edge = args.patch if is_finetuning else SIDE
    crops = torch.randn(args.batch, 1, edge, edge, edge, device=device)

    device_name = f"cpu, {torch.get_num_threads()} threads"
    if on_gpu:
        device_name = torch.cuda.get_device_name()
    common: Line = {
        "device": device_name,
        "commit": commit_of(Path(__file__).parent),
        "versions": {name: version(name) for name in ("torch", "nnunetv2")},
    }
    recorder = Recorder(args.out.resolve(), common)
    same: Line = {
        "part": "step",
        "what": args.what,
        "encoder": args.encoder if is_finetuning else None,
        "batch": args.batch,
        "edge": edge,
    }

    steps: dict[str, Callable[[Tensor], None]] = {}
    for name, make in arms_of(args, device).items():
        start = time.perf_counter()
        steps[name] = make()
        built_s = round(time.perf_counter() - start, 2)
        first_s = first_steps(steps[name], crops, device)
        recorder.add({**same, "arm": name, "built_s": built_s, "first_steps_s": first_s})

    seconds = measure(steps, crops, args.repeats, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rounded = {}
    for name, values in seconds.items():
        rounded[name] = [round(value, 4) for value in values]
    noise = medians["baseline again"] / medians["baseline"]
    recorder.add(
        {
            **same,
            "repeats": args.repeats,
            "seconds": rounded,
            "median_s": {name: round(median, 4) for name, median in medians.items()},
            "ours_over_baseline": round(medians["ours"] / medians["baseline"], 3),
            "baseline_again_over_baseline": round(noise, 3),
        },
    )

    if not is_finetuning and on_gpu:
        recorder.add({**same, "arm": "ours", **share_of_peak(args.batch, medians["ours"], device)})
        steps.clear()
        torch.cuda.empty_cache()
        ways = {
            "ours": our_step,
            "baseline": plain_step,
            "baseline in bf16": partial(plain_step, half=True),
        }
        for name, way in ways.items():
            recorder.add({**same, "arm": name, **memory_of(way, args.batch, device)})


if __name__ == "__main__":
    main()
