"""Send SIGTERM at random moments of one pretraining on large scans.

Measured are the seconds to exit, the exit code, the printed lines, and the processes and temporary
files that are left. The same line is typed again after every stop, so that stops fall into
indexing, checking, preprocessing and training. The stopped process is a fork of this process, which
has imported everything.

    python benchmarks/stops.py --stops 20 --finish

One JSON line goes to ``benchmarks/results/stops.jsonl``. The scans are real ones made large by
resampling, with some noise, so that they take as long to read as a real scan of this size. Their
voxel sizes differ, so that preprocessing resamples them. They are deleted afterwards.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK
from kills import RESULTS, SCANS, Home, about, import_everything

from nnunet_autoreg.records import TEMPORARY_FILES, append_json_line

AIM_S = 10.0


class StoppedHome(Home):
    """A run in a separate session, so that all processes that it starts can be found."""

    def stop_after(self, seconds: float, in_training: bool) -> dict[str, object] | None:
        """Type the line and stop it after a time; None if it ended before.

        With ``in_training`` the time counts from the first step that this line trains.
        """
        log = self.root / "log.txt"
        log.touch()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self._child()
        if in_training and self._wait_for_step(pid) is not None:
            return None
        if self._wait(pid, seconds) is not None:
            return None

        phase, before = self.phase(), len(log.read_bytes())
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        code = self._wait(pid, 300)
        took = time.monotonic() - began
        # Helpers of Python end by themselves a moment later.
        time.sleep(1)

        printed = log.read_bytes()[before:].decode(errors="replace")
        lines = printed.strip().splitlines()
        own = [line for line in lines if line.startswith("autoreg_pretrain: ")]
        line = own[-1] if own else ""
        return {
            "phase": activity(line, phase),
            "after_s": round(seconds, 1),
            "exit_s": round(took, 2),
            "code": code,
            "num_lines": len(own),
            "tracebacks": sum("Traceback" in line for line in lines),
            "processes_left": len(processes_of(pid)),
            "temporary_files": len(self.temporary_files()),
            "line": line,
        }

    def _wait_for_step(self, pid: int) -> int | None:
        """Wait until a step is trained. Return the exit code if the process ends before."""
        before = self._metrics()
        code = None
        while code is None and self._metrics() == before:
            code = self._wait(pid, 0.2)
        return code

    def _metrics(self) -> bytes:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes() if metrics.is_file() else b""

    def _wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit code, or None if the process runs for longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None

    def temporary_files(self) -> list[Path]:
        return [path for path in self.root.rglob(TEMPORARY_FILES) if path.is_file()]


def processes_of(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,sess=,stat="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    processes = []
    for row in listed.splitlines():
        pid, found_session, state = row.split()
        is_zombie = state.startswith("Z")
        if int(found_session) == session and not is_zombie:
            processes.append(int(pid))
    return processes


def write_scans(folder: Path, number: int, side: int, num_spacings: int) -> None:
    """Write real scans resampled to ``side``^3 voxels of 16 bits, as NIfTI and NRRD in turn.

    Preprocessing resamples them if there is more than one voxel size.
    """
    folder.mkdir(parents=True)
    for index, source in enumerate(sorted(SCANS.glob("*.nii.gz"))[:number]):
        small = SimpleITK.ReadImage(str(source), SimpleITK.sitkFloat32)
        field_mm = np.array(small.GetSize()) * small.GetSpacing()
        large = SimpleITK.Resample(
            small,
            [side] * 3,
            SimpleITK.Transform(),
            SimpleITK.sitkLinear,
            small.GetOrigin(),
            (field_mm / side).tolist(),
            small.GetDirection(),
        )

        # Without noise an interpolated scan would compress too well.
        array_ZYX = SimpleITK.GetArrayFromImage(large)
        array_ZYX *= 2000 / array_ZYX.max()
        noise = np.random.default_rng(index)
        array_ZYX += noise.standard_normal(array_ZYX.shape, dtype=np.float32) * 20

        image = SimpleITK.GetImageFromArray(array_ZYX.astype(np.int16))
        spacing_mm = 0.5 + 0.1 * (index % num_spacings)
        image.SetSpacing([spacing_mm] * 3)
        ending = "nii" if index % 2 else "nrrd"
        SimpleITK.WriteImage(image, str(folder / f"scan_{index}.{ending}"))


def activity(line: str, by_files: str) -> str:
    """Return the activity of a run from its last line, or from its files if there is no line."""
    found = re.search(r"while ([^,;:(]+)", line)
    return re.sub(r"\d+", "N", found[1]).strip() if found else by_files


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--stops", type=int, default=20)
    p.add_argument("--cases", type=int, default=6)
    p.add_argument("--side", type=int, default=500, help="voxels along each axis of a scan")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--latest", type=float, default=60, metavar="S", help="latest moment of a stop")
    p.add_argument(
        "--in-training",
        action="store_true",
        help="count the moments from the first step that a line trains",
    )
    p.add_argument("--finish", action="store_true", help="let the last run finish at the end")
    p.add_argument("--spacings", type=int, default=3, help="number of voxel sizes of the scans")
    p.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    p.add_argument("--folder", help="where the scans are written (default: a temporary folder)")
    return p


def main() -> None:
    """Stop runs until there are enough stops, and record them in one line."""
    args = parser().parse_args()
    import_everything()
    moments = random.Random(args.seed)
    stops: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        scans = Path(temporary) / "scans"
        write_scans(scans, args.cases, args.side, args.spacings)
        number = 0
        home = StoppedHome(Path(temporary) / "run 0", scans, args.steps)
        while len(stops) < args.stops:
            found = home.stop_after(moments.uniform(0, args.latest), args.in_training)
            if found is None:
                # The run finished before it was stopped, so that a new run begins.
                number += 1
                home = StoppedHome(Path(temporary) / f"run {number}", scans, args.steps)
                continue
            stops.append(found)
            print(json.dumps(found), flush=True)
        code = home.type_line(None) if args.finish else None
        left = len(home.temporary_files())

    seconds = sorted(float(str(stop["exit_s"])) for stop in stops)
    stops_by_phase: dict[str, list[float]] = {}
    for stop in stops:
        exit_s = float(str(stop["exit_s"]))
        stops_by_phase.setdefault(str(stop["phase"]), []).append(exit_s)
    record = {
        **about(args),
        "benchmark": "stops",
        "command": " ".join(["python", "benchmarks/stops.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, shared",
        "cases": f"{args.cases} real scans resampled to {args.side}^3 voxels of 16 bits",
        "load": round(os.getloadavg()[1], 1),
        "num_stops": len(stops),
        "stops_by_phase": {phase: sorted(values) for phase, values in stops_by_phase.items()},
        "stops_after_s": [stop["after_s"] for stop in stops],
        "exit_s": seconds,
        "median_s": seconds[len(seconds) // 2],
        "longest_s": seconds[-1],
        "num_within_aim": sum(value <= AIM_S for value in seconds),
        "num_code_130": sum(stop["code"] == 130 for stop in stops),
        "num_one_line": sum(stop["num_lines"] == 1 for stop in stops),
        "tracebacks": sum(int(str(stop["tracebacks"])) for stop in stops),
        "processes_left": sum(int(str(stop["processes_left"])) for stop in stops),
        "finished_with": code,
        "temporary_files_left": left,
    }
    append_json_line(RESULTS.with_name("stops.jsonl"), record)
    print(json.dumps(record, indent=2))
    is_in_time = seconds[-1] <= AIM_S
    is_good = record["num_code_130"] == len(stops) and is_in_time and not code and not left
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
