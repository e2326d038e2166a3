"""What is borrowed from nnU-Net does exactly what nnU-Net does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused

from nnunet_autoreg import nnunet_api
from nnunet_autoreg.errors import PlanError, UsageError
from nnunet_autoreg.plan import IntensityWindow

WINDOW = IntensityWindow(
    mean=40.0,
    std=100.0,
    median=35.0,
    min=-900.0,
    max=1500.0,
    percentile_00_5=-160.0,
    percentile_99_5=400.0,
)


def test_a_missing_variable_is_named_with_the_line_that_sets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    with refused(UsageError, "usage-variable-unset", "export nnUNet_results="):
        nnunet_api.results_folder()


def test_a_variable_that_names_no_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "gone"))

    with refused(UsageError, "usage-no-folder", "nnUNet_preprocessed", tmp_path / "gone"):
        nnunet_api.preprocessed_folder()

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "file"))

    with refused(UsageError, "usage-no-folder", tmp_path / "file"):
        nnunet_api.preprocessed_folder()


@pytest.mark.parametrize("name", ["4", "004", "Dataset004_Hippo"])
def test_a_dataset_is_found_by_number_and_by_name(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for folder in ("Dataset004_Hippo", "Dataset027_ACDC"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert nnunet_api.dataset_folder(name) == tmp_path / "Dataset004_Hippo"


def test_an_unknown_dataset_gets_a_close_match_or_the_known_numbers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for folder in ("Dataset004_Hippo", "Dataset027_ACDC"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))

    with refused(UsageError, "usage-no-dataset", "Dataset004_Hipo", "'Dataset004_Hippo'"):
        nnunet_api.dataset_folder("Dataset004_Hipo")
    # Python itself refuses to convert numbers of more than 4300 digits.
    with refused(UsageError, "usage-no-dataset", "Dataset004_Hippo"):
        nnunet_api.dataset_folder("4" * 5000)
    with refused(UsageError, "usage-no-dataset", "-d 5", "4 (Dataset004_Hippo), 27"):
        nnunet_api.dataset_folder("5")


def test_two_datasets_of_one_number_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for folder in ("Dataset004_A", "Dataset004_B"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))

    with refused(UsageError, "usage-ambiguous-dataset", "Dataset004_A", "Dataset004_B"):
        nnunet_api.dataset_folder("4")


def run_nnunet(
    array: Any,
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    scheme: str,
    use_mask: bool,
) -> Any:
    """The same case through nnU-Net's own preprocessor."""
    import dataclasses
    from types import SimpleNamespace

    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    function = "resample_data_or_seg_to_shape"
    shared = {"order_z": 0, "force_separate_z": None}
    configuration = ConfigurationManager(
        {
            "architecture": {"network_class_name": "unused"},
            "spacing": list(target),
            "normalization_schemes": [scheme],
            "use_mask_for_norm": [use_mask],
            "resampling_fn_data": function,
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **shared},
            "resampling_fn_seg": function,
            "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **shared},
        },
    )
    plans = SimpleNamespace(
        transpose_forward=[0, 1, 2],
        foreground_intensity_properties_per_channel={"0": dataclasses.asdict(WINDOW)},
    )
    preprocessor = DefaultPreprocessor(verbose=False)
    return preprocessor.run_case_npy(
        array,
        None,
        {"spacing": list(spacing)},
        plans,
        configuration,
        {},
    )[0]


@pytest.mark.parametrize(
    ("dataset", "target", "scheme", "use_mask"),
    [
        ("Dataset004_Hippocampus", (1.2, 0.9, 1.1), "ZScoreNormalization", False),
        ("Dataset004_Hippocampus", (1.0, 1.0, 1.0), "ZScoreNormalization", True),
        ("Dataset052_SarcomaCT", (3.0, 2.0, 2.0), "CTNormalization", False),
    ],
)
def test_a_real_case_is_preprocessed_bit_for_bit_as_nnunet_does(
    shared_data: Path,
    dataset: str,
    target: tuple[float, ...],
    scheme: str,
    use_mask: bool,
) -> None:
    path = min((shared_data / "nnUNet_raw" / dataset / "imagesTr").iterdir())
    scan = nnunet_api.read_scan(path)
    before = scan.array_CZYX.copy()
    ours = nnunet_api.crop_resample_normalise(
        scan.array_CZYX,
        scan.spacing_mm,
        target,
        scheme,
        use_mask,
        WINDOW,
    )

    theirs = run_nnunet(scan.array_CZYX, scan.spacing_mm, target, scheme, use_mask)

    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
    # The scan itself is not changed in place.
    np.testing.assert_array_equal(scan.array_CZYX, before)


