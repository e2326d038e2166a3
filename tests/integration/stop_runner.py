"""Runs ``autoreg_pretrain`` lines in forks of one process that has imported everything, with slow
work at a named point.

A point replaces one function by one that first makes a mark and then takes minutes; the package
knows nothing of it. A request has argv, point, way, mark, log and env.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

from fork_server import serve, take_over
from kill_runner import at_call, import_all, leave_out_pictures

# Far longer than a stop may take, so that a test cannot pass because the work is done.
LONG_S = 300.0


def mark():
    """Show the test that the slow work has begun."""
    Path(os.environ["STOP_MARK"]).touch()


def wait_in_python(*arguments, **named):
    mark()
    time.sleep(LONG_S)


def ignore_exceptions(*arguments, **named):
    """Work that continues after any exception, as code with a bare ``except`` does.

    One that follows later gets through.
    """
    mark()
    try:
        time.sleep(LONG_S)
    except BaseException:
        time.sleep(LONG_S)


def wait_in_c(*arguments, **named):
    """A call of compiled code that no signal interrupts: a lock that is taken twice."""
    mark()
    # 128 bytes are more than any system's pthread_mutex_t, and zeros are an unlocked one.
    lock = ctypes.create_string_buffer(128)
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)


def compile_slowly(*arguments, **named):
    """A compiler that wraps every exception raised inside it, as Dynamo does."""
    import torch

    def backend(graph, inputs):
        try:
            mark()
            time.sleep(LONG_S)
        except BaseException as error:
            raise RuntimeError("the compiler failed") from error

    torch.compile(lambda x: x * 2, backend=backend)(torch.ones(3))


WAYS = {
    "python": wait_in_python,
    "ignoring": ignore_exceptions,
    "c": wait_in_c,
    "compiler": compile_slowly,
}


def arm(point, way):
    """Replace what the point names."""
    import safetensors.torch
    import torch

    from nnunet_autoreg.corpus import index
    from nnunet_autoreg.pretrain import dry_run, pipeline
    from nnunet_autoreg.pretrain.validation import Validation
    from nnunet_autoreg.store import store

    # The call at which work becomes slow: of a kind that is called again and again, one in the
    # middle.
    owner, name, number = {
        "indexing": (index, "load_scan", 2),
        "planning": (pipeline, "check_initial_weights", 1),
        "preprocessing": (store, "load_scan", 1),
        "sampling pool": (pipeline, "make_sampling_pools", 1),
        "dry step": (dry_run, "dry_step", 1),
        "compilation": (dry_run, "dry_step", 1),
        "training": (torch.optim.AdamW, "step", 7),
        "validation": (Validation, "_features", 2),
        "export": (safetensors.torch, "save_file", 1),
    }[point]
    if way == "workers":
        # Both the main process and its workers come here; the work is done in the workers.
        pipeline.num_processes = lambda: 2
        way = "c"
    at_call(number, owner, name, WAYS[way])


def child(request):
    # A separate session, so that the test finds every process of the line.
    os.setsid()
    os.environ["STOP_MARK"] = request["mark"]
    take_over(request)
    leave_out_pictures()
    if request["point"]:
        os.environ["STOP_AT"], os.environ["STOP_WAY"] = request["point"], request["way"]
        arm(request["point"], request["way"])
    from nnunet_autoreg.cli.pretrain import main

    # As the installed command calls it.
    sys.argv = ["autoreg_pretrain", *request["argv"]]
    return main()


if __name__ == "__main__":
    import_all()
    serve(child)
elif __name__ == "__mp_main__" and "STOP_AT" in os.environ:
    arm(os.environ["STOP_AT"], os.environ["STOP_WAY"])
