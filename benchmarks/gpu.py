"""Check on a GPU that results are right, how fast they are, and whether the memory estimate holds.

    python benchmarks/gpu.py --parts smoke --out gpu.jsonl
    python benchmarks/gpu.py --parts throughput --encoders primus_m resenc_l --out gpu.jsonl
    python benchmarks/gpu.py --parts smoke --dry-run-on-cpu

Run ``smoke`` first; it takes about 3 minutes. With ``--dry-run-on-cpu`` everything is small.

Every part runs in a separate process, for at most ``--minutes`` (4). If it fails or takes longer, a
line says so, and the next part begins. Parts that are measured per encoder run once per encoder.
Every line is on disk, in the file named by ``--out``, before the next one is measured. The exit
code is 1 if something is wrong.

Only the installed package and this folder are needed: scans are generated, or come from dataset 4
if ``nnUNet_raw`` has it. There is no network access.

Parts:
    turns        crops that are flipped and transposed on the device
    attention    FlexAttention's kernels compared with plain attention; also attention_quick
    losses       compiled with eager, bf16 with float32, checkpointed with not, per encoder
    throughput   seconds of a step and share of the matrix peak, per encoder
    memory       estimate and measured peak, per encoder
    pretrain     50 steps of a CNN and a transformer by the command, and the time to the first step
    stop         SIGTERM before the first step
    resume       a pretraining that is stopped and continued, compared with one that is not
    finetune     planning, 20 iterations of nnUNetv2_train, prediction
    chain        the same, longer
    processes    two GPUs
Groups of parts: ``smoke``, ``correctness``, ``all``.
"""

import argparse
import faulthandler
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from itertools import permutations, product
from pathlib import Path

import torch
from gpu_commands import CNN, TRANSFORMER, chain, finetune, pretrain, processes, resume, stop
from measuring import Setting, batch_of, crop_of, peak_bytes, plan_of, relative
from recording import Line, Recorder, commit_of, python_command, read_lines, run_bounded
from torch import Tensor

