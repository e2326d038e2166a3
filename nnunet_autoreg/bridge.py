"""The start-up bridge: makes stock nnU-Net find our trainers, planners and one normalisation by
name.

A ``.pth`` line (``PTH_LINE``) runs ``install`` at every start of the interpreter, so this file
imports only what every interpreter has loaded anyway, does nothing but register one import hook,
and leaves stock look-ups as they are: only a name of ours that nnU-Net did not find is answered
from a fixed table.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "NNUNET_AUTOREG_BRIDGE"
PTH_NAME = "nnunet_autoreg_bridge.pth"
PTH_LINE = (
    'import sys; exec("try:\\n from nnunet_autoreg.bridge import install; install()\\nexcept '
    'Exception: pass")\n'
)

HOOKED_MODULE = "nnunetv2.utilities.find_class_by_name"
HOOKED_FUNCTION = "recursive_find_python_class"

PLANNERS_ROOM = "nnunetv2.experiment_planning"
TRAINERS_ROOM = "nnunetv2.training"
NORMALIZATIONS_ROOM = "nnunetv2.preprocessing.normalization"
LENGTHS = ("", "_5epochs", "_50epochs", "_150epochs", "_300epochs")
PLANNERS = {"AutoregPlanner": "nnunet_autoreg.planners.autoreg_planner"}
NORMALIZATIONS = {"AutoregPercentileNormalization": "nnunet_autoreg.finetune.normalization"}
TRAINERS = {
    base + length: f"nnunet_autoreg.trainers.{module}"
    for base, module in (
        ("AutoregPretrainedTrainer", "autoreg_trainers"),
        ("AutoregScratchTrainer", "autoreg_trainers"),
        ("AutoregDetectionTrainer", "autoreg_detection_trainers"),
        ("AutoregDetectionScratchTrainer", "autoreg_detection_trainers"),
    )
    for length in LENGTHS
}


class BridgeFinder:
    """A meta-path finder that lets others find nnU-Net's look-up module and wraps the look-up once
    it has run.
    """

    is_autoreg_bridge = True

    def __init__(self) -> None:
        self._asking: set[int] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec of nnU-Net's look-up module, as the other finders give it; None for every other
        module.
        """
        if fullname != HOOKED_MODULE or _thread.get_ident() in self._asking:
            return None
        self._asking.add(_thread.get_ident())
        try:
            for finder in [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    _wrap_after_execution(spec)
                    return spec
            return None
        finally:
            self._asking.discard(_thread.get_ident())


def install() -> None:
    """Register the hook, once, unless the environment switches it off; also reach modules that are
    loaded already.
    """
    if os.environ.get(SWITCH) == "0" or is_live():
        return
    sys.meta_path.insert(0, BridgeFinder())
    if HOOKED_MODULE in sys.modules:
        _wrap_lookup(sys.modules[HOOKED_MODULE])


def is_live() -> bool:
    """Whether the hook is registered in this interpreter."""
    return any(getattr(finder, "is_autoreg_bridge", False) for finder in sys.meta_path)


def _wrap_after_execution(spec: "ModuleSpec") -> None:
    """Shadow the loader's ``exec_module`` for one call; the loader itself stays what it is, so that
    ``inspect`` works.
    """
    loader: Any = spec.loader
    stock: Any = getattr(loader, "exec_module", None)
    if stock is None:
        return

    def exec_module(module: "ModuleType") -> None:
        # A zip archive's loader serves other modules meanwhile.
        if module.__name__ != HOOKED_MODULE:
            stock(module)
            return
        del loader.exec_module
        stock(module)
        _wrap_lookup(module)

    # A loader that takes no attributes: nnU-Net must still load, and autoreg_doctor tells that our
    # names are not found.
    try:
        loader.exec_module = exec_module
    except AttributeError:
        return


def _wrap_lookup(module: "ModuleType") -> None:
    """Replace the look-up in its module, and wherever nnU-Net has imported it from there
    already.
    """
    stock = getattr(module, HOOKED_FUNCTION, None)
    if stock is None or hasattr(stock, "is_autoreg_bridge"):
        return
    wrapped = _with_our_classes(stock)
    for name, user in list(sys.modules.items()):
        if name.startswith("nnunetv2.") and getattr(user, HOOKED_FUNCTION, None) is stock:
            setattr(user, HOOKED_FUNCTION, wrapped)
    setattr(module, HOOKED_FUNCTION, wrapped)


def _with_our_classes(stock: "Callable[..., Any]") -> "Callable[..., Any]":
    import functools

    @functools.wraps(stock)
    def recursive_find_python_class(*args: "Any", **kwargs: "Any") -> "Any":
        found = stock(*args, **kwargs)
        if found is not None:
            return found
        class_name = str(kwargs.get("class_name", args[1] if len(args) > 1 else ""))
        searched = kwargs.get("current_module", args[2] if len(args) > 2 else None)
        module = _module_of(class_name, searched)
        return None if module is None else _load(class_name, module)

    recursive_find_python_class.is_autoreg_bridge = True  # type: ignore[attr-defined]
    return recursive_find_python_class


def _module_of(class_name: str, searched: "str | None") -> "str | None":
    """Our module that holds ``class_name``, if it belongs in the package ``searched`` (None: a
    folder of nnUNet_extTrainer).
    """
    for room, table in (
        (TRAINERS_ROOM, TRAINERS),
        (PLANNERS_ROOM, PLANNERS),
        (NORMALIZATIONS_ROOM, NORMALIZATIONS),
    ):
        if class_name in table and (searched is None or f"{searched}.".startswith(f"{room}.")):
            return table[class_name]
    return None


def _load(class_name: str, module: str) -> "Any":
    """Import one of our classes.

    Raises:
        ImportError: it cannot be imported; the message names the class and the cause.
    """
    import importlib

    try:
        return getattr(importlib.import_module(module), class_name)
    except Exception as error:
        raise ImportError(
            f"nnunet-autoreg offers '{class_name}', but {module} cannot be imported "
            f"({type(error).__name__}: {error}); "
            "run autoreg_doctor to see what is wrong, or install nnunet-autoreg anew"
        ) from error
