"""The launcher of several processes for one training: start, meet, monitor and end them together.

The workers are started here (``--num-gpus``), or exist already because torchrun started them.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from nnunet_autoreg.corpus.parallel import end_with_parent
from nnunet_autoreg.errors import AutoregError, InterruptedRunError, LostProcessError, UsageError
from nnunet_autoreg.stopping import keep_silent

GO, FAILED = "autoreg/go", "autoreg/failed"
"""Keys of the store: what the workers shall do, and the message of a worker that failed."""

TRAIN = b"train"
MEETING_TIMEOUT = timedelta(minutes=15)
LOOK_EVERY_S, WAIT_EVERY_S = 0.5, 1.0
GRACE_S = 20.0
"""How long the main process may take to notice by itself that another one is gone, before it is
ended."""

AGAIN = "the last checkpoint is kept: type the same line again to go on"


@dataclass(frozen=True)
class Launch:
    """This process among all. Rank 0 is the main process, which alone reads inputs and writes.

    Attributes:
        local_rank, local_size: among the processes of this machine.
        by_torchrun: the others exist already, started by torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    by_torchrun: bool = False


def launch_of(num_gpus: int | None, device: str, environ: Mapping[str, str]) -> Launch:
    """Return this process's place by ``--num-gpus`` or by torchrun's environment.

    Raises:
        UsageError: the two contradict each other, or there are not so many GPUs.
    """
    if num_gpus is not None and num_gpus < 1:
        raise UsageError(f"--num-gpus {num_gpus}: must be at least 1", code="launch-num-gpus")

    is_torchrun = "RANK" in environ and "MASTER_ADDR" in environ
    size = int(environ.get("WORLD_SIZE", "1")) if is_torchrun else 1
    if size == 1:
        launch = Launch(size=num_gpus or 1, local_size=num_gpus or 1)
    elif num_gpus is not None and num_gpus != size:
        raise UsageError(
            f"--num-gpus {num_gpus}: torchrun has started {size} processes already, and they are "
            "what trains; leave out --num-gpus",
            code="launch-torchrun",
        )
    else:
        rank = int(environ["RANK"])
        local_rank = int(environ.get("LOCAL_RANK", rank))
        local_size = int(environ.get("LOCAL_WORLD_SIZE", size))
        launch = Launch(rank, size, local_rank, local_size, by_torchrun=True)

    if launch.size > 1:
        _check_devices(launch, device)
    return launch


def _check_devices(launch: Launch, device: str) -> None:
    import torch

    if device == "mps":
        raise UsageError(
            f"{launch.size} processes on --device mps: there is only one such device; leave out "
            "--num-gpus",
            code="launch-too-few-devices",
        )
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and launch.local_size > num_gpus:
        raise UsageError(
            f"{launch.local_size} processes on this machine, which has {num_gpus} GPUs: each needs "
            f"one; use --num-gpus {num_gpus}",
            code="launch-too-few-devices",
        )


