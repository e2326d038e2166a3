"""What keeps the results of ``benchmarks/gpu.py``: lines on disk at once, parts that end in
time.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """Return a module of the folder ``benchmarks``, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recording() -> Iterator[ModuleType]:
    yield loaded("recording")
    sys.modules.pop("recording", None)


def on_disk(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_before_the_next_is_made(
    recording: ModuleType,
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "lines.jsonl"
    recorder = recording.Recorder(out, {"device": "cpu"})
    counted = []

    def lines() -> Iterator[dict[str, object]]:
        yield {"part": "x", "number": 0}
        # A generator runs only when the next line is asked for: what is on disk by then?
        counted.append(len(on_disk(out)))
        yield {"part": "x", "number": 1}
        counted.append(len(on_disk(out)))

    assert recorder.add_all({"part": "x"}, lines())
    assert counted == [1, 2]
    assert on_disk(out)[1] == {"part": "x", "number": 1, "device": "cpu"}


def test_a_part_that_fails_leaves_what_it_had_and_a_line(
    recording: ModuleType,
    tmp_path: Path,
) -> None:
    out = tmp_path / "lines.jsonl"

    def lines() -> Iterator[dict[str, object]]:
        yield {"part": "memory", "ok": True}
        raise ZeroDivisionError("no step")

    assert not recording.Recorder(out, {}).add_all({"part": "memory", "encoder": "vit"}, lines())

    kept, failure = on_disk(out)
    assert kept == {"part": "memory", "ok": True}
    assert (failure["part"], failure["encoder"], failure["ok"]) == ("memory", "vit", False)
    assert "ZeroDivisionError" in str(failure["failed"])


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    # A zombie (state Z) has ended; its parent has not asked for its exit code yet.
    state = Path(f"/proc/{number}/stat")
    return not (state.exists() and ") Z " in state.read_text())


def test_a_command_past_its_limit_is_ended_with_its_children(
    recording: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "GRACE_S", 0.2)
    note = tmp_path / "child"
    # The worst case: the command ignores SIGTERM, and has started another process.
    script = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )

    reason = recording.run_bounded([sys.executable, "-c", script], 3)

    assert reason is not None
    assert "3 s" in reason
    child = int(note.read_text())
    # The kernel may take a moment.
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("pass", None),
        ("raise SystemExit(7)", "7"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    ],
)
def test_the_reason_says_how_a_command_ended(
    recording: ModuleType,
    script: str,
    word: str | None,
) -> None:
    reason = recording.run_bounded([sys.executable, "-c", script], 60)

    if word is None:
        assert reason is None
    else:
        assert word in reason


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    names = ("recording", "measuring", "gpu_commands", "gpu")
    modules = {name: loaded(name) for name in names}
    yield modules["gpu"]
    for name in names:
        sys.modules.pop(name, None)


def test_the_smoke_parts_cover_attention_and_every_command(gpu: ModuleType) -> None:
    units = gpu.units_of(["smoke"], [], False)

    assert units[0] == ("attention_quick", "")
    assert {
        ("pretrain", gpu.CNN),
        ("pretrain", gpu.TRANSFORMER),
        ("resume", ""),
        ("finetune", ""),
    } <= set(units)


def test_long_parts_run_encoder_by_encoder(gpu: ModuleType) -> None:
    chosen = gpu.units_of(["throughput", "memory"], ["primus_m", "vit_b16"], False)
    every = gpu.units_of(["throughput"], [], False)

    assert chosen == [
        ("throughput", "primus_m"),
        ("throughput", "vit_b16"),
        ("memory", "primus_m"),
        ("memory", "vit_b16"),
    ]
    assert [name for _, name in every] == list(gpu.ENCODERS)


def test_attention_is_compared_for_samples_that_differ(gpu: ModuleType) -> None:
    cases = gpu.attention_cases(3, 40)

    assert {order for order, _ in cases} == {"raster", "random"}
    # Equal prefixes would not show a kernel that takes one sample's mask for all.
    for ranks, prefix, valid in cases.values():
        assert len(ranks) == len(valid) == len(prefix) == 3
        assert len(set(prefix.tolist())) == 3


@pytest.mark.parametrize(
    "encoder",
    ["primus_tiny", "resenc_tiny", "primus_m", "resenc_l", "vit_b16"],
)
def test_a_plan_has_the_crop_and_the_two_parts_that_are_measured(
    gpu: ModuleType,
    encoder: str,
) -> None:
    size = gpu.encoder_size(encoder)

    plan = gpu.plan_of(size, gpu.crop_of(size, False), 3, "run.compile=false")

    assert plan.encoder.name == encoder
    assert plan.sequence.crop_size_vox == (128, 128, 128)
    assert (plan.optim.micro_batch_size, plan.optim.batch_size) == (3, 6)
    assert plan.run.compile is False
