"""The cost of a pretraining as a record. Torch-free."""

from dataclasses import dataclass

UNEQUAL = 0.1
"""Arms whose pretrainings differ by more than this share of their arithmetic are no equals."""


@dataclass(frozen=True)
class Cost:
    """The cost of a finished pretraining.

    Attributes:
        flops: multiplications and additions of all steps, forward and backward of encoder, decoder
            and head; None where they could not be counted.
        samples: crops seen.
        seconds: of all steps, from the run's metrics; None where it left none.
    """

    flops: float | None
    samples: int
    seconds: float | None
