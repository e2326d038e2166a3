"""Run ``autoreg_doctor``: check the installation, and name a remedy for every problem."""

import argparse
import sys

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import CommandParser, command, print_next
from nnunet_autoreg.installation.checks import FAIL, all_checks, next_step
from nnunet_autoreg.installation.link import LINK_NAME, remove_link, site_packages, write_link


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = CommandParser(
        examples=[
            "autoreg_doctor",
            "autoreg_doctor --link",
        ],
        prog="autoreg_doctor",
        description="Check that nnunet-autoreg and nnU-Net find each other, show the GPU and the "
        "folders that are used, and explain how to fix every problem. Exit code 0: no problem was "
        "found; 1: something has to be fixed.",
    )
    fixing = p.add_mutually_exclusive_group()
    fixing.add_argument(
        "--link",
        action="store_true",
        help=f"write {LINK_NAME} into site-packages of this environment if nnU-Net does not find "
        "our classes. This is needed after 'pip install -e' of nnunet-autoreg, or if it is found "
        "through PYTHONPATH",
    )
    fixing.add_argument(
        "--unlink",
        action="store_true",
        help="remove the file that --link has written",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table, or write or remove the link.

    Return 0 if no problem was found, 1 if something has to be fixed.
    """
    arguments = parser().parse_args(argv)
    if arguments.link or arguments.unlink:
        change = write_link if arguments.link else remove_link
        print(change(site_packages()))
        print_next("autoreg_doctor")
        return 0

    checks = []
    for check in all_checks():
        checks.append(check)

        # At once, because the later checks take seconds.
        print(f"{check.status:<5} {check.name:<19} {check.finding}", flush=True)
        if check.remedy:
            print(f"      -> {check.remedy}", flush=True)

    print_next(next_step(checks))
    return int(any(check.status == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(main())
