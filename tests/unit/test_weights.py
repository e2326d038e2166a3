"""``autoreg_weights``: what files are, what is refused before anything runs, AR-SSL4M's form,
licences, normalisation.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from traps import Trap

from nnunet_autoreg.cli.weights import main
from nnunet_autoreg.convert.ar_ssl4m import expected_keys
from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.licences import licences_of
from nnunet_autoreg.convert.source import AR_SSL4M, NO_PLAN, UNKNOWN, open_source
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.normalization import AutoregPercentileNormalization, as_pretrained
from nnunet_autoreg.finetune.resolve import DatasetTraits, choose_weights
from nnunet_autoreg.model.card import read_card


def ar_ssl4m(depth: int = 1, width: int = 12, token: int = 4) -> dict[str, Tensor]:
    """A checkpoint with AR-SSL4M's keys, tiny."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (4, width),
        "patchifier.proj.weight": (width, 1, token, token, token),
        "decoder_pred.bias": (token**3,),
        "decoder_pred.weight": (token**3, width),
        "linear1.weight": (4 * width, width),
        "linear1.bias": (4 * width,),
        "linear2.weight": (width, 4 * width),
    }
    tensors = {}
    for key in sorted(expected_keys(depth)):
        default = (width, width) if key.endswith("_proj.weight") else (width,)
        shape = next((s for end, s in shapes.items() if key.endswith(end)), default)
        tensors[key] = torch.randn(shape, generator=generator)
    return tensors


def saved(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


@pytest.mark.parametrize("way", ["zip", "bare"])
def test_a_file_that_would_run_code_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    sprung = tmp_path / "sprung"
    content = {"network_weights": {"a": torch.ones(1)}, "more": Trap(sprung)}
    file = tmp_path / "evil.pth"
    if way == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content["more"]))
    for line in (["inspect", str(file)], ["import", str(file), "--name", "evil"]):
        assert main(line) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no code in it was run" in error

    assert not sprung.exists()
    assert not (tmp_path / "autoreg_pretraining").exists()

    # The trap works: whoever unpickles the file springs it.
    if way == "zip":
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())

    assert sprung.exists()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    file = saved(tmp_path / "a.pth", ar_ssl4m())
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(WeightsError) as caught:
        open_source(file)

    assert str(file) in str(caught.value)


def test_kinds_of_files_are_recognised_and_wrappers_are_removed(tmp_path: Path) -> None:
    tensors = ar_ssl4m()
    bare = open_source(saved(tmp_path / "bare.pth", tensors))
    # As several trainers save: below a key, and below DistributedDataParallel's "module.".
    wrapped = {f"module.{key}": value for key, value in tensors.items()}
    nested = open_source(saved(tmp_path / "nested.pth", {"state_dict": wrapped, "epoch": 3}))
    assert bare.kind == nested.kind == AR_SSL4M
    assert set(bare.tensors) == set(nested.tensors) == set(tensors)

    save_file(tensors, tmp_path / "st.safetensors")
    assert open_source(tmp_path / "st.safetensors").kind == AR_SSL4M

    without_plan = {"network_weights": {"encoder.a": torch.ones(2)}, "trainer_name": "x"}
    other = open_source(saved(tmp_path / "o.pth", without_plan))
    assert (other.kind, other.rest) == (NO_PLAN, {"trainer_name": "x"})
    assert open_source(saved(tmp_path / "u.pth", {"w": torch.ones(2)})).kind == UNKNOWN
    with refused(WeightsError, "weights-no-dictionary", tmp_path / "l.pth", "list"):
        open_source(saved(tmp_path / "l.pth", [torch.ones(2)]))
    with refused(WeightsError, "weights-ambiguous", tmp_path, "6", "bare.pth", "and 3 more"):
        open_source(tmp_path)


