"""Write and remove the ``.pth`` file that loads the start-up bridge.

An installed wheel carries its own such file. An editable install does not.
"""

import os
import sysconfig
from pathlib import Path

from nnunet_autoreg import bridge
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.installation.fresh_process import has_bridge

LINK_NAME = "nnunet_autoreg_link.pth"
LINK_HEAD = "# Made by autoreg_doctor --link; remove with autoreg_doctor --unlink.\n"


def site_packages() -> Path:
    """Return the folder of this environment in which Python looks for ``.pth`` files."""
    return Path(sysconfig.get_path("purelib"))


def write_link(folder: Path) -> str:
    """Write the guarded ``.pth`` line, unless the bridge works without it; return a message.

    Raises:
        UsageError: the bridge is switched off (code "usage-bridge-switched-off").
        AutoregError: another file has this name (code "doctor-foreign-file"), the folder cannot be
            written (code "doctor-not-writable"), or the file has no effect (code
            "doctor-link-without-effect").
    """
    target = folder / LINK_NAME
    if os.environ.get(bridge.SWITCH) == "0":
        raise UsageError(
            f"the start-up bridge is switched off by {bridge.SWITCH}=0; unset {bridge.SWITCH}, and "
            "try again",
            code="usage-bridge-switched-off",
        )
    if has_bridge():
        return "the start-up bridge works already; nothing was written"
    if target.exists() and not _is_our_link(target):
        raise AutoregError(
            f"{target} was not made by autoreg_doctor and is not changed; move it away, and try "
            "again",
            code="doctor-foreign-file",
        )

    # In ASCII, because Python may read such files in the encoding of the system.
    try:
        target.write_text(LINK_HEAD + bridge.PTH_LINE, encoding="ascii")
    except OSError as error:
        raise AutoregError(
            f"{target} cannot be written ({error.strerror}); activate an environment that is yours",
            code="doctor-not-writable",
        ) from error

    # A file in a folder that Python does not read as site-packages has no effect.
    if not has_bridge():
        raise AutoregError(
            f"{target} was written, but a new Python process does not read it, or does not find "
            f"nnunet_autoreg; add {Path(bridge.__file__).parents[1]} to PYTHONPATH, or install "
            "nnunet-autoreg with pip",
            code="doctor-link-without-effect",
        )
    return f"wrote {target}"


def remove_link(folder: Path) -> str:
    """Remove the file that ``write_link`` wrote, if it is there; return a message.

    Raises:
        AutoregError: another file has this name (code "doctor-foreign-file"), or it cannot be
            removed (code "doctor-not-writable").
    """
    target = folder / LINK_NAME
    if not target.exists():
        return f"there is no {target}; nothing was removed"
    if not _is_our_link(target):
        raise AutoregError(
            f"{target} was not made by autoreg_doctor and is not changed",
            code="doctor-foreign-file",
        )

    try:
        target.unlink()
    except OSError as error:
        raise AutoregError(
            f"{target} cannot be removed ({error.strerror})",
            code="doctor-not-writable",
        ) from error
    return f"removed {target}"


def _is_our_link(target: Path) -> bool:
    if not target.is_file():
        return False
    text = target.read_text(encoding="utf-8", errors="replace")
    return text.startswith(LINK_HEAD)
