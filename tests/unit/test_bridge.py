"""Test the start-up bridge on a stand-in for nnU-Net's look-up module.

The real module is tested in tests/contract/test_install.py.
"""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nnunet_autoreg import bridge

LOOKUP = """
def recursive_find_python_class(
    folder, class_name, current_module, base_folder=None, verbose=False
):
    \"\"\"Stock.\"\"\"
    return {"nnUNetTrainer": "the stock trainer", "Odd": 0}.get(class_name)
"""
USER = "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class\n"
TRAINERS_SEARCH = "nnunetv2.training.nnUNetTrainer"
PLANNERS_SEARCH = "nnunetv2.experiment_planning"


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a tiny package with nnU-Net's name importable, in an interpreter without the bridge."""
    utilities = tmp_path / "nnunetv2" / "utilities"
    utilities.mkdir(parents=True)
    (utilities / "__init__.py").touch()
    (utilities.parent / "__init__.py").touch()
    (utilities / "find_class_by_name.py").write_text(LOOKUP)
    (utilities / "find_objects.py").write_text(USER)
    # Another test may have loaded the real package; it is put back at the end.
    loaded = {}
    for name in list(sys.modules):
        if name.split(".")[0] == "nnunetv2":
            loaded[name] = sys.modules.pop(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(bridge.SWITCH, raising=False)
    stock_finders = [f for f in sys.meta_path if not hasattr(f, "is_autoreg_bridge")]
    monkeypatch.setattr(sys, "meta_path", stock_finders)

    yield utilities

    for name in [name for name in sys.modules if name.split(".")[0] == "nnunetv2"]:
        del sys.modules[name]
    sys.modules.update(loaded)


@pytest.fixture
def our_trainers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The real trainers import torch and nnU-Net; a string for each name is enough here.
    module = ModuleType("nnunet_autoreg.trainers.autoreg_trainers")
    for name in bridge.TRAINERS:
        for length in ("", "_5epochs", "_17epochs"):
            setattr(module, f"{name}{length}", f"our {name}{length}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def lookup_module() -> ModuleType:
    return importlib.import_module(bridge.HOOKED_MODULE)


def test_a_name_that_stock_does_not_find_is_answered_from_the_table(
    nnunet: Path,
    our_trainers: ModuleType,
) -> None:
    bridge.install()
    find = lookup_module().recursive_find_python_class

    # The three ways in which nnU-Net's functions call it: by position, by name, and for the folder
    # of nnUNet_extTrainer, which has no module.
    pretrained = find("folder", "AutoregPretrainedTrainer", TRAINERS_SEARCH)
    scratch = find(
        "folder",
        class_name="AutoregScratchTrainer_5epochs",
        current_module=TRAINERS_SEARCH,
    )
    outside = find(
        "a folder of nnUNet_extTrainer",
        "AutoregPretrainedTrainer",
        None,
        base_folder="x",
        verbose=False,
    )

    assert pretrained == outside == "our AutoregPretrainedTrainer"
    assert scratch == "our AutoregScratchTrainer_5epochs"


def test_stock_answers_pass_through_untouched(nnunet: Path) -> None:
    bridge.install()
    find = lookup_module().recursive_find_python_class

    assert find("folder", "nnUNetTrainer", TRAINERS_SEARCH) == "the stock trainer"
    # 0 is false, but it is an answer: only None means that nothing was found.
    assert find("folder", "Odd", TRAINERS_SEARCH) == 0
    assert find("folder", "nnUNetTrainerOfNobody", TRAINERS_SEARCH) is None


def test_a_class_of_the_same_name_inside_stock_wins(nnunet: Path, our_trainers: ModuleType) -> None:
    with_our_name = LOOKUP.replace('"nnUNetTrainer"', '"AutoregPretrainedTrainer"')
    (nnunet / "find_class_by_name.py").write_text(with_our_name)
    bridge.install()
    find = lookup_module().recursive_find_python_class

    assert find("f", "AutoregPretrainedTrainer", TRAINERS_SEARCH) == "the stock trainer"


@pytest.mark.parametrize(
    "searched",
    [
        "nnunetv2.preprocessing",
        "nnunetv2.imageio",
        # Starts like nnunetv2.training, but is another package.
        "nnunetv2.training_tools",
        PLANNERS_SEARCH,
        "mine",
    ],
)
def test_a_trainer_is_not_offered_where_something_else_is_searched(
    nnunet: Path,
    our_trainers: ModuleType,
    searched: str,
) -> None:
    bridge.install()
    find = lookup_module().recursive_find_python_class

    assert find("folder", "AutoregPretrainedTrainer", searched) is None


def test_a_module_that_cannot_be_imported_is_named_with_the_cause(
    nnunet: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bridge.PLANNERS, "AutoregPlanner", "nnunet_autoreg.planners.no_such_module")
    bridge.install()
    find = lookup_module().recursive_find_python_class

    with pytest.raises(ImportError) as caught:
        find("folder", "AutoregPlanner", PLANNERS_SEARCH)

    for part in ("AutoregPlanner", "ModuleNotFoundError", "no_such_module", "autoreg_doctor"):
        assert part in str(caught.value)
    assert find("folder", "nnUNetTrainer", TRAINERS_SEARCH) == "the stock trainer"


def test_installing_late_reaches_every_module_that_holds_the_lookup(
    nnunet: Path,
    our_trainers: ModuleType,
) -> None:
    # "from ... import" has copied the function into another module before the bridge starts.
    user = importlib.import_module("nnunetv2.utilities.find_objects")
    wanted = ("f", "AutoregPretrainedTrainer", TRAINERS_SEARCH)

    assert user.recursive_find_python_class(*wanted) is None

    bridge.install()

    assert user.recursive_find_python_class(*wanted) == "our AutoregPretrainedTrainer"
    assert user.recursive_find_python_class is lookup_module().recursive_find_python_class


def test_installing_twice_registers_one_hook_and_wraps_once(nnunet: Path) -> None:
    bridge.install()
    bridge.install()

    assert sum(hasattr(finder, "is_autoreg_bridge") for finder in sys.meta_path) == 1

    wrapped = lookup_module().recursive_find_python_class

    assert not hasattr(wrapped.__wrapped__, "__wrapped__")


def test_the_environment_switches_it_off(nnunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNUNET_AUTOREG_BRIDGE", "0")

    bridge.install()

    assert not bridge.is_live()
    assert not hasattr(lookup_module().recursive_find_python_class, "__wrapped__")


def test_the_hooked_module_keeps_its_import_metadata(nnunet: Path) -> None:
    plain = importlib.util.find_spec(bridge.HOOKED_MODULE)
    bridge.install()
    module = lookup_module()

    spec = module.__spec__

    assert plain is not None
    assert spec is not None
    found = (spec.name, spec.origin, type(spec.loader))
    assert found == (plain.name, plain.origin, type(plain.loader))
    # The hook was put on this one loader and is taken off after the import.
    assert "exec_module" not in vars(spec.loader)
    assert "return {" in inspect.getsource(module)
    function = module.recursive_find_python_class
    signature = str(inspect.signature(function))
    assert signature.startswith("(folder, class_name, current_module")
    assert function.__doc__ == "Stock."


def test_a_reload_is_wrapped_again(nnunet: Path, our_trainers: ModuleType) -> None:
    bridge.install()
    find = importlib.reload(lookup_module()).recursive_find_python_class

    assert find("f", "AutoregPretrainedTrainer", TRAINERS_SEARCH) == "our AutoregPretrainedTrainer"


def test_an_import_that_fails_leaves_no_trace_on_the_next_one(
    nnunet: Path,
    our_trainers: ModuleType,
) -> None:
    bridge.install()
    (nnunet / "find_class_by_name.py").write_text("raise InterruptedError")

    with pytest.raises(InterruptedError):
        lookup_module()

    # Another length, so that Python does not take the compiled file of before.
    (nnunet / "find_class_by_name.py").write_text(LOOKUP + "# whole again\n")
    importlib.invalidate_caches()
    find = lookup_module().recursive_find_python_class

    assert find("f", "AutoregPretrainedTrainer", TRAINERS_SEARCH) == "our AutoregPretrainedTrainer"


def test_another_finder_that_asks_all_others_does_not_loop(
    nnunet: Path,
    our_trainers: ModuleType,
) -> None:
    class Asker:
        """As lazy-import and instrumentation tools do: ask everybody else, then wrap what comes
        back.
        """

        def find_spec(self, fullname, path=None, target=None):
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
            return None

    bridge.install()
    # Behind the bridge, which also asks all other finders: each would ask the other for ever.
    sys.meta_path.insert(1, Asker())
    find = lookup_module().recursive_find_python_class

    assert find("f", "AutoregPretrainedTrainer", TRAINERS_SEARCH) == "our AutoregPretrainedTrainer"


def test_finders_and_loaders_of_an_older_kind_do_not_stop_nnunet(nnunet: Path) -> None:
    class Slotted:
        """A loader that takes no attributes."""

        __slots__ = ()

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.recursive_find_python_class = "stock, not wrapped"

    class Finder:
        def find_spec(self, fullname, path=None, target=None):
            if fullname != bridge.HOOKED_MODULE:
                return None
            return importlib.util.spec_from_loader(fullname, Slotted())

    bridge.install()
    # A finder without find_spec, as Python before 3.4 had, and one whose loader cannot be hooked.
    sys.meta_path[1:1] = [SimpleNamespace(find_module=lambda *_: None), Finder()]

    assert lookup_module().recursive_find_python_class == "stock, not wrapped"


def test_a_look_up_module_without_the_function_is_not_changed(nnunet: Path) -> None:
    (nnunet / "find_class_by_name.py").write_text("something_else = 1\n")
    bridge.install()
    assert lookup_module().something_else == 1


def test_no_name_breaks_the_folder_names_of_nnunet() -> None:
    # nnU-Net splits folder names at "__".
    names = [*bridge.TRAINERS, *bridge.PLANNERS, *bridge.NORMALIZATIONS]

    assert not [name for name in names if "__" in name]


@pytest.mark.parametrize("base", bridge.TRAINERS)
@pytest.mark.parametrize("length", ["_5epochs", "_17epochs"])
def test_every_trainer_is_found_by_a_name_with_any_length(
    nnunet: Path,
    our_trainers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    length: str,
) -> None:
    monkeypatch.setitem(bridge.TRAINERS, base, our_trainers.__name__)
    bridge.install()

    found = lookup_module().recursive_find_python_class("f", base + length, TRAINERS_SEARCH)

    assert found == f"our {base}{length}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AutoregPretrainedTrainer", ("AutoregPretrainedTrainer", None)),
        ("AutoregPretrainedTrainer_1epochs", ("AutoregPretrainedTrainer", 1)),
        ("AutoregScratchTrainer_1000epochs", ("AutoregScratchTrainer", 1000)),
    ],
)
def test_a_name_is_split_into_its_base_and_its_length(
    name: str,
    expected: tuple[str, int | None],
) -> None:
    assert bridge.split_length(name) == expected


