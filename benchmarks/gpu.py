"""Everything that only a GPU can say, in one go: is it right, how fast, does the memory estimate hold, do the commands work.

    python benchmarks/gpu.py                       all parts, about 45 minutes; needs nnU-Net's three folders and dataset 4 for the last two
    python benchmarks/gpu.py --parts correctness memory
    python benchmarks/gpu.py --dry-run-on-cpu      the same in miniature, about 8 minutes of processor time; chosen where there is no GPU

JSON lines go to ``benchmarks/results/gpu.jsonl`` (a dry run's to ``--out``, by default nowhere), a table to the screen. The exit code is 1
if a check failed.

Parts: ``correctness`` - crops turned on the device, FlexAttention's kernels against plain attention, compiled against eager, bf16 against
float32, checkpointing against none. ``throughput`` - every encoder's step, share of the matrix peak. ``memory`` - estimate against measured
peak, every encoder, with and without checkpointing. ``resume`` - a run stopped and continued against one that was not. ``chain`` - ten
minutes of pretraining on Hippocampus, then planning and fine-tuning, by the commands. ``processes`` - two GPUs against one.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import permutations, product
from pathlib import Path

import torch
from gpu_commands import chain, processes, resume
from measuring import Line, Setting, peak_bytes, relative
from torch import Tensor

from nnunet_autoreg.geometry import Size, as_size, grid_of, volume
from nnunet_autoreg.model.attention import attend, block_causal, strictly_earlier
from nnunet_autoreg.model.memory import CONTEXT_BYTES
from nnunet_autoreg.model.sizes import ENCODERS, EncoderSize, encoder_size
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import DataPlan, EncoderPlan, ObjectivePlan, OptimPlan, Plan, RunPlan, SequencePlan
from nnunet_autoreg.pretrain.compiled import loss_function
from nnunet_autoreg.pretrain.display import matmul_peak, step_flops
from nnunet_autoreg.pretrain.machine import plan_memory
from nnunet_autoreg.pretrain.step import TrainingStep
from nnunet_autoreg.pretrain.validation import autocast
from nnunet_autoreg.sequences.blocks import block_ids
from nnunet_autoreg.sequences.sample import Batch
from nnunet_autoreg.sequences.turn import Turn

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference over the largest value: float32 on a GPU multiplies in TF32 or float32, bf16 has 8 bits."""
ESTIMATE_WITHIN = 0.10

def encoders_of(setting: Setting) -> Sequence[EncoderSize]:
    """Those to measure."""
    return [encoder_size("primus_tiny"), encoder_size("resenc_tiny")] if setting.is_small else list(ENCODERS.values())


