"""Three disjoint sets of sequences: to score units, to judge students, to train them."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_ray.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Indices of sequences. The token stream mixes topics already, so each set is one range."""

    calibration: range
    validation: range
    train: range


def split(n: int, calibration: int, validation: int, minimum_train: int, sequence_length: int) -> Splits:
    """The first `calibration` of `n` sequences, the next `validation`, and all others for training.

    Raises ConfigError where fewer than `minimum_train` are left.
    """
    needed = calibration + validation + minimum_train
    if n < needed:
        raise ConfigError(
            f"the text gives {n:,} sequences of {sequence_length} tokens; calibration {calibration:,} + "
            f"validation {validation:,} + at least {minimum_train:,} for training need {needed:,}; add "
            "text, or lower data.calibration, data.validation or data.sequence_length"
        )
    held_out = calibration + validation
    return Splits(
        calibration=range(calibration),
        validation=range(calibration, held_out),
        train=range(held_out, n),
    )
