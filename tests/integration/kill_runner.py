"""Runs ``autoreg_pretrain`` lines in forks of one process that has imported everything, and kills
them at named points.

A point replaces one function of the package, or of torch, by one that ends the process with
SIGKILL; the package knows nothing of it. A request has argv, point, log and env. Pictures are left
out: they take most of the time.
"""

import importlib
import os
import sys
from pathlib import Path

from fork_server import kill, serve, take_over


def at_call(number, owner, name, act):
    """Have call ``number`` of a function go to ``act(original, *arguments)``."""
    original = getattr(owner, name)
    calls = []

    def replaced(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            return act(original, *arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, replaced)


def before(original, *arguments, **named):
    kill()


def after(original, *arguments, **named):
    original(*arguments, **named)
    kill()


# A disk holds half of a file if the machine loses power while it is written.
def half_saved(original, content, file):
    import io

    whole = io.BytesIO()
    original(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    kill()


def half_exported(original, tensors, path, **named):
    original(tensors, path, **named)
    Path(path).write_bytes(Path(path).read_bytes()[:999])
    kill()


def half_a_line(original, metrics, step, name, value, unit):
    with metrics.path.open("a") as handle:
        handle.write(f'{{"step": {step}, "na')
    kill()


def on_replace(target, act):
    """At the second renaming of a file onto one named ``target``."""
    original = Path.replace
    calls = []

    def replaced(path, onto):
        if Path(onto).name == target:
            calls.append(1)
            # The first renaming is that of the first checkpoint, before which there is nothing to
            # lose.
            if len(calls) == 2:
                return act(original, path, onto)
        return original(path, onto)

    Path.replace = replaced


def in_a_worker():
    """Kill a worker process of preprocessing: it arms itself when it imports this file."""
    if __name__ == "__mp_main__":
        from nnunet_autoreg.store import store

        at_call(1, store, "write_case", before)
    else:
        from nnunet_autoreg.pretrain import pipeline

        pipeline.num_processes = lambda: 2


def arm(point):
    """Replace what the point names."""
    import safetensors.torch
    import torch

    from nnunet_autoreg.corpus import index
    from nnunet_autoreg.model.card import EncoderCard
    from nnunet_autoreg.pretrain.validation import Validation
    from nnunet_autoreg.report.metrics import MetricsFile
    from nnunet_autoreg.store import store

    # The number is that of the call at which the line is killed: in the middle of the work.
    {
        "indexing": lambda: at_call(2, index, "load_scan", before),
        "preprocessing": lambda: at_call(2, store, "write_case", after),
        "in a worker": in_a_worker,
        "in the middle of a step": lambda: at_call(5, torch.optim.AdamW, "step", before),
        "validation": lambda: at_call(2, Validation, "_features", before),
        "while a checkpoint is written": lambda: at_call(3, torch, "save", half_saved),
        "between writing and renaming a checkpoint": lambda: on_replace(
            "checkpoint_latest.pth",
            before,
        ),
        "between the two renames of a checkpoint": lambda: on_replace(
            "checkpoint_previous.pth",
            after,
        ),
        "while writing metrics.jsonl": lambda: at_call(12, MetricsFile, "_append", half_a_line),
        "export": lambda: at_call(1, safetensors.torch, "save_file", half_exported),
        "after the export, before the finished mark": lambda: at_call(
            1,
            EncoderCard,
            "save",
            before,
        ),
    }[point]()


def leave_out_pictures():
    from nnunet_autoreg.pretrain import pipeline, trainer
    from nnunet_autoreg.report import report

    # Nothing that is killed depends on pictures.
    pipeline.draw_fingerprint = trainer.draw_progress = report.Reporter.write = lambda *_: None
    pipeline.num_processes = lambda: 1


def child(request):
    take_over(request)
    leave_out_pictures()
    if request["point"]:
        # Worker processes read the point from the environment.
        os.environ["KILL_POINT"] = request["point"]
        arm(request["point"])
    from nnunet_autoreg.cli.pretrain import main

    sys.argv = ["autoreg_pretrain", *request["argv"]]
    return main(request["argv"])


def import_all():
    """Import what a line needs, so that its fork has it."""
    names = ("pretrain.pipeline", "pretrain.dry_run", "report.report", "report.slices")
    ours = [f"nnunet_autoreg.{name}" for name in names]
    for module in (
        "dynamic_network_architectures.architectures.primus",
        "nnunetv2.preprocessing.preprocessors.default_preprocessor",
        "torch._dynamo",
        *ours,
    ):
        importlib.import_module(module)


if __name__ == "__main__":
    import_all()
    serve(child)
elif __name__ == "__mp_main__" and "KILL_POINT" in os.environ:
    arm(os.environ["KILL_POINT"])