def crop_of(encoder: EncoderSize, setting: Setting) -> Size:
    """A crop of whole blocks: 128^3, or a miniature."""
    side = [token * block for token, block in zip(encoder.token_size, encoder.block_tokens, strict=True)]
    return as_size([max(2 * s, 32) if setting.is_small else max(2, 128 // s) * s for s in side])


def plan_of(encoder: EncoderSize, crop: Size, micro: int, recompute: bool = False, **sequence: object) -> Plan:
    """A plan whose step has two parts."""
    optim = OptimPlan(2, 2 * micro, 1e-4, 1, micro_batch_size=micro, checkpoint_activations=recompute)
    return Plan("gpu", DataPlan((1.0, 1.0, 1.0)), EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
                SequencePlan(crop, encoder.block_tokens, **sequence), ObjectivePlan(trunk=encoder.trunk), optim,  # type: ignore[arg-type]
                RunPlan(0, 1, 1))


def batch_of(plan: Plan, num_samples: int) -> Batch:
    """Random crops, the last quarter of every second one padding; all are to be mirrored on the device."""
    size, generator = plan.sequence.crop_size_vox, torch.Generator().manual_seed(0)
    ids = torch.from_numpy(block_ids(grid_of(size, plan.encoder.token_size_vox), plan.sequence.block_tokens))
    num_blocks = int(ids.max()) + 1
    if plan.sequence.order == "random":
        ranks = torch.stack([torch.randperm(num_blocks, generator=generator)[ids] for _ in range(num_samples)])
    else:
        ranks = ids.expand(num_samples, -1).clone()
    real = torch.ones(num_samples, 1, *size, dtype=torch.bool)
    real[1::2, :, size[0] * 3 // 4 :] = False
    prefix = torch.randint(1, num_blocks, (num_samples,), generator=generator)
    voxels = torch.randn(num_samples, 1, 1, *size, generator=generator) * real[:, :, None]
    return Batch(voxels, real, ranks, prefix, turns=(Turn((True, True, True)),) * num_samples)


def checked(what: str, error: float, limit: float, **more: object) -> Line:
    """One comparison."""
    return {"part": "correctness", "what": what, **more, "error": error, "limit": limit, "ok": error <= limit}


def attention_lines(setting: Setting) -> Iterator[Line]:
    """FlexAttention's kernels, values and gradients, against plain attention in float32, for every rule, order and padding."""
    num_tokens = 150 if setting.is_small else 1000
    generator = torch.Generator().manual_seed(0)
    raster = torch.arange(num_tokens).expand(2, -1)
    mixed = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(2)])
    valid = {"whole": torch.ones(2, num_tokens, dtype=torch.bool), "padded": torch.rand(2, num_tokens, generator=generator) > 0.3}
    prefix = torch.tensor([1, num_tokens // 3])
    for order, ranks in (("raster", raster), ("random", mixed)):
        for padding, real in valid.items():
            tensors = [t.to(setting.device) for t in (ranks, prefix, real)]
            for kind in ("encoder", "decoder"):
                for width in (64, 66):
                    for dtype in (torch.float32, torch.bfloat16):
                        if setting.is_small and (width, dtype) != (66, torch.float32):
                            continue
                        error = attention_error(kind, tensors, width, dtype, setting)
                        yield checked("flex attention against plain", error, TOLERANCE[dtype], order=order, padding=padding, rule=kind,
                                      width=width, dtype=str(dtype))


def attention_error(kind: str, tensors: Sequence[Tensor], width: int, dtype: torch.dtype, setting: Setting) -> float:
    """The largest relative difference of output and, on a GPU, gradients."""
    ranks, prefix, valid = tensors
    rule = block_causal(ranks, prefix, valid) if kind == "encoder" else strictly_earlier(ranks, valid)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 2, ranks.shape[1], width, generator=generator).to(setting.device) for _ in range(3)]
    # No CPU kernel has a gradient.
    has_gradient = setting.device.type == "cuda"

    def run(function: Callable[..., Tensor], kind_of: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind_of).requires_grad_(has_gradient) for x in inputs]
        out = function(*leaves)
        return [out.detach(), *(torch.autograd.grad(out.float().square().sum(), leaves) if has_gradient else ())]

    torch._dynamo.reset()
    backend = "inductor" if has_gradient else "eager"
    flex = torch.compile(lambda q, k, v: attend(q, k, v, rule.block_mask()), dynamic=False, backend=backend)
    found, expected = run(flex, dtype), run(lambda q, k, v: attend(q, k, v, rule.dense()), torch.float32)
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))


def loss_and_gradient(objective: Objective, loss: Callable[[Batch], object], batch: Batch, half: bool, device: torch.device) -> Tensor:
    """The mean loss, and behind it the gradient's norm in every parameter, in float64."""
    objective.module.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        terms = loss(batch)
    (terms.total / terms.count).backward()  # type: ignore[attr-defined]
    norms = [p.grad.double().norm() for p in objective.module.parameters() if p.grad is not None]
    return torch.stack([(terms.total / terms.count).detach().double(), *norms])  # type: ignore[attr-defined]


