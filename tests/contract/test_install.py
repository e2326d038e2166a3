"""A real install of our wheel, beside nnU-Net installed normally or editable."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fresh_environment import FreshEnvironment, fresh_environment, link_library

from nnunet_autoreg import bridge

pytestmark = pytest.mark.contract

REPO = Path(__file__).resolve().parents[2]
# What a wheel is built from; tests and documentation are not part of it.
SOURCES = (
    "nnunet_autoreg",
    "trainers",
    "planners",
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
)
OURS = ("AutoregPlanner", "AutoregPretrainedTrainer", "AutoregScratchTrainer_5epochs")
STOCK = ("ExperimentPlanner", "nnUNetTrainer", "nnUNetTrainer_5epochs")
PLANNING = "nnunetv2.experiment_planning.experiment_planners"
TRAINER = "nnunetv2.training.nnUNetTrainer"
FOUND = {
    "AutoregPlanner": "nnunet_autoreg.planners.autoreg_planner",
    "AutoregPretrainedTrainer": "nnunet_autoreg.trainers.autoreg_trainers",
    "AutoregScratchTrainer_5epochs": "nnunet_autoreg.trainers.autoreg_trainers",
    "ExperimentPlanner": f"{PLANNING}.default_experiment_planner",
    "nnUNetTrainer": f"{TRAINER}.nnUNetTrainer",
    "nnUNetTrainer_5epochs": f"{TRAINER}.variants.training_length.nnUNetTrainer_Xepochs",
}
# nnU-Net may print other lines, so the answer has a mark.
ANSWER = "answer:"

# Looks names up as nnU-Net does: its planning API for planners, its training command for trainers.
LOOK_UP = f"""
import json, multiprocessing, sys
from os.path import join

def look_up(name):
    import nnunetv2
    from nnunetv2.utilities import find_class_by_name, find_objects
    try:
        if name.endswith("Planner"):
            folder = join(nnunetv2.__path__[0], "experiment_planning")
            found = find_class_by_name.recursive_find_python_class(
                folder, name, current_module="nnunetv2.experiment_planning"
            )
        else:
            found = find_objects.recursive_find_trainer_class_by_name(name)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
    return None if found is None else found.__module__

if __name__ == "__main__":
    answer = {{name: look_up(name) for name in sys.argv[2:]}}
    if sys.argv[1] == "--spawn":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            answer["spawned"] = pool.apply(look_up, ("AutoregPlanner",))
    import nnunetv2
    answer["nnunetv2"] = nnunetv2.__path__[0]
    print({ANSWER!r} + json.dumps(answer))
"""
# Printed by an interpreter that imports nothing itself.
START = (
    "import sys; print(any(hasattr(f, 'is_autoreg_bridge') for f in sys.meta_path), "
    "sorted(m for m in sys.modules if m in ('torch', 'nnunetv2', 'numpy')))"
)


class Environment(FreshEnvironment):
    """A fresh virtual environment whose bridge is looked at."""

    def start(self, **variables: str) -> str:
        """Start the bare interpreter, which must be silent; report whether the hook is live, and
        what heavy things are loaded.
        """
        done = self.run("-c", START, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    def look_up(self, *names: str, flag: str = "--here", **variables: str) -> dict[str, str]:
        script = self.root / "look_up.py"
        script.write_text(LOOK_UP)
        done = self.run(script, flag, *names, **variables)
        assert done.returncode == 0, done.stderr
        # Only one line has the mark.
        line = next(line for line in done.stdout.splitlines() if line.startswith(ANSWER))
        return dict(json.loads(line.removeprefix(ANSWER)))


def make_environment(root: Path, library: Path) -> Environment:
    return Environment(fresh_environment(root, library).root)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_library(tmp_path_factory.mktemp("borrowed") / "library")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(
                REPO / name,
                folder / name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        elif (REPO / name).exists():
            shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    line = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        source,
    ]
    # Isolation would download the build tools; they are installed already.
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Our wheel beside a normal nnU-Net. Not to be changed by a test."""
    environment = make_environment(tmp_path_factory.mktemp("installed") / "venv", library)
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture
def disposable(wheel: Path, library: Path, tmp_path: Path) -> Environment:
    """As ``installed``, for one test to damage."""
    environment = make_environment(tmp_path / "venv", library)
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


def test_the_wheel_holds_the_pth_line_both_mapped_folders_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        # The .pth file is what makes Python start the bridge.
        names = archive.namelist()
        assert archive.read(bridge.PTH_NAME).decode() == bridge.PTH_LINE
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        description = archive.read(metadata).decode()

    # Relative addresses of pictures and links lead nowhere outside the repository.
    assert "## Run it" in description
    assert "![" not in description
    assert "The tutorial shows" in " ".join(description.split())
    assert "](" not in description
    # Both folders lie at the top of the repository and inside the package in the wheel, and the
    # page of
    # the report is not a Python file.
    assert {
        "nnunet_autoreg/trainers/__init__.py",
        "nnunet_autoreg/planners/__init__.py",
        "nnunet_autoreg/bridge.py",
        "nnunet_autoreg/report/page.html",
    } <= set(names)

    tops = {name.split("/")[0] for name in names}

    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"nnunet_autoreg", bridge.PTH_NAME}


def test_every_start_is_silent_light_and_has_the_hook(installed: Environment) -> None:
    assert (installed.site_packages / bridge.PTH_NAME).is_file()
    # Nothing heavy is loaded by a mere start of Python.
    assert installed.start() == "True []"


def test_stock_and_our_names_are_found_also_in_spawned_workers(installed: Environment) -> None:

    answer = installed.look_up(*OURS, *STOCK, flag="--spawn")

    assert {name: answer[name] for name in FOUND} == FOUND
    assert answer["spawned"] == FOUND["AutoregPlanner"]


