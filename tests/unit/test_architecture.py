"""The house rules that can be read off import statements: levels, light modules, empty ``__init__``
files.
"""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = "nnunet_autoreg"

# Level by level. The files of levels 0 and 1 are rooms themselves, in the order in which they may
# import each other.
LEVELS = [
    [
        "errors",
        "geometry",
        "wording",
        "records",
        "rng",
        "safe_load",
        "machine",
        "children",
        "phases",
        "stopping",
        "terminal",
    ],
    ["families", "plan", "objective_kinds", "plan_check", "nnunet_api", "bridge", "requirements"],
    ["io"],
    ["corpus", "model"],
    ["planning", "store", "checkpoint"],
    ["sampling", "objectives", "finetune"],
    ["report", "convert"],
    ["downstream"],
    ["pretrain", "benchmark", "detection", "classification", "installation"],
    ["cli", "trainers", "planners"],
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ROOMS_OF_ORDERED_FILES = (0, 1)
# One level, one way: an objective reads the samples that a sequence lays out; a sequence knows no
# objective.
SIDEWAYS = {("objectives", "sampling")}

MAY_IMPORT_NNUNET = {
    "nnunet_api",
    "finetune",
    "convert",
    "benchmark",
    "downstream",
    "detection",
    "classification",
    "trainers",
    "planners",
}
LIGHT_ROOMS = {*LEVELS[0], *LEVELS[1], "io", "corpus", "planning", "store", "installation", "cli"}
LIGHT_FILES = {
    "model.sizes",
    "model.card",
    "model.verdict",
    "objectives.prediction_plan",
    "objectives.alice_plan",
    "convert.choices",
}
LIGHT_FOLDERS = ("objectives.registered.",)
HEAVY = (
    "torch",
    "torchvision",
    "nnunetv2",
    "timm",
    "dynamic_network_architectures",
    "batchgeneratorsv2",
)


def source_files() -> dict[str, Path]:
    """Dotted name below the package -> file; ``trainers/`` and ``planners/`` lie at the top of the
    repository.
    """
    files = {}
    prefixes = {PACKAGE: "", "trainers": "trainers.", "planners": "planners."}
    for folder, prefix in prefixes.items():
        for path in sorted((REPO / folder).rglob("*.py")):
            inside = path.relative_to(REPO / folder).with_suffix("")
            name = prefix + ".".join(inside.parts)
            # A package is named by its folder: "model.__init__" is "model".
            name = name.removesuffix(".__init__").removesuffix("__init__")
            files[name] = path
    return files


FILES = source_files()
MODULES = sorted(name for name, path in FILES.items() if path.name != "__init__.py")


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that ``module`` imports anywhere in its file, by full dotted name."""
    found = set()
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports with the full name of the module"
            # "from package import x" names a module if x is one of our files.
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                found.add(full_name if is_ours(full_name) else str(node.module))
    return frozenset(found)


def is_ours(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in FILES


def own_imports(module: str) -> set[str]:
    return {
        name.removeprefix(f"{PACKAGE}.")
        for name in imports(module)
        if name.startswith(f"{PACKAGE}.")
    }


def room_of(module: str) -> str:
    return module.partition(".")[0]


def may_import(importer: str, imported: str) -> bool:
    """Whether the table of levels lets one of our files import another."""
    here = room_of(importer)
    there = room_of(imported)
    if LEVEL_OF[there] < LEVEL_OF[here] or here == there or (here, there) in SIDEWAYS:
        return True
    level = LEVEL_OF[here]
    ordered = LEVELS[level]
    return (
        level in ROOMS_OF_ORDERED_FILES
        and LEVEL_OF[there] == level
        and ordered.index(there) < ordered.index(here)
    )


def test_the_rule_itself_distinguishes_up_from_down() -> None:
    # Two files of one ordered level, a file of a higher level, and a folder of a higher level.
    assert may_import("records", "errors")
    assert not may_import("errors", "records")
    assert may_import("model.card", "plan")
    assert not may_import("plan", "model.card")
    assert may_import("pretrain.trainer", "report.metrics")
    assert not may_import("report.metrics", "pretrain.trainer")
    # Two folders of the same level may not import each other, except for the one way of SIDEWAYS.
    assert not may_import("pretrain.trainer", "detection.boxes")
    assert may_import("objectives.x", "sampling.y")
    assert not may_import("sampling.y", "objectives.x")
    assert not may_import("planning", "store.case")
    assert may_import("trainers.x", "finetune.y")


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_in_a_known_room_and_imports_downwards_only(module: str) -> None:
    assert room_of(module) in LEVEL_OF, f"{module} belongs to no room of the table"
    wrong = sorted(name for name in own_imports(module) if not may_import(module, name))
    assert not wrong, f"{module} (level {LEVEL_OF[room_of(module)]}) must not import {wrong}"


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {module: own_imports(module).intersection(MODULES) for module in MODULES}
    # static_order() raises CycleError if there is a circle.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_everything_imported_from_the_package_exists() -> None:
    missing = set()
    for module in MODULES:
        missing |= {(module, name) for name in own_imports(module) if name not in FILES}

    assert not missing


def test_init_files_hold_nothing_but_a_docstring_and_the_version() -> None:
    for name, path in FILES.items():
        if path.name != "__init__.py":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        rest = []
        for node in body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_docstring:
                rest.append(node)
        if name == "":
            version, lazy = rest
            assert ast.unparse(version).startswith("__version__ = ")
            # It imports load_encoder when that is first used, and never when the package is.
            assert isinstance(lazy, ast.FunctionDef)
            assert lazy.name == "__getattr__"
        else:
            assert rest == [], f"{path} must stay empty"


def test_the_files_of_pretrain_state_their_reading_order() -> None:
    stated = {}
    for module in MODULES:
        if room_of(module) != "pretrain":
            continue
        source = FILES[module].read_text(encoding="utf-8")
        found = re.search(r"File (\d+) of (\d+) in reading order", source)
        assert found, f"{module} does not say where it is in the reading order"
        stated[module] = (int(found[1]), int(found[2]))

    # Every number from 1 to the number of files exists once, and every file states the same total.
    assert sorted(stated.values()) == [(n, len(stated)) for n in range(1, len(stated) + 1)]
    page = (REPO / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    for module, (number, _) in stated.items():
        assert f"| {number} `{module.replace('.', '/')}.py` |" in page


def test_nnunet_is_imported_in_its_own_rooms_only() -> None:
    users = set()
    for module in MODULES:
        if "nnunetv2" in {name.split(".")[0] for name in imports(module)}:
            users.add(module)

    assert {m for m in users if room_of(m) not in MAY_IMPORT_NNUNET} == set()
    assert "nnunet_api" in users


def light_modules() -> list[str]:
    return [m for m in MODULES if is_light(m)]


def is_light(module: str) -> bool:
    in_light_folder = module.startswith(LIGHT_FOLDERS)
    return room_of(module) in LIGHT_ROOMS or module in LIGHT_FILES or in_light_folder


def test_importing_a_light_module_loads_no_torch() -> None:
    # One process for all modules: the message names the first one after which torch is loaded.
    script = (
        "import importlib, sys\n"
        f"for module in {light_modules()!r}:\n"
        f"    importlib.import_module('{PACKAGE}.' + module)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, f'importing {module} loads {loaded}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


SHARED_BY_COMMANDS = ("cli.common", "cli.options", "cli.starting")
COMMANDS = sorted(
    module
    for module in MODULES
    if room_of(module) == "cli"
    and module not in SHARED_BY_COMMANDS
    and "argparse" in imports(module)
)


@pytest.mark.parametrize("module", COMMANDS)
def test_a_commands_help_loads_no_torch_and_ends_with_0(module: str) -> None:
    script = (
        f"import sys, {PACKAGE}.{module} as command\n"
        "try:\n"
        "    command.main(['--help'])\n"
        "except SystemExit as ended:\n"
        # "or 0": an empty list would be printed as "[]" and end with 1.
        f"    sys.exit(ended.code or [name for name in {HEAVY!r} if name in sys.modules] or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: autoreg_")


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_imports_first_what_stops_it_while_it_starts(module: str) -> None:
    body = ast.parse(FILES[module].read_text(encoding="utf-8")).body
    imported = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = [ast.unparse(node) for node in imported]

    own = [line for line in lines if PACKAGE in line]

    # cli.starting handles a stop while modules are imported, so it comes before the slow ones.
    assert own[0] == f"import {PACKAGE}.cli.starting"


def test_no_public_class_name_exists_twice_in_the_project() -> None:
    names: Counter[str] = Counter()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names[node.name] += 1

    used_twice = sorted(name for name, count in names.items() if count > 1)

    assert used_twice == []


def test_no_class_name_exists_twice_in_the_tests() -> None:
    names: Counter[str] = Counter()
    for path in (REPO / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names[node.name] += 1

    used_twice = sorted(name for name, count in names.items() if count > 1)

    assert used_twice == []


def declared_dependencies() -> set[str]:
    block = re.search(
        r"^dependencies = \[(.*?)^\]",
        (REPO / "pyproject.toml").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert block is not None
    names = set()
    for line in re.findall(r'"([^"]+)"', block.group(1)):
        # "numpy>=1.26", "torch[opt]; python_version > '3.9'": the name ends at the first such sign.
        name = re.split(r"[<>=!~; \[]", line)[0]
        names.add(canonical(name))
    return names


def canonical(name: str) -> str:
    # The rule of packaging: -, _ and . are the same in the name of a distribution.
    return re.sub(r"[-_.]+", "-", name).lower()


NNUNETS_OWN = {"acvl-utils", "batchgenerators"}
"""Declared because nnU-Net's own functions, which we call, live in them; not imported by name."""

OPTIONAL = {"tensorboard", "wandb", "huggingface-hub"}
"""Imported only where the user has asked for what they do; each is an extra."""


def test_the_declared_dependencies_are_the_imported_ones() -> None:
    roots = set()
    for module in MODULES:
        roots |= {name.split(".")[0] for name in imports(module)}
    foreign = roots - set(sys.stdlib_module_names) - {PACKAGE}

    # The name in an import is not always that of the distribution (yaml comes with pyyaml).
    providers = packages_distributions()
    used = set()
    for name in foreign:
        if importlib.util.find_spec(name):
            used |= {canonical(distribution) for distribution in providers[name]}

    assert (used - OPTIONAL) | NNUNETS_OWN == declared_dependencies()
