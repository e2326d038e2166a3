"""``autoreg_doctor`` and what all commands share."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_autoreg import bridge
from nnunet_autoreg.cli import common, doctor
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.installation import checks, fresh_process, link
from nnunet_autoreg.model.card import Adaptation, EncoderCard
from nnunet_autoreg.model.sizes import encoder_size

# The answer of a fresh interpreter on a machine where everything works.
WELL = {
    "live": True,
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "timm": "1.0.22",
    **{f"network {name}": "built" for name in checks.PROBED_NETWORKS},
    "device": ["cuda", "Some GPU", 24 * 2**30, 1, 20 * 2**30],
    "planner": "nnunet_autoreg.planners.autoreg_planner",
    "trainer": "nnunet_autoreg.trainers.autoreg_trainers",
}
TRAP = "RuntimeError: operator torchvision::nms\n does not exist"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders, and a bridge that is not switched off."""
    for variable in checks.FOLDERS:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.delenv(bridge.SWITCH, raising=False)
    return tmp_path


PRIMUS_TINY = encoder_size("primus_tiny")


def card(name: str, finished_at: str) -> EncoderCard:
    return EncoderCard(
        name=name,
        encoder="primus_tiny",
        class_path=PRIMUS_TINY.class_path,
        arguments=PRIMUS_TINY.arguments,
        token_size_vox=(8, 8, 8),
        crop_size_vox=(32, 32, 32),
        spacing_mm=(1.0, 1.0, 1.0),
        modalities=("MR",),
        channel_names=("MRI",),
        ct_window=None,
        num_input_channels=1,
        adaptation=Adaptation("eva", "down_projection", ("down_projection.proj",), "eva.pos_embed"),
        objective="autoregressive",
        licences={},
        num_scans=3,
        num_steps=5,
        finished_at=finished_at,
        sha256="0" * 64,
    )


def test_without_problems_every_line_is_ok_and_pretraining_is_next(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checks, "probe", lambda: WELL)

    assert doctor.main([]) == 0

    lines = capsys.readouterr().out.splitlines()

    # Every line but the last is a check.
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * 15
    assert "cuda: Some GPU, 24 GiB (20 free)" in lines[-4]
    assert lines[-1] == "next: autoreg_pretrain -d DATASET --name NAME   (or -i FOLDER)"


def test_finished_runs_are_counted_and_the_newest_is_named(folders: Path) -> None:
    runs = folders / "nnUNet_results" / "autoreg_pretraining"
    for name, day in (("old", "2025-01-31"), ("new", "2025-11-01"), ("older", "2024-12-31")):
        (runs / name).mkdir(parents=True)
        card(name, f"{day}T10:00:00Z").save(runs / name)
    (runs / "unfinished").mkdir()

    check = checks.check_runs()

    assert check.status == "ok"
    assert check.finding == "3 finished, newest: new (primus_tiny, 2025-11-01T10:00:00Z)"
    # A finished run exists, so fine-tuning comes next.
    assert checks.next_step([check]).startswith("nnUNetv2_plan_and_preprocess")


def test_a_damaged_card_is_counted_and_shown_with_its_path(folders: Path) -> None:
    run = folders / "nnUNet_results" / "autoreg_pretraining" / "torn"
    run.mkdir(parents=True)
    (run / "encoder.json").write_text("{")

    check = checks.check_runs()

    assert (check.status, check.finding) == ("warn", "none yet; 1 unreadable")
    assert str(run / "encoder.json") in check.remedy


