"""Reading any file gives a valid result or one line with a code, with any content.

A few damaged and hostile inputs per format are tried here; ``benchmarks/fuzz.py`` tries thousands.
"""

import copy
import functools
import io
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import csv_bytes, damaged, few, json_bytes, values, watching
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_detector import make_plans
from traps import Trap

from nnunet_autoreg.benchmark.results import read_results
from nnunet_autoreg.benchmark.split import find_patients, read_subjects
from nnunet_autoreg.checkpoint import LATEST_NAME, load_newest, save_checkpoint
from nnunet_autoreg.classification.table import public_table, read_table
from nnunet_autoreg.cli.weights import main as weights_main
from nnunet_autoreg.convert.choices import HUGGINGFACE_FORM
from nnunet_autoreg.convert.exporting import export_weights
from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.inspecting import inspect_weights
from nnunet_autoreg.convert.source import CONFIG_NAME, MODEL_NAME, OWN_KEY
from nnunet_autoreg.corpus.dataset_json import read_dataset_json
from nnunet_autoreg.corpus.exclude import read_exclude
from nnunet_autoreg.corpus.journal import Journal
from nnunet_autoreg.corpus.locations import read_boxes, values_of_structures
from nnunet_autoreg.corpus.manifest import read_manifest
from nnunet_autoreg.corpus.private import PATH_FIELDS, PRIVATE_NAME, hide_paths, write_private
from nnunet_autoreg.corpus.rows import OK, ScanRow, read_index, write_index
from nnunet_autoreg.detection import data as detection_data
from nnunet_autoreg.detection.folders import read_classes
from nnunet_autoreg.detection.geometry import frame_of_affine
from nnunet_autoreg.detection.instances import (
    ObjectClass,
    Rules,
    labels_of_instances,
    read_true_boxes,
)
from nnunet_autoreg.detection.nndetection import _read_task
from nnunet_autoreg.detection.objects import write_box_labels
from nnunet_autoreg.detection.plan import read_plan as read_detection_plan
from nnunet_autoreg.detection.scanfile import Detection, make_scan_file, read_scan_file
from nnunet_autoreg.finetune.block import read_block
from nnunet_autoreg.finetune.load import read_tensors
from nnunet_autoreg.finetune.plans import check_plans_name, kept_configurations
from nnunet_autoreg.finetune.resolve import DatasetTraits, objection
from nnunet_autoreg.model.card import CARD_NAME, RUNS_FOLDER, WEIGHTS_NAME, read_card
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.request import Request, matching_plan, read_plan
from nnunet_autoreg.records import read_object, sha256_of, to_jsonable
from nnunet_autoreg.report.metrics import read_lines

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TRAITS = DatasetTraits("Dataset001_X", ("T1",), (1.0, 1.0, 1.0))

Read = Callable[[Path], object]


def fuzz(
    name: str,
    file: Path,
    contents: st.SearchStrategy[bytes],
    read: Read,
    folder: Path,
) -> None:
    """Write every content to ``file`` and read it under the watch."""
    with watching(name, folder) as watch:

        @few
        @given(contents)
        def one(content: bytes) -> None:
            file.write_bytes(content)
            watch.try_out(lambda: read(file))

        one()


def row(number: int) -> ScanRow:
    return ScanRow(
        id=f"{number:08x}",
        dataset="Dataset001_X",
        case=f"case_{number}",
        channel="T1",
        modality="MR",
        source=f"/data/imagesTr/case_{number}_0000.nii.gz",
        shape_vox=(20, 30, 40),
        spacing_mm=(1.0, 1.0, 2.5),
        cropped_shape_vox=(20, 28, 40),
        content_hash="ab" * 16,
        status=OK,
        reason="",
        percentiles=(0.0, 1.5, 100.0),
        name=f"Dataset001_X/case_{number}",
    )


def table_of(file: Path) -> list[list[str]]:
    return [line.split(",") for line in file.read_text().splitlines()]


def check_rows(rows: tuple[ScanRow, ...]) -> None:
    """Check that usable rows have sizes that planning can compute with."""
    for one in rows:
        sizes = (one.shape_vox, one.spacing_mm, one.cropped_shape_vox)
        if one.status == OK:
            assert all(sizes), one
        for size in sizes:
            # Scans that could not be read have no sizes.
            assert all(0 < value < math.inf for value in size or ()), one
        assert all(map(math.isfinite, one.percentiles)), one