def test_the_switch_leaves_stock_nnunet_as_it_is(installed: Environment) -> None:
    off = {bridge.SWITCH: "0"}

    assert installed.start(**off) == "False []"

    names = ("AutoregPlanner", "AutoregPretrainedTrainer", "ExperimentPlanner")
    answer = installed.look_up(*names, **off)

    assert answer["AutoregPlanner"] is None
    assert answer["AutoregPretrainedTrainer"].startswith(
        "RuntimeError: Could not find requested nnunet trainer",
    )
    assert answer["ExperimentPlanner"] == FOUND["ExperimentPlanner"]


def test_commands_are_installed_and_end_misuse_with_2(installed: Environment) -> None:
    doctor = installed.python.parent / "autoreg_doctor"

    assert installed.run(doctor, "--help").stdout.startswith("usage: autoreg_doctor")
    assert installed.run(doctor, "--no-such-option").returncode == 2


@pytest.mark.parametrize("broken", ["__init__.py", "bridge.py"])
def test_a_broken_package_stays_silent_at_start_and_harms_no_stock_name(
    disposable: Environment,
    broken: str,
) -> None:
    # A syntax error, as after an interrupted upgrade.
    (disposable.site_packages / "nnunet_autoreg" / broken).write_text("def (:\n")

    assert disposable.start() == "False []"

    answer = disposable.look_up("ExperimentPlanner", "nnUNetTrainer_5epochs")

    assert answer["ExperimentPlanner"] == FOUND["ExperimentPlanner"]
    assert answer["nnUNetTrainer_5epochs"] == FOUND["nnUNetTrainer_5epochs"]


def test_a_broken_trainer_of_ours_gives_a_clear_error_for_our_name_only(
    disposable: Environment,
) -> None:
    trainers = disposable.site_packages / "nnunet_autoreg" / "trainers"
    (trainers / "autoreg_trainers.py").write_text("import no_such_thing\n")

    # The bridge does not import the trainers until a name of ours is looked up.
    assert disposable.start() == "True []"

    answer = disposable.look_up("AutoregPretrainedTrainer", "nnUNetTrainer_5epochs")
    assert answer["nnUNetTrainer_5epochs"] == FOUND["nnUNetTrainer_5epochs"]

    refusal = answer["AutoregPretrainedTrainer"]
    assert refusal.startswith("ImportError: 'AutoregPretrainedTrainer'")
    assert "no_such_thing" in refusal
    assert "No module named 'no_such_thing'" in answer["AutoregPretrainedTrainer"]


def test_uninstalling_removes_the_package_the_pth_and_the_hook(disposable: Environment) -> None:
    assert disposable.start() == "True []"

    disposable.pip("uninstall", "--yes", "nnunet-autoreg")

    assert disposable.start() == "False []"
    left = [entry.name for entry in disposable.site_packages.iterdir() if "autoreg" in entry.name]
    assert left == []


def test_an_editable_install_of_ours_is_made_live_by_the_doctors_link(
    source: Path,
    library: Path,
    tmp_path: Path,
) -> None:
    environment = make_environment(tmp_path / "venv", library)
    # An editable install of setuptools does not carry the .pth file.
    environment.pip(
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--editable",
        source,
    )
    doctor = environment.python.parent / "autoreg_doctor"

    assert environment.start() == "False []"
    assert environment.run(doctor, "--link").returncode == 0
    assert environment.start() == "True []"
    answer = environment.look_up("AutoregPretrainedTrainer")
    assert answer["AutoregPretrainedTrainer"] == FOUND["AutoregPretrainedTrainer"]
    assert environment.run(doctor, "--unlink").returncode == 0
    assert environment.start() == "False []"


@pytest.fixture(scope="module")
def nnunet_checkout(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """nnU-Net's source tree in the installed version, downloaded once and kept in pytest's cache.

    Tests are skipped if it cannot be had.
    """
    release = version("nnunetv2")
    cache = Path(request.config.cache.mkdir("nnunetv2-source"))  # type: ignore[union-attr]
    archive = cache / f"nnunetv2-{release}.tar.gz"
    if not archive.is_file():
        line = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-binary",
            ":all:",
            "--no-deps",
            "--no-build-isolation",
        ]
        done = subprocess.run(
            [*line, "-d", cache, f"nnunetv2=={release}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not archive.is_file():
            pytest.skip(
                f"the source of nnunetv2 {release} cannot be downloaded: "
                f"{(done.stderr.strip() or 'no message')[-200:]}",
            )
    folder = tmp_path_factory.mktemp("checkout")
    shutil.unpack_archive(archive, folder)
    return folder / f"nnunetv2-{release}"


def test_an_editable_nnunet_stays_whole_and_finds_us(
    wheel: Path,
    nnunet_checkout: Path,
    tmp_path: Path,
) -> None:
    # All packages of this environment, but not its nnU-Net.
    library = link_library(tmp_path / "library", "nnunetv2")
    environment = make_environment(tmp_path / "venv", library)
    environment.pip(
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--editable",
        nnunet_checkout,
    )
    environment.pip("install", "--no-deps", "--no-index", wheel)

    assert environment.start() == "True []"

    answer = environment.look_up(*OURS, *STOCK, flag="--spawn")

    # The nnU-Net that was found is the checkout, and not a copy elsewhere.
    assert answer["nnunetv2"] == str(nnunet_checkout / "nnunetv2")
    assert {name: answer[name] for name in FOUND} == FOUND
    assert answer["spawned"] == FOUND["AutoregPlanner"]
