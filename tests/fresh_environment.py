"""Fresh virtual environments that borrow the heavy packages of the running one.

They do so through a folder of links: ``.pth`` files in such a folder are not executed, and
nnunet-autoreg is left out of it, so only what a test installs can make the bridge live.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from nnunet_autoreg import bridge


@dataclass(frozen=True)
class FreshEnvironment:
    """A fresh virtual environment."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def site_packages(self) -> Path:
        if os.name == "nt":
            return self.root / "Lib" / "site-packages"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        # Variables that would let the environment see packages of the running one.
        hidden = ("PYTHONPATH", "PYTHONHOME", bridge.SWITCH)
        inherited = {k: v for k, v in os.environ.items() if k not in hidden}
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.root,
            env={**inherited, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def pip(self, *arguments: str | Path) -> None:
        # The environment is made without pip, so the running pip installs into it.
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        line = [*pip, "--disable-pip-version-check", *arguments]
        done = subprocess.run(line, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def libraries() -> set[Path]:
    """Return the folders of packages of the running environment.

    nnU-Net may lie in the site-packages of another environment that this one reads as well.
    """
    found = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None
    home = Path(next(iter(spec.submodule_search_locations or ()))).parent
    if home.name not in ("site-packages", "dist-packages"):
        pytest.skip(f"nnunetv2 is not installed in a site-packages folder but in {home}")
    return {*found, home}


def link_library(folder: Path, *without: str) -> Path:
    """Link every package of the running environment but ours and ``without``, and no ``.pth``."""
    folder.mkdir()
    excluded = ("nnunet_autoreg", "__editable__", *without)
    for library in libraries():
        for entry in library.iterdir():
            is_excluded = entry.name.lower().startswith(excluded)
            is_linked = (folder / entry.name).is_symlink()
            if entry.suffix == ".pth" or is_excluded or is_linked:
                continue
            try:
                (folder / entry.name).symlink_to(entry)
            except OSError as error:
                pytest.skip(f"this system makes no links ({error})")
    return folder


def fresh_environment(root: Path, library: Path) -> FreshEnvironment:
    """Make a virtual environment that reads the packages of ``library``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    environment = FreshEnvironment(root)
    (environment.site_packages / "borrowed.pth").write_text(f"{library}\n")
    return environment
