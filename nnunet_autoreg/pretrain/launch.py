"""Several processes for one training: started here (``--num-gpus``) or by torchrun, met, watched,
and ended together.
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
TRAIN = b"train"
MEETING_TIMEOUT = timedelta(minutes=15)
LOOK_EVERY_S, WAIT_EVERY_S = 0.5, 1.0
GRACE_S = 20.0
"""How long the main process may take to notice by itself that another one is gone, before it is
ended.
"""
AGAIN = "the last checkpoint is kept: type the same line again to go on"


@dataclass(frozen=True)
class Launch:
    """Where this process stands: rank 0 is the main one, which alone reads the inputs and writes.

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
    """What ``--num-gpus`` or torchrun's environment say.

    Raises:
        UsageError: they contradict each other, or there are not so many GPUs.
    """
    size = (
        int(environ.get("WORLD_SIZE", "1")) if "RANK" in environ and "MASTER_ADDR" in environ else 1
    )
    if size > 1:
        launch = Launch(
            int(environ["RANK"]),
            size,
            int(environ.get("LOCAL_RANK", environ["RANK"])),
            int(environ.get("LOCAL_WORLD_SIZE", size)),
            True,
        )
        if num_gpus is not None and num_gpus != size:
            raise UsageError(
                f"--num-gpus {num_gpus}: torchrun started {size} processes already, and they are "
                "what trains; leave "
                "--num-gpus away"
            )
    else:
        launch = Launch(size=num_gpus or 1, local_size=num_gpus or 1)
    if num_gpus is not None and num_gpus < 1:
        raise UsageError(f"--num-gpus {num_gpus}: must be at least 1")
    if launch.size > 1:
        _check_devices(launch, device)
    return launch


def _check_devices(launch: Launch, device: str) -> None:
    import torch

    if device == "mps":
        raise UsageError(
            f"{launch.size} processes on --device mps: there is one such device only; leave "
            "--num-gpus away"
        )
    if device == "cuda" and launch.local_size > torch.cuda.device_count():
        raise UsageError(
            f"{launch.local_size} processes on this machine, which has {torch.cuda.device_count()} "
            "GPUs: each needs one; "
            f"use --num-gpus {torch.cuda.device_count()}"
        )


