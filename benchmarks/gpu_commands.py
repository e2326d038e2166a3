"""The parts of ``gpu.py`` that type commands.

They are pretraining, stopping and resuming, fine-tuning, and training on two GPUs.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch
from measuring import Setting, relative
from recording import Line

from nnunet_autoreg.cli.phantom import LABELS, draw_phantom, write_image

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
HIPPOCAMPUS, PHANTOM = "Dataset004_Hippocampus", "Dataset901_Phantom"
NUM_TEST = 2

CNN, TRANSFORMER = "resenc_tiny", "primus_tiny"
STEPS, STEPS_SMALL = 50, 8
SMALL_SETTINGS = {
    CNN: ["sequence.crop_size_vox=32,32,32"],
    TRANSFORMER: [
        'encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
        '"init_values":0.1,"scale_attn_inner":true}',
        "sequence.crop_size_vox=16,24,16",
    ],
}
"""Settings of a pretraining that is small enough for a CPU."""

COMPILED = ["run.compile=true"]
"""A run of 50 steps would not be compiled by default. Here it is, because compiling is tested."""

FIRST_STEP_WITHIN_S = 60
STOPS_WITHIN_S = 10
RESUMED_WITHIN = 1e-2
"""Allowed relative difference of weights on a GPU, which adds in a different order every time."""

POLL_S = 0.05


class CommandError(Exception):
    """A command ended with another exit code than 0; the message has its last lines."""


@dataclass(frozen=True)
class Started:
    """A command that was started.

    Attributes:
        log: file with its output.
        began: ``time.monotonic`` when it was typed.
    """

    process: subprocess.Popen[bytes]
    command: tuple[str, ...]
    log: Path
    began: float

    def seconds(self) -> float:
        """Return the seconds since the command was typed."""
        return time.monotonic() - self.began

    def finish(self) -> float:
        """Wait for the command and return its seconds.

        Raises:
            CommandError: it failed.
        """
        if self.process.wait():
            lines = self.log.read_text(errors="replace").splitlines()
            last_lines = " | ".join(lines[-3:])
            command = " ".join(self.command)
            code = self.process.returncode
            raise CommandError(f"{command}: exit code {code}: {last_lines}")
        return round(self.seconds(), 1)


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders below ``root``, with a few scans in the raw one.

    Its methods type commands.

    Attributes:
        dataset: name of the dataset's folder: Hippocampus if ``nnUNet_raw`` has it, else generated
            scans.
    """

    root: Path
    setting: Setting
    dataset: str

    @classmethod
    def opened(cls, setting: Setting) -> "Workspace":
        """Return the workspace that the parts of one call share; the first of them makes it."""
        root = setting.folder / "workspace"
        if not root.exists():
            # It is renamed when it is complete, so that an interrupted part does not leave an
            # incomplete dataset to the next one.
            temporary = Path(tempfile.mkdtemp(dir=setting.folder))
            num_cases = 6 if setting.is_small else 16
            dataset = _link_hippocampus(temporary, num_cases)
            if dataset is None:
                dataset = _write_phantoms(temporary, num_cases)
            for name in (PREPROCESSED, RESULTS):
                (temporary / name).mkdir()
            (temporary / "dataset").write_text(dataset)
            temporary.rename(root)
        return cls(root, setting, (root / "dataset").read_text())

    @property
    def number(self) -> str:
        """The dataset's number, as commands take it."""
        return str(int(self.dataset[len("Dataset") :].split("_")[0]))

    def start(self, *command: str, **variables: str) -> Started:
        """Type a command.

        Args:
            variables: of its environment, beside nnU-Net's folders.
        """
        folders = {name: str(self.root / name) for name in (RAW, PREPROCESSED, RESULTS)}
        environment = {**os.environ, **folders, **variables, "PYTHONUNBUFFERED": "1"}
        log = self.root / f"log_{len(list(self.root.glob('log_*'))):03d}.txt"
        program = program_of(command[0])

        with log.open("wb") as handle:
            process = subprocess.Popen(
                [*program, *command[1:]],
                env=environment,
                stdout=handle,
                stderr=subprocess.STDOUT,
            )
        return Started(process, command, log, time.monotonic())

    def pretraining(
        self,
        name: str,
        encoder: str,
        *more: str,
        settings: Sequence[str] = (),
    ) -> list[str]:
        """Return the command of a pretraining on the workspace's scans."""
        command = ["autoreg_pretrain", "-d", self.number, "--name", name, "--encoder", encoder]
        command += ["--device", self.setting.device.type, *more]
        if self.setting.is_small:
            settings = [*SMALL_SETTINGS[encoder], "run.log_every=1", *settings]
        if settings:
            command += ["--set", *settings]
        return command

    def short_pretraining(self, name: str, encoder: str) -> list[str]:
        """Return the command of the pretraining that is tried, stopped and resumed.

        Only its name differs between these.
        """
        length = ["--steps", str(self.num_steps)]
        batch = ["--batch", "2"] if self.setting.is_small else []
        often = ["run.log_every=1", "run.checkpoint_every=2", "run.validate_every=1000"]
        return self.pretraining(name, encoder, *length, *batch, settings=[*often, *COMPILED])

    @property
    def num_steps(self) -> int:
        """Steps of the pretraining that is tried."""
        return STEPS_SMALL if self.setting.is_small else STEPS

    def folder(self, name: str) -> Path:
        """Return the folder of a pretraining."""
        return self.root / RESULTS / "autoreg_pretraining" / name

    def last_values(self, name: str) -> dict[str, float]:
        """Return the last value of everything that a pretraining logged."""
        metrics = self.folder(name) / "metrics.jsonl"
        lines = [json.loads(text) for text in metrics.read_text().splitlines()]
        return {line["name"]: line["value"] for line in lines if line["unit"] != "text"}

    def has_stepped(self, name: str) -> bool:
        """Return whether a pretraining has logged its first step."""
        metrics = self.folder(name) / "metrics.jsonl"
        return metrics.exists() and '"step_time"' in metrics.read_text()

    def finished_pretraining(self, encoder: str) -> str:
        """Return the name of a finished short pretraining. It is run if no earlier part did so."""
        name = f"short_{encoder}"
        if not (self.folder(name) / "encoder.safetensors").exists():
            self.start(*self.short_pretraining(name, encoder)).finish()
        return name