@pytest.fixture
def index(tmp_path: Path) -> Path:
    file = tmp_path / "run" / "scans.csv"
    file.parent.mkdir()
    write_index(file, [row(1), row(2), row(3)])
    return file


def test_any_index_of_scans_is_read_or_refused(index: Path, tmp_path: Path) -> None:
    def read(file: Path) -> None:
        check_rows(read_index(file, is_private=False))
        check_rows(read_index(file))

    fuzz("scans.csv", index, csv_bytes(table_of(index)), read, tmp_path)


def test_any_private_file_is_read_or_refused(index: Path, tmp_path: Path) -> None:
    private = index.with_name(PRIVATE_NAME)

    fuzz(
        PRIVATE_NAME,
        private,
        csv_bytes(table_of(private)),
        lambda _file: check_rows(read_index(index)),
        tmp_path,
    )


def test_any_manifest_is_read_or_refused(tmp_path: Path) -> None:
    lines = [
        ["path", "subject", "session", "contrast", "class", "modality"],
        ["a", "p1", "s1", "T1w", "tumour", "MR"],
        ["b.nii.gz", "p2", "", "", "", "CT"],
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "b.nii.gz").touch()

    fuzz("manifest", tmp_path / "m.csv", csv_bytes(lines), read_manifest, tmp_path)


def test_any_table_of_classes_is_read_or_refused(tmp_path: Path) -> None:
    # Two values that a spreadsheet would change: a formula, and one that is quoted already.
    lines = [["case", "patient", "grade", "kind"], ["a", "p1", "1", "=x"], ["b", "p2", "2", "'y"]]
    lines += [["c", "p3", "1", "=x"], ["d", "p4", "2", "'y"]]
    copy_file = tmp_path / "copy.csv"

    def read(file: Path) -> None:
        table = read_table(file, {}, ["a", "b", "c", "d"])
        # The copy that a training keeps says the same, and no spreadsheet takes it for formulas.
        copy_file.write_text(public_table(table), encoding="utf-8")
        kept = read_table(copy_file, {}, ["a", "b", "c", "d"])
        assert (kept.tasks, kept.labels) == (table.tasks, table.labels)
        assert ",=" not in copy_file.read_text(encoding="utf-8")

    fuzz("classesTr.csv", tmp_path / "classesTr.csv", csv_bytes(lines), read, tmp_path)


@pytest.mark.parametrize("ending", ["json", "txt"])
def test_any_splits_file_is_read_or_refused(ending: str, tmp_path: Path) -> None:
    splits = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]

    fuzz("splits", tmp_path / f"s.{ending}", json_bytes(splits), read_exclude, tmp_path)


def test_any_table_of_patients_is_read_or_refused(tmp_path: Path) -> None:
    lines = [["case", "subject", "sex"], ["a_1", "p1", "f"], ["a_2", "p1", "f"], ["b", "p2", "m"]]

    def read(file: Path) -> None:
        # Without a usable table every case counts as a patient; a table that the user names must be
        # usable.
        found = find_patients(tmp_path, ["a_1", "a_2", "b"])
        assert set(found.patient_of) == {"a_1", "a_2", "b"}
        read_subjects(file, ["a_1", "a_2", "b"])

    fuzz("cases.csv", tmp_path / "cases.csv", csv_bytes(lines), read, tmp_path)


def test_any_table_of_boxes_is_read_or_refused(tmp_path: Path) -> None:
    lines = [
        ["scan", "class", "zmin", "ymin", "xmin", "zmax", "ymax", "xmax"],
        ["a", "tumour", "1", "2", "3", "4", "5", "6"],
        ["b", "cyst", "0", "0.5", "0", "4", "5", "6"],
    ]

    def read(file: Path) -> None:
        for box in read_boxes(file):
            assert all(map(math.isfinite, (*box.low, *box.high))), box

    fuzz("boxes.csv", tmp_path / "boxes.csv", csv_bytes(lines), read, tmp_path)


DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT", "1": "T1"},
    "labels": {"background": 0, "liver": [1, 2], "tumour": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "licence": "CC BY 4.0",
    "dataset": {"a": {"images": ["$X/a_0000.nii.gz", "b"], "label": "labelsTr/a.nii.gz"}},
    "autoreg_detection": {"detect_labels": ["tumour"], "min_voxels": 3},
}


