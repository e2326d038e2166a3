"""The store against nnU-Net's own way, on the same real scans, interleaved in one run.

crops: random crops per second and core, read from the store and through ``nnUNetDatasetBlosc2``,
    which holds the same arrays, written
with its own block sizes and filters for this crop. "ours": with arrays opened and chunks checked;
"ours, first touch": every round begins as a new process does, opening arrays and checking chunks;
"baseline": ``load_case`` and a crop of the images, as its loader does for every sample; "opened
once": a crop from an array of nnU-Net's that stays open, which its loader does not do.

preprocessing: the commands as typed, on one core: ``autoreg_pretrain ... --part 1/1`` and
    ``nnUNetv2_preprocess -np 1``, which preprocesses
the label maps as well; beside them "no labels", the same with the package's functions and
nnU-Net's, without label maps, scan by scan.

    python benchmarks/store.py crops --repeats 7
    python benchmarks/store.py preprocessing --repeats 3

One JSON line per set goes to ``benchmarks/results/store.jsonl``: medians of CPU seconds (own and of
ended children) and of wall seconds.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.geometry import Size, Spacing, as_size, volume
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.store import case as store_case
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.layout import blocks_touched, layout_of
from nnunet_autoreg.store.store import Store, _make_case, plan_task

RESULTS = Path(__file__).parent / "results" / "store.jsonl"
WINDOW = IntensityWindow(
    mean=40.0,
    std=100.0,
    median=35.0,
    min=-900.0,
    max=1500.0,
    percentile_00_5=-160.0,
    percentile_99_5=400.0,
)
# Name, dataset, number of cases, spacing, crop. At 1 mm the CT is resampled along z, as thick
# slices are in an isotropic plan.
CROP_SETS: tuple[tuple[str, str, int, Spacing, Size], ...] = (
    ("hippocampus", "Dataset004_Hippocampus", 48, (1.0, 1.0, 1.0), (40, 56, 40)),
    ("cardiac cine", "Dataset027_ACDC", 16, (10.0, 1.5, 1.5), (16, 128, 128)),
    ("sarcoma CT, native", "Dataset052_SarcomaCT", 12, (3.27, 0.98, 0.98), (48, 96, 96)),
    ("sarcoma CT at 1 mm", "Dataset052_SarcomaCT", 6, (1.0, 1.0, 1.0), (128, 128, 128)),
    ("sarcoma CT at 1 mm", "Dataset052_SarcomaCT", 6, (1.0, 1.0, 1.0), (64, 64, 64)),
    ("MS brains", "Dataset061_MSLesions", 8, (1.0, 1.0, 1.0), (128, 128, 128)),
    ("MS brains", "Dataset061_MSLesions", 8, (1.0, 1.0, 1.0), (64, 64, 64)),
)
PREPROCESSING_SETS = (
    ("4", "Dataset004_Hippocampus", 48),
    ("51", "Dataset051_SarcomaMR", 16),
    ("52", "Dataset052_SarcomaCT", 12),
)


def rows_of(dataset: str, num: int) -> list[ScanRow]:
    """Return the first usable scans of a dataset of nnUNet_raw."""
    candidates = [candidate for candidate in find_scans([dataset], []) if not candidate.status]
    index = index_scans(candidates[:num], set(), 1)
    return list(index.usable)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return CPU seconds of this process and of children that ended meanwhile, and wall seconds."""

    def cpu() -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + of_children.ru_utime + of_children.ru_stime

    start, start_cpu = time.perf_counter(), cpu()
    work()
    return cpu() - start_cpu, time.perf_counter() - start


