"""Names of the FP8 and FP4 recipes. They can be subclassed and compared, not used: there is no FP8 here."""

from __future__ import annotations

from enum import Enum


class Format(Enum):
    """Number formats; the values are the largest numbers of the forward and backward formats."""

    E4M3 = (448, 448)
    E5M2 = (57344, 57344)
    HYBRID = (448, 57344)
    E2M1 = (6, 6)


class Recipe:
    """Base of all recipes."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            f"{type(self).__name__}: the transformer_engine stand-in has no FP8 or FP4. Leave "
            "--fp8_format and --fp4_format unset in a rehearsal."
        )


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass


class CustomRecipe(Recipe):
    pass
