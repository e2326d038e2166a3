"""Encoders as folders for Hugging Face, and repositories there as a place to import from.

Nothing here needs a network: repositories stand in a cache of the layout of huggingface_hub.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refused

from nnunet_autoreg.cli.weights import main
from nnunet_autoreg.convert.choices import HUGGINGFACE_FORM, NNSSL_FORM
from nnunet_autoreg.convert.exporting import export_weights
from nnunet_autoreg.convert.hub import local_weights
from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.model_card import licence_id, model_card
from nnunet_autoreg.errors import AutoregError, WeightsError
from nnunet_autoreg.finetune.resolve import LIST_HEAD, list_runs
from nnunet_autoreg.io.addresses import repository_of
from nnunet_autoreg.model.card import IMPORTED, read_card
from nnunet_autoreg.model.verdict import LEARNT, Verdict
from nnunet_autoreg.pretrain.checkpointing import prepare_starting_point

VERDICT = Verdict(
    LEARNT,
    "the validation error 0.41 is below both trivial predictions",
    errors={"error": 0.41, "copy": 0.62, "mean": 1.0},
    probe={"features": 0.8, "voxels": 0.6, "chance": 0.5},
    num_validation_scans=4,
    min_scans=10,
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run_folder(tmp_path: Path, write_run: Callable[..., Path]) -> Path:
    """A finished run of a CNN with its decoder and a verdict."""
    return write_run(
        tmp_path,
        "brain",
        encoder="resenc_tiny",
        decoder=True,
        verdict=VERDICT,
        licences={"Dataset004": "CC-BY-SA 4.0", "folder-1a2": "CC BY-SA 4.0"},
    )


@pytest.fixture
def exported(tmp_path: Path, run_folder: Path) -> Path:
    """The same run in Hugging Face's form."""
    folder = tmp_path / "out"
    export_weights(run_folder / "encoder.safetensors", folder, HUGGINGFACE_FORM)
    return folder


def front_matter(text: str) -> dict[str, str]:
    """Return the lines of a model card's front matter by key."""
    head = text.split("---\n")[1]
    return dict(line.split(": ", 1) for line in head.splitlines())


