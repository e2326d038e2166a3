"""What a release says of itself: version, bounds, and what its image is built from."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import nnunet_autoreg

REPO = Path(__file__).resolve().parents[2]


def text_of(name):
    return (REPO / name).read_text(encoding="utf-8")


def metadata():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib

    return tomllib.loads(text_of("pyproject.toml"))["project"]


def test_the_citation_names_the_version_and_the_licence():
    citation = text_of("CITATION.cff")

    assert f"version: {nnunet_autoreg.__version__}\n" in citation
    assert f"license: {metadata()['license']}\n" in citation


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "Dockerfile", "pyproject.toml"])
def test_it_says_that_it_is_not_a_medical_device(name):
    text = " ".join(text_of(name).split()).lower()

    assert "research software" in text
    assert "no medical device" in text


def test_no_address_of_a_repository_is_invented():
    assert "urls" not in metadata()
    assert "repository-code" not in text_of("CITATION.cff")


def test_torch_has_bounds_on_both_sides():
    (torch,) = (line for line in metadata()["dependencies"] if re.match(r"torch\b", line))

    assert ">=2.6" in torch
    assert "<3" in torch


def test_the_image_is_built_from_all_that_the_package_needs():
    copied = set(re.findall(r"^COPY (.+) \S+$", text_of("Dockerfile"), re.MULTILINE))
    files = {name for names in copied for name in names.split()}
    let_in = set(re.findall(r"^!(.+)$", text_of(".dockerignore"), re.MULTILINE))
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    needed |= {"nnunet_autoreg", "trainers", "planners"}

    assert files == let_in == needed
    assert all((REPO / name).exists() for name in files)


def test_the_image_has_a_home_that_every_user_can_write_to():
    """Without it, Triton compiles into /.triton where -u names a user that the image lacks."""
    (variables,) = re.findall(r"^ENV ((?:.+\\\n)*.+)$", text_of("Dockerfile"), re.MULTILINE)
    values = dict(part.split("=") for part in variables.replace("\\\n", " ").split())

    assert values["HOME"] == "/tmp"
    folders = {name for name in values if name.startswith("nnUNet_")}
    assert folders == {"nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"}


def test_every_command_that_the_image_shows_exists():
    scripts = metadata()["scripts"]
    text = text_of("Dockerfile")
    shown = set(re.findall(r"\bautoreg_[a-z]\w*", text))

    assert shown
    assert shown <= set(scripts)

    # The line that it starts with, and the one in its head, can be typed.
    started = json.loads(re.search(r"^CMD (.+)$", text, re.MULTILINE)[1])
    example = re.search(r"nnunet-autoreg (autoreg_.+)$", text, re.MULTILINE)[1].split()
    for command, *arguments in (started, example):
        module = import_module(scripts[command].partition(":")[0])
        module.parser().parse_args(arguments)


def test_optional_packages_can_be_installed_by_name():
    extras = metadata()["optional-dependencies"]

    assert extras["tensorboard"] == ["tensorboard"]
    assert extras["wandb"] == ["wandb"]
    assert [re.split("[<>=]", name)[0] for name in extras["hf"]] == ["huggingface_hub"]


def test_the_changelog_has_every_heading_once_and_stays_readable():
    """A merge can bring back lines that were summed up before."""
    _, *versions = re.split(r"^## \[", text_of("CHANGELOG.md"), flags=re.MULTILINE)

    assert versions
    for version in versions:
        headings = re.findall(r"^### .*$", version, re.MULTILINE)
        assert headings == sorted(set(headings)), version.splitlines()[0]
        assert len(version.splitlines()) <= 150, version.splitlines()[0]


def test_the_version_is_the_newest_of_the_changelog():
    heading = r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$"
    newest = re.search(heading, text_of("CHANGELOG.md"), re.MULTILINE)

    assert newest is not None
    assert newest[1] == nnunet_autoreg.__version__