def loss_lines(setting: Setting) -> Iterator[Line]:
    """The whole loss: compiled, in bf16, checkpointed, against the plain one in float32."""
    names = ["primus_tiny"] if setting.is_small else ["primus_tiny", "primus_b", "primus_v3_s", "resenc_tiny"]
    for name in names:
        encoder = encoder_size(name)
        for sequence in ({}, {"order": "random", "predictor": "query"}):
            plan = plan_of(encoder, as_size([min(64, c) for c in crop_of(encoder, setting)]), 2, **sequence)
            batch = batch_of(plan, 2).to(setting.device)
            torch.manual_seed(0)
            objective = build_objective(plan)
            objective.module.to(setting.device).train()
            compiled = replace(plan, run=replace(plan.run, compile=True))
            plain = loss_and_gradient(objective, objective.loss, batch, False, setting.device)
            torch.manual_seed(0)
            again = build_objective(replace(plan, optim=replace(plan.optim, checkpoint_activations=True)))
            again.module.to(setting.device).train()
            ways = {"checkpointed against not": (again, again.loss, False, 1e-4)}
            if setting.device.type == "cuda":
                loss = loss_function(compiled, objective, setting.device)
                ways |= {"compiled against eager, float32": (objective, loss, False, 5e-3),
                         "compiled bf16 against eager float32": (objective, loss, True, 5e-2),
                         "eager bf16 against float32": (objective, objective.loss, True, 5e-2)}
            for what, (of, loss, half, limit) in ways.items():
                torch._dynamo.reset()
                found = loss_and_gradient(of, loss, batch, half, setting.device)
                yield checked(what, float((found[:1] / plain[:1] - 1).abs()), limit, encoder=name, **sequence,
                              gradient_error=float((found[1:] - plain[1:]).norm() / plain[1:].norm()))


def turn_lines(setting: Setting) -> Iterator[Line]:
    """Crops copied and turned on the device in every way: voxels that differ from those turned here, and its milliseconds per crop."""
    turns = [Turn(flips, as_size(axes)) for flips in product((False, True), repeat=3) for axes in permutations(range(3))]
    side = 16 if setting.is_small else 128
    voxels = torch.randn(len(turns), 1, 1, side, side, side, generator=torch.Generator().manual_seed(0))
    batch = Batch(voxels, voxels[:, 0] > 0, torch.zeros(len(turns), 8), torch.zeros(len(turns)), turns=tuple(turns))
    batch = batch.pin_memory() if setting.device.type == "cuda" else batch
    seconds = math.inf
    for _ in range(3):  # the first one meets an empty cache of memory
        start = time.monotonic()
        turned = batch.to(setting.device).voxels
        turned[-1].flatten()[0].item()  # waits for the device
        seconds = min(seconds, time.monotonic() - start)
    differ = sum(int((mine.cpu() != turn.tensor(whole)).sum()) for mine, whole, turn in zip(turned, voxels, turns, strict=True))
    yield checked("crops turned on the device against here", differ, 0.0, side_vox=side, ms_per_crop=1000 * seconds / len(turns))


def correctness(setting: Setting) -> Iterator[Line]:
    """All comparisons."""
    yield from turn_lines(setting)
    yield from attention_lines(setting)
    yield from loss_lines(setting)