def test_an_export_for_hugging_face_holds_weights_config_and_a_model_card(
    run_folder: Path,
    exported: Path,
) -> None:
    text = (exported / "README.md").read_text()
    config = json.loads((exported / "config.json").read_text())

    names = {file.name for file in exported.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    weights = (run_folder / "encoder.safetensors").read_bytes()
    assert (exported / "model.safetensors").read_bytes() == weights
    assert config["model_type"] == "nnunet_autoreg"
    assert config["architectures"] == ["ResidualEncoderUNet"]

    head = front_matter(text)
    assert head["license"] == "cc-by-sa-4.0"
    assert json.loads(head["tags"])[-1] == "mr"
    assert "**learnt**: " + VERDICT.reason in text
    assert "| Dataset004 | CC-BY-SA 4.0 |" in text
    assert "| validation error: copy | 0.62 |" in text
    assert "no medical device" in text


@pytest.mark.parametrize(
    ("names", "text"),
    [(("", "MRI"), "1 (MRI)"), (("",), "1 (unnamed)"), (("T1", "T2"), "1 (T1, T2)")],
)
def test_channels_without_a_name_are_not_listed(
    write_run: Callable[..., Path],
    tmp_path: Path,
    names: tuple[str, ...],
    text: str,
) -> None:
    """Scans of a plain folder have none."""
    card = read_card(write_run(tmp_path, "run", channel_names=names))

    assert card.channels_text == text


def test_a_folder_for_hugging_face_is_imported_bit_by_bit(
    tmp_path: Path,
    run_folder: Path,
    exported: Path,
) -> None:
    card, _ = import_weights(exported, "theirs", tmp_path, ImportOptions())

    first = read_card(run_folder)
    changed = {f for f in first.__dataclass_fields__ if getattr(first, f) != getattr(card, f)}
    assert changed == {"name", "extra"}
    assert card.has_decoder
    assert card.extra[IMPORTED]["format"] == "Hugging Face"
    back = tmp_path / "autoreg_pretraining" / "theirs" / "encoder.safetensors"
    assert back.read_bytes() == (run_folder / "encoder.safetensors").read_bytes()

    rows = {row[0]: row for row in list_runs(tmp_path)}
    verdict = rows["theirs"][LIST_HEAD.index("verdict")]
    assert verdict == "learnt, imported, used by name only"


def test_a_repeated_export_is_allowed_and_another_is_refused(
    tmp_path: Path,
    run_folder: Path,
    exported: Path,
) -> None:
    weights = run_folder / "encoder.safetensors"
    before = [file.stat().st_mtime_ns for file in sorted(exported.iterdir())]

    export_weights(weights, exported, HUGGINGFACE_FORM)

    # Not even written once more.
    assert [file.stat().st_mtime_ns for file in sorted(exported.iterdir())] == before
    with refused(WeightsError, "weights-export-exists", exported, "model.safetensors"):
        export_weights(weights, exported, NNSSL_FORM)

    # A model card is made to be completed by hand, and must not be overwritten.
    (exported / "README.md").write_text("my own words")
    with refused(WeightsError, "weights-export-exists", "README.md"):
        export_weights(weights, exported, HUGGINGFACE_FORM)


def test_the_command_exports_inspects_and_imports(
    tmp_path: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    folder = str(tmp_path / "out")

    assert main(["export", "brain", "-o", folder, "--form", "huggingface"]) == 0
    assert "hf upload OWNER/NAME" in capsys.readouterr().out.splitlines()[-1]

    assert main(["inspect", folder]) == 0
    shown = capsys.readouterr().out
    assert f"verdict             learnt: {VERDICT.reason}" in shown

    assert main(["import", folder, "--name", "theirs", "--licence", "CC0"]) == 0
    assert main(["inspect", "theirs"]) == 0
    shown = capsys.readouterr().out
    assert "in 100 steps on 10 scans" in shown
    assert "Dataset004: CC0 (stated by the user)" in shown


def test_pretraining_starts_from_a_folder_for_hugging_face(
    tmp_path: Path,
    run_folder: Path,
    exported: Path,
) -> None:
    of_folder = prepare_starting_point(str(exported), tmp_path / "new")
    of_file = prepare_starting_point(str(exported / "model.safetensors"), tmp_path / "other")

    assert of_folder.sha256 == of_file.sha256 == read_card(run_folder).sha256
    assert (tmp_path / "new" / "initial" / "encoder.safetensors").is_file()


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        # No licence is known.
        ({}, "unknown"),
        ({"a": ""}, "unknown"),
        ({"a": "none stated"}, "unknown"),
        # One licence, in several spellings.
        ({"a": "CC0"}, "cc0-1.0"),
        ({"a": "CC-BY-4.0", "b": "cc by 4.0"}, "cc-by-4.0"),
        ({"OpenMind": "CC-BY-4.0 (stated by the user)"}, "cc-by-4.0"),
        ({"a": "CC-BY-SA 4.0"}, "cc-by-sa-4.0"),
        ({"a": "CC-BY-NC-ND-4.0"}, "cc-by-nc-nd-4.0"),
        # Without a version, in words, unknown for a part of the data, or two that differ: nobody
        # but a person can say which licence that makes.
        ({"a": "CC-BY"}, "other"),
        ({"a": "hands off commercial use"}, "other"),
        ({"a": "CC-BY-4.0", "b": ""}, "other"),
        ({"a": "CC-BY-4.0", "b": "CC-BY-SA-4.0"}, "other"),
        ({"a": "Apache-2.0"}, "apache-2.0"),
    ],
)
def test_the_licence_of_weights_follows_from_all_that_they_were_made_from(
    licences: dict[str, str],
    expected: str,
) -> None:
    assert licence_id(licences) == expected


def test_texts_of_others_cannot_change_the_form_of_a_model_card(run_folder: Path) -> None:
    from dataclasses import replace

    # Three dashes end the front matter, a bar ends a cell, and a tag would be rendered.
    licence = "mine\n---\n| x | <script>"
    card = replace(
        read_card(run_folder),
        licences={"a": licence},
        modalities=('MR"\nlicense: mit',),
    )

    text = model_card(card)

    assert front_matter(text)["license"] == "other"
    assert "<script>" not in text
    assert "| a | mine --- \\| x \\| &lt;script> |" in text


def change_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["nnunet_autoreg"]["card"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "code", "value"),
    [
        (lambda card: card.update(class_path="os.system"), "card-invalid", "os.system"),
        (
            lambda card: card["arguments"].update(norm_op="os.system"),
            "weights-bad-config",
            "os.system",
        ),
        (lambda card: card.pop("sha256"), "card-unreadable", "sha256"),
        (lambda card: card.update(sha256="0" * 64), "weights-changed", "model.safetensors"),
        (lambda card: card.update(num_input_channels=10**9), "card-huge", "num_input_channels"),
        (lambda card: card["arguments"].update(n_stages=10**6), "card-huge", "n_stages"),
    ],
)
def test_a_config_from_elsewhere_is_checked(
    tmp_path: Path,
    exported: Path,
    change: Callable[..., object],
    code: str,
    value: str,
) -> None:
    change_config(exported, change)

    with refused(AutoregError, code, value):
        import_weights(exported, "theirs", tmp_path, ImportOptions())

    # Nothing is left of an import that was refused.
    assert not (tmp_path / "autoreg_pretraining" / "theirs").exists()