def test_any_dataset_json_is_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_X"
    for name in ("imagesTr", "boxesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)

    def read(_file: Path) -> None:
        described = read_dataset_json(folder)
        assert all(isinstance(name, str) for name in described.channels)
        for found in values_of_structures(folder).values():
            # Label maps are read as int64.
            assert all(-(2**63) <= value < 2**63 for value in found)

    fuzz("dataset.json", folder / "dataset.json", json_bytes(DATASET), read, tmp_path)


def test_any_dataset_json_of_detection_is_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_X"
    for name in ("imagesTr", "boxesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)

    def read(file: Path) -> None:
        read_classes(folder / "labelsTr", file, {"tumour": 2})
        write_box_labels(folder)

    fuzz("dataset.json (detection)", folder / "dataset.json", json_bytes(DATASET), read, tmp_path)


def test_any_dataset_json_of_nndetection_is_read_or_refused(tmp_path: Path) -> None:
    task = {"labels": {"0": "nodule"}, "modalities": {"0": "CT"}, "target_class": None}

    fuzz(
        "dataset.json (nnDetection)",
        tmp_path / "dataset.json",
        json_bytes(task),
        lambda file: _read_task(file.parent),
        tmp_path,
    )


def golden(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("name", ["tiny", "hippocampus_crops_primus_tiny"])
def test_any_plan_is_read_or_refused(name: str, tmp_path: Path) -> None:
    request = Request("x", folders=("/data",), num_steps=10)
    # Paths are in a private file beside the plan, as pretraining writes them.
    hidden, paths = hide_paths(to_jsonable(request), PATH_FIELDS)
    write_private(tmp_path, [{"id": key, "source": path} for key, path in paths.items()])
    data = {**golden(name), "request": hidden}

    def read(_file: Path) -> None:
        check(read_plan(tmp_path))
        matching_plan(tmp_path, request)

    fuzz("plan.json", tmp_path / "plan.json", json_bytes(data), read, tmp_path)


@pytest.mark.parametrize("encoder", ["primus_tiny", "resenc_tiny"])
def test_any_card_of_weights_is_read_or_refused(
    encoder: str,
    write_run: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, "x", encoder=encoder, decoder=encoder == "resenc_tiny")
    card = json.loads((run / CARD_NAME).read_text())

    def read(_file: Path) -> None:
        found = read_card(run)
        objection(found, run / WEIGHTS_NAME, TRAITS)
        inspect_weights(run, ImportOptions())

    fuzz("encoder.json", run / CARD_NAME, json_bytes(card), read, tmp_path)


def test_any_fine_tuning_plan_is_read_or_refused(tmp_path: Path) -> None:
    plans = make_plans()
    # Configurations of the user's own are the only ones that are kept when plans are made again.
    custom = {"inherits_from": "3d_fullres", "patch_size": [16, 16, 16], "batch_size": 4}
    plans["configurations"]["mine"] = custom
    new = copy.deepcopy(plans)
    class_path = plans["autoreg"]["encoder"]["class_path"]

    def read(file: Path) -> None:
        found = read_object(file)
        check_plans_name("AutoregPlans", found)
        kept_configurations(found, new, class_path)
        read_block(found)
        for configuration in new["configurations"].values():
            read_detection_plan({**configuration, **found}, str(file))

    fuzz("AutoregPlans.json", tmp_path / "AutoregPlans.json", json_bytes(plans), read, tmp_path)


KINDS = (ObjectClass("tumour", 1, (1,)),)
BOXES = {"boxes": [{"box_zyx": [0.0, 0.0, 0.0, 2.0, 3.0, 4.0], "label": 1, "ignore": False}]}
DETECTIONS = to_jsonable(
    make_scan_file(
        "a",
        frame_of_affine(np.diag([1.0, 1.0, 2.0, 1.0]), (8, 9, 10)),
        [Detection((0.0, 0.0, 0.0, 2.0, 3.0, 4.0), 1, "tumour", 0.5)],
        {"tumour": 1},
    ),
)
INSTANCES = {"instances": {"1": 1, "2": 2}}
INDEX = {
    "rules": to_jsonable(Rules()),
    "classes": to_jsonable(KINDS),
    "cases": {
        "a": {
            "stamp": "x",
            "objects": [
                {
                    "id": 1,
                    "place": 0,
                    "box_zyx": [0.0, 0.0, 0.0, 2.0, 3.0, 4.0],
                    "num_voxels": 3,
                    "ignored": False,
                },
            ],
            "has_masks": True,
        },
    },
}


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (BOXES, lambda file: read_true_boxes(file, KINDS, None)),
        (DETECTIONS, read_scan_file),
        (INSTANCES, labels_of_instances),
        (INDEX, detection_data.read_index),
    ],
    ids=["true boxes", "detections", "instances", "index"],
)
def test_any_file_of_objects_is_read_or_refused(data: Any, read: Read, tmp_path: Path) -> None:
    fuzz("objects", tmp_path / "objects.json", json_bytes(data), read, tmp_path)


RESULT = {
    "arm": "scratch",
    "encoder": "primus_s",
    "labels": 2,
    "seed": 0,
    "split": "test",
    "steps": 10,
    "batch": 2,
    "recipe": "",
}


def read_journal(file: Path) -> None:
    with Journal(file) as journal:
        assert isinstance(journal.known, dict)


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ({"step": 1, "name": "loss", "value": 0.5, "unit": ""}, read_lines),
        (RESULT, read_results),
        (["0" * 64, {"status": "ok", "reason": "", "shape_vox": [1, 2, 3]}], read_journal),
    ],
    ids=["metrics", "results", "journal"],
)
def test_any_file_of_json_lines_is_read_or_refused(line: Any, read: Read, tmp_path: Path) -> None:
    lines = st.lists(json_bytes(line), min_size=1, max_size=3).map(b"\n".join)

    fuzz("JSON lines", tmp_path / "x.jsonl", lines.map(lambda data: data + b"\n"), read, tmp_path)


