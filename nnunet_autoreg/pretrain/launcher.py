"""The processes of one training: how they start, connect, work and end.

File 4 of 11 in reading order.

With ``--num-gpus`` the command only launches processes: torch.multiprocessing runs the same command
in each of them, and ends all if one fails. torchrun does the same on several machines. Every
process gets its rank from the environment. Process 0 prepares everything and trains (``run_main``);
the others wait and then train with it (``run_worker``).
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nnunet_autoreg.corpus.parallel import (
    allow_interruption,
    end_with_parent,
    interruption_held_back,
)
from nnunet_autoreg.errors import AutoregError, InterruptedRunError, LostProcessError, UsageError
from nnunet_autoreg.phases import phase
from nnunet_autoreg.planning.length import needs_timing
from nnunet_autoreg.stopping import (
    STOP_SIGNALS,
    deliver_last_line,
    keep_silent,
    last_line,
    report_stop,
    stop_requested,
    stops_passed_on,
)

if TYPE_CHECKING:
    from nnunet_autoreg.objective_kinds import SliceGroup
    from nnunet_autoreg.pretrain.distributed import World
    from nnunet_autoreg.pretrain.trainer import Trainer, TrainingJob
    from nnunet_autoreg.report.report import RunSetting
    from nnunet_autoreg.report.slices import Picture

log = logging.getLogger(__name__)

GO, FAILED = "autoreg/go", "autoreg/failed"
"""Keys of the store: the task of the workers, and the message of a worker that failed."""

OUR_LAUNCHER = "AUTOREG_LAUNCHER"
"""Environment variable of the processes that ``--num-gpus`` has started."""

TRAIN = b"train"
MEETING_TIMEOUT = timedelta(minutes=15)
LOOK_EVERY_S, WAIT_EVERY_S = 0.1, 1.0
LOST_PEER_GRACE_S = 5.0
"""How long a process that has lost another one waits to learn why, or to be ended."""

AGAIN = "the last checkpoint is kept: type the same line again to continue"


@dataclass(frozen=True)
class Launch:
    """Rank of this process, and number of processes. Only rank 0, the main process, reads and
    writes.

    Attributes:
        local_rank, local_size: among the processes of this machine.
        launcher: "torchrun" or "--num-gpus", which started all processes; "" if they are not
            started yet.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""


def launch_of(num_gpus: int | None, device: str, environ: Mapping[str, str]) -> Launch:
    """Return rank and size from ``--num-gpus`` or from the launcher's environment.

    Raises:
        UsageError: the two contradict each other, or there are too few GPUs.
    """
    if num_gpus is not None and num_gpus < 1:
        raise UsageError(f"--num-gpus {num_gpus}: must be at least 1", code="launch-num-gpus")

    is_launched = "RANK" in environ and "MASTER_ADDR" in environ
    size = int(environ.get("WORLD_SIZE", "1")) if is_launched else 1
    if size == 1:
        launch = Launch(size=num_gpus or 1, local_size=num_gpus or 1)
    elif num_gpus is not None and num_gpus != size:
        raise UsageError(
            f"--num-gpus {num_gpus}: torchrun has started {size} processes already, and these "
            "train; leave out --num-gpus",
            code="launch-torchrun",
        )
    else:
        rank = int(environ["RANK"])
        local_rank = int(environ.get("LOCAL_RANK", rank))
        local_size = int(environ.get("LOCAL_WORLD_SIZE", size))
        launcher = "--num-gpus" if OUR_LAUNCHER in environ else "torchrun"
        launch = Launch(rank, size, local_rank, local_size, launcher)

    if launch.size == 1:
        return launch
    import torch

    num_devices = torch.cuda.device_count()
    if device == "mps":
        raise UsageError(
            f"{launch.size} processes on --device mps: there is only one such device; leave out "
            "--num-gpus",
            code="launch-too-few-devices",
        )
    if device == "cuda" and launch.local_size > num_devices:
        raise UsageError(
            f"{launch.local_size} processes on this machine, which has {num_devices} GPUs: each "
            f"needs one; use --num-gpus {num_devices}",
            code="launch-too-few-devices",
        )
    return launch


