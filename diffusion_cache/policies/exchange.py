"""Computing a step that a schedule reuses in exchange for a later one, so that the number of computed steps stays."""

from collections.abc import Collection, Sequence


def remaining(
    planned: Collection[int], extra: Sequence[int], fixed: Collection[int] = (), strict: bool = False
) -> frozenset[int]:
    """What of the planned steps is left, with the extra ones, each of which has taken the place of the next.

    fixed: planned steps that stay whatever happens. strict: extra steps take nobody's place.
    """
    steps = set(planned)
    for step in extra:
        steps.add(step)
        dropped = None if strict else replaced(steps, step, fixed)
        if dropped is not None:
            steps.remove(dropped)
    return frozenset(steps)


def replaced(steps: Collection[int], step: int, fixed: Collection[int] = ()) -> int | None:
    """Which of the steps is dropped if an extra one is computed; None where none is left.

    The next one: what was to be computed then is computed at once.
    """
    return min((s for s in steps if s > step and s not in fixed), default=None)