def test_a_problem_has_a_remedy_and_the_first_one_comes_next(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setattr(checks, "probe", lambda: {**WELL, "live": False})

    assert doctor.main([]) == 1

    out = capsys.readouterr().out

    assert "fail  nnUNet_raw          the environment variable nnUNet_raw is not set\n" in out
    bridge_fails = "nnU-Net does not find our classes: the .pth line is not read"
    assert f"fail  start-up bridge     {bridge_fails}\n" in out
    assert "\n      -> autoreg_doctor --link\n" in out
    # Nothing works without the folder, so it comes before the bridge.
    next_step = "next: fix 'nnUNet_raw': type: export nnUNet_raw=/path/to/nnUNet_raw"
    assert out.splitlines()[-1] == next_step


def test_a_folder_that_is_missing_or_a_file_fails_by_name(folders: Path) -> None:
    (folders / "nnUNet_raw").rmdir()

    gone = checks.check_folder("nnUNet_raw", checks.FOLDERS["nnUNet_raw"])

    assert gone.status == "fail"
    assert "does not exist" in gone.finding
    assert "mkdir -p" in gone.remedy

    # A file under the name of the folder.
    (folders / "nnUNet_raw").touch()

    assert checks.check_folder("nnUNet_raw", checks.FOLDERS["nnUNet_raw"]).status == "fail"


@pytest.mark.parametrize(
    ("variable", "status"),
    [("nnUNet_raw", "warn"), ("nnUNet_results", "fail")],
)
def test_a_read_only_folder_is_bad_unless_it_holds_raw_data(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    status: str,
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)

    check = checks.check_folder(variable, checks.FOLDERS[variable])

    assert check.status == status
    assert "cannot be written" in check.finding


@pytest.mark.parametrize(
    ("version", "status"),
    # "2.10.0" is newer than "2.8.1", though its text sorts before it.
    [
        ("2.8.1", "ok"),
        ("2.10.0", "ok"),
        ("2.8.0", "fail"),
        ("2.5", "fail"),
        ("3.0.0", "fail"),
    ],
)
def test_the_supported_range_of_nnunet_is_from_2_8_1_to_below_3(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    status: str,
) -> None:
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda _: version)

    check = checks.check_nnunet()

    assert check.status == status
    assert version in check.finding


def test_a_missing_nnunet_fails_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)

    check = checks.check_nnunet()

    assert check.status == "fail"
    assert check.remedy == "pip install 'nnunetv2>=2.8.1,<3'"


def test_a_bridge_that_is_off_not_read_or_broken_has_its_own_remedy() -> None:
    assert checks.check_bridge(WELL, None).status == "ok"
    assert checks.check_bridge({**WELL, "live": False}, "0").remedy == "unset NNUNET_AUTOREG_BRIDGE"
    assert checks.check_bridge({**WELL, "live": False}, None).remedy == "autoreg_doctor --link"

    broken = {k: v for k, v in WELL.items() if k != "trainer"}
    broken["trainer_error"] = "ImportError: no\n such module"
    check = checks.check_bridge(broken, None)
    assert check.status == "fail"
    # The message of the error is made one line.
    reason = "ImportError: no such module"
    assert check.finding == f"live, but AutoregPretrainedTrainer is not found: {reason}"


def test_a_torchvision_of_another_build_of_torch_is_named() -> None:
    answer = {k: v for k, v in WELL.items() if k != "torchvision"} | {"torchvision_error": TRAP}

    check = checks.check_companion(answer, "torchvision")

    assert check.status == "fail"
    assert check.finding == "RuntimeError: operator torchvision::nms does not exist"
    assert "pip install" in check.remedy


def test_a_cpu_is_a_warning_that_names_the_build_of_torch() -> None:
    # A build of torch for CPUs; and one for CUDA 13.2 that finds no GPU, so the driver is missing.
    assert "build for CPUs" in checks.check_device({"device": ["cpu", None]}).finding

    check = checks.check_device({"device": ["cpu", "13.2"]})

    assert check.status == "warn"
    assert "driver" in check.remedy
    assert checks.check_device({"device": ["mps"]}).status == "ok"
    assert checks.check_device({"device_error": "OSError: libcudart"}).status == "fail"


def test_a_fresh_interpreter_that_fails_is_shown_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fallen = SimpleNamespace(stdout="", stderr="Fatal\nSegmentation fault\n", returncode=-11)
    monkeypatch.setattr(fresh_process.subprocess, "run", lambda *_, **__: fallen)
    answer = fresh_process.probe()

    check = checks.check_bridge(answer, None)

    reason = "a fresh interpreter ended with exit code -11: Segmentation fault"
    assert (check.status, check.finding) == ("fail", reason)
    assert checks.check_torch(answer).status == "fail"