def interleaved(
    ways: dict[str, Callable[[], object]],
    repeats: int,
    warm_up: bool,
) -> dict[str, dict[str, list[float]]]:
    """Measure every way once per round. Each round begins with another way.

    Args:
        warm_up: do one more round before, which is not counted.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in ways:
        seconds[name] = {"cpu_s": [], "wall_s": []}

    names = list(ways)
    for number in range(-int(warm_up), repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cpu_s, wall_s = timed(ways[name])
            if number >= 0:
                seconds[name]["cpu_s"].append(cpu_s)
                seconds[name]["wall_s"].append(wall_s)
    return seconds


def write_line(line: dict[str, Any], seconds: dict[str, dict[str, list[float]]], per: int) -> None:
    """Append and print a result; ``per`` is the number of crops or cases that a round handles."""
    medians: dict[str, dict[str, float]] = {}
    spread = {}
    cpu_of: dict[str, float] = {}
    for name, kinds in seconds.items():
        cpu_of[name] = statistics.median(kinds["cpu_s"]) / per
        wall_s = statistics.median(kinds["wall_s"]) / per
        medians[name] = {"cpu_s": round(cpu_of[name], 6), "wall_s": round(wall_s, 6)}
        fastest, slowest = min(kinds["cpu_s"]), max(kinds["cpu_s"])
        spread[name] = [round(fastest / per, 6), round(slowest / per, 6)]

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    line = {
        **line,
        "per_round": per,
        "median_s_each": medians,
        "cpu_s_each_min_max": spread,
        "ours_over_baseline_cpu": round(cpu_of["ours"] / cpu_of["baseline"], 3),
        "cores": os.cpu_count(),
        "shared_machine": True,
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nnunetv2", "blosc2", "numpy")},
        "command": " ".join(["python", "benchmarks/store.py", *sys.argv[1:]]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=1), flush=True)


def bench_crops(repeats: int, num_crops: int) -> None:
    """Measure crops per second and core, set by set."""
    for name, dataset, num, spacing, crop in CROP_SETS:
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(dataset, num)
            store = Store(Path(folder) / "ours")
            cases = [store.open(key) for key in store.ensure(rows, spacing, WINDOW, 1).values()]
            theirs = save_as_nnunet(Path(folder) / "theirs", cases, crop)
            draws = draw_crops(cases, crop, num_crops)
            seconds = interleaved(crop_ways(cases, theirs, draws), repeats, warm_up=True)
            voxels = sum(volume(size) for _, _, size in draws)
            touched = 0
            for n, start, size in draws:
                block, chunk = layout_of(cases[n].shape_vox)
                touched += blocks_touched(start, size, block, chunk) * volume(block)
            sizes = {}
            for format_name in ("ours", "theirs"):
                files = (Path(folder) / format_name).rglob("*.b2nd")
                images = [file for file in files if "_seg" not in file.name]
                sizes[format_name] = sum(file.stat().st_size for file in images)
            per_s = {}
            for way, kinds in seconds.items():
                per_s[way] = round(num_crops / statistics.median(kinds["cpu_s"]))
            write_line(
                {
                    "what": "crops",
                    "set": name,
                    "crop_vox": crop,
                    "num_cases": len(cases),
                    "repeats": repeats,
                    "seed": 0,
                    "crops_per_s_and_core": per_s,
                    "decompressed_over_crop": round(touched / voxels, 2),
                    "bytes_on_disk": sizes,
                },
                seconds,
                num_crops,
            )


def save_as_nnunet(folder: Path, cases: list[StoredCase], crop: Size) -> Any:
    """Write the same arrays in nnU-Net's format, with empty label maps.

    The layout is that of nnU-Net's preprocessor for this patch size.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder.mkdir()
    for n, case in enumerate(cases):
        data = case.read((0, 0, 0), case.shape_vox)
        blocks, chunks = comp_blosc2_params(data.shape, crop, data.itemsize)
        nnUNetDatasetBlosc2.save_case(
            data,
            np.zeros(data.shape, np.int8),
            {"spacing": case.spacing_mm},
            str(folder / str(n)),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks,
            blocks_seg=blocks,
        )
    return nnUNetDatasetBlosc2(str(folder), [str(n) for n in range(len(cases))])


def draw_crops(cases: list[StoredCase], crop: Size, num: int) -> list[tuple[int, Size, Size]]:
    """Draw (case, start, size) uniformly over cases and positions, clipped to the case."""
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(num):
        n = int(generator.integers(len(cases)))
        start, size = [], []
        for wanted, extent in zip(crop, cases[n].shape_vox, strict=True):
            side = min(wanted, extent)
            size.append(side)
            start.append(int(generator.integers(extent - side + 1)))
        draws.append((n, as_size(start), as_size(size)))
    return draws


def crop_ways(
    cases: list[StoredCase],
    theirs: Any,
    draws: list[tuple[int, Size, Size]],
) -> dict[str, Callable[[], object]]:
    """Return the readings to compare; they must give the same voxels."""
    opened = [theirs.load_case(str(n))[0] for n in range(len(cases))]

    def part(array: Any, start: Size, size: Size) -> Any:
        (z, y, x), (depth, height, width) = start, size
        return np.asarray(array[:, z : z + depth, y : y + height, x : x + width])

    def ours() -> None:
        for n, start, size in draws:
            cases[n].read(start, size)

    def ours_first() -> None:
        store_case._handles.clear()
        store_case._checked.clear()
        ours()

    def baseline() -> None:
        for n, start, size in draws:
            part(theirs.load_case(str(n))[0], start, size)

    def opened_once() -> None:
        for n, start, size in draws:
            part(opened[n], start, size)

    for n, start, size in draws[:20]:
        np.testing.assert_array_equal(cases[n].read(start, size), part(opened[n], start, size))
    return {
        "ours": ours,
        "ours, first touch": ours_first,
        "baseline": baseline,
        "baseline again": baseline,
        "opened once": opened_once,
    }


