"""kill -9 at random moments of real pretrainings; the encoder compared, byte for byte, with that of
a run that nobody disturbed.

Every run begins with empty nnU-Net folders, so that kills fall into indexing, preprocessing,
training and export alike. A killed run is typed again, and killed again, until it finishes; then
the next one begins. What is killed is a fork of this process, which has imported
everything: kills fall into the work, not into imports.

    python benchmarks/kills.py --kills 50

One JSON line goes to ``benchmarks/results/kills.jsonl``.
"""

import argparse
import hashlib
import importlib
import json
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "kills.jsonl"
SCANS = REPO.parent / "shared/data/nnUNet_raw/Dataset004_Hippocampus/imagesTr"
ENCODER = (
    'encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":2,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)
SETTINGS = [
    ENCODER,
    "sequence.crop_size_vox=24,32,24",
    "run.checkpoint_every=5",
    "run.validate_every=10",
    "run.log_every=1",
]
PHASES = ("indexing and planning", "preprocessing and loading", "training", "export")


def import_everything() -> None:
    """What a run imports late."""
    for module in (
        "dynamic_network_architectures.architectures.primus",
        "nnunetv2.preprocessing.preprocessors.default_preprocessor",
        "torch._dynamo",
        "matplotlib.figure",
        "nnunet_autoreg.pretrain.pipeline",
        "nnunet_autoreg.pretrain.dry_run",
    ):
        importlib.import_module(module)


class Home:
    """Empty nnU-Net folders of one run, and its line."""

    def __init__(self, root: Path, scans: Path, steps: int):
        self.root = root
        self.argv = [
            "-i",
            str(scans),
            "--name",
            "run",
            "--steps",
            str(steps),
            "--batch",
            "2",
            "--encoder",
            "primus_tiny",
            "--device",
            "cpu",
            "--set",
            *SETTINGS,
        ]
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir(parents=True)

    @property
    def folder(self) -> Path:
        return self.root / "nnUNet_results/autoreg_pretraining/run"

    def type_line(self, kill_after_s: float | None) -> int:
        """Run the line in a fork; gives its exit status, negative if it was killed first."""
        pid = os.fork()
        if pid == 0:
            self._child()
        deadline = time.monotonic() + kill_after_s if kill_after_s is not None else float("inf")
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.005)

    def _child(self) -> None:
        code = 70
        try:
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                os.environ[name] = str(self.root / name)
            with (self.root / "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            from nnunet_autoreg.cli.pretrain import main

            sys.argv = ["autoreg_pretrain", *self.argv]
            code = main(self.argv)
        finally:
            logging.shutdown()
            os._exit(code)

    def phase(self) -> str:
        """How far the run had come, by its files."""
        if not (self.folder / "plan.json").exists():
            return PHASES[0]
        if not (self.folder / "metrics.jsonl").exists():
            return PHASES[1]
        return PHASES[3] if (self.folder / "encoder.safetensors").exists() else PHASES[2]

    def digest(self) -> str:
        return hashlib.sha256((self.folder / "encoder.safetensors").read_bytes()).hexdigest()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--cases", type=int, default=6)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument(
        "--longest",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="latest moment of a kill, as a share of the time of an undisturbed run (a run that is "
        "typed again takes less)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="begin no further kill after this time",
    )
    args = p.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import_everything()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(Path(temporary), args, begun + 60 * args.minutes)
    record = {**about(args), **record, "total_s": round(time.monotonic() - begun, 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=2))
    sys.exit(
        0 if record["num_identical"] == record["num_finished"] and not record["num_failed"] else 1,
    )


def measure(root: Path, args: argparse.Namespace, deadline: float) -> dict[str, object]:
    """Kill until ``args.kills`` were made; every run that began is finished and compared."""
    scans = root / "scans"
    scans.mkdir()
    for image in sorted(SCANS.glob("*.nii.gz"))[: args.cases]:
        shutil.copy(image, scans)
    whole = Home(root / "whole", scans, args.steps)
    start = time.monotonic()
    assert whole.type_line(None) == 0, (whole.root / "log.txt").read_text()[-2000:]
    duration = time.monotonic() - start
    moments = random.Random(args.seed)
    kills: Counter[str] = Counter()
    finished = identical = failed = most = 0
    while kills.total() < args.kills and time.monotonic() < deadline:
        home, in_row, status = Home(root / f"run {finished}", scans, args.steps), 0, -1
        while status != 0:
            more = kills.total() < args.kills and time.monotonic() < deadline
            status = home.type_line(moments.uniform(0, args.longest * duration) if more else None)
            if status == -signal.SIGKILL:
                kills[home.phase()] += 1
                in_row += 1
            elif status != 0:
                failed += 1
                print((home.root / "log.txt").read_text()[-1000:], file=sys.stderr)
                break
        finished, most = finished + 1, max(most, in_row)
        identical += status == 0 and home.digest() == whole.digest()
        print(
            f"run {finished}: {in_row} kills, {kills.total()} in all, {identical} identical",
            flush=True,
        )
        shutil.rmtree(home.root)
    return {
        "num_kills": kills.total(),
        "kills_by_phase": {name: kills[name] for name in PHASES},
        "num_finished": finished,
        "num_identical": identical,
        "num_failed": failed,
        "most_kills_of_one_run": most,
        "undisturbed_s": round(duration, 1),
    }


def about(args: argparse.Namespace) -> dict[str, object]:
    """What is needed to repeat it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    ).stdout.strip()
    return {
        "benchmark": "kills",
        "command": " ".join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "nnunetv2", "numpy")},
        "machine": f"{platform.machine()}, 1 CPU core",
        "cases": f"{args.cases} of Dataset004_Hippocampus",
        "steps": args.steps,
        "settings": SETTINGS,
        "seed": args.seed,
    }


if __name__ == "__main__":
    main()