class Crew:
    """The processes that train with the main one, as the main one sees them.

    A context; ``world`` begins and ends the common part.

    Args:
        device: cpu, cuda or mps, for all.
    """

    def __init__(self, launch: Launch | None = None, device: str = "cpu"):
        self.launch, self.device = launch or Launch(), device
        self.store: Any = open_store(self.launch) if self.launch.by_torchrun else None
        self.helpers: list[Any] = []
        self.begun = False

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.launch.by_torchrun and not self.begun:
            self.store.set(GO, b"end 0" if kind is None else b"end 1")

    @contextmanager
    def world(self) -> Iterator[Any]:
        """The ``World`` of the main process, from the moment that all are needed until all are
        done.

        Raises:
            AutoregError: another process died or failed.
        """
        from nnunet_autoreg.pretrain.distributed import ALONE, is_lost_peer, join, leave
        from nnunet_autoreg.pretrain.job import device_of, share_cores

        if self.launch.size == 1:
            yield ALONE
            return
        share_cores(self.launch.local_size)
        self._call()
        watch = Watch(self)
        try:
            place = replace(ALONE, size=self.launch.size)
            yield join(
                self.store,
                0,
                self.launch.size,
                device_of(self.device, self.launch.local_rank, place),
            )
            self._see_off()
            leave()
        except Exception as error:
            if is_lost_peer(error):
                raise LostProcessError(self.fate()) from error
            raise
        finally:
            watch.stop()
            self._end()

    def _call(self) -> None:
        """Start the others, or tell those that wait to begin."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.begun = True
        if self.launch.by_torchrun:
            self.store.set(GO, TRAIN)
            return
        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING_TIMEOUT
        )
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self.launch.size):
            place = replace(self.launch, rank=rank, local_rank=rank)
            self.helpers.append(
                context.Process(
                    target=begin_helper,
                    args=(place, self.device, self.store.port),
                    name=f"process {rank}",
                )
            )
            self.helpers[-1].start()

    def _see_off(self) -> None:
        for helper in self.helpers:
            helper.join(GRACE_S)

    def _end(self) -> None:
        """End what still runs: helpers that were interrupted too get a moment."""
        deadline = time.monotonic() + LOOK_EVERY_S
        for helper in self.helpers:
            helper.join(max(0.0, deadline - time.monotonic()))
            if helper.is_alive():
                helper.kill()
                helper.join()

    def cause(self, store: Any = None) -> str:
        """What became of a process that ended before its time; "" while none has.

        Args:
            store: to ask by, instead of the crew's own.
        """
        store = self.store if store is None else store
        if store.check([FAILED]):
            return f"{store.get(FAILED).decode()}; all processes were stopped, and {AGAIN}"
        codes = {
            helper.name: helper.exitcode
            for helper in self.helpers
            if helper.exitcode not in (None, 0, InterruptedRunError.exit_code)
        }
        for name, code in sorted(codes.items(), key=lambda item: item[1]):
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            want = ", most likely for want of memory" if code == -signal.SIGKILL else ""
            return (
                f"{name} of {self.launch.size} ended {how}{want}; all processes were stopped, and "
                f"{AGAIN}"
            )
        return ""

    def fate(self) -> str:
        """What to say when the connection to another process was lost."""
        deadline, told = time.monotonic() + 10 * LOOK_EVERY_S, ""
        with suppress(
            InterruptedRunError
        ):  # torchrun ends the others where one died; why it does is still to be said
            while not (told := self.cause()) and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S / 5)
        who = "; torchrun says which" if self.launch.by_torchrun else ""
        return (
            told
            or f"one of {self.launch.size} processes is gone, or cannot be reached any more{who}; "
            f"{AGAIN}"
        )


class Watch(threading.Thread):
    """Ends the main process with a line where another one is gone and the main one, waiting in a
    device's queue, would never notice.
    """

    def __init__(self, crew: Crew):
        super().__init__(daemon=True)
        self.crew, self.over = crew, threading.Event()
        # A connection of its own: a store lets nobody ask while somebody waits in it, as for a
        # process that died before it came.
        self.store = crew.store.clone() if hasattr(crew.store, "clone") else crew.store
        self.start()

    def run(self) -> None:
        """Look until told to stop."""
        told = ""
        while not self.over.wait(LOOK_EVERY_S) and not told:
            try:
                told = self.crew.cause(self.store)
            except (
                RuntimeError
            ):  # the store is gone with the one who kept it, which --num-gpus does itself
                told = f"the launcher is gone; {AGAIN}"
        if told and not self.over.wait(GRACE_S):
            print(f"autoreg_pretrain: {told}", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(self) -> None:
        """All is over, or the main process ends by itself."""
        self.over.set()


def open_store(launch: Launch) -> Any:
    """Where torchrun lets its processes meet."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=MEETING_TIMEOUT))
    return store


def begin_helper(launch: Launch, device: str, port: int) -> None:
    """What a process does that ``--num-gpus`` started."""
    warnings.filterwarnings(
        "ignore", message=r".*torch\.jit\.", category=FutureWarning
    )  # torchvision's own, at its import
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    end_with_parent()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=MEETING_TIMEOUT)
    sys.exit(help_to_train(launch, device, store))


def stand_by(launch: Launch, device: str) -> int:
    """What a process beside the main one does that torchrun started: wait, for hours if need be,
    until training begins, and take part.

    Returns:
        its exit code.
    """
    keep_silent()
    store = open_store(launch)
    try:
        while not store.check([GO]):
            time.sleep(WAIT_EVERY_S)
        told = store.get(GO)
    except RuntimeError:
        return 1
    if told != TRAIN:
        return int(told.split()[1])
    return help_to_train(launch, device, store)


def help_to_train(launch: Launch, device: str, store: Any) -> int:
    """Take part in the training that the main process leads; what fails here is told there.

    Returns the exit code.

    After a failure a process with a GPU ends at once: the device may wait for ever for a process
        that is gone.
    """
    from nnunet_autoreg.pretrain.distributed import ALONE, is_lost_peer, join, leave
    from nnunet_autoreg.pretrain.job import assist, device_of, share_cores

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("nnunet_autoreg").setLevel(logging.ERROR)
    share_cores(launch.local_size)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, which a killed process would leave behind
    try:
        place = replace(ALONE, rank=launch.rank, size=launch.size)
        world = join(store, launch.rank, launch.size, device_of(device, launch.local_rank, place))
        told: Any = world.share(None)
        assist(told[0], told[1], world, launch.local_rank)
        leave()
        return 0
    except InterruptedRunError:
        return InterruptedRunError.exit_code
    except Exception as error:
        if not is_lost_peer(error):
            if not isinstance(error, AutoregError):
                traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            with suppress(RuntimeError):  # the main process may be gone
                store.set(
                    FAILED,
                    f"process {launch.rank} of {launch.size}: "
                    f"{first_line or type(error).__name__}".encode(),
                )
        if device == "cuda":
            sys.stderr.flush()
            os._exit(1)
        return 1
