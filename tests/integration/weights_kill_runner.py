"""Run ``autoreg_weights`` lines in forks of one process, and kill them at named points.

A point replaces one function of the package, of Python or of a library by one that ends the process
with SIGKILL. A request has argv, point, log and env.
"""

import os
import sys
from pathlib import Path

from fork_server import kill, serve, take_over


def kill_at_rename(method, target, after=False):
    """Kill before or after a path is renamed to a name that ends in ``target``."""
    original = getattr(Path, method)

    def replaced(path, onto):
        if not Path(onto).name.endswith(target):
            return original(path, onto)
        if after:
            original(path, onto)
        kill()

    setattr(Path, method, replaced)


def kill_in_half_a_text(target):
    """Kill while the temporary file of ``target`` is written."""
    original = Path.write_text

    def replaced(path, text, **options):
        if target not in path.name:
            return original(path, text, **options)
        original(path, text[: len(text) // 2], **options)
        kill()

    Path.write_text = replaced


def kill_in_half_a_checkpoint():
    """Kill while the temporary file of the checkpoint is written."""
    original = Path.write_bytes

    def replaced(path, data):
        if "checkpoint_final.pth" not in path.name:
            return original(path, data)
        original(path, data[: len(data) // 2])
        kill()

    Path.write_bytes = replaced


def kill_in_half_the_tensors():
    import safetensors.torch

    original = safetensors.torch.save_file

    def replaced(tensors, file, **options):
        original(tensors, file, **options)
        os.truncate(file, Path(file).stat().st_size // 2)
        kill()

    safetensors.torch.save_file = replaced


# In the order in which a command reaches them: import of weights first, then export.

POINTS = {
    "while the tensors are written": kill_in_half_the_tensors,
    "before the tensors are renamed": lambda: kill_at_rename("replace", "encoder.safetensors"),
    "between tensors and card": lambda: kill_at_rename("replace", "encoder.safetensors", True),
    "while the card is written": lambda: kill_in_half_a_text("encoder.json"),
    "before the folder is renamed": lambda: kill_at_rename("rename", "imported"),
    "after the folder is renamed": lambda: kill_at_rename("rename", "imported", True),
    "while the plan is written": lambda: kill_in_half_a_text("adaptation_plan.json"),
    "after the plan": lambda: kill_at_rename("replace", "adaptation_plan.json", True),
    "while the checkpoint is written": kill_in_half_a_checkpoint,
    "before the checkpoint is renamed": lambda: kill_at_rename("replace", "checkpoint_final.pth"),
    "after the checkpoint": lambda: kill_at_rename("replace", "checkpoint_final.pth", True),
}


def child(request):
    take_over(request)
    if request["point"]:
        POINTS[request["point"]]()
    from nnunet_autoreg.cli.weights import main

    sys.argv = ["autoreg_weights", *request["argv"]]
    return main(request["argv"])


if __name__ == "__main__":
    # Imported once, before any fork.
    import nnunet_autoreg.convert.exporting
    import nnunet_autoreg.convert.importing  # noqa: F401

    serve(child)
