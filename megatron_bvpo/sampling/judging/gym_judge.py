"""reasoning-gym's scorers as a judge: `--with megatron_bvpo.sampling.judging.gym_judge:score`.

A row needs its task's name: `metadata.source_dataset`, as reasoning-gym's entries have it, or a column
`source_dataset` or `family`.
"""

from functools import cache
from typing import Any

from megatron_bvpo.sampling.judging import final_answers


def score(text: str, answer: str | None, columns: dict[str, Any], question: str) -> dict[str, Any]:
    """The scorer's number for the final answer, from 0 to 1; 1 is right.

    Raises:
        ValueError: the row does not tell its task.
    """
    metadata = columns.get("metadata") or {}
    task = metadata.get("source_dataset") or columns.get("source_dataset") or columns.get("family")
    if not task:
        raise ValueError("the row has no metadata.source_dataset, source_dataset or family: which task is it?")
    stated = final_answers.stated(text)
    final = text.strip() if stated is None else stated
    entry = {**columns, "question": question, "answer": answer, "metadata": metadata}
    value = max(float(_scorer(task)(reading, entry)) for reading in final_answers.readings(final))
    return {"score": value, "right": value >= 1.0, "parsed": final}


@cache
def _scorer(task: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