def program_of(name: str) -> list[str]:
    """Return the words that start a command: its script beside this interpreter, or an entry point.

    A package in a folder on ``PYTHONPATH`` has no script there.
    """
    script = Path(sys.executable).with_name(name)
    if script.exists():
        return [str(script)]
    found = list(entry_points(group="console_scripts", name=name))
    if found:
        module, attribute = found[0].value.split(":")
        code = f"import sys; from {module} import {attribute} as f; sys.exit(f())"
        return [sys.executable, "-c", code]
    return [shutil.which(name) or name]


def _link_hippocampus(root: Path, num_cases: int) -> str | None:
    """Link the first scans of Hippocampus into the raw folder; None if ``nnUNet_raw`` lacks it."""
    source = Path(os.environ.get(RAW, "/nowhere")) / HIPPOCAMPUS
    images = sorted(source.glob("imagesTr/*.nii.gz"))[: num_cases + NUM_TEST]
    if len(images) < num_cases + NUM_TEST:
        return None

    target = root / RAW / HIPPOCAMPUS
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (target / folder).mkdir(parents=True)
    for image in images[:num_cases]:
        label = source / "labelsTr" / image.name.replace("_0000", "")
        (target / "imagesTr" / image.name).symlink_to(image)
        (target / "labelsTr" / label.name).symlink_to(label)
    for image in images[num_cases:]:
        (target / "imagesTs" / image.name).symlink_to(image)

    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": num_cases}))
    return HIPPOCAMPUS