@pytest.mark.parametrize(
    "length",
    [
        "_epochs",
        "_0epochs",
        "_05epochs",
        "_-5epochs",
        "_5.5epochs",
        # An Arabic 5, which int() would accept.
        "_\u0665epochs",
        "_5epoch",
        "_5epochs_5epochs",
        "5epochs",
        # int() refuses more than 4300 digits with a ValueError.
        "_" + "9" * 5000 + "epochs",
    ],
)
def test_a_length_that_is_not_a_plain_number_is_not_our_name(length: str) -> None:
    name = f"AutoregPretrainedTrainer{length}"

    assert bridge.find_module(name, TRAINERS_SEARCH) is None


def test_planners_and_normalisations_have_no_lengths() -> None:
    assert bridge.find_module("AutoregPlanner_5epochs", None) is None
    assert bridge.find_module("AutoregPercentileNormalization_5epochs", None) is None


def test_the_bridge_imports_only_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(bridge.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])

    assert imported <= set(sys.stdlib_module_names)


def run_pth_line(folder: Path) -> subprocess.CompletedProcess[str]:
    """Execute the ``.pth`` line as ``site`` does, where ``folder`` is searched first, and report
    what is loaded then.
    """
    script = (
        "import os, sys  # as site has\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "before = set(sys.modules)\n"
        f"exec({bridge.PTH_LINE!r})\n"
        "print(sorted(set(sys.modules) - before), any(hasattr(f, 'is_autoreg_bridge') for f in "
        "sys.meta_path))"
    )
    # -I and -S: no site-packages, so that neither an installed bridge nor its package helps.
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_pth_line_loads_the_bridge_and_nothing_else() -> None:
    done = run_pth_line(Path(bridge.__file__).parents[1])

    assert done.stdout == "['nnunet_autoreg', 'nnunet_autoreg.bridge'] True\n"
    assert done.stderr == ""


@pytest.mark.parametrize("broken", ["__init__.py", "bridge.py"])
def test_the_pth_line_is_silent_when_the_package_is_broken(tmp_path: Path, broken: str) -> None:
    package = tmp_path / "nnunet_autoreg"
    package.mkdir()
    for name in ("__init__.py", "bridge.py"):
        # An empty bridge.py lacks the function that the line calls; that must be silent too.
        (package / name).write_text("def (:\n" if name == broken else "")

    done = run_pth_line(tmp_path)

    assert done.stdout.endswith("False\n")
    assert done.stderr == ""


def test_the_pth_line_is_silent_when_the_package_is_gone(tmp_path: Path) -> None:
    done = run_pth_line(tmp_path)
    assert done.stdout == "[] False\n"
    assert done.stderr == ""


def test_the_pth_line_is_one_line_that_site_executes() -> None:
    # site executes a line of a .pth file only if it begins with "import ".
    assert bridge.PTH_LINE.startswith("import ")
    assert bridge.PTH_LINE.count("\n") == 1
    assert bridge.PTH_LINE.isascii()
