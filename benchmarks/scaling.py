"""Compare the training step of two processes on two devices with that of one process.

Every process has the same crops per step, so that with perfect scaling both steps take equally
long. One and two processes take turns in one run, so that other work on the machine slows both
down. A step is that of the training loop: loading, forward, backward, the sum over processes, and
the update, without validation scans and checkpoints. On CUDA each process has a GPU. On a CPU each
process computes with one thread, which is a useful measurement only if two cores are free.

    python benchmarks/scaling.py --steps 20 --repeats 5
    python benchmarks/scaling.py --device cuda --encoder primus_b --crop 96 96 96 --batch 8 \\
        --steps 50 --repeats 5

One JSON line goes to ``benchmarks/results/scaling.jsonl``: the seconds per step of both (medians
over repeats), and the efficiency, which is the time of one process divided by that of two.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
WARM_UP = 3


class Noise:
    """Samples of noise with a prefix of half the blocks, which cost the same in every process."""

    def __init__(self, plan: Any):
        from nnunet_autoreg.sampling.kinds import num_blocks

        self.size, self.num_blocks = plan.sequence.crop_size_vox, num_blocks(plan)

    def draw(self, cases: Any, purpose: str, step: int, number: int = 0) -> Any:
        """Sample ``number`` of a step."""
        from nnunet_autoreg.sampling.sample import Sample

        generator = np.random.default_rng([step, number])
        voxels = generator.normal(size=(1, 1, *self.size)).astype(np.float32)
        return Sample(
            voxels,
            np.ones((1, *self.size), dtype=bool),
            np.arange(self.num_blocks),
            self.num_blocks // 2,
        )


def plan_of(args: argparse.Namespace, size: int) -> Any:
    """Return a plan of raster sequences of single tokens, with ``--batch`` crops per process."""
    from nnunet_autoreg.model.sizes import encoder_size
    from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
    from nnunet_autoreg.plan import (
        DataPlan,
        EncoderPlan,
        OptimPlan,
        Plan,
        RunPlan,
        SequencePlan,
    )

    encoder = encoder_size(args.encoder)
    return Plan(
        "scaling",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan(encoder.name, encoder.class_path, encoder.arguments, encoder.token_size),
        SequencePlan(tuple(args.crop)),
        PredictionPlan(),
        OptimPlan(10**6, args.batch * size, 1e-4, 1),
        RunPlan(0, 10**6, 10**6, sharding=args.sharding),
    )


def measure(args: argparse.Namespace) -> float:
    """Return the seconds per step in this process, after a warm-up."""
    import torch
    from torch.distributed import TCPStore

    from nnunet_autoreg.objectives.registry import build_objective
    from nnunet_autoreg.pretrain.distributed import SINGLE_PROCESS, device_of, join, leave
    from nnunet_autoreg.pretrain.trainer import Trainer

    size, rank = args.size, args.rank
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = (
        torch.device(args.device, rank) if args.device == "cuda" else device_of(args.device, rank)
    )
    world = SINGLE_PROCESS
    if size > 1:
        store = TCPStore("127.0.0.1", args.port, size, rank == 0, timeout=timedelta(minutes=5))
        world = join(store, rank, size, device)
    torch.manual_seed(0)
    plan = plan_of(args, size)
    objective = build_objective(plan)
    objective.sampler = Noise(plan)
    trainer = Trainer(plan, Path(os.devnull), objective, [], [], device, 0, world=world)
    batches = [trainer.batches[step] for step in range(2)]
    start = 0.0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            start = time.monotonic()
        loss, _ = trainer.train_step(step, batches[step % 2])
        world.any(False)
        float(loss)
    seconds = (time.monotonic() - start) / args.steps
    world.wait()
    leave()
    return seconds


def together(args: argparse.Namespace, size: int, port: int) -> float:
    """Return the seconds per step of ``size`` processes, as the main one measured them."""
    command = [sys.executable, __file__, "--device", args.device, "--encoder", args.encoder]
    command += ["--batch", str(args.batch), "--steps", str(args.steps)]
    command += ["--sharding", args.sharding, "--crop", *(str(side) for side in args.crop)]
    command += ["--size", str(size), "--port", str(port)]

    processes = []
    for rank in range(size):
        line = [*command, "--rank", str(rank)]
        processes.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return float(printed[0])


def main() -> None:
    """Measure one process or, without a rank, all."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--encoder", default="primus_tiny")
    parser.add_argument("--crop", nargs=3, type=int, default=[32, 32, 32])
    parser.add_argument("--batch", type=int, default=4, help="crops per process and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sharding", default="none", choices=["none", "full"])
    for name in ("--rank", "--size", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(measure(args))
        return
    times: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(args.repeats):
        for size in (1, 2) if repeat % 2 == 0 else (2, 1):
            times[size].append(together(args, size, 29500 + (os.getpid() + repeat) % 1000))
    one, two = (statistics.median(times[size]) for size in (1, 2))
    import torch

    name = (
        torch.cuda.get_device_name(0)
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    record = {
        "device": args.device,
        "hardware": name,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "encoder": args.encoder,
        "crop": args.crop,
        "batch_per_process": args.batch,
        "steps": args.steps,
        "repeats": args.repeats,
        "sharding": args.sharding,
        "seconds_per_step_1": one,
        "seconds_per_step_2": two,
        "all_seconds": times,
        "efficiency": one / two,
    }
    with RESULTS.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