def bench_preprocessing(repeats: int, chosen: list[str]) -> None:
    """Measure the seconds per case of the commands, and of their functions, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for number, dataset, num in (entry for entry in PREPROCESSING_SETS if entry[0] in chosen):
        with tempfile.TemporaryDirectory() as folder:
            environment = link_subset(Path(folder), dataset, num)

            def run(*line: str, environment: dict[str, str] = environment) -> None:
                done = subprocess.run(
                    line,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr[-2000:]

            run("nnUNetv2_plan_and_preprocess", "-d", number, "--no_pp", "-npfp", "1")
            length = ("--steps", "1", "--batch", "1")
            ours = ("autoreg_pretrain", "-d", number, "--name", "x", *length, "--device", "cpu")
            run(*ours, "--dry-run")
            made = Path(environment["nnUNet_preprocessed"])

            def fresh_ours(
                run: Callable[..., None] = run,
                ours: tuple[str, ...] = ours,
                made: Path = made,
            ) -> None:
                for path in (made / "autoreg_store").glob("??"):
                    shutil.rmtree(path)
                run(*ours, "--part", "1/1")

            def baseline(run: Callable[..., None] = run, number: str = number) -> None:
                run("nnUNetv2_preprocess", "-d", number, "-c", "3d_fullres", "-np", "1")

            ways: dict[str, Callable[[], object]] = {
                "ours": fresh_ours,
                "baseline": baseline,
                "baseline again": baseline,
            }
            with_functions = function_ways(dataset, num, made, Path(folder))
            functions = interleaved(with_functions, repeats, warm_up=True)
            seconds = interleaved(ways, repeats, warm_up=False) | functions
            write_line(
                {"what": "preprocessing", "set": dataset, "repeats": repeats, "num_workers": 1},
                seconds,
                num,
            )


def link_subset(folder: Path, dataset: str, num: int) -> dict[str, str]:
    """Make nnU-Net's folders with links to the first cases of a raw dataset.

    Returns:
        the environment that names these folders.
    """
    source = Path(os.environ["nnUNet_raw"]) / dataset  # noqa: SIM112
    target = folder / "raw" / dataset
    (target / "imagesTr").mkdir(parents=True)
    (target / "labelsTr").mkdir()
    labels = sorted((source / "labelsTr").glob("*.nii.gz"))[:num]
    for label in labels:
        (target / "labelsTr" / label.name).symlink_to(label)
        for image in (source / "imagesTr").glob(label.name.replace(".nii.gz", "_????.nii.gz")):
            (target / "imagesTr" / image.name).symlink_to(image)
    description = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": len(labels)}))
    names = {
        "nnUNet_raw": "raw",
        "nnUNet_preprocessed": "preprocessed",
        "nnUNet_results": "results",
    }
    for name in names.values():
        (folder / name).mkdir(exist_ok=True)
    return {
        **os.environ,
        **{variable: str(folder / name) for variable, name in names.items()},
        "OMP_NUM_THREADS": "1",
    }


def function_ways(
    dataset: str,
    num: int,
    made: Path,
    folder: Path,
) -> dict[str, Callable[[], object]]:
    """Return our and nnU-Net's functions that preprocess and write scans, without label maps.

    They handle one scan after the other in this process.
    """
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(made / dataset / "nnUNetPlans.json"))
    configuration = plans.get_configuration("3d_fullres")
    description = json.loads((made / dataset / "dataset.json").read_text())
    rows = rows_of(dataset, num)
    spacing = tuple(float(s) for s in configuration.spacing)
    tasks = [plan_task(row, spacing, WINDOW) for row in rows]  # type: ignore[arg-type]

    def ours() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        for task in tasks:
            _make_case(folder / "store", task)

    def theirs() -> None:
        shutil.rmtree(folder / "functions", ignore_errors=True)
        (folder / "functions").mkdir()
        for n, row in enumerate(rows):
            data, _, properties = DefaultPreprocessor(verbose=False).run_case(
                [row.source],
                None,
                plans,
                configuration,
                description,
            )
            blocks, chunks = comp_blosc2_params(
                data.shape,
                tuple(configuration.patch_size),
                data.itemsize,
            )
            seg = np.zeros((1, 1, 1, 1), np.int8)
            nnUNetDatasetBlosc2.save_case(
                data,
                seg,
                properties,
                str(folder / "functions" / str(n)),
                chunks=chunks,
                blocks=blocks,
                chunks_seg=(1, 1, 1, 1),
                blocks_seg=(1, 1, 1, 1),
            )

    return {"ours, no labels": ours, "baseline, no labels": theirs}


def main() -> None:
    """Parse the command line and measure."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("what", choices=["crops", "preprocessing"])
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--crops", type=int, default=100, help="crops of a round")
    p.add_argument(
        "--datasets",
        nargs="+",
        default=[entry[0] for entry in PREPROCESSING_SETS],
        help="of preprocessing",
    )
    args = p.parse_args()
    if args.what == "crops":
        bench_crops(args.repeats, args.crops)
    else:
        bench_preprocessing(args.repeats, args.datasets)


if __name__ == "__main__":
    main()