class Launcher:
    """Starts, monitors and ends the workers that train with the main process.

    It is a context; inside it, ``world`` begins and ends the common training.

    Args:
        device: cpu, cuda or mps, for all processes.
    """

    def __init__(self, launch: Launch | None = None, device: str = "cpu"):
        self.launch = launch or Launch()
        self.device = device
        self.store: Any = open_store(self.launch) if self.launch.by_torchrun else None
        self.workers: list[Any] = []
        self.has_started = False

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # torchrun's workers wait for a word even if there is nothing to train.
        if self.launch.by_torchrun and not self.has_started:
            self.store.set(GO, b"end 0" if kind is None else b"end 1")

    @contextmanager
    def world(self) -> Iterator[Any]:
        """Yield the ``World`` of the main process while all processes train.

        Raises:
            AutoregError: another process died or failed.
        """
        from nnunet_autoreg.pretrain.distributed import (
            ALONE,
            device_of,
            is_lost_peer,
            join,
            leave,
            share_cores,
        )

        if self.launch.size == 1:
            yield ALONE
            return

        share_cores(self.launch.local_size)
        self._start_workers()
        monitor = WorkerMonitor(self)
        try:
            together = replace(ALONE, size=self.launch.size)
            device = device_of(self.device, self.launch.local_rank, together)
            yield join(self.store, 0, self.launch.size, device)
            self._join_workers()
            leave()
        except Exception as error:
            if is_lost_peer(error):
                raise LostProcessError(self.lost_message()) from error
            raise
        finally:
            monitor.stop()
            self._end_workers()

    def _start_workers(self) -> None:
        """Start the workers, or have torchrun's workers begin."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.has_started = True
        if self.launch.by_torchrun:
            self.store.set(GO, TRAIN)
            return

        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING_TIMEOUT
        )
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self.launch.size):
            launch = replace(self.launch, rank=rank, local_rank=rank)
            worker = context.Process(
                target=begin_worker,
                args=(launch, self.device, self.store.port),
                name=f"process {rank}",
            )
            self.workers.append(worker)
            worker.start()

    def _join_workers(self) -> None:
        for worker in self.workers:
            worker.join(GRACE_S)

    def _end_workers(self) -> None:
        """End what still runs; workers that were interrupted too get a moment."""
        deadline = time.monotonic() + LOOK_EVERY_S
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()

    def exit_reason(self, store: Any = None) -> str:
        """Return why a worker ended before its time; "" while none has.

        Args:
            store: to ask through, instead of the launcher's own connection.
        """
        store = self.store if store is None else store
        if store.check([FAILED]):
            return f"{store.get(FAILED).decode()}; all processes were stopped, and {AGAIN}"

        expected = (None, 0, InterruptedRunError.exit_code)
        codes = {worker.name: worker.exitcode for worker in self.workers}
        unexpected = {name: code for name, code in codes.items() if code not in expected}
        if not unexpected:
            return ""

        # Signals are negative: a worker that was killed counts before those that failed for it.
        name = min(unexpected, key=lambda name: unexpected[name])
        code = unexpected[name]
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            how += ", most likely for lack of memory"
        return f"{name} of {self.launch.size} ended {how}; all processes were stopped, and {AGAIN}"

    def lost_message(self) -> str:
        """Return the message for a lost connection to another process."""
        # The reason may become known a moment after the connection was lost. torchrun meanwhile
        # ends this process by SIGTERM, and the reason is still to be reported.
        reason = ""
        deadline = time.monotonic() + 10 * LOOK_EVERY_S
        with suppress(InterruptedRunError):
            reason = self.exit_reason()
            while not reason and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S / 5)
                reason = self.exit_reason()
        if reason:
            return reason
        who = "; torchrun says which" if self.launch.by_torchrun else ""
        return (
            f"one of {self.launch.size} processes is gone, or cannot be reached any more{who}; "
            f"{AGAIN}"
        )


class WorkerMonitor(threading.Thread):
    """Ends the main process with one line where a worker is gone and the main one cannot notice.

    It cannot notice while it waits in a device's queue.
    """

    def __init__(self, launcher: Launcher):
        super().__init__(daemon=True)
        self.launcher = launcher
        self.over = threading.Event()
        # A connection of its own: a store answers nobody while somebody waits in it, as for a
        # process that died before it came.
        store = launcher.store
        self.store = store.clone() if hasattr(store, "clone") else store
        self.start()

    def run(self) -> None:
        """Look for an exit reason until ``stop`` is called."""
        reason = ""
        while not self.over.wait(LOOK_EVERY_S) and not reason:
            try:
                reason = self.launcher.exit_reason(self.store)
            except RuntimeError:
                # The store has ended with the process that kept it.
                reason = f"the launcher is gone; {AGAIN}"
        if reason and not self.over.wait(GRACE_S):
            print(f"autoreg_pretrain: {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(self) -> None:
        """Stop looking, because the training is over or the main process ends by itself."""
        self.over.set()


def open_store(launch: Launch) -> Any:
    """Return the store at which torchrun's processes meet."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=MEETING_TIMEOUT))
    return store


def begin_worker(launch: Launch, device: str, port: int) -> None:
    """Run a worker that ``--num-gpus`` has started, and exit with its exit code."""
    # torchvision warns at its import of what it does itself.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    end_with_parent()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=MEETING_TIMEOUT)
    sys.exit(train_as_worker(launch, device, store))


def wait_and_train(launch: Launch, device: str) -> int:
    """Run a worker that torchrun has started: wait until training begins, and take part.

    The main process may take hours to make everything ready.

    Returns:
        the exit code.
    """
    keep_silent()
    store = open_store(launch)
    try:
        while not store.check([GO]):
            time.sleep(WAIT_EVERY_S)
        order = store.get(GO)
    except RuntimeError:
        return 1
    if order != TRAIN:
        _, code = order.split()
        return int(code)
    return train_as_worker(launch, device, store)


def train_as_worker(launch: Launch, device: str, store: Any) -> int:
    """Take part in the training that the main process leads, and return the exit code.

    The main process reports what fails here. After a failure a process with a GPU ends at once,
    because the device may wait for ever for a process that is gone.
    """
    from nnunet_autoreg.pretrain.distributed import (
        ALONE,
        device_of,
        is_lost_peer,
        join,
        leave,
        share_cores,
    )
    from nnunet_autoreg.pretrain.training_job import run_worker

    # Ctrl-C reaches all processes; the main one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("nnunet_autoreg").setLevel(logging.ERROR)
    share_cores(launch.local_size)
    # tqdm's own lock is a semaphore of the system, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())

    try:
        together = replace(ALONE, rank=launch.rank, size=launch.size)
        own_device = device_of(device, launch.local_rank, together)
        world = join(store, launch.rank, launch.size, own_device)
        run_worker(world, launch.local_rank)
        leave()
        return 0
    except InterruptedRunError:
        return InterruptedRunError.exit_code
    except Exception as error:
        if not is_lost_peer(error):
            if not isinstance(error, AutoregError):
                traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0] or type(error).__name__
            message = f"process {launch.rank} of {launch.size}: {first_line}"
            # The main process, which keeps the store, may be gone.
            with suppress(RuntimeError):
                store.set(FAILED, message.encode())
        if device == "cuda":
            sys.stderr.flush()
            os._exit(1)
        return 1