def test_a_masked_scan_keeps_zeros_outside_and_equals_nnunet() -> None:
    # A cube with a margin of zeros, and a row of zeros inside the box around it.
    array = np.zeros((1, 20, 20, 20), dtype=np.float32)
    array[0, 4:16, 4:16, 4:16] = np.random.default_rng(0).normal(100, 10, (12, 12, 12))
    array[0, 4, 4, :] = 0

    ours = nnunet_api.crop_resample_normalise(
        array,
        (1, 1, 1),
        (1, 1, 1),
        "ZScoreNormalization",
        True,
        None,
    )

    theirs = run_nnunet(array, (1, 1, 1), (1, 1, 1), "ZScoreNormalization", True)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (1, 12, 12, 12)
    assert (ours[0, 0, 0] == 0).all()
    inside = array[:, 4:16, 4:16, 4:16] != 0
    assert abs(float(ours[inside].mean())) < 1e-4


def test_an_anisotropic_scan_is_resampled_slice_by_slice_as_nnunet_does() -> None:
    array = np.random.default_rng(1).normal(size=(1, 6, 20, 24)).astype(np.float32)
    ours = nnunet_api.crop_resample_normalise(
        array,
        (10, 1.5, 1.5),
        (5, 1, 1),
        "ZScoreNormalization",
        False,
        None,
    )

    # 6 * 10 / 5 slices of 20 * 1.5 by 24 * 1.5 pixels. Along z, which is more than three times as
    # coarse, the nearest slice is taken, so that slices come in pairs.
    assert ours.shape == (1, 12, 30, 36)
    np.testing.assert_array_equal(ours[:, 0], ours[:, 1])
    theirs = run_nnunet(array, (10, 1.5, 1.5), (5, 1, 1), "ZScoreNormalization", False)
    np.testing.assert_array_equal(ours, theirs)


def test_ct_values_are_clipped_to_the_window_then_scaled() -> None:
    array = np.full((1, 4, 4, 4), 40.0, dtype=np.float32)
    array[0, 0] = 3000
    array[0, 1] = -1000

    ours = nnunet_api.crop_resample_normalise(
        array,
        (1, 1, 1),
        (1, 1, 1),
        "CTNormalization",
        False,
        WINDOW,
    )

    # The window is -160 to 400, its mean 40, its deviation 100: (400 - 40) / 100, (-160 - 40) /
    # 100.
    assert ours[0, 0, 0, 0] == pytest.approx(3.6)
    assert ours[0, 1, 0, 0] == pytest.approx(-2.0)
    assert ours[0, 2, 0, 0] == 0


def test_ct_without_a_window_is_refused() -> None:
    with refused(PlanError, "plan-no-ct-window", "data.ct_window"):
        nnunet_api.crop_resample_normalise(
            np.ones((1, 4, 4, 4)),
            (1, 1, 1),
            (1, 1, 1),
            "CTNormalization",
            False,
            None,
        )


def test_an_unknown_scheme_gets_a_close_match() -> None:
    with refused(PlanError, "plan-normalisation", "'ZScoreNormalization'"):
        nnunet_api.crop_resample_normalise(
            np.ones((1, 4, 4, 4)),
            (1, 1, 1),
            (1, 1, 1),
            "ZScoreNormalisation",
            False,
            None,
        )


def test_only_ct_keeps_its_window() -> None:
    assert nnunet_api.scheme_of("CT") == "CTNormalization"
    assert [nnunet_api.scheme_of(m) for m in ("MR", "PET")] == ["ZScoreNormalization"] * 2


def test_the_resampled_shape_is_nnunets() -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = rng.integers(1, 300, 3).tolist()
        old = rng.uniform(0.2, 10, 3).tolist()
        new = rng.uniform(0.2, 10, 3).tolist()
        theirs = tuple(compute_new_shape(shape, old, new))
        assert nnunet_api.resampled_shape(shape, old, new) == theirs
    # 2.5 is rounded to the even number.
    assert nnunet_api.resampled_shape((10, 5, 4), (1.0, 1.0, 1.0), (2.0, 2.0, 1.0)) == (5, 2, 4)


@pytest.mark.parametrize(
    ("given", "number"),
    [("4", "4"), ("004", "4"), ("Dataset004_Hippocampus", "4"), ("scans", "ID")],
)
def test_nnunets_commands_are_given_numbers(given: str, number: str) -> None:
    assert nnunet_api.dataset_number(given) == number


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ('"{root}"', "{root}"),
        ("'{root}'", "{root}"),
        (" {root} ", "{root}"),
        ("~/here", "{home}/here"),
        ('"$HOME/a b"', "'{home}/a b'"),
    ],
)
def test_quotes_and_a_tilde_in_a_folder_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    meant: str,
) -> None:
    # The remedy was once to make a folder, which then had quotes in its name.
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    places = {"root": tmp_path, "home": home}
    monkeypatch.setenv("nnUNet_results", value.format(**places))

    with pytest.raises(UsageError) as refused:
        nnunet_api.results_folder()

    # The folder exists; making another with quotes in its name would be a wrong remedy.
    assert f"export nnUNet_results={meant.format(**places)}" in str(refused.value)
    assert "mkdir" not in str(refused.value)
