"""Rows of the row checks' tests."""

from megatron_bvpo.data.rows import RowRules

CHOSEN = "<think>\nTwo and two.\n</think>\n\nIt is 4."
REJECTED = "<think>\nA guess.\n</think>\n\nIt is 5."
OWN = {"empty_response": "4", "empty_rejected_response": "5"}
RULES = RowRules()


def talk(response=CHOSEN, prompt="What is 2+2?"):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def row(chosen=CHOSEN, rejected=REJECTED, **more):
    return {"messages": talk(chosen), "rejected_response": rejected, **more}