def launch_processes(main: Callable[[], int], argv: Sequence[str], size: int) -> int:
    """Run a command in ``size`` processes of this machine, and return its exit code.

    This process only waits for them. If one fails, torch ends the others by SIGTERM, and after 30 s
    by SIGKILL. A stop is passed on to process 0, which decides for all. One line that says why
    everything ended is printed here, even if the reason arose in another process.

    Args:
        main: the command, which finds its arguments in ``sys.argv``.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.multiprocessing.spawn import (
        ProcessExitedException,
        ProcessRaisedException,
        start_processes,
    )

    # torch warns of every process that it ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {
        OUR_LAUNCHER: "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    lines: Any = multiprocessing.get_context("spawn").SimpleQueue()
    with interruption_held_back():
        # CUDA does not survive a fork.
        context = start_processes(  # type: ignore[no-untyped-call]
            begin_process,
            (environ, lines, main, list(argv)),
            size,
            join=False,
            start_method="spawn",
        )

    def stop_main_process() -> None:
        process = context.processes[0]
        if process.is_alive():
            process.terminate()

    with stops_passed_on(stop_main_process):
        try:
            # Each call returns when a process has ended.
            while not context.join():
                pass
            return 0
        except ProcessRaisedException as error:
            # A bug, which keeps its traceback.
            print(error, file=sys.stderr, flush=True)
            return 1
        except ProcessExitedException as error:
            rank, code = error.error_index, error.exit_code

    # After a stop, an error is only a consequence of it. Otherwise, what the main process says
    # counts less than why another one has ended.
    message = store.get(FAILED).decode() if store.check([FAILED]) else ""
    reason = "" if stop_requested() else exit_reason(rank, size, code, message)
    if reason:
        was_killed = context.processes[0].exitcode < 0
        end_of_bar = "\n" if was_killed else ""
        last_line(f"{end_of_bar}autoreg_pretrain: {reason}")
        return 1
    if not lines.empty():
        last_line(lines.get())
    elif stop_requested():
        report_stop()
    return InterruptedRunError.exit_code if stop_requested() else code


def begin_process(
    rank: int,
    environ: Mapping[str, str],
    lines: Any,
    main: Callable[[], int],
    argv: Sequence[str],
) -> None:
    """Run the command as one process of ``launch_processes``, and exit with its exit code."""
    end_with_parent()
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv[1:] = argv
    deliver_last_line(lines.put)
    try:
        allow_interruption()
        code = main()
    except KeyboardInterrupt:
        code = InterruptedRunError.exit_code

    # From here on, nothing is left that a signal has to end.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def exit_reason(rank: int, size: int, code: int, message: str = "") -> str:
    """Return why a process ended before the others; "" if the main process reports it itself.

    Args:
        code: its exit code; negative for a signal.
        message: error message of a worker that failed.
    """
    if not message:
        is_main_error = rank == 0 and code > 0
        if is_main_error or code == InterruptedRunError.exit_code:
            return ""
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", most likely for lack of memory"
        message = f"process {rank} of {size} ended {how}"
    return f"{message}; all processes were stopped, and {AGAIN}"


class Launcher:
    """Controls the workers of the main process: they wait, train with it, or end.

    It is a context manager. Inside, ``world`` begins and ends the common training.

    Args:
        device: cpu, cuda or mps, for all processes.
    """

    def __init__(self, launch: Launch | None = None, device: str = "cpu"):
        self.launch = launch or Launch()
        self.device = device
        self.store: Any = open_store(self.launch) if self.launch.size > 1 else None
        self.has_started = False

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The others wait for a word even if there is nothing to train.
        if self.store is not None and not self.has_started:
            self.store.set(GO, b"end 0" if kind is None else b"end 1")

    @contextmanager
    def world(self) -> Iterator[Any]:
        """Yield the ``World`` of the main process while all processes train.

        Raises:
            LostProcessError: another process died or failed.
        """
        from nnunet_autoreg.pretrain.distributed import (
            SINGLE_PROCESS,
            device_of,
            is_lost_peer,
            join,
            leave,
            share_cores,
        )

        if self.launch.size == 1:
            yield SINGLE_PROCESS
            return

        share_cores(self.launch.local_size)
        self.has_started = True
        self.store.set(GO, TRAIN)
        try:
            together = replace(SINGLE_PROCESS, size=self.launch.size)
            device = device_of(self.device, self.launch.local_rank, together)
            yield join(self.store, 0, self.launch.size, device)
            leave()
        except Exception as error:
            if is_lost_peer(error):
                raise LostProcessError(self.lost_message()) from error
            raise

    def lost_message(self) -> str:
        """Return the message for a lost connection to another process."""
        # The reason may become known a moment after the connection was lost. The launcher meanwhile
        # ends this process by SIGTERM, and the reason is still to be reported.
        deadline = time.monotonic() + LOST_PEER_GRACE_S
        with suppress(InterruptedRunError):
            while not self.store.check([FAILED]) and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S)
        if self.store.check([FAILED]):
            return exit_reason(0, self.launch.size, 1, self.store.get(FAILED).decode())
        who = "; torchrun says which" if self.launch.launcher == "torchrun" else ""
        return (
            f"one of {self.launch.size} processes has ended, or cannot be reached any more{who}; "
            f"{AGAIN}"
        )


def open_store(launch: Launch) -> Any:
    """Return the key-value store through which all processes connect."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    if launch.launcher == "torchrun":
        store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=MEETING_TIMEOUT))
        return store

    # The process that launched this one keeps it.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=MEETING_TIMEOUT)


