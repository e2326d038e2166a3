"""How a training is stopped: its state is saved first, unless that would take too long."""

from nnunet_autoreg.errors import InterruptedRunError
from nnunet_autoreg.stopping import raise_if_stopped, stops_noted

__all__ = ["InterruptedRunError", "raise_if_stopped", "refuse_interruption", "stops_noted"]


def refuse_interruption(error: BaseException) -> None:
    """Raise the interruption that an exception of other people's code stands for, if it stands for
    one.

    torch's compiler wraps whatever is raised inside it; what it wrapped is then no fault of the
    code that was compiled.

    Raises:
        InterruptedRunError: SIGTERM or Ctrl-C has come, or one of the causes of ``error`` is an
            interruption.
    """
    raise_if_stopped()
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]

    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        seen.add(id(cause))
        waiting += [cause.__cause__, cause.__context__, getattr(cause, "inner_exception", None)]
