"""Package map: top-level ``trainers/`` and ``planners/`` are ``nnunet_autoreg.trainers`` and
``nnunet_autoreg.planners``.

The wheel also carries the start-up bridge's ``.pth`` line at its root, where ``pip`` installs and
uninstalls it whole. The description of the package is README.md without its pictures and links,
whose relative addresses lead nowhere outside the repository.
"""

import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n\n(?:\*.*?\*\n\n)?", re.MULTILINE | re.DOTALL)
"""A picture, and the caption in italics below it."""
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)\s]+\)")
"""A link to another file of the repository. Its text is kept."""
BRIDGE = runpy.run_path(str(HERE / "nnunet_autoreg" / "bridge.py"))


class BuildWithBridge(build_py):
    """Build the package afresh and put the ``.pth`` beside it."""

    def run(self):
        # A module that was deleted or renamed since the last build must not reach the wheel.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "nnunet_autoreg", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            self._pth().write_text(BRIDGE["PTH_LINE"], encoding="ascii")

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._pth())]

    def _pth(self):
        return Path(self.build_lib) / BRIDGE["PTH_NAME"]


README = (HERE / "README.md").read_text(encoding="utf-8")

setup(
    long_description=LINK.sub(r"\1", PICTURE.sub("", README)),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["nnunet_autoreg", "nnunet_autoreg.*"]),
        "nnunet_autoreg.trainers",
        "nnunet_autoreg.planners",
    ],
    package_dir={"nnunet_autoreg.trainers": "trainers", "nnunet_autoreg.planners": "planners"},
    cmdclass={"build_py": BuildWithBridge},
)