# --- Checkpoints ------------------------------------------------------------------------------

SMALL = {
    "embed_dim": 48,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 1,
    "eva_numheads": 4,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
CROP = (16, 16, 16)


@functools.cache
def odd_tensors() -> list[torch.Tensor]:
    """Tensors that a checkpoint can hold and no network can use."""
    # 2^40 values of one number in the file, and values that overlap.
    odd = [
        torch.zeros(1).expand(2**40),
        torch.zeros(4).as_strided((1000, 1000), (0, 0)),
        torch.zeros(64).as_strided((32, 32), (1, 1)),
        torch.empty(2**50, device="meta"),
        torch.full((3,), math.nan),
        torch.full((3,), math.inf),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.int64),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.zeros(3)),
    ]
    # Not every version of torch has all of these.
    narrow = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint16")
    for name in narrow:
        kind = getattr(torch, name, None)
        if kind is not None:
            odd.append(torch.zeros(8, dtype=torch.uint8).view(kind))
    return odd


def shared_lists(levels: int) -> Any:
    """Few bytes in the file, 2^levels values when they are written out."""
    value: Any = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezipped(whole: bytes, changes: dict[str, bytes], compression: int = 0) -> bytes:
    """Return a file of ``torch.save`` with some records replaced."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(info.filename, changes.get(name, old.read(info)))
    return buffer.getvalue()


# What a pickle in a checkpoint might name: functions that run code, and those that torch itself
# uses to build tensors.
GLOBALS = (
    "os system",
    "posix system",
    "subprocess Popen",
    "builtins eval",
    "builtins getattr",
    "builtins bytearray",
    "builtins set",
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "torch load",
    "torch Tensor",
    "torch Size",
    "torch device",
    "torch FloatStorage",
    "torch.storage _load_from_bytes",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._tensor _rebuild_from_type_v2",
    "torch.nn.parameter Parameter",
    "numpy._core.multiarray scalar",
    "numpy dtype",
    "numpy.dtypes Float64DType",
)


OPCODES = (
    "MARK NONE NEWTRUE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 LIST "
    "DICT APPEND APPENDS SETITEM SETITEMS ADDITEMS REDUCE REDUCE REDUCE BUILD NEWOBJ NEWOBJ_EX OBJ "
    "STACK_GLOBAL BINPERSID POP POP_MARK DUP MEMOIZE"
)


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Return a pickle that was put together from opcodes, with arguments and without sense."""
    # Twice, so that a name is drawn as often as an opcode.
    named = [b"c" + text.replace(" ", "\n").encode() + b"\n" for text in GLOBALS]
    pieces = st.sampled_from(
        [
            *named,
            *named,
            pickle.UNICODE + b"mkdir trap\n",
            # Strings with a zero byte, numbers of thousands of digits, and lengths beyond the end
            # of the file.
            pickle.BINUNICODE + (5).to_bytes(4, "little") + b"f8\0\0\0",
            pickle.BININT + (2**31 - 1).to_bytes(4, "little"),
            pickle.LONG + b"1" * 4000 + b"L\n",
            pickle.LONG4 + (2**31 - 1).to_bytes(4, "little"),
            pickle.BINUNICODE8 + (2**40).to_bytes(8, "little") + b"x",
            pickle.BINBYTES8 + (2**62).to_bytes(8, "little"),
            pickle.BINPUT + b"\0",
            pickle.BINGET + b"\0",
            pickle.LONG_BINGET + b"\xff\xff\xff\x7f",
            *(getattr(pickle, name) for name in OPCODES.split()),
        ],
    )
    return b"\x80\x02" + b"".join(draw(st.lists(pieces, max_size=25))) + b"."