def test_a_slow_import_is_not_called_a_broken_one(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def take_long(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", fresh_process.PROBE_LIMIT_S)

    monkeypatch.setattr(fresh_process.subprocess, "run", take_long)

    assert doctor.main([]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("fail")]
    assert len([line for line in lines if line.startswith("warn  not checked")]) == 1
    assert lines[-1].startswith("next: autoreg_doctor")


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty stand-in for site-packages, in which a link takes effect at once."""
    monkeypatch.delenv(bridge.SWITCH, raising=False)
    monkeypatch.setattr(doctor, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(link, "has_bridge", lambda: any(tmp_path.iterdir()))
    return tmp_path


def test_link_writes_the_guarded_line_and_unlink_removes_it(
    site_packages: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--link"]) == 0

    link = site_packages / "nnunet_autoreg_link.pth"
    head, line = link.read_text().splitlines()

    assert head.startswith("#")
    assert line + "\n" == bridge.PTH_LINE
    assert doctor.main(["--link"]) == 0
    assert f"wrote {link}" in capsys.readouterr().out
    assert doctor.main(["--unlink"]) == 0
    assert list(site_packages.iterdir()) == []
    assert doctor.main(["--unlink"]) == 0
    assert str(link) in capsys.readouterr().out.splitlines()[-2]


def test_link_and_unlink_do_not_touch_a_foreign_file(
    site_packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = site_packages / "nnunet_autoreg_link.pth"
    foreign.write_text("/somewhere/else\n")
    monkeypatch.setattr(link, "has_bridge", lambda: False)

    assert doctor.main(["--link"]) == 1
    assert doctor.main(["--unlink"]) == 1
    assert foreign.read_text() == "/somewhere/else\n"
    assert capsys.readouterr().err.count(str(foreign)) == 2


def test_a_link_without_effect_is_an_error(
    site_packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(link, "has_bridge", lambda: False)
    assert doctor.main(["--link"]) == 1
    assert "PYTHONPATH" in capsys.readouterr().err


def test_link_refuses_while_the_bridge_is_switched_off(
    site_packages: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(bridge.SWITCH, "0")
    assert doctor.main(["--link"]) == 2
    assert list(site_packages.iterdir()) == []


def test_misuse_ends_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--link", "--unlink"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (AutoregError("no scan\nis left"), 1, "autoreg_test_doctor: no scan is left\n"),
        (UsageError("set nnUNet_results"), 2, "autoreg_test_doctor: set nnUNet_results\n"),
        (
            KeyboardInterrupt(),
            130,
            "autoreg_test_doctor: interrupted; run the same command again to continue\n",
        ),
    ],
)
def test_a_command_turns_errors_into_one_line_and_a_code(
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @common.command
    def main(argv: list[str] | None = None) -> int:
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == line


def test_shared_memory_that_cannot_be_written_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As the semaphores of Python's process pools fail: without a file name.
    @common.command
    def main(argv: list[str] | None = None) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(common, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)

    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert "--shm-size" in error


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_too_little_memory_ends_in_one_line(
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    # The handler looks at torch's errors only if torch was imported.
    import torch  # noqa: F401

    @common.command
    def main(argv: list[str] | None = None) -> int:
        raise error

    assert main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    @common.command
    def main(argv: list[str] | None = None) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    script = (
        "import sys\n"
        "from nnunet_autoreg.cli.common import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    for _ in range(100_000):\n"
        "        print('a line of the table')\n"
        "    return 0\n"
        "sys.exit(main())\n"
    )
    line = [sys.executable, "-c", script]
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stderr is not None

    # As "| head -1" does: read a line, and close the pipe while the command still writes.
    run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait(timeout=60)) == ("", 1)

    run.stderr.close()


def test_the_log_goes_to_stderr_once_with_the_level_before_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("nnunet_autoreg")
    before = list(logger.handlers), logger.level
    try:
        # Twice, as when one command calls another: every line must come once.
        common.configure_logging()
        common.configure_logging()
        logging.getLogger("nnunet_autoreg.corpus").info("40 scans")
        logging.getLogger("nnunet_autoreg.corpus").warning("2 left out")
        logging.getLogger("nnunet_autoreg.corpus").debug("not shown")
        assert capsys.readouterr().err == "40 scans\nwarning: 2 left out\n"
    finally:
        logger.handlers[:], logger.level = before