def _write_phantoms(root: Path, num_cases: int) -> str:
    """Write generated scans of ``autoreg_demo``'s kind as a raw dataset."""
    target = root / RAW / PHANTOM
    for number in range(num_cases + NUM_TEST):
        scan, label = draw_phantom(0, number)
        kind = "Tr" if number < num_cases else "Ts"
        write_image(target / f"images{kind}" / f"phantom_{number:02d}_0000.nii.gz", scan)
        if kind == "Tr":
            write_image(target / "labelsTr" / f"phantom_{number:02d}.nii.gz", label)

    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": num_cases}
    (target / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    return PHANTOM


def pretrain(setting: Setting, encoder: str) -> Iterator[Line]:
    """Run a short pretraining.

    Measured are the seconds to its first step, and the longest time without output before that.
    """
    work = Workspace.opened(setting)
    name = f"short_{encoder}"
    started = work.start(*work.short_pretraining(name, encoder))

    silence = seen = 0
    spoke = started.began
    while started.process.poll() is None and not work.has_stepped(name):
        time.sleep(POLL_S)
        size = started.log.stat().st_size
        if size > seen:
            seen, spoke = size, time.monotonic()
        silence = max(silence, time.monotonic() - spoke)
    first = started.seconds()

    seconds = started.finish()
    last = work.last_values(name)
    plan = json.loads((work.folder(name) / "plan.json").read_text())
    names = ("train_error", "step_time", "data_wait", "peak_memory", "share_of_peak")
    shown = {key: last.get(key) for key in names}
    yield {
        "part": "pretrain",
        "encoder": encoder,
        "dataset": work.dataset,
        "steps": work.num_steps,
        "compile": plan["run"]["compile"],
        "first_step_s": round(first, 1),
        "longest_silence_s": round(silence, 1),
        "seconds": seconds,
        **shown,
        "limit_s": FIRST_STEP_WITHIN_S,
        "ok": first <= FIRST_STEP_WITHIN_S and math.isfinite(last["train_error"]),
    }


def stop(setting: Setting) -> Iterator[Line]:
    """Send SIGTERM to a pretraining before its first step; measure the time to its end."""
    work = Workspace.opened(setting)
    for encoder in (TRANSFORMER, CNN):
        name = f"stopped_early_{encoder}"
        started = work.start(*work.short_pretraining(name, encoder))
        while started.process.poll() is None and not (work.folder(name) / "plan.json").exists():
            time.sleep(POLL_S)
        # After it has written the plan, it preprocesses, tries a step and compiles.
        time.sleep(3)
        yield {
            "part": "stop",
            "encoder": encoder,
            "when": "before the first step",
            **_ended(started),
        }


def resume(setting: Setting) -> Iterator[Line]:
    """Stop a pretraining after its first checkpoint, and continue it.

    Its weights are compared with those of a pretraining that was not stopped.
    """
    from safetensors.torch import load_file

    work = Workspace.opened(setting)
    whole = work.finished_pretraining(TRANSFORMER)
    command = work.short_pretraining("stopped", TRANSFORMER)
    started = work.start(*command)
    first_checkpoint = work.folder("stopped") / "checkpoint_latest.pth"
    while started.process.poll() is None and not first_checkpoint.exists():
        time.sleep(POLL_S / 10)
    ended = _ended(started)
    yield {"part": "resume", "what": "stopped", **ended}

    seconds = work.start(*command).finish()
    expected = load_file(work.folder(whole) / "encoder.safetensors")
    found = load_file(work.folder("stopped") / "encoder.safetensors")
    error = max(relative(found[key], expected[key]) for key in expected)
    limit = 0.0 if setting.device.type == "cpu" else RESUMED_WITHIN
    yield {
        "part": "resume",
        "what": "resumed against not stopped",
        "seconds": seconds,
        "bit_equal": error == 0,
        "error": error,
        "limit": limit,
        "ok": error <= limit,
    }


def _ended(started: Started) -> Line:
    """Send SIGTERM; return how the command ended. A command that does not end is killed."""
    was_running = started.process.poll() is None
    asked = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    try:
        code = started.process.wait(6 * STOPS_WITHIN_S)
    except subprocess.TimeoutExpired:
        started.process.kill()
        code = started.process.wait()
    seconds = time.monotonic() - asked
    is_right = was_running and seconds <= STOPS_WITHIN_S and code == 130
    lines = started.log.read_text(errors="replace").splitlines()
    return {
        "was_running": was_running,
        "ended_after_s": round(seconds, 2),
        "limit_s": STOPS_WITHIN_S,
        "exit_code": code,
        "last_line": lines[-1] if lines else "",
        "ok": is_right,
    }


def finetune(setting: Setting) -> Iterator[Line]:
    """Plan, train for 20 iterations, and predict, from the weights of a short pretraining."""
    work = Workspace.opened(setting)
    name = work.finished_pretraining(TRANSFORMER)
    num_iterations = 2 if setting.is_small else 20
    yield from _finetuned(work, "finetune", name, 1, num_iterations)


def chain(setting: Setting) -> Iterator[Line]:
    """Pretrain as planned in a third of the part's time, and fine-tune for 200 iterations."""
    work = Workspace.opened(setting)
    hours = ["--hours", f"{setting.minutes / 3 / 60:.4f}"]
    length = ["--steps", "4", "--batch", "2"] if setting.is_small else hours
    seconds = work.start(*work.pretraining("chain", TRANSFORMER, *length)).finish()

    plan = json.loads((work.folder("chain") / "plan.json").read_text())
    last = work.last_values("chain")
    shown = (
        "heldout_error",
        "heldout_mean",
        "step_time",
        "data_wait",
        "tokens_per_second",
        "share_of_peak",
        "peak_memory",
    )
    yield {
        "part": "chain",
        "what": "pretraining",
        "dataset": work.dataset,
        "seconds": seconds,
        "steps": plan["optim"]["num_steps"],
        "dry_step_gib": plan["run"]["peak_memory_gib"],
        **{key: last.get(key) for key in shown},
    }
    epochs, iterations = (1, 2) if setting.is_small else (2, 100)
    yield from _finetuned(work, "chain", "chain", epochs, iterations)


def _finetuned(
    work: Workspace,
    part: str,
    name: str,
    num_epochs: int,
    num_iterations: int,
) -> Iterator[Line]:
    """Plan, train and predict with nnU-Net's own commands, from the weights of a pretraining."""
    variables = {"autoreg_weights": name, "nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2"}
    configuration = ["-c", "3d_fullres"]
    trainer = ["-tr", "AutoregPretrainedTrainer", "-p", "AutoregPlans"]
    trainer += ["-device", work.setting.device.type]

    planning = ["nnUNetv2_plan_and_preprocess", "-d", work.number, "-pl", "AutoregPlanner"]
    planning += [*configuration, "-np", "2", "-npfp", "2"]
    seconds = work.start(*planning, **variables).finish()
    yield {"part": part, "what": "planning", "seconds": seconds}

    plans_file = work.root / PREPROCESSED / work.dataset / "AutoregPlans.json"
    plans = json.loads(plans_file.read_text())
    length = {
        "num_epochs": num_epochs,
        "num_iterations_per_epoch": num_iterations,
        "num_val_iterations_per_epoch": 1,
    }
    plans["autoreg"]["recipe"].update(length)
    plans_file.write_text(json.dumps(plans))

    training = ["nnUNetv2_train", work.number, "3d_fullres", "0", *trainer]
    seconds = work.start(*training, **variables).finish()
    (summary,) = (work.root / RESULTS / work.dataset).glob("*/fold_0/validation/summary.json")
    dice = json.loads(summary.read_text())["foreground_mean"]["Dice"]
    yield {
        "part": part,
        "what": "fine-tuning",
        "seconds": seconds,
        "iterations": num_epochs * num_iterations,
        "validation_dice": None if math.isnan(dice) else round(dice, 3),
    }

    scans = work.root / RAW / work.dataset / "imagesTs"
    predicted = work.root / f"predicted_{part}"
    prediction = ["nnUNetv2_predict", "-d", work.number, "-i", str(scans), "-o", str(predicted)]
    prediction += ["-f", "0", *configuration, "-npp", "2", "-nps", "2", *trainer]
    seconds = work.start(*prediction, **variables).finish()
    num_predicted = len(list(predicted.glob("*.nii.gz")))
    line = {"part": part, "what": "prediction", "seconds": seconds, "scans": num_predicted}
    yield {**line, "ok": num_predicted == NUM_TEST}


def processes(setting: Setting) -> Iterator[Line]:
    """Compare the step of two GPUs and twice the batch with that of one GPU: 1 is perfect."""
    num_gpus = 0 if setting.is_small else torch.cuda.device_count()
    if num_gpus < 2:
        yield {"part": "processes", "left_out": f"{num_gpus} GPUs; two are needed"}
        return

    work = Workspace.opened(setting)
    seconds = {}
    for num in (1, 2):
        length = ["--steps", "100", "--batch", str(32 * num), "--num-gpus", str(num)]
        work.start(*work.pretraining(f"gpus{num}", "primus_b", *length)).finish()
        seconds[num] = work.last_values(f"gpus{num}")["step_time"]
    efficiency = seconds[1] / seconds[2]
    yield {
        "part": "processes",
        "step_s": seconds,
        "efficiency": round(efficiency, 3),
        "ok": efficiency >= 0.9,
    }