from nnunet_autoreg.geometry import as_size, grid_of, volume
from nnunet_autoreg.model.attention import attend, block_causal, strictly_earlier
from nnunet_autoreg.model.compilation import autocast
from nnunet_autoreg.model.memory import CONTEXT_BYTES
from nnunet_autoreg.model.sizes import ENCODERS, encoder_size
from nnunet_autoreg.objectives.base import Objective
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.dry_run import plan_memory
from nnunet_autoreg.pretrain.training_step import TrainingStep, matmul_peak, step_flops
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.sample import Batch

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Allowed largest difference over the largest value. On a GPU, float32 is multiplied in TF32 or
float32; bf16 has 8 bits.
"""
ESTIMATE_WITHIN = 0.10
NUM_STEPS, NUM_STEPS_SMALL = 8, 3
MOST_AT_ONCE = 16

LOSSES_OF = ("primus_tiny", "primus_b", "primus_v3_s", "resenc_tiny")
"""If no encoder is named, losses are compared for one encoder of every kind of blocks."""


def turns(setting: Setting) -> Iterator[Line]:
    """Crops turned on the device in every way: voxels that differ from those turned here,
    milliseconds per crop.
    """
    flips = list(product((False, True), repeat=3))
    ways = [FlipTranspose(flip, as_size(axes)) for flip in flips for axes in permutations(range(3))]
    side = 16 if setting.is_small else 128
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randn(len(ways), 1, 1, side, side, side, generator=generator)
    batch = Batch(
        voxels,
        voxels[:, 0] > 0,
        torch.zeros(len(ways), 8),
        torch.zeros(len(ways)),
        flip_transposes=tuple(ways),
    )
    batch = batch.pin_memory() if setting.device.type == "cuda" else batch

    seconds = math.inf
    for _ in range(3):  # The first one meets an empty cache of memory.
        start = time.monotonic()
        turned = batch.to(setting.device).voxels
        turned[-1].flatten()[0].item()  # Waits for the device.
        seconds = min(seconds, time.monotonic() - start)

    differ = 0
    for found, turn, whole in zip(turned, ways, voxels, strict=True):
        differ += int((found.cpu() != turn.tensor(whole)).sum())
    more = {"side_vox": side, "ms_per_crop": 1000 * seconds / len(ways)}
    yield {
        "part": "turns",
        "what": "voxels that differ",
        **more,
        "error": differ,
        "ok": differ == 0,
    }


def attention(setting: Setting, is_quick: bool = False) -> Iterator[Line]:
    """FlexAttention's kernels, output and gradients, against plain attention in float32.

    Each compiled function meets every order and padding in turn, as a training does.
    """
    num_samples, num_heads, num_tokens = (2, 2, 150) if setting.is_small else (3, 4, 1000)
    cases = attention_cases(num_samples, num_tokens)
    widths = (66,) if setting.is_small or is_quick else (64, 66)
    dtypes = (torch.float32,) if setting.is_small else (torch.float32, torch.bfloat16)

    for kind, width, dtype in product(("encoder", "decoder"), widths, dtypes):
        torch._dynamo.reset()
        # No CPU kernel has a gradient.
        backend = "inductor" if setting.device.type == "cuda" else "eager"
        flex = torch.compile(attend, dynamic=False, backend=backend)
        for (order, padding), (ranks, prefix, valid) in cases.items():
            tensors = [t.to(setting.device) for t in (ranks, prefix, valid)]
            rule = (
                block_causal(*tensors)
                if kind == "encoder"
                else strictly_earlier(tensors[0], tensors[2])
            )
            inputs = random_inputs((num_samples, num_heads, num_tokens, width), setting.device)
            mask = rule.block_mask(num_heads)

            start = time.monotonic()
            found = outputs_and_gradients(flex, inputs, mask, dtype)
            expected = outputs_and_gradients(attend, inputs, rule.dense(), torch.float32)
            errors = [sample_error(a, b) for a, b in zip(found, expected, strict=True)]
            worst = max(max(error) for error in errors)
            yield {
                "part": "attention",
                "rule": kind,
                "order": order,
                "padding": padding,
                "width": width,
                "dtype": str(dtype).removeprefix("torch."),
                "samples": num_samples,
                "heads": num_heads,
                "gradients": len(found) > 1,
                "error": worst,
                "limit": TOLERANCE[dtype],
                "seconds": round(time.monotonic() - start, 1),
                "ok": worst <= TOLERANCE[dtype],
            }


def attention_cases(
    num_samples: int,
    num_tokens: int,
) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
    """Return ranks (B, T), prefix (B,) and validity (B, T) by order and padding; samples differ in
    all of them.
    """
    generator = torch.Generator().manual_seed(0)
    raster = torch.arange(num_tokens).expand(num_samples, -1)
    mixed = torch.stack(
        [torch.randperm(num_tokens, generator=generator) for _ in range(num_samples)],
    )
    whole = torch.ones(num_samples, num_tokens, dtype=torch.bool)
    padded = torch.rand(num_samples, num_tokens, generator=generator) > 0.3
    prefix = torch.linspace(1, num_tokens * 2 // 3, num_samples).long()

    cases = {}
    for order, ranks in (("raster", raster), ("random", mixed)):
        for padding, valid in (("whole", whole), ("padded", padded)):
            cases[order, padding] = (ranks, prefix, valid)
    return cases


def random_inputs(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return queries, keys and values (B, H, T, D)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(device) for _ in range(3)]


def outputs_and_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    mask: object,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the output, and on a GPU the gradients of queries, keys and values."""
    has_gradient = inputs[0].is_cuda
    leaves = [x.to(dtype).requires_grad_(has_gradient) for x in inputs]
    out = function(*leaves, mask)
    if not has_gradient:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def sample_error(found: Tensor, expected: Tensor) -> list[float]:
    """Return the relative error of every sample of a batch."""
    return [relative(a, b) for a, b in zip(found, expected, strict=True)]


