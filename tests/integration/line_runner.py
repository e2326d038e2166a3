"""Runs whole command lines, ours and nnU-Net's, in forks of one process that has imported what
they need.

A request has line, log and env. A command is found by its name as the installed program is: by its
entry point. nnU-Net reads its folders when it is imported, so this process gets them.
"""

import importlib
import sys
from importlib.metadata import entry_points

from fork_server import serve, take_over

# What takes seconds to import, and is the same for all lines.
MODULES = (
    "dynamic_network_architectures.architectures.primus",
    "matplotlib.figure",
    "nnunet_autoreg.pretrain.dry_run",
    "nnunet_autoreg.pretrain.pipeline",
    "nnunet_autoreg.report.report",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.run.run_training",
    "torch._dynamo",
)


def child(request):
    take_over(request)
    name, *arguments = request["line"]
    (entry,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, *arguments]
    # As the program in the folder bin does.
    main = entry.load()
    try:
        return main() or 0
    except SystemExit as end:
        return end.code or 0


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    serve(child)