def test_ar_ssl4m_is_imported_with_turned_axes_and_normalisation(tmp_path: Path) -> None:
    tensors = ar_ssl4m()
    file = saved(tmp_path / "a.pth", {"state_dict": tensors})
    card, imported = import_weights(file, "a", tmp_path, ImportOptions(num_heads=2))
    stored = load_file(tmp_path / "autoreg_pretraining" / "a" / "encoder.safetensors")

    kernel = "model.patchifier.proj.weight"

    # Ours is (z, y, x), theirs (x, y, z).
    assert torch.equal(stored[kernel], tensors[kernel].permute(0, 1, 4, 3, 2))

    rest = [key for key in tensors if key.startswith("model.") and key != kernel]

    assert len(rest) == 17
    assert all(torch.equal(stored[key], tensors[key]) for key in rest)
    assert len(stored) == 18
    assert card.normalization == "AutoregPercentileNormalization"
    assert card.licences == {"AR-SSL4M": "none stated"}
    assert card.arguments["mlp_ratio"] == 4.0
    assert card.token_size_vox == (4, 4, 4)
    assert card.num_steps == 0
    assert "left out: decoder_pred, the head of pretraining" in imported.notes


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (
            lambda t: t.pop("model.norm.bias"),
            "weights-mismatch",
            ("1 blocks", "lacks model.norm.bias"),
        ),
        (
            lambda t: t.update({"model.more": torch.ones(1)}),
            "weights-mismatch",
            ("also holds model.more",),
        ),
        (
            lambda t: t.update({"model.pos_embed_learn": torch.ones(1, 1)}),
            "weights-learned-positions",
            ("model.pos_embed_learn",),
        ),
        (
            lambda t: t.update({"model.norm.bias": torch.full((12,), torch.nan)}),
            "weights-not-finite",
            ("a.pth", "'model.norm.bias'"),
        ),
    ],
)
def test_what_is_wrong_with_an_ar_ssl4m_file_is_named(
    tmp_path: Path,
    change: Any,
    code: str,
    values: tuple[str, ...],
) -> None:
    tensors = ar_ssl4m()
    change(tensors)
    file = saved(tmp_path / "a.pth", tensors)

    with refused(WeightsError, code, *values):
        import_weights(file, "a", tmp_path, ImportOptions(num_heads=2))
    assert not (tmp_path / "autoreg_pretraining").exists()


def test_a_number_of_heads_that_the_file_does_not_state_is_needed(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", ar_ssl4m())

    # The shapes of the weights are the same for any number of heads that divides the width.
    with refused(WeightsError, "weights-heads", "12", "--heads N"):
        import_weights(file, "a", tmp_path, ImportOptions())
    with refused(WeightsError, "weights-heads", "--heads 5", "12"):
        import_weights(file, "a", tmp_path, ImportOptions(num_heads=5))


def test_the_command_inspects_imports_and_exports(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    file = str(saved(tmp_path / "a.pth", ar_ssl4m()))
    assert main(["inspect", file]) == 0

    shown = capsys.readouterr().out
    assert "cannot be imported  " in shown
    assert "--heads N" in shown
    assert "20 with" in shown
    assert main(["inspect", file, "--heads", "2"]) == 0

    shown = capsys.readouterr().out
    assert "licence             AR-SSL4M: none stated" in shown
    assert shown.splitlines()[-1] == f"next: autoreg_weights import {file} --name NAME --heads 2"
    assert main(["import", file, "--heads", "2", "--name", "theirs", "--licence", "CC0"]) == 0
    assert "licences of the weights: AR-SSL4M: CC0 (stated by the user)" in capsys.readouterr().out
    assert main(["inspect", "theirs"]) == 0

    shown = capsys.readouterr().out
    assert "a finished pretraining, 'theirs': imported" in shown
    assert read_card(tmp_path / "autoreg_pretraining" / "theirs").sha256 in shown
    assert main(["export", "theirs", "-o", str(tmp_path / "out")]) == 0
    assert "ViT" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "out"), "--heads", "2", "--name", "again"]) == 0

    # Exported and imported again, the weights are the same bytes.
    runs = tmp_path / "autoreg_pretraining"
    again = (runs / "again" / "encoder.safetensors").read_bytes()
    assert again == (runs / "theirs" / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (["import", "x.pth", "--name", "a__b"], "a__b"),
        (["import", "x.pth", "--name", "none"], "--name none"),
        (
            ["import", "x.pth", "--name", "a", "--spacing", "0", "1", "1"],
            "--spacing 0.0 1.0 1.0",
        ),
        (["import", "x.pth", "--name", "a", "--heads", "-1"], "--heads -1"),
        (["import", "x.pth", "--name", "a", "--patch-size", "8", "8", "0"], "--patch-size 8 8 0"),
        (["import", "x.pth", "--name", "a"], "x.pth"),
        (["inspect", "nothing"], "nothing"),
    ],
)
def test_impossible_lines_end_in_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: list[str],
    value: str,
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    assert main(line) in (1, 2)

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert value in error