def losses(setting: Setting, encoder: str) -> Iterator[Line]:
    """The whole loss and its gradient: compiled, in bf16, checkpointed, against the plain one in
    float32.
    """
    size = encoder_size(encoder)
    crop = as_size([min(64, side) for side in crop_of(size, setting.is_small)])
    eager, compiled, checkpointed = (
        ["run.compile=false"],
        ["run.compile=true"],
        ["optim.checkpoint_activations=true"],
    )
    ways = {"checkpointed against not": ([*eager, *checkpointed], False, 1e-4)}
    if setting.device.type == "cuda":
        ways |= {
            "compiled against eager, float32": (compiled, False, 5e-3),
            "eager bf16 against float32": (eager, True, 5e-2),
            "compiled bf16 against eager float32": (compiled, True, 5e-2),
        }

    orders = (("raster", "next"), ("random", "query"))
    choices = [
        [f"sequence.order={order}", f"sequence.predictor={predictor}"]
        for order, predictor in orders
    ]
    # A whole U-Net has one way to predict, which planning chooses.
    is_whole_network = plan_of(size, crop, 2).sequence.predictor not in ("next", "query")
    for sequence in [[]] if is_whole_network else choices:
        plain_plan = plan_of(size, crop, 2, *sequence, *eager)
        batch = batch_of(plain_plan, 2).to(setting.device)
        plain = loss_and_gradient(plain_plan, batch, False, setting)
        for what, (settings, is_half, limit) in ways.items():
            start = time.monotonic()
            found = loss_and_gradient(
                plan_of(size, crop, 2, *sequence, *settings),
                batch,
                is_half,
                setting,
            )
            error = float((found[:1] / plain[:1] - 1).abs())
            gradient_error = float((found[1:] - plain[1:]).norm() / plain[1:].norm())
            line = {
                "part": "losses",
                "encoder": encoder,
                "order": plain_plan.sequence.order,
                "what": what,
                "error": error,
            }
            more = {
                "gradient_error": gradient_error,
                "limit": limit,
                "seconds": round(time.monotonic() - start, 1),
            }
            yield {**line, **more, "ok": error <= limit}


def loss_and_gradient(plan: Plan, batch: Batch, is_half: bool, setting: Setting) -> Tensor:
    """Return the mean loss and behind it the norm of the gradient in every parameter, in
    float64.
    """
    step, objective = step_of(plan, setting)
    with torch.autocast(setting.device.type, torch.bfloat16) if is_half else nullcontext():
        terms = step.batch_loss.loss(batch)
    total, count = terms.total, terms.count
    (total / count).backward()
    norms = [p.grad.double().norm() for p in objective.module.parameters() if p.grad is not None]
    return torch.stack([(total / count).detach().double(), *norms])


