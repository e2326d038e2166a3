"""Seconds and memory to index many scans by their headers, content hashing apart, against the
obvious ways.

The files are generated: half NIfTI, half MetaImage, whole headers with their own voxel sizes,
    voxels left as a hole in the file. They
are warm (read once before). Timed is all that the index does short of reading voxels: finding the
files, reading and checking the headers, hashing subjects, exclusions and manifest looked up, and
scans.csv written. Baselines: SimpleITK's ``ReadImageInformation`` over the same list of files in
one process, and in as many processes as ours. ``rest`` is what else grows with the
number of scans: telling copies by signatures (one shape, anatomically alike, one copy hidden), and
    taking up a journal of all scans.

    python benchmarks/index.py --num 100000
    python benchmarks/index.py --num 100000 --only ours rest

One JSON line goes to ``benchmarks/results/index.jsonl``. Every way runs in a separate process, so
that each has its own peak memory.
"""

import argparse
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "index.jsonl"
SHAPE_XYZ = (64, 64, 32)
PER_FOLDER = 100
WAYS = {"ours": "ours", "processes": "plain", "one_process": "plain", "rest": "rest"}


def nifti_header(spacing_mm: float) -> bytes:
    """A NIfTI-1 header of int16 voxels, identity orientation."""
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, *SHAPE_XYZ, 1, 1, 1, 1)
    struct.pack_into("<2h", head, 70, 4, 16)
    struct.pack_into("<8f", head, 76, 1, spacing_mm, spacing_mm, 2.5, 1, 1, 1, 1)
    struct.pack_into("<3f", head, 108, 352, 1, 0)
    struct.pack_into("<B", head, 123, 2)
    struct.pack_into("<2h", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, spacing_mm, 0, 0, 0, 0, spacing_mm, 0, 0, 0, 0, 2.5, 0)
    head[344:348] = b"n+1\0"
    return bytes(head)


def meta_header(spacing_mm: float) -> bytes:
    """A MetaImage header of int16 voxels."""
    x, y, z = SHAPE_XYZ
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = "
        "False\nCompressedData = False\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = {spacing_mm:.6f} "
        f"{spacing_mm:.6f} 2.5\n"
        f"DimSize = {x} {y} {z}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    ).encode()


def make_files(folder: Path, num: int) -> None:
    """Write ``num`` scans, named as BIDS does, 100 subjects to a folder."""
    num_bytes = 2 * SHAPE_XYZ[0] * SHAPE_XYZ[1] * SHAPE_XYZ[2]
    for n in range(num):
        spacing_mm = 0.5 + n / num
        if n % 2:
            head, ending = meta_header(spacing_mm), ".mha"
        else:
            head, ending = nifti_header(spacing_mm), ".nii"
        path = folder / f"site{n // PER_FOLDER:04d}" / f"sub-{n:06d}_T1w{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.write(head)
            handle.truncate(len(head) + num_bytes)


def files_of(folder: Path) -> list[str]:
    """Return every file below a folder."""
    files = []
    for parent, _, names in os.walk(folder):
        files += [os.path.join(parent, name) for name in names]  # noqa: PTH118
    return files


def read_information(path: str) -> tuple[Any, Any]:
    """Return size and voxel size by SimpleITK."""
    import SimpleITK

    reader: Any = SimpleITK.ImageFileReader()  # type: ignore[no-untyped-call]
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetSize(), reader.GetSpacing()


def ours(folder: Path, workers: int) -> dict[str, Any]:
    """Measure our index without its voxels; return the seconds of its steps."""
    from nnunet_autoreg.corpus.find import find_scans
    from nnunet_autoreg.corpus.index import first_row, read_headers, tasks_of
    from nnunet_autoreg.corpus.manifest import ManifestEntry
    from nnunet_autoreg.corpus.rows import read_index, write_index

    clock = [time.perf_counter()]
    candidates = find_scans([], [folder])
    clock.append(time.perf_counter())
    rows = [first_row(c, "", "salt", ManifestEntry()) for c in candidates]
    stamps = read_headers(rows, tasks_of(candidates, {}, None), workers)
    clock.append(time.perf_counter())
    write_index(folder.parent / "scans.csv", rows)
    clock.append(time.perf_counter())
    assert all(
        stamp and row.shape_vox == SHAPE_XYZ[::-1] for stamp, row in zip(stamps, rows, strict=True)
    )
    assert len(read_index(folder.parent / "scans.csv")) == len(rows)
    steps = [round(b - a, 2) for a, b in pairwise(clock)]
    names = ("find_s", "headers_s", "write_s")
    return {
        "num": len(rows),
        "seconds": round(clock[-1] - clock[0], 2),
        **dict(zip(names, steps, strict=True)),
    }