def test_imported_weights_are_used_by_name_only(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", ar_ssl4m())
    import_weights(file, "theirs", tmp_path, ImportOptions(num_heads=2))
    dataset = DatasetTraits("Dataset001_A", ("MRI",), (1.0, 1.0, 1.0))

    with refused(WeightsError, "weights-none-suits", "export autoreg_weights=theirs"):
        choose_weights(tmp_path, dataset, None)

    choice = choose_weights(tmp_path, dataset, "theirs")

    assert choice.card is not None
    assert choice.card.name == "theirs"
    assert choice.warnings == ()


def test_the_licence_is_the_users_then_the_model_cards(
    tmp_path: Path,
) -> None:
    file = tmp_path / "w.pth"
    plan = {"pretrain_plan": {"dataset_name": "Dataset745_OpenMind"}}
    assert licences_of(plan, None, file) == {"OpenMind": "CC-BY-4.0"}

    found = licences_of({}, [{"name": "nnFoundation"}], file)
    assert found["nnFoundation"].startswith("CC-BY-SA-4.0 (share-alike")
    assert licences_of({}, None, file) == {"w.pth": "none stated"}

    (tmp_path / "README.md").write_text('---\nlicense: "mit"\ntags: [x]\n---\ntext\n')
    assert licences_of(plan, None, file) == {"OpenMind": "mit (README.md beside the file)"}
    assert licences_of(plan, None, file, "CC0") == {"OpenMind": "CC0 (stated by the user)"}


def test_percentiles_1_and_99_9_become_0_and_1_with_clipping() -> None:
    # 1001 values from 0 to 1000: the first percentile is 10, the 99.9th 999.
    image = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    normalise = AutoregPercentileNormalization(use_mask_for_norm=False, intensityproperties={})

    found = normalise.run(image.copy()).ravel()[[0, 10, 11, 500, 999, 1000]]
    constant = normalise.run(np.full((2, 2, 2), 7.0, np.float32))

    np.testing.assert_allclose(found, [0, 0, 1 / 989, 490 / 989, 1, 1], atol=1e-6)
    # Both percentiles are equal, and nothing is divided by 0.
    assert not constant.any()


def test_a_plan_normalises_every_channel_as_in_pretraining(
    tmp_path: Path,
) -> None:
    own = ["CTNormalization", "ZScoreNormalization"]

    assert as_pretrained(own, [False, True], None) == (own, [False, True])

    file = saved(tmp_path / "a.pth", ar_ssl4m())
    card, _ = import_weights(file, "a", tmp_path, ImportOptions(num_heads=2))

    schemes, masks = as_pretrained(own, [False, True], card)

    assert schemes == ["AutoregPercentileNormalization"] * 2
    assert masks == [False, False]


def test_nnunet_finds_the_normalisation_by_name() -> None:
    from nnunet_autoreg import bridge

    name = "AutoregPercentileNormalization"
    module = "nnunet_autoreg.finetune.normalization"

    assert bridge.find_module(name, bridge.NORMALIZATIONS_ROOM) == module
    assert bridge.find_module(name, bridge.TRAINERS_ROOM) is None


def test_the_content_of_a_file_of_no_known_kind_is_listed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unknown = saved(tmp_path / "u.pth", {"conv.weight": torch.ones(2, 3), "epoch": 3})
    assert main(["inspect", str(unknown)]) == 0

    shown = capsys.readouterr().out
    assert "unknown: neither ours, nor AR-SSL4M's, nor nnssl's" in shown
    assert "1 with 6 parameters: conv.weight 1" in shown

    without_plan = {"network_weights": {"encoder.a": torch.ones(2)}, "trainer_name": "x"}
    bare = saved(tmp_path / "n.pth", without_plan)
    assert main(["inspect", str(bare)]) == 0

    lines = capsys.readouterr().out.splitlines()
    remedy = f"autoreg_weights import {bare} --name NAME --adaptation-plan FILE"
    assert any(line.endswith(" trainer_name") for line in lines)
    assert lines[-1] == f"next: {remedy}"