def test_a_value_of_the_config_cannot_be_stated_otherwise(tmp_path: Path, exported: Path) -> None:
    with refused(WeightsError, "weights-option-unused", "--heads", "config.json"):
        import_weights(exported, "theirs", tmp_path, ImportOptions(num_heads=3))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, which may not use a network."""
    reason = "huggingface_hub is not installed, so nothing can be looked for in its cache"
    hub = pytest.importorskip("huggingface_hub", reason=reason)
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def put_into_cache(cache: Path, folder: Path, repository: str = "owner/name") -> Path:
    """Write a folder into the cache as huggingface_hub does; return its snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for part in (snapshot, home / "blobs", home / "refs"):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = home / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_repository_in_the_cache_is_imported_without_a_network(
    tmp_path: Path,
    run_folder: Path,
    exported: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    put_into_cache(cache, exported)

    assert main(["import", "hf://owner/name", "--name", "theirs"]) == 0

    card = read_card(run_folder.parent / "theirs")
    origin = card.extra[IMPORTED]
    assert (origin["repository"], origin["commit"]) == ("owner/name", COMMIT)
    assert card.sha256 == read_card(run_folder).sha256
    # Where the cache lies is private to this machine.
    assert str(tmp_path) not in json.dumps(origin)

    by_revision = prepare_starting_point(f"hf://owner/name@{COMMIT}", tmp_path / "new")
    assert by_revision.sha256 == card.sha256


def test_a_repository_that_is_not_in_the_cache_ends_in_one_line(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    assert main(["import", "hf://owner/nothing", "--name", "theirs"]) == 1

    error = capsys.readouterr().err
    assert error.count("autoreg_weights: ") == 1
    with refused(WeightsError, "weights-download", "hf://owner/nothing", "HF_HUB_OFFLINE"):
        local_weights("hf://owner/nothing")


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with refused(WeightsError, "weights-no-hub", 'pip install "nnunet-autoreg[hf]"'):
        local_weights("hf://owner/name")


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("https://example.org/a.zip", ("https://example.org/a.zip", "download")),
        ("https://huggingface.co/owner/name/tree/main", ("hf://owner/name ",)),
        ("https://huggingface.co/datasets/owner/name", ("download the file yourself",)),
        ("s3://bucket/x.pth", ("s3://bucket/x.pth",)),
        ("hf://owner", ("hf://OWNER/NAME",)),
        ("hf://owner/name/model.safetensors", ("hf://OWNER/NAME",)),
        ("hf://../etc/x", ("hf://OWNER/NAME",)),
    ],
)
def test_an_address_is_refused_as_it_was_typed(given: str, values: tuple[str, ...]) -> None:
    with refused(WeightsError, "weights-address", *values):
        local_weights(given)


def test_a_path_is_not_an_address(tmp_path: Path) -> None:
    for text in ("a/b.pth", "C:/weights.pth", "./hf:/owner/name", str(tmp_path)):
        assert local_weights(text) == Path(text)


def test_only_files_of_the_cache_belong_to_a_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--AnonRes--ResEncL-OpenMind" / "snapshots" / COMMIT

    assert repository_of(snapshot / "a.pth") == ("AnonRes/ResEncL-OpenMind", COMMIT)
    # A folder of this form outside the cache may be named after a patient.
    assert repository_of(tmp_path / "DOE^JOHN" / "snapshots" / COMMIT / "a.pth") == ("", "")
    assert repository_of(Path("/a.pth")) == ("", "")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pretrain", ["--name", "a", "-i", "https://example.org/scans"]),
        ("pretrain", ["--name", "a", "-d", "4", "--init", "https://example.org/scans"]),
        ("pretrain", ["--name", "a", "-i", "hf://owner/name"]),
        ("weights", ["inspect", "https://example.org/scans"]),
        ("weights", ["export", "https://example.org/scans", "-o", "out"]),
        ("weights", ["export", "brain", "-o", "https://example.org/scans"]),
        ("embed", ["-w", "https://example.org/scans", "-i", "x", "-o", "y.npz"]),
        ("detect", ["-d", "4", "-i", "https://example.org/scans", "-o", "out"]),
        ("classify", ["-d", "4", "-i", "https://example.org/scans", "-o", "out"]),
        ("benchmark", ["-d", "4", "-o", "https://example.org/scans"]),
    ],
)
def test_no_command_takes_an_address_for_a_path(
    tmp_path: Path,
    command: str,
    line: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from importlib import import_module

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)

    assert import_module(f"nnunet_autoreg.cli.{command}").main(line) in (1, 2)

    last = capsys.readouterr().err.splitlines()[-1]
    assert "://" in last
    assert "download" in last or "import" in last
    # A path made of the address would be a folder "https:".
    assert not (tmp_path / "https:").exists()