def plain(folder: Path, workers: int) -> dict[str, Any]:
    """Measure SimpleITK over all files, in this process or in ``workers``."""
    start = time.perf_counter()
    paths = files_of(folder)
    if workers == 1:
        found = [read_information(path) for path in paths]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = list(pool.map(read_information, paths, chunksize=64))
    assert all(tuple(size) == SHAPE_XYZ for size, _ in found)
    return {"num": len(found), "seconds": round(time.perf_counter() - start, 2)}


def rest(folder: Path, num: int) -> dict[str, Any]:
    """Copies among ``num`` scans, and a journal of as many; nothing is read from scans."""
    import numpy as np

    from nnunet_autoreg.corpus.content import NUM_POINTS, settle_copies
    from nnunet_autoreg.corpus.index import encoded
    from nnunet_autoreg.corpus.journal import Journal, ScanFacts, journal_key
    from nnunet_autoreg.corpus.rows import ScanRow

    rng = np.random.default_rng(0)
    points = (rng.normal(0, 3800, NUM_POINTS) + rng.normal(0, 1200, (num, NUM_POINTS))).astype(
        np.int16,
    )
    points[-1] = points[0] + 3
    size, spacing = (32, 64, 64), (2.5, 1.0, 1.0)
    rows = [
        ScanRow(
            f"p/{n}",
            "p",
            str(n),
            "",
            "MR",
            f"/p/{n}",
            size,
            spacing,
            size,
            f"{n:064d}",
            "ok",
            "",
        )
        for n in range(num)
    ]
    start = time.perf_counter()
    settled = settle_copies(rows, list(points))
    copies_s = time.perf_counter() - start
    assert [row.id for row in settled if row.status == "duplicate"] == [rows[-1].id]
    path = folder.parent / "journal.jsonl"
    with Journal(path) as journal:
        for n, row in enumerate(rows):
            found = (row.content_hash, (1.0, 2.0, 3.0, 4.0, 5.0), encoded(points[n], "<i2"))
            facts = ScanFacts("", "", "MR", "dataset.json", size, spacing, size, *found)
            journal.add(journal_key("stamp", n), facts)
    start = time.perf_counter()
    with Journal(path) as journal:
        assert len(journal.known) == num
    return {
        "num": num,
        "copies_s": round(copies_s, 2),
        "journal_read_s": round(time.perf_counter() - start, 2),
        "journal_mib": round(path.stat().st_size / 2**20),
    }


def measured(way: str, folder: Path, workers: int, num: int) -> dict[str, Any]:
    """Run one way in a fresh process; adds processor seconds and peak memory."""
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        "--folder",
        str(folder),
        "--workers",
        str(workers),
        "--num",
        str(num),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_way(way: str, folder: Path, workers: int, num: int) -> None:
    """What the fresh process does: one JSON line on stdout."""
    result = (
        rest(folder, num) if way == "rest" else {"ours": ours, "plain": plain}[way](folder, workers)
    )
    own, children = (
        resource.getrusage(resource.RUSAGE_SELF),
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    num_children = workers if workers > 1 and way != "rest" else 0
    result["cpu_s"] = round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1)
    result["peak_mib"] = round(own.ru_maxrss / 1024)
    result["peak_all_mib"] = round((own.ru_maxrss + num_children * children.ru_maxrss) / 1024)
    print(json.dumps(result))


def main() -> None:
    """Parse the command line, measure, print and append one line."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--num", type=int, default=100_000)
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument(
        "--only",
        nargs="+",
        choices=[*WAYS],
        default=[*WAYS],
        help="of the ways; default: all",
    )
    p.add_argument("--way", choices=["ours", "plain", "rest"], help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        run_way(args.way, args.folder, args.workers, args.num)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scans"
        make_files(folder, args.num if set(args.only) != {"rest"} else 0)
        for path in files_of(folder):
            with Path(path).open("rb") as handle:
                handle.read(4096)
        ways = {
            name: measured(
                WAYS[name],
                folder,
                1 if name == "one_process" else args.workers,
                args.num,
            )
            for name in args.only
        }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    line = {
        "what": "index of headers",
        "command": " ".join(["benchmarks/index.py", *sys.argv[1:]]),
        "num": args.num,
        "workers": args.workers,
        **ways,
        "cores": len(os.sched_getaffinity(0)),
        "load_1_min_at_end": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("simpleitk", "numpy")},
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
