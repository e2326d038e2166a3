"""Make stock nnU-Net find our trainers, our planner and one normalisation by name.

A ``.pth`` line (``PTH_LINE``) runs ``install`` at every start of the interpreter. Therefore this
file imports only what every interpreter has loaded anyway, and does nothing but register one import
hook. Stock look-ups stay as they are: the bridge answers only where nnU-Net found nothing, and only
for the names of the tables below.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
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
PLANNERS = {"AutoregPlanner": "nnunet_autoreg.planners.autoreg_planner"}
NORMALIZATIONS = {"AutoregPercentileNormalization": "nnunet_autoreg.finetune.normalization"}
CLASSIFICATION_TRAINERS = "nnunet_autoreg.trainers.autoreg_classification_trainers"
TRAINERS = {
    "AutoregPretrainedTrainer": "nnunet_autoreg.trainers.autoreg_trainers",
    "AutoregScratchTrainer": "nnunet_autoreg.trainers.autoreg_trainers",
    "AutoregDetectionTrainer": "nnunet_autoreg.trainers.autoreg_detection_trainers",
    "AutoregDetectionScratchTrainer": "nnunet_autoreg.trainers.autoreg_detection_trainers",
    "AutoregClassificationTrainer": CLASSIFICATION_TRAINERS,
    "AutoregClassificationScratchTrainer": CLASSIFICATION_TRAINERS,
}
"""Class name -> module. Every trainer also answers to ``<name>_<N>epochs``, see
``split_length``."""


def split_length(class_name: str) -> "tuple[str, int | None]":
    """Split the name of a trainer into its base name and its number of epochs.

    ``AutoregPretrainedTrainer_20epochs`` is ("AutoregPretrainedTrainer", 20). A name without a
    length, or with one that is not written as N is usually written (0, 05, 1e2), is returned whole
    with None: nnU-Net names result folders after the class, so each length must have one name only.
    """
    base, underscore, length = class_name.rpartition("_")
    digits = length.removesuffix("epochs")
    is_number = digits.isascii() and digits.isdigit() and digits[0] != "0" and len(digits) < 10

    if underscore and length.endswith("epochs") and is_number:
        return base, int(digits)
    return class_name, None


class BridgeFinder:
    """Wrap nnU-Net's look-up function once its module has been executed.

    This meta-path finder finds nothing itself: the other finders are asked for the module.
    """

    is_autoreg_bridge = True

    def __init__(self) -> None:
        self._searching_threads: set[int] = set()

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders give for nnU-Net's look-up module.

        It is None for every other module.
        """
        thread = _thread.get_ident()
        # Another finder may ask all finders in turn, this one included.
        if fullname != HOOKED_MODULE or thread in self._searching_threads:
            return None

        self._searching_threads.add(thread)
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    _wrap_after_execution(spec)
                    return spec
            return None
        finally:
            self._searching_threads.discard(thread)


def install() -> None:
    """Register the hook once, unless the environment switches it off.

    Modules of nnU-Net that are loaded already get the wrapped look-up as well.
    """
    if os.environ.get(SWITCH) == "0" or is_live():
        return
    sys.meta_path.insert(0, BridgeFinder())
    if HOOKED_MODULE in sys.modules:
        _wrap_lookup(sys.modules[HOOKED_MODULE])


def is_live() -> bool:
    """Return whether the hook is registered in this interpreter."""
    return any(getattr(finder, "is_autoreg_bridge", False) for finder in sys.meta_path)


def _wrap_after_execution(spec: "ModuleSpec") -> None:
    """Shadow the loader's ``exec_module`` for one call.

    The loader itself is not replaced, so that ``inspect`` still finds the source of the module.
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

    # Some loaders accept no attributes. nnU-Net must still load then; autoreg_doctor reports that
    # our names are not found.
    try:
        loader.exec_module = exec_module
    except AttributeError:
        return


def _wrap_lookup(module: "ModuleType") -> None:
    """Replace the look-up function in its module by one that also looks in our tables.

    Modules of nnU-Net that have imported it from there already get the wrapped function as well.
    """
    stock = getattr(module, HOOKED_FUNCTION, None)
    if stock is None or hasattr(stock, "is_autoreg_bridge"):
        return

    import functools

    @functools.wraps(stock)
    def recursive_find_python_class(*args: "Any", **kwargs: "Any") -> "Any":
        found = stock(*args, **kwargs)
        if found is not None:
            return found

        # nnU-Net found nothing. The signature is (folder, class_name, current_module, ...).
        class_name = str(kwargs.get("class_name", args[1] if len(args) > 1 else ""))
        searched = kwargs.get("current_module", args[2] if len(args) > 2 else None)
        our_module = find_module(class_name, searched)
        if our_module is not None:
            return _load(class_name, our_module)
        _suggest(class_name, searched)
        return None

    wrapped: Any = recursive_find_python_class
    wrapped.is_autoreg_bridge = True
    for name, user in list(sys.modules.items()):
        if name.startswith("nnunetv2.") and getattr(user, HOOKED_FUNCTION, None) is stock:
            setattr(user, HOOKED_FUNCTION, wrapped)
    setattr(module, HOOKED_FUNCTION, wrapped)


def find_module(class_name: str, searched: "str | None") -> "str | None":
    """Return the name of our module that holds ``class_name``; None if we have no such class.

    Args:
        searched: the package of nnU-Net in which the class is looked for. A trainer is not offered
            if a planner is wanted. None: it is looked for in a folder of nnUNet_extTrainer.
    """
    base, _ = split_length(class_name)
    candidates = (
        (TRAINERS_ROOM, TRAINERS.get(base)),
        (PLANNERS_ROOM, PLANNERS.get(class_name)),
        (NORMALIZATIONS_ROOM, NORMALIZATIONS.get(class_name)),
    )
    for room, module in candidates:
        if module is not None and (searched is None or f"{searched}.".startswith(f"{room}.")):
            return module
    return None


_suggested: "set[str]" = set()


def _suggest(class_name: str, searched: "str | None") -> None:
    """Print the closest of our names where nnU-Net asks for a class that begins like ours.

    The look-up continues: the class may be the user's, in a folder of nnUNet_extTrainer.
    """
    base, underscore, length = class_name.partition("_")
    known: list[str] = []
    for room, names in ((TRAINERS_ROOM, TRAINERS), (PLANNERS_ROOM, PLANNERS)):
        if f"{searched}.".startswith(f"{room}."):
            known += names
    if not known or not base.lower().startswith("autoreg") or class_name in _suggested:
        return

    import difflib

    _suggested.add(class_name)
    close = difflib.get_close_matches(base, known, n=1, cutoff=0.5)
    if base in known:
        advice = f"a length is written as {base}_20epochs, not as {underscore}{length}"
    elif close:
        advice = f"did you mean {close[0]}?"
    else:
        advice = f"known are {', '.join(sorted(known))}"
    print(f"nnunet-autoreg has no class {class_name}; {advice}", file=sys.stderr, flush=True)


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
            f"'{class_name}' belongs to nnunet-autoreg, but {module} cannot be imported "
            f"({type(error).__name__}: {error}). Run autoreg_doctor to see what is wrong, or "
            "reinstall nnunet-autoreg",
        ) from error