def wait_and_train(launch: Launch, device: str) -> int:
    """Run a worker: wait until training begins, take part, and return the exit code.

    The main process may need hours to prepare. It reports failures of workers. After a failure a
    process with a GPU ends immediately, because the device may wait forever for a process that has
    ended.
    """
    keep_silent()
    store = open_store(launch)
    try:
        while not store.check([GO]):
            time.sleep(WAIT_EVERY_S)
        order = store.get(GO)
    except RuntimeError:
        # The process that keeps the store is gone.
        return 1
    if order != TRAIN:
        _, code = order.split()
        return int(code)

    from nnunet_autoreg.pretrain.distributed import (
        SINGLE_PROCESS,
        device_of,
        is_lost_peer,
        join,
        leave,
        share_cores,
    )

    # Ctrl-C reaches all processes; the main one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("nnunet_autoreg").setLevel(logging.ERROR)
    share_cores(launch.local_size)
    # tqdm's own lock is a semaphore of the system, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    try:
        together = replace(SINGLE_PROCESS, rank=launch.rank, size=launch.size)
        own_device = device_of(device, launch.local_rank, together)
        world = join(store, launch.rank, launch.size, own_device)
        run_worker(world, launch.local_rank)
        leave()
        return 0
    except InterruptedRunError:
        return InterruptedRunError.exit_code
    except Exception as error:
        if is_lost_peer(error):
            # The launcher should see first who is gone; it then ends this process.
            time.sleep(LOST_PEER_GRACE_S)
        else:
            if not isinstance(error, AutoregError):
                traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0] or type(error).__name__
            message = f"process {launch.rank} of {launch.size}: {first_line}"
            # The process that keeps the store may be gone.
            with suppress(RuntimeError):
                store.set(FAILED, message.encode())
        if device == "cuda":
            sys.stderr.flush()
            os._exit(1)
        return 1


def run_main(
    job: "TrainingJob",
    world: "World",
    local_rank: int,
    setting: "RunSetting",
) -> "Trainer":
    """Train as the main process, and write the report; return the trainer for the export.

    ``run_worker`` makes the same collective calls in the same order.

    Args:
        setting: where the run trains, for the report.
    """
    from nnunet_autoreg.pretrain.data import choose_loaders
    from nnunet_autoreg.pretrain.dry_run import plan_with_hours, time_steps
    from nnunet_autoreg.pretrain.trainer import build_trainer
    from nnunet_autoreg.report.report import Reporter

    is_timed = needs_timing(job.plan)
    world.share((job, is_timed))
    if is_timed:
        with phase("measuring how long a step takes"):
            seconds = time_steps(job, world, local_rank)
            plan = plan_with_hours(job.folder, job.plan, seconds, job.device)
            job = replace(job, plan=world.share(plan))

    if world.size > 1:
        batch_size = job.plan.optim.batch_size
        log.info(
            "%d processes train together, %d of %d crops in this one",
            world.size,
            batch_size // world.size,
            batch_size,
        )
    if job.device == "cuda":
        num_loaders, why = choose_loaders(job.plan, job.device, job.num_local)
        log.info("%d processes load for each GPU (%s)", num_loaders, why)

    with phase("building the network and the validation batches"):
        trainer = build_trainer(job, world, local_rank)
    draw = picture_function(trainer, setting)
    reporter = Reporter(job.folder, job.plan, setting)

    def report() -> None:
        # Of sharded weights all processes draw the pictures, also where the report needs none.
        pictures = draw() if trainer.is_sharded else None
        reporter.write(draw if pictures is None else lambda: pictures)

    trainer.after_checkpoint = report
    trainer.run()
    trainer.checkpoints.require_folder()
    with phase("drawing the report"):
        report()
    return trainer


def run_worker(world: "World", local_rank: int) -> None:
    """Train as a worker: compute a share of every batch, and hold a part of sharded weights."""
    from nnunet_autoreg.pretrain.dry_run import time_steps
    from nnunet_autoreg.pretrain.trainer import build_trainer

    received: tuple[TrainingJob, bool] | None = world.share(None)
    assert received is not None, "the main process sends the job"
    job, is_timed = received
    if is_timed:
        time_steps(job, world, local_rank)
        job = replace(job, plan=world.share(job.plan))

    trainer = build_trainer(job, world, local_rank)
    draw = picture_function(trainer)
    # Pictures and the export gather sharded weights, which takes all processes.
    if trainer.is_sharded:
        trainer.after_checkpoint = draw
    trainer.run()
    if trainer.is_sharded:
        draw()
        trainer.objective.transferable_state()
    world.wait()


def picture_function(
    trainer: "Trainer",
    setting: "RunSetting | None" = None,
) -> Callable[[], list["Picture | SliceGroup"]]:
    """Return a function that draws pictures of validation samples, or of their groups.

    If the weights are sharded, all processes have to call it.
    """
    from nnunet_autoreg.pretrain.distributed import gathered
    from nnunet_autoreg.report.galleries import galleries_of
    from nnunet_autoreg.report.slices import validation_pictures

    draw = partial(
        validation_pictures,
        trainer.objective,
        trainer.validation_batches,
        trainer.device,
        trainer.plan.data.spacing_mm,
        None if setting is None else setting.scan_axes,
    )

    def draw_gathered() -> list["Picture | SliceGroup"]:
        with gathered(trainer.train_step.loss_of):
            pictures: list[Picture | SliceGroup] = [*draw()]
            if not pictures:
                pictures += galleries_of(
                    trainer.objective,
                    trainer.validation_batches,
                    trainer.device,
                )
            return pictures

    return draw_gathered
