"""Checks that several sections share."""

from __future__ import annotations


def at_least(section: str, minimum: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{section}.{name} must be at least {minimum}, got {value}.")


def above_zero(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name} must be above 0, got {value}.")