@st.composite
def state_dicts(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """Return a saved state dict with odd tensors, keys and values in it."""
    content = dict(whole)
    keys = st.sampled_from([*whole, "more", "network_weights", "state_dict", "module.x"])
    odd_keys = st.sampled_from([None, 3, 1.5, True, ("a",), b"x"])
    # Some 2^60 values that take few bytes in the file.
    things = st.one_of(
        st.sampled_from(odd_tensors()),
        values.filter(lambda value: "\ud800" not in repr(value)),
        st.integers(20, 60).map(shared_lists),
    )
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(keys, keys, keys, odd_keys))
        content[key] = draw(things)
    if draw(st.booleans()):
        content = {draw(st.sampled_from(["network_weights", "state_dict"])): content}
    return saved(content)


@pytest.fixture(scope="module")
def run_folder(write_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("results"), "x", crop=CROP, arguments=SMALL)


def hostile_files(whole: dict[str, Any], trap: Path) -> st.SearchStrategy[bytes]:
    """Return files of ``torch.save`` that are damaged, odd, or made to run code or fill memory."""
    whole_bytes = saved(whole)
    # 256 MiB of zeros in a file of a few hundred kilobytes.
    bomb = rezipped(whole_bytes, {"data/0": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    traps = [saved({**whole, "more": Trap(trap)})]
    traps.append(saved({"more": Trap(trap)}, _use_new_zipfile_serialization=False))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        traps.append(pickle.dumps({"state_dict": Trap(trap)}, protocol))
        changed = {"data.pkl": pickle.dumps(Trap(trap), protocol)}
        traps.append(rezipped(whole_bytes, changed))
    return st.one_of(
        state_dicts(whole),
        state_dicts(whole),
        damaged(whole_bytes),
        programs(),
        programs().map(lambda program: rezipped(whole_bytes, {"data.pkl": program})),
        # An empty file, an empty zip archive, and a million nested lists.
        st.sampled_from([*traps, bomb, b"", b"PK\x05\x06" + bytes(18), b"\x80\x02" + b"]" * 10**6]),
    )


def test_any_checkpoint_is_read_or_refused(run_folder: Path, tmp_path: Path) -> None:
    whole = {f"encoder.{k}": v for k, v in read_tensors(run_folder / WEIGHTS_NAME).items()}

    fuzz(
        "checkpoint (.pth)",
        tmp_path / "x.pth",
        hostile_files(whole, tmp_path / "trap"),
        lambda file: inspect_weights(file, ImportOptions()),
        tmp_path,
    )


def test_any_adaptation_plan_is_read_or_refused(run_folder: Path, tmp_path: Path) -> None:
    export_weights(run_folder / WEIGHTS_NAME, tmp_path / "export")
    file = tmp_path / "export" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    plan = content.pop("nnssl_adaptation_plan")
    torch.save(content, file)
    beside = file.with_name("adaptation_plan.json")

    fuzz(
        "adaptation_plan.json",
        beside,
        json_bytes(plan),
        lambda _file: inspect_weights(file, ImportOptions()),
        tmp_path,
    )


def test_any_checkpoint_of_a_run_is_read_or_refused(tmp_path: Path) -> None:
    # Checkpoints of runs are sealed with a hash, so a hostile one must be sealed as well.
    content = {"step": 3, "plan": golden("tiny"), "network": {"w": torch.zeros(8)}}
    file = tmp_path / "run" / LATEST_NAME
    save_checkpoint(file, content)
    whole = file.read_bytes()
    hostile = [{"version": 2, "more": Trap(tmp_path / "trap")}, {"version": 99}, []]

    def sealed(number: int) -> bytes:
        save_checkpoint(file, hostile[number] if isinstance(hostile[number], dict) else {})
        return file.read_bytes()

    contents = st.one_of(damaged(whole), st.integers(0, 2).map(sealed), st.just(b""))
    fuzz(
        "checkpoint of a run",
        file,
        contents,
        lambda _file: load_newest(file.parent),
        tmp_path,
    )


@st.composite
def tensor_files(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a safetensors file whose header was edited."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    text = draw(json_bytes(header))
    # The length before the header: right, beyond any file, none, or that of the old header.
    size = draw(st.sampled_from((len(text), len(text), len(text), 2**63, 0, length)))
    return size.to_bytes(8, "little") + text + whole[8 + length :]


def test_any_safetensors_file_is_read_or_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 8), "b": torch.zeros(2, dtype=torch.bfloat16)}
    whole = save(tensors, {"format": "pt"})

    def read(file: Path) -> None:
        for tensor in read_tensors(file).values():
            assert tensor.dtype == torch.float32
            assert bool(torch.isfinite(tensor).all())

    contents = st.one_of(tensor_files(whole), damaged(whole))
    fuzz("checkpoint (.safetensors)", tmp_path / "x.safetensors", contents, read, tmp_path)


def test_any_folder_of_the_hub_is_imported_or_refused(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    runs = tmp_path / "runs"
    export_weights(run_folder / WEIGHTS_NAME, folder, HUGGINGFACE_FORM)
    runs.mkdir()
    config_file = folder / CONFIG_NAME
    model = folder / MODEL_NAME
    config = json.loads(config_file.read_text())
    whole = model.read_bytes()

    def read(_file: Path) -> None:
        inspect_weights(folder, ImportOptions())
        import_weights(folder, "x", runs, ImportOptions())
        shutil.rmtree(runs / RUNS_FOLDER / "x")

    def read_sealed(file: Path) -> None:
        # Whoever edits the weights can state their hash as well.
        config[OWN_KEY]["card"]["sha256"] = sha256_of(file)
        config_file.write_text(json.dumps(config))
        read(file)

    fuzz("config.json (Hugging Face)", config_file, json_bytes(config), read, tmp_path)
    contents = st.one_of(tensor_files(whole), damaged(whole))
    fuzz("model.safetensors (Hugging Face)", model, contents, read_sealed, tmp_path)


def test_the_command_ends_any_weights_file_in_one_line(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = {f"encoder.{k}": v for k, v in read_tensors(run_folder / WEIGHTS_NAME).items()}

    def read(file: Path) -> None:
        code = weights_main(["inspect", str(file)])
        printed = capsys.readouterr()
        assert code in (0, 1, 2)
        assert printed.err.count("\n") == (1 if code else 0), printed.err
        assert all(line.isprintable() for line in printed.out.splitlines())

    contents = hostile_files(whole, tmp_path / "trap")
    fuzz("autoreg_weights inspect", tmp_path / "x.pth", contents, read, tmp_path)


def test_pipes_in_the_place_of_files_are_not_waited_for(index: Path, tmp_path: Path) -> None:
    # Opening a pipe blocks until somebody writes into it, which here nobody does.
    pipe = tmp_path / "pipe"
    for name in ("pipe", LATEST_NAME, "x.safetensors", "cases.csv"):
        os.mkfifo(tmp_path / name)
    private = index.with_name(PRIVATE_NAME)
    readers: list[Callable[[], object]] = [
        lambda: read_index(pipe),
        lambda: read_manifest(pipe),
        lambda: read_exclude(pipe),
        lambda: read_boxes(pipe),
        lambda: read_subjects(pipe, ["a"]),
        lambda: inspect_weights(pipe, ImportOptions()),
        lambda: load_newest(tmp_path),
        lambda: read_tensors(tmp_path / "x.safetensors"),
        lambda: read_lines(pipe),
        lambda: find_patients(tmp_path, ["a"]),
        lambda: read_dataset_json(tmp_path),
    ]

    with watching("pipes", tmp_path) as watch:
        for read in readers:
            watch.try_out(read)
        private.unlink()
        os.mkfifo(private)
        watch.try_out(lambda: read_index(index))

    # Two of these files are optional, and as a pipe they are treated as missing.
    assert watch.outcomes["read"] == 2
