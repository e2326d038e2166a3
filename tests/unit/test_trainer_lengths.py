"""Test the trainers that are named after their number of epochs, such as ``..._20epochs``."""

import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from nnunet_autoreg import bridge
from nnunet_autoreg.trainers import (
    autoreg_classification_trainers,
    autoreg_detection_trainers,
    autoreg_trainers,
)

TRAINER_MODULES = (autoreg_trainers, autoreg_detection_trainers, autoreg_classification_trainers)
MODULES = {module.__name__: module for module in TRAINER_MODULES}


def base_and_module(name: str) -> tuple[Any, ModuleType]:
    module = MODULES[bridge.TRAINERS[name]]
    return getattr(module, name), module


@pytest.mark.parametrize("name", bridge.TRAINERS)
def test_a_trainer_of_any_length_is_a_subclass_of_its_base(name: str) -> None:
    base, module = base_and_module(name)

    made = getattr(module, f"{name}_37epochs")

    assert issubclass(made, base)
    assert made.length == 37
    assert base.length is None  # type: ignore[attr-defined]
    assert (made.__name__, made.__qualname__) == (f"{name}_37epochs", f"{name}_37epochs")
    assert made.__module__ == module.__name__


@pytest.mark.parametrize("name", bridge.TRAINERS)
def test_only_segmentation_trainers_build_the_plans_own_network(name: str) -> None:
    # What the others build is not a network of nnU-Net, so they write no stock models.
    base, module = base_and_module(name)
    made = getattr(module, f"{name}_3epochs")

    builders = {found.build_network_architecture for found in (made, base)}

    own = autoreg_trainers._AutoregTrainer.build_network_architecture
    is_segmentation = name in ("AutoregPretrainedTrainer", "AutoregScratchTrainer")
    assert (builders == {own}) == is_segmentation


def test_the_same_name_gives_the_same_class() -> None:
    # Pickle looks for the class by its name, and wants to find the same object.
    first = autoreg_trainers.AutoregScratchTrainer_41epochs

    assert autoreg_trainers.AutoregScratchTrainer_41epochs is first
    assert autoreg_trainers.AutoregScratchTrainer_42epochs is not first


def test_the_name_can_be_imported_and_inherited_from() -> None:
    from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer_43epochs

    class Mine(AutoregPretrainedTrainer_43epochs):  # type: ignore[misc]
        pass

    assert Mine.length == 43


@pytest.mark.parametrize(
    "name",
    [
        "NoTrainerOfOurs_5epochs",
        "AutoregPretrainedTrainer_0epochs",
        # A class of the module, but not a trainer that nnU-Net may ask for.
        "_AutoregTrainer_5epochs",
        # A trainer of the other module.
        "AutoregDetectionTrainer_5epochs",
        "nnUNetTrainer_5epochs",
    ],
)
def test_other_names_are_not_attributes_of_the_module(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(autoreg_trainers, name)

    assert name in str(caught.value)


def test_the_detection_module_makes_no_segmentation_trainer() -> None:
    # It imports the class of that name, so it would otherwise have two trainers of one name.
    assert not hasattr(autoreg_detection_trainers, "AutoregPretrainedTrainer_5epochs")


@pytest.mark.parametrize("name", bridge.TRAINERS)
def test_nnunet_finds_a_trainer_of_any_length_by_its_name(name: str) -> None:
    bridge.install()
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    found = recursive_find_trainer_class_by_name(f"{name}_23epochs")

    assert found is getattr(base_and_module(name)[1], f"{name}_23epochs")


def test_a_fresh_process_unpickles_a_trainer_of_any_length() -> None:
    # A spawned worker starts without the class that the main process has made.
    pickled = pickle.dumps(autoreg_detection_trainers.AutoregDetectionScratchTrainer_29epochs)
    program = f"import pickle; found = pickle.loads({pickled!r}); print(found, found.length)"

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )

    module = autoreg_detection_trainers.__name__
    expected = f"<class '{module}.AutoregDetectionScratchTrainer_29epochs'> 29"
    assert done.stdout.strip() == expected, done.stderr
    assert pickle.loads(pickled).length == 29
