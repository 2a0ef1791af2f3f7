"""How large a submission is, of its flags of sbatch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_bvpo.errors import UserError


def submission_size(slurm: Mapping[str, Any]) -> tuple[int, int | None]:
    """(nodes, GPUs of a node, or None where nobody can say); of a range of nodes, the least.

    Raises:
        UserError: a value that sbatch would not take; `field` is the key.
    """
    flags = {str(key).replace("-", "_"): value for key, value in slurm.items() if value is not None}
    for key, value in flags.items():
        if isinstance(value, (list, dict)):
            raise UserError(f"is {value!r}; expected one value", field=key)
    nodes = re.fullmatch(r"0*([1-9]\d*)([-,:].*)?", str(flags.get("nodes", 1)))
    if not nodes:
        raise UserError(f"is {flags['nodes']!r}; expected how many, such as 4", field="nodes")
    given = str(flags.get("gpus_per_node", ","))
    gpus = re.fullmatch(r"([\w.-]+:)?0*([1-9]\d*)", given)
    if not gpus and "," not in given:  # several kinds in a node
        raise UserError(f"is {given!r}; expected how many, such as 8 or h100:8", field="gpus_per_node")
    return int(nodes[1]), int(gpus[2]) if gpus else None
