"""The parts of ``gpu.py`` that type commands: resuming, the chain from scans to a fine-tuned network, two GPUs."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import Line, Setting, relative

RAW = "nnUNet_raw"
SMALL_ENCODER = ('encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
                 '"init_values":0.1,"scale_attn_inner":true}')


@dataclass(frozen=True)
class Clinic:
    """Folders of their own below ``root``, with Hippocampus linked into the raw one; its methods type lines."""

    root: Path
    setting: Setting

    @classmethod
    def opened(cls, root: Path, setting: Setting) -> "Clinic | None":
        """None where the dataset is not there."""
        found = sorted(Path(os.environ.get(RAW, "/nowhere")).glob("Dataset004_*"))
        if not found:
            return None
        for name in ("nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
        target = root / "nnUNet_raw" / found[0].name
        for part in ("imagesTr", "labelsTr"):
            (target / part).mkdir(parents=True)
        images = sorted((found[0] / "imagesTr").glob("*.nii.gz"))[: 6 if setting.is_small else None]
        for image in images:
            (target / "imagesTr" / image.name).symlink_to(image)
            label = found[0] / "labelsTr" / image.name.replace("_0000", "")
            (target / "labelsTr" / label.name).symlink_to(label)
        description = json.loads((found[0] / "dataset.json").read_text())
        (target / "dataset.json").write_text(json.dumps({**description, "numTraining": len(images)}))
        return cls(root, setting)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command on its way; what it says goes to a log."""
        folders = {name: str(self.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        program = str(Path(sys.executable).with_name(command[0]))
        with (self.root / "log.txt").open("a") as log:
            return subprocess.Popen([program, *command[1:]], env={**os.environ, **folders}, stdout=log, stderr=log, text=True)

    def type(self, *command: str) -> float:
        """Its seconds.

        Raises:
            SystemExit: it failed.
        """
        start = time.perf_counter()
        if self.start(*command).wait():
            raise SystemExit(f"failed: {' '.join(command)}\n{(self.root / 'log.txt').read_text()[-3000:]}")
        return round(time.perf_counter() - start, 1)

    def line(self, name: str, *more: str, settings: Sequence[str] = ()) -> list[str]:
        """A pretraining."""
        small = [SMALL_ENCODER, "sequence.crop_size_vox=16,24,16", "run.log_every=1"] if self.setting.is_small else []
        every = ["--set", *small, *settings] if small or settings else []
        return ["autoreg_pretrain", "-d", "4", "--name", name, "--encoder", "primus_tiny", "--device", self.setting.device.type, *more,
                *every]

    def folder(self, name: str) -> Path:
        """Of a pretraining."""
        return self.root / "nnUNet_results" / "autoreg_pretraining" / name

    def last(self, name: str) -> dict[str, float]:
        """The last value of everything that a run logged."""
        lines = [json.loads(text) for text in (self.folder(name) / "metrics.jsonl").read_text().splitlines()]
        return {line["name"]: line["value"] for line in lines if "value" in line}


def resume(setting: Setting) -> Iterator[Line]:
    """A run that got SIGTERM after its first checkpoint and was typed again, against one left alone."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as root:
        clinic = Clinic.opened(Path(root), setting)
        if clinic is None:
            yield {"part": "resume", "left_out": "nnUNet_raw holds no dataset 4"}
            return
        rest = ["--steps", "6" if setting.is_small else "60", "--batch", "2" if setting.is_small else "8"]
        settings = ["run.checkpoint_every=2", "run.validate_every=1000"]
        clinic.type(*clinic.line("whole", *rest, settings=settings))
        process = clinic.start(*clinic.line("stopped", *rest, settings=settings))
        while process.poll() is None and not (clinic.folder("stopped") / "checkpoint_latest.pth").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        was_stopped = process.wait() != 0
        clinic.type(*clinic.line("stopped", *rest, settings=settings))
        whole, stopped = (load_file(clinic.folder(name) / "encoder.safetensors") for name in ("whole", "stopped"))
        error = max(relative(stopped[key], whole[key]) for key in whole)
        limit = 0.0 if setting.device.type == "cpu" else 1e-2
        yield {"part": "resume", "was_stopped": was_stopped, "bit_equal": error == 0, "error": error, "limit": limit,
               "ok": error <= limit and was_stopped}


def chain(setting: Setting) -> Iterator[Line]:
    """Pretraining, planning, fine-tuning: the commands, and what came of them."""
    with tempfile.TemporaryDirectory() as root:
        clinic = Clinic.opened(Path(root), setting)
        if clinic is None:
            yield {"part": "chain", "left_out": "nnUNet_raw holds no dataset 4"}
            return
        length = ["--steps", "4", "--batch", "2"] if setting.is_small else ["--hours", f"{setting.minutes / 60:.4f}"]
        seconds = clinic.type(*clinic.line("chain", *length))
        plan, last = json.loads((clinic.folder("chain") / "plan.json").read_text()), clinic.last("chain")
        shown = ("heldout_error", "heldout_mean", "heldout_copy", "step_time", "tokens_per_second", "share_of_peak", "peak_memory")
        yield {"part": "chain", "what": "pretraining", "seconds": seconds, "encoder": plan["encoder"]["name"],
               "steps": plan["optim"]["num_steps"], "dry_step_gib": plan["run"]["peak_memory_gib"],
               **{name: last.get(name) for name in shown}}
        trainer = "AutoregPretrainedTrainer" if setting.is_small else "AutoregPretrainedTrainer_5epochs"
        yield {"part": "chain", "what": "planning", "seconds": clinic.type(
            "nnUNetv2_plan_and_preprocess", "-d", "4", "-pl", "AutoregPlanner", "-c", "3d_fullres", "-np", "2", "-npfp", "2")}
        if setting.is_small:
            file = next(clinic.root.glob("nnUNet_preprocessed/*/AutoregPlans.json"))
            plans = json.loads(file.read_text())
            plans["autoreg"]["recipe"].update(num_epochs=1, num_iterations_per_epoch=1, num_val_iterations_per_epoch=1)
            file.write_text(json.dumps(plans))
        line = ["nnUNetv2_train", "4", "3d_fullres", "0", "-tr", trainer, "-p", "AutoregPlans", "-device", setting.device.type]
        seconds = clinic.type(*line)
        summary = next(clinic.root.glob("nnUNet_results/Dataset004_*/*/fold_0/validation/summary.json"))
        dice = json.loads(summary.read_text())["foreground_mean"]["Dice"]
        yield {"part": "chain", "what": "fine-tuning", "seconds": seconds, "trainer": trainer,
               "validation_dice": None if math.isnan(dice) else dice}


def processes(setting: Setting) -> Iterator[Line]:
    """The step of two GPUs with twice the batch against that of one: 1 is perfect."""
    if setting.is_small or torch.cuda.device_count() < 2:
        yield {"part": "processes", "left_out": f"{torch.cuda.device_count()} GPUs"}
        return
    with tempfile.TemporaryDirectory() as root:
        clinic = Clinic.opened(Path(root), setting)
        if clinic is None:
            yield {"part": "processes", "left_out": "nnUNet_raw holds no dataset 4"}
            return
        seconds = {}
        for num in (1, 2):
            more = ["--encoder", "primus_b", "--steps", "200", "--batch", str(32 * num), "--num-gpus", str(num)]
            clinic.type(*clinic.line(f"gpus{num}", *more))
            seconds[num] = clinic.last(f"gpus{num}")["step_time"]
        efficiency = seconds[1] / seconds[2]
        yield {"part": "processes", "step_s": seconds, "efficiency": round(efficiency, 3), "ok": efficiency >= 0.9}
