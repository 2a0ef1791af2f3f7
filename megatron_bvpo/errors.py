"""The one exception for mistakes that a user can mend.

The command line prints it as `megatron-bvpo: error: …` without a stack trace and exits with code 2.
Everything else that is raised is a fault of ours and keeps its trace.
"""

import os

EXIT_CODE = 2


class UserError(ValueError):
    """A mistake in flags, data or environment, told in a way that says what to do.

    Args:
        message: what was found and what was expected, as one or two sentences.
        file: the file at fault, if any.
        line: its line, counted from 1.
        field: the field, flag or variable at fault.
        remedy: what to do, as a sentence or a command.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        where = ""
        if self.file is not None:
            where = f"{self.file}:{self.line}: " if self.line is not None else f"{self.file}: "
        elif self.line is not None:
            where = f"line {self.line}: "
        what = f"{self.field}: {self.message}" if self.field is not None else self.message
        text = f"{where}{what}"
        if self.remedy is None:
            return text
        if text and text[-1] not in ".!?:":
            text += ";" if self.remedy[:1].islower() else "."
        return f"{text} {self.remedy}"

    def __reduce__(self):
        # Keyword arguments are lost by the default, and errors come back from worker processes pickled.
        return _rebuild, (self.message, self.file, self.line, self.field, self.remedy)


def _rebuild(message, file, line, field, remedy) -> UserError:
    return UserError(message, file=file, line=line, field=field, remedy=remedy)


def or_bound() -> str:
    """What to add to "check that it is mounted": inside an image a folder must be bound, too."""
    inside = any(os.environ.get(name) for name in ("BVPO_IN_IMAGE", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"))
    return " and bound into the image: BVPO_BINDS=/its/folder when submitting slurm.sbatch" if inside else ""
