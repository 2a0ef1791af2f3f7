"""Where new layers go: `upper-half`, or the numbers of the old layers that they follow."""

from __future__ import annotations

from megatron_bvpo.errors import UserError

UPPER_HALF = "upper-half"
FLAG = "--layers"


def places(given: str, layers: int) -> list[int]:
    """Numbers N of old layers, counted from 0 and in order: a new layer goes between N and N + 1.

    `upper-half` puts one in front of each layer of the upper half, so that a model of L layers gets L // 2 more.

    Raises:
        UserError: not a list of numbers, a place that is not there, or one named twice.
    """
    example = f"give {UPPER_HALF}, or numbers from 0 to {layers - 2} such as {FLAG} {max(layers - 2, 0)}"
    if layers < 2:
        message = f"a model of {layers} layer has no neighbours to put a layer between"
        raise UserError(message, field=FLAG, remedy="grow a model of two layers or more")
    if given.strip() == UPPER_HALF:
        return list(range(layers - layers // 2 - 1, layers - 1))
    try:
        found = [int(part) for part in given.split(",")]
    except ValueError:
        raise UserError(f"{given!r} is no list of whole numbers", field=FLAG, remedy=example) from None
    for place in found:
        if not 0 <= place <= layers - 2:
            raise UserError(
                f"there is no place between layers {place} and {place + 1}: the model's layers are 0 to {layers - 1}",
                field=FLAG,
                remedy=example,
            )
    twice = sorted({place for place in found if found.count(place) > 1})
    if twice:
        raise UserError(
            f"names {twice[0]} twice, and one new layer goes between two neighbours",
            field=FLAG,
            remedy="name each place once",
        )
    return sorted(found)


def new_numbers(places: list[int], layers: int) -> tuple[dict[int, int], dict[int, int]]:
    """(old layer → its number in the grown model, place → the number of its new layer)."""
    old = {layer: layer + sum(place < layer for place in places) for layer in range(layers)}
    return old, {place: old[place] + 1 for place in places}