def step_of(plan: Plan, setting: Setting) -> tuple[TrainingStep, Objective]:
    """A training step on a fresh network."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    objective = build_objective(plan)
    return TrainingStep(plan, objective, setting.device), objective


def largest_micro(encoder: EncoderSize, crop: Size, setting: Setting) -> int:
    """As many crops at once as the estimate says fit, 16 at most; 0 if none does."""
    if setting.is_small:
        return 2
    room = 0.8 * torch.cuda.get_device_properties(setting.device).total_memory
    return min(16, plan_memory(plan_of(encoder, crop, 1)).largest_batch(room))


def throughput(setting: Setting) -> Iterator[Line]:
    """Steps of every encoder: seconds, crops and tokens per second, share of the matrix peak (attention counted dense)."""
    peak = matmul_peak(setting.device) if setting.device.type == "cuda" else math.nan
    for encoder in encoders_of(setting):
        crop = crop_of(encoder, setting)
        micro = largest_micro(encoder, crop, setting)
        if micro == 0:
            yield {"part": "throughput", "encoder": encoder.name, "crop": list(crop), "left_out": "one crop does not fit by the estimate"}
            continue
        plan = plan_of(encoder, crop, micro)
        step, objective = step_of(plan, setting)
        batch, seconds = batch_of(plan, plan.optim.batch_size), []
        for number in range(3 if setting.is_small else 8):
            start = time.perf_counter()
            loss, _ = step(number, batch)
            float(loss)
            seconds.append(time.perf_counter() - start)
        first, usual = seconds[0], sorted(seconds[2:])[len(seconds[2:]) // 2]
        with autocast(setting.device):
            flops = plan.optim.batch_size * step_flops(objective, batch_of(plan, 1).to(setting.device))
        crops = plan.optim.batch_size
        yield {"part": "throughput", "encoder": encoder.name, "crop": list(crop), "micro_batch": micro, "step_s": round(usual, 4),
               "first_step_s": round(first, 2), "crops_per_s": round(crops / usual, 2),
               "tokens_per_s": round(crops * volume(grid_of(crop, encoder.token_size)) / usual),
               "share_of_peak": None if math.isnan(peak) else round(flops / usual / peak, 3)}


def memory(setting: Setting) -> Iterator[Line]:
    """Estimated over measured peak of a step, the context left out, with and without checkpointing, for one crop at once and for two."""
    for encoder in encoders_of(setting):
        crop = crop_of(encoder, setting)
        for micro in (1, 2):
            for recompute in (False, True):
                plan = plan_of(encoder, crop, micro, recompute)
                estimate = plan_memory(plan, setting.device.type == "cuda").total_bytes(micro) - CONTEXT_BYTES
                line: Line = {"part": "memory", "encoder": encoder.name, "crop": list(crop), "micro_batch": micro,
                              "checkpointed": recompute, "estimated_gib": round(estimate / 2**30, 3)}
                try:
                    peak = peak_of(plan, setting)
                except torch.OutOfMemoryError:
                    yield {**line, "left_out": "out of memory"}
                    continue
                yield {**line, "measured_gib": round(peak / 2**30, 3), "estimate_over_measured": round(estimate / peak, 3),
                       "ok": abs(estimate / peak - 1) <= ESTIMATE_WITHIN}


def peak_of(plan: Plan, setting: Setting) -> int:
    """The peak of the second of two steps."""
    step, objective = step_of(plan, setting)
    batch = batch_of(plan, plan.optim.batch_size)
    step(0, batch)
    moments = [v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    held = [*objective.module.parameters(), *objective.module.buffers(), *moments]
    objective.module.zero_grad(set_to_none=True)
    peak = peak_bytes(partial(step, 1, batch), held, setting.device)
    del step, objective, held, moments
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return peak


PARTS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "correctness": correctness, "throughput": throughput, "memory": memory, "resume": resume, "chain": chain, "processes": processes,
}


def table(lines: Sequence[Line]) -> str:
    """One row a line, without what all lines share."""
    rows = []
    for line in lines:
        verdict = {True: "ok", False: "WRONG", None: ""}[line.get("ok")]  # type: ignore[index]
        rest = "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in line.items()
                         if key not in ("part", "ok") and value is not None)
        rows.append(f"{line['part']:12} {verdict:6} {rest}")
    return "\n".join(rows)


def main() -> int:
    """Run the parts asked for; return the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--minutes", type=float, default=10, help="of the pretraining in the part 'chain'")
    p.add_argument("--dry-run-on-cpu", action="store_true", help="everything in miniature")
    p.add_argument("--out", type=Path, help=f"default: {RESULTS}, of a dry run nowhere")
    args = p.parse_args()
    is_small = args.dry_run_on_cpu or not torch.cuda.is_available()
    setting = Setting(torch.device("cpu" if is_small else "cuda"), is_small, args.minutes)
    out = args.out or (None if is_small else RESULTS)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    common: Line = {"device": "cpu" if is_small else torch.cuda.get_device_name(), "commit": commit.stdout.strip(),
                    "versions": {name: version(name) for name in ("torch", "nnunetv2")}}
    lines = []
    for part in args.parts:
        for line in PARTS[part](setting):
            lines.append(line)
            print(table([line]), flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a") as handle:
                    handle.write(json.dumps({**line, **common}) + "\n")
    wrong = sum(line.get("ok") is False for line in lines)
    print(f"{len(lines)} lines, {wrong} wrong; {common['device']}, commit {common['commit']}, {common['versions']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
