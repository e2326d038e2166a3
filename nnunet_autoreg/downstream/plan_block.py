"""Write and check the block of a plans file with the plan of detection or classification."""

from collections.abc import Mapping
from typing import Any

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.records import to_jsonable


def store(plans: dict[str, Any], configuration: str, block: str, plan: object) -> None:
    """Write a plan into parsed plans.

    Args:
        plans: parsed plans file, which is changed.
        configuration: name of the configuration.
        block: name of the block, such as "autoreg_detection".
        plan: record of the plan's values.
    """
    plans["configurations"][configuration][block] = to_jsonable(plan)


def check_ranges(
    plan: object,
    rules: Mapping[str, tuple[bool, str]],
    block: str,
    where: str,
    code: str,
) -> None:
    """Refuse the first value of a plan that is out of its range.

    Args:
        plan: record of the plan's values.
        rules: field -> (whether it is in its range, the range as text).
        block: name of the block in the message.
        where: name of the plans file in the message.
        code: stable code of the error.

    Raises:
        PlanError: a value is out of its range.
    """
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise PlanError(
                f"{where}: {block}.{name}={getattr(plan, name)} must be {wanted}",
                code=code,
            )