def step_of(plan: Plan, setting: Setting) -> tuple[TrainingStep, Objective]:
    """Return a training step on a fresh network, the same every time."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    objective = build_objective(plan)
    step = TrainingStep(plan, objective, setting.device)
    objective.module.train()
    return step, objective


def throughput(setting: Setting, encoder: str) -> Iterator[Line]:
    """Steps of an encoder: seconds, crops and tokens per second, share of the matrix peak
    (attention counted dense).
    """
    size = encoder_size(encoder)
    crop = crop_of(size, setting.is_small)
    line: Line = {"part": "throughput", "encoder": encoder, "crop": list(crop)}
    micro = 2
    if not setting.is_small:
        room = 0.8 * torch.cuda.get_device_properties(setting.device).total_memory
        micro = min(MOST_AT_ONCE, plan_memory(plan_of(size, crop, 1)).largest_batch(room))
    if micro == 0:
        yield {**line, "left_out": "one crop does not fit by the estimate"}
        return

    plan = plan_of(size, crop, micro, "run.compile=true")
    crops = plan.optim.batch_size
    batch = batch_of(plan, crops)
    step, objective = step_of(plan, setting)
    seconds = []
    for number in range(NUM_STEPS_SMALL if setting.is_small else NUM_STEPS):
        start = time.perf_counter()
        loss, _ = step(number, batch)
        float(loss)  # Waits for the device.
        seconds.append(time.perf_counter() - start)

    usual = sorted(seconds[2:])[len(seconds[2:]) // 2]
    measured = {
        **line,
        "order": plan.sequence.order,
        "micro_batch": micro,
        "first_step_s": round(seconds[0], 2),
        "step_s": round(usual, 4),
        "crops_per_s": round(crops / usual, 2),
        "tokens_per_s": round(crops * volume(grid_of(crop, size.token_size)) / usual),
    }
    if setting.device.type == "cuda":
        # Counting comes last, on a network that is not compiled: what was measured is not lost if
        # it fails.
        yield measured
        del step, objective
        plain, counted = step_of(plan_of(size, crop, micro, "run.compile=false"), setting)
        with autocast(setting.device):
            flops = crops * step_flops(counted, batch_of(plan, 1).to(setting.device))
        peak = matmul_peak(setting.device)
        del plain
        share = {
            "share_of_peak": round(flops / usual / peak, 3),
            "peak_tflops": round(peak / 1e12, 1),
        }
        yield {**line, **share}
    else:
        yield measured


def memory(setting: Setting, encoder: str) -> Iterator[Line]:
    """Estimated over measured peak of a step, the context left out: one crop at once and two,
    checkpointed and not.
    """
    size = encoder_size(encoder)
    crop = crop_of(size, setting.is_small)
    for micro, recompute in product((2, 1), (False, True)):
        compiling = f"run.compile={'true' if setting.device.type == 'cuda' else 'false'}"
        plan = plan_of(
            size,
            crop,
            micro,
            f"optim.checkpoint_activations={str(recompute).lower()}",
            compiling,
        )
        estimate = (
            plan_memory(plan, setting.device.type == "cuda").total_bytes(micro) - CONTEXT_BYTES
        )
        line: Line = {
            "part": "memory",
            "encoder": encoder,
            "crop": list(crop),
            "micro_batch": micro,
            "checkpointed": recompute,
            "estimated_gib": round(estimate / 2**30, 3),
        }
        try:
            peak = peak_of(plan, setting)
        except torch.OutOfMemoryError:
            yield {**line, "left_out": "out of memory"}
            continue
        ratio = estimate / peak
        found = {"measured_gib": round(peak / 2**30, 3), "estimate_over_measured": round(ratio, 3)}
        yield {**line, **found, "ok": abs(ratio - 1) <= ESTIMATE_WITHIN}


def peak_of(plan: Plan, setting: Setting) -> int:
    """Return the peak of the second of two steps, in bytes."""
    step, objective = step_of(plan, setting)
    batch = batch_of(plan, plan.optim.batch_size)
    step(0, batch)
    states = step.optimizer.state.values()
    moments = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    held = [*objective.module.parameters(), *objective.module.buffers(), *moments]
    objective.module.zero_grad(set_to_none=True)
    peak = peak_bytes(partial(step, 1, batch), held, setting.device)

    del step, objective, held, moments, states
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return peak


PARTS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "turns": turns,
    "attention": attention,
    "attention_quick": partial(attention, is_quick=True),
    "stop": stop,
    "resume": resume,
    "finetune": finetune,
    "chain": chain,
    "processes": processes,
}
PARTS_PER_ENCODER: dict[str, Callable[[Setting, str], Iterator[Line]]] = {
    "losses": losses,
    "throughput": throughput,
    "memory": memory,
    "pretrain": pretrain,
}
GROUPS = {
    "smoke": ["attention_quick", "pretrain", "resume", "finetune"],
    "correctness": ["turns", "attention", "losses"],
    "all": [
        "turns",
        "attention",
        "losses",
        "throughput",
        "memory",
        "pretrain",
        "stop",
        "resume",
        "chain",
        "processes",
    ],
}


def units_of(
    names: Sequence[str],
    encoders: Sequence[str],
    is_small: bool,
) -> list[tuple[str, str]]:
    """Return (part, encoder) in the order in which they run; "" where a part is not of one encoder.

    Args:
        names: parts and groups of them.
        encoders: those to measure; empty for the part's own.
    """
    parts: list[str] = []
    for name in names:
        parts += [part for part in GROUPS.get(name, [name]) if part not in parts]

    units = []
    for part in parts:
        own: Sequence[str] = list(ENCODERS)
        if part == "pretrain":
            own = (TRANSFORMER, CNN)
        elif part == "losses":
            own = LOSSES_OF
        if is_small:
            own = (TRANSFORMER, CNN)
        chosen = (
            [""] if part in PARTS else [*encoders] if encoders and part != "pretrain" else [*own]
        )
        units += [(part, encoder) for encoder in chosen]
    return units


def run_unit(unit: str, setting: Setting, recorder: Recorder) -> int:
    """Measure one part in this process; return the exit code, which is 0 if all was recorded,
    failures included.
    """
    part, _, encoder = unit.partition(":")
    name: Line = {"part": part, "encoder": encoder} if encoder else {"part": part}
    # If a part hangs, its traceback is printed just before it is ended.
    faulthandler.dump_traceback_later(max(60 * setting.minutes - 5, 1))
    lines = PARTS_PER_ENCODER[part](setting, encoder) if encoder else PARTS[part](setting)
    recorder.add_all(name, lines)
    faulthandler.cancel_dump_traceback_later()
    return 0


def run_units(args: argparse.Namespace, is_small: bool, recorder: Recorder) -> None:
    """Run every part in a separate process, one after the other, within its time."""
    with tempfile.TemporaryDirectory(prefix="autoreg_gpu_") as folder:
        for part, encoder in units_of(args.parts, args.encoders, is_small):
            unit = f"{part}:{encoder}" if encoder else part
            options = ["--unit", unit, "--minutes", str(args.minutes)]
            options += ["--folder", str(args.folder or folder)]
            if recorder.path:
                options += ["--out", str(recorder.path)]
            if is_small:
                options.append("--dry-run-on-cpu")

            started = time.monotonic()
            failed = run_bounded(python_command(Path(__file__), *options), 60 * args.minutes)
            seconds = round(time.monotonic() - started, 1)
            line: Line = {"part": part, "encoder": encoder or None}
            if failed:
                recorder.add({**line, "failed": failed, "after_s": seconds, "ok": False})
            else:
                recorder.add({**line, "what": "whole part", "seconds": seconds})


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*GROUPS, *PARTS, *PARTS_PER_ENCODER]
    p.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=["smoke"],
        metavar="PART",
        help="default: smoke",
    )
    p.add_argument(
        "--encoders",
        nargs="+",
        choices=list(ENCODERS),
        default=[],
        metavar="NAME",
        help="for losses, throughput and memory",
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=4,
        help="limit for one part (default 4)",
    )
    p.add_argument("--out", type=Path, help="file that every line is appended to at once, as JSON")
    p.add_argument(
        "--folder",
        type=Path,
        help="existing folder for scans, runs and logs; default: a temporary one",
    )
    p.add_argument(
        "--dry-run-on-cpu",
        action="store_true",
        help="make everything small; this is the default without a GPU",
    )
    p.add_argument("--unit", help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Run the requested parts; return the exit code."""
    args = parser().parse_args()
    is_small = args.dry_run_on_cpu or not torch.cuda.is_available()
    out = args.out.resolve() if args.out else None
    if args.unit:
        device = "cpu" if is_small else "cuda"
        setting = Setting(torch.device(device), is_small, args.minutes, args.folder.resolve())
        return run_unit(args.unit, setting, Recorder(out, common_of(is_small)))

    with tempfile.TemporaryDirectory(prefix="autoreg_gpu_out_") as temporary:
        # The lines of the parts' processes are read from the file, for the last line.
        path = out or Path(temporary) / "lines.jsonl"
        num_before = len(read_lines(path))
        run_units(args, is_small, Recorder(path, common_of(is_small)))
        lines = read_lines(path)[num_before:]

    wrong = [line for line in lines if line.get("ok") is False]
    last = lines[-1]
    counts = f"{len(lines)} lines, {len(wrong)} wrong"
    print(f"{counts}; {last['device']}, versions {last['versions']}")
    return 1 if wrong else 0


def common_of(is_small: bool) -> Line:
    """Return the content that all lines share: device, commit and versions."""
    packages = ("nnunet-autoreg", "torch", "nnunetv2", "timm")
    versions = {name: version(name) for name in packages}
    # Asking takes a few hundred MB of the device, which no part's peak counts.
    device = "cpu" if is_small else torch.cuda.get_device_name()
    return {"device": device, "commit": commit_of(Path(__file__).parent), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
