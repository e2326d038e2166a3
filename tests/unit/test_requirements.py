"""Installed packages against what is required of them, with distributions written to a folder on
``sys.path``.
"""

import os
import shlex
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from nnunet_autoreg.cli import common
from nnunet_autoreg.cli.phantom import draw_phantom, write_image
from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.installation import checks
from nnunet_autoreg.requirements import Violation, checked_distributions, find_violations

REPO = Path(__file__).resolve().parents[2]


class Site:
    """A folder in front of ``sys.path`` that takes fake distributions."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(
        self,
        name: str,
        version: str,
        *requirements: str,
        extras: tuple[str, ...] = (),
    ) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Fake distributions; the three that are checked hide the real ones and require nothing yet."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    site = Site(folder)
    site.install("dynamic-network-architectures", "0.4.4")
    site.install("nnunet-autoreg", "0.1.0")
    return site


def found(package: str) -> Violation:
    """The one violation, which must be of this package."""
    (violation,) = find_violations()
    assert violation.package == package
    return violation


def test_a_newer_version_than_required_is_named_with_its_pip_line(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib<1.0.23,>=1")
    site.install("fakelib", "1.0.29")

    violation = found("fakelib")

    assert violation.installed == "1.0.29"
    assert "nnunetv2 2.8.1" in violation.required[0]
    assert shlex.split(violation.remedy) == ["pip", "install", "fakelib<1.0.23,>=1"]
    assert violation.remedy in str(violation)


def test_a_version_that_meets_every_requirement_is_not_named(site: Site) -> None:
    # 2.11 is above 2.5 although "1" comes before "5", and a local version (+cu130) counts as
    # 2.11.0.
    site.install("nnunetv2", "2.8.1", "fakelib<1.0.23", "otherlib!=2.9.*,>=2.5")
    site.install("fakelib", "1.0.22")
    site.install("otherlib", "2.11.0+cu130")

    assert find_violations() == ()


def test_a_pre_release_within_the_range_is_not_named(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib>=1.0")
    site.install("fakelib", "2.0.dev5+gitabc")

    assert find_violations() == ()


def test_a_missing_package_is_named(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "Never_Installed.Anywhere>=3")

    violation = found("never-installed-anywhere")

    assert violation.installed is None
    assert shlex.split(violation.remedy)[2] == "never-installed-anywhere>=3"


def test_the_pip_line_meets_the_requirements_of_everybody(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "Fake.Lib>=2", "fake_lib!=2.5")
    site.install("fake-lib", "1.9", "whatever-it-needs")
    metadata = site.folder / "nnunet_autoreg-0.1.0.dist-info" / "METADATA"
    metadata.write_text(
        "Metadata-Version: 2.1\nName: nnunet-autoreg\nVersion: 0.1.0\nRequires-Dist: fake-lib<3\n",
    )

    remedy = Requirement(shlex.split(found("fake-lib").remedy)[2])

    # One name in three spellings, with the bounds of all who require it.
    assert remedy.specifier == SpecifierSet(">=2,!=2.5,<3")


def test_torch_is_replaced_together_with_torchvision(site: Site) -> None:

    site.install("nnunetv2", "2.8.1", "torch!=2.9.*,>=2.1.2")
    site.install("torch", "2.9.1")

    assert shlex.split(found("torch").remedy)[3:] == ["torchvision"]


def test_markers_of_other_systems_and_unwanted_extras_do_not_count(site: Site) -> None:
    other = 'fakelib>=5; python_version < "3"'
    extra = 'fakelib>=6; extra == "dev"'
    site.install("nnunetv2", "2.8.1", other, extra, extras=("dev",))
    site.install("fakelib", "1.0")

    assert find_violations() == ()


def test_a_marker_of_this_interpreter_counts(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", 'fakelib>=5; python_version >= "3.10"')
    site.install("fakelib", "1.0")

    assert found("fakelib").installed == "1.0"


def test_an_extra_that_a_requirement_asks_for_counts(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib[fast]")
    needs = ("unwanted>=9; extra == 'slow'", "speedlib>=2; extra == 'fast'", "not-asked-here>=1")
    site.install("fakelib", "1.0", *needs, extras=("fast", "slow"))
    site.install("speedlib", "1.5")

    assert "fakelib 1.0" in found("speedlib").required[0]


def test_damaged_metadata_does_not_stop_the_check(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib>=1", "this is (no requirement", "oddlib>=1")
    site.install("oddlib", "not_a_version")
    (site.folder / "fakelib-1.0.dist-info").mkdir()
    (site.folder / "fakelib-1.0.dist-info" / "METADATA").write_text("Name: fakelib\n")

    assert find_violations() == ()


def test_the_checked_distributions_are_those_that_are_installed(site: Site) -> None:
    site.install("nnunetv2", "2.8.1")

    names = [canonicalize_name(text.split()[0]) for text in checked_distributions()]

    assert names == ["nnunetv2", "dynamic-network-architectures", "nnunet-autoreg"]


def test_the_doctor_warns_of_a_violation_and_fails_without_a_network(site: Site) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib<2")
    site.install("fakelib", "3.0")
    violations = find_violations()
    built = {f"network {name}": "built" for name in checks.PROBED_NETWORKS}
    broken = {"network primus_tiny_error": "RuntimeError: sizes differ"}

    (line,) = checks.check_requirements(violations)
    works = checks.check_networks(built, violations)
    fails = checks.check_networks(broken, violations)

    assert (line.status, line.remedy) == ("warn", "pip install 'fakelib<2'")
    assert works.status == "ok"
    assert (fails.status, fails.remedy) == ("fail", "pip install 'fakelib<2'")


def ended_by(error: Exception, cause: Exception | None = None) -> int:
    """The exit code of a command whose work ends with this error."""

    @common.command
    def main(argv: list[str] | None = None) -> int:
        raise error from cause

    return int(main([]))


def test_a_bug_beside_a_violation_ends_in_one_line_that_names_it(
    site: Site,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib<2")
    site.install("fakelib", "3.0")

    assert ended_by(RuntimeError("sizes\ndiffer")) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: sizes differ" in line
    assert "pip install 'fakelib<2'" in line


def test_a_network_that_cannot_be_built_names_the_violation(
    site: Site,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.install("nnunetv2", "2.8.1", "fakelib<2")
    site.install("fakelib", "3.0")

    assert ended_by(PlanError("no network"), TypeError("one argument too many")) == 2
    assert "pip install 'fakelib<2'" in capsys.readouterr().err

    assert ended_by(AutoregError("no scan was found")) == 1
    assert "pip install" not in capsys.readouterr().err


def test_a_pretraining_beside_a_wrong_timm_ends_without_a_traceback(tmp_path: Path) -> None:
    site = tmp_path / "site"
    scans = tmp_path / "scans"
    (site / "timm").mkdir(parents=True)
    # What a newer timm does to the networks: they cannot be built.
    (site / "timm" / "__init__.py").write_text(
        "raise RuntimeError('the rotary embedding has another size')\n",
    )
    Site(site).install("timm", "99.0")
    write_image(scans / "scan_0.nii.gz", draw_phantom(0, 0)[0])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPO)])}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        environment[name] = str(tmp_path / name)

    command = ["-m", "nnunet_autoreg.cli.pretrain", "-i", str(scans), "--name", "x"]
    command += ["--encoder", "primus_tiny", "--dry-run"]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: timm 99.0")]
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(warnings) == 1
    assert "timm<1.0.23" in done.stderr.splitlines()[-1]


def declared(text: str) -> dict[str, SpecifierSet]:
    """Our own requirements as ``pyproject.toml`` states them, by canonical name."""
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    found = {}
    for line in block.splitlines():
        if line.strip().startswith('"'):
            requirement = Requirement(line.strip().strip('",'))
            found[canonicalize_name(requirement.name)] = requirement.specifier
    return found


def boundary_versions(specifiers: SpecifierSet) -> set[Version]:
    """Versions at, just below and just above every version that a specifier names."""
    versions = set()
    for specifier in specifiers:
        release = Version(specifier.version.removesuffix(".*")).release
        below = (*release[:-1], max(release[-1] - 1, 0), 999)
        above = (*release[:-1], release[-1] + 1)
        for numbers in (release, below, above, (*release, 1)):
            versions.add(Version(".".join(map(str, numbers))))
    return versions


OURS = declared((REPO / "pyproject.toml").read_text(encoding="utf-8"))
THEIRS = []
for package in ("nnunetv2", "dynamic-network-architectures"):
    for text in requires(package) or ():
        requirement = Requirement(text)
        if requirement.marker is None and canonicalize_name(requirement.name) in OURS:
            THEIRS.append(requirement)


@pytest.mark.parametrize("theirs", THEIRS, ids=str)
def test_our_metadata_allows_no_version_that_theirs_excludes(theirs: Requirement) -> None:
    ours = OURS[canonicalize_name(theirs.name)]

    candidates = boundary_versions(ours) | boundary_versions(theirs.specifier)
    too_many = []
    for version in candidates:
        if ours.contains(version) and not theirs.specifier.contains(version):
            too_many.append(str(version))

    assert too_many == []
