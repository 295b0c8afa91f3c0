"""Mutants that compute the same as the module does, and why."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
