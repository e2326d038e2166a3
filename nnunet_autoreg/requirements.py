"""Compare the installed packages with the requirements of nnU-Net, its networks and this package.

pip checks requirements only when it installs something. A package that is upgraded later can break
the networks silently. Only metadata is read here and nothing is imported, so a package that cannot
be imported any more is found as well.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

CHECKED = ("nnunetv2", "dynamic-network-architectures", "nnunet-autoreg")
"""Distributions whose requirements are checked, if they are installed."""

INSTALLED_TOGETHER = {"torch": ("torchvision",)}
"""Package -> packages that must be installed with it, because they need the same build."""


@dataclass(frozen=True)
class Violation:
    """Hold a package that is missing, or whose version violates a requirement.

    Attributes:
        package: canonical name, e.g. "timm".
        installed: its version; None if it is not installed.
        required: the violated requirements, e.g. ("timm<1.0.23 is required by
            dynamic-network-architectures 0.4.4",).
        remedy: the pip command that installs a version which meets all requirements.
    """

    package: str
    installed: str | None
    required: tuple[str, ...]
    remedy: str

    def __str__(self) -> str:
        required = " and ".join(self.required)
        found = f"{self.package} {self.installed or 'is not installed'}"
        return f"{found}, but {required}; type: {self.remedy}"


def find_violations() -> tuple[Violation, ...]:
    """Return every violated requirement of the checked distributions, sorted by package.

    Markers are evaluated for this interpreter. Requirements of an extra count only if another
    requirement asks for that extra.
    """
    wanted: dict[str, list[tuple[str, Requirement]]] = {}
    for name in CHECKED:
        for owner, requirement in _requirements_of(name, frozenset(), set()):
            wanted.setdefault(canonicalize_name(requirement.name), []).append((owner, requirement))

    violations = []
    for package, required in sorted(wanted.items()):
        installed = _installed_version(package)
        broken = []
        for owner, requirement in required:
            if not _is_met(requirement, installed):
                broken.append((owner, requirement))
        if not broken:
            continue

        # One clause for each different requirement, with the names of all who require it.
        owners_of: dict[str, list[str]] = {}
        for owner, requirement in broken:
            owners_of.setdefault(_plain(requirement), []).append(owner)
        clauses = []
        for text, owners in owners_of.items():
            clauses.append(f"{text} is required by {' and '.join(owners)}")

        # The remedy meets all requirements of the package at once, not only the violated ones.
        specifiers: set[str] = set()
        extras: set[str] = set()
        for _, requirement in required:
            specifiers.update(str(specifier) for specifier in requirement.specifier)
            extras.update(requirement.extras)
        with_extras = f"{package}[{','.join(sorted(extras))}]" if extras else package
        together = [
            with_extras + ",".join(sorted(specifiers)),
            *INSTALLED_TOGETHER.get(package, ()),
        ]
        remedy = f"pip install {shlex.join(together)}"
        violations.append(Violation(package, installed, tuple(clauses), remedy))
    return tuple(violations)


def checked_distributions() -> tuple[str, ...]:
    """Return the names and versions of those checked distributions that are installed."""
    found = []
    for name in CHECKED:
        version = _installed_version(name)
        if version is not None:
            found.append(f"{name} {version}")
    return tuple(found)


def in_one_line(violations: tuple[Violation, ...]) -> str:
    """Return all violations with their remedies in one line for an error message."""
    return "installed packages violate requirements: " + "; ".join(map(str, violations))


def _requirements_of(
    name: str,
    extras: frozenset[str],
    visited: set[tuple[str, frozenset[str]]],
) -> Iterator[tuple[str, Requirement]]:
    """Yield the requirements of a distribution, each with the name of the package that has it.

    The requirements of extras that it asks for are included.

    Args:
        extras: empty for the requirements without an extra, else those that only these extras add.
        visited: distributions with extras that were read already; extras may refer to each other.
    """
    found = _distribution(name)
    key = (canonicalize_name(name), extras)
    if found is None or key in visited:
        return
    visited.add(key)

    owner = f"{canonicalize_name(name)} {_version_of(found) or 'of unknown version'}"
    for text in found.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            # pip could not read this line either.
            continue

        is_always = _holds(requirement, "")
        is_of_extra = any(_holds(requirement, extra) for extra in extras)
        applies = is_of_extra and not is_always if extras else is_always
        if not applies:
            continue
        yield owner, requirement
        if requirement.extras:
            yield from _requirements_of(requirement.name, frozenset(requirement.extras), visited)


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _version_of(found: Distribution) -> str | None:
    # A damaged .dist-info folder has no version, for which some releases of Python raise an error.
    try:
        version: str | None = found.metadata["Version"]
    except KeyError:
        return None
    return version


def _installed_version(name: str) -> str | None:
    found = _distribution(name)
    return None if found is None else _version_of(found) or "of unknown version"


def _is_met(requirement: Requirement, installed: str | None) -> bool:
    """Return whether a version meets a requirement; versions that cannot be compared count as
    met."""
    if installed is None:
        return False
    try:
        version = Version(installed)
    except InvalidVersion:
        return True
    # A pre-release was installed on purpose, so it is compared like any other version.
    return requirement.specifier.contains(version, prereleases=True)


def _plain(requirement: Requirement) -> str:
    """Return a requirement without its marker, as it would be typed."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
