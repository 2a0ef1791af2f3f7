"""Rows of the row checks' tests."""

import json
from dataclasses import replace

from megatron_bvpo.data.handover import Reading
from megatron_bvpo.data.rows import RowRules
from megatron_bvpo.streams import ORDER

CHOSEN = "<think>\nTwo and two.\n</think>\n\nIt is 4."
REJECTED = "<think>\nA guess.\n</think>\n\nIt is 5."
OWN = {"empty_response": "4", "empty_rejected_response": "5"}
RULES = RowRules()
READING = Reading(RULES)


def talk(response=CHOSEN, prompt="What is 2+2?"):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def row(chosen=CHOSEN, rejected=REJECTED, **more):
    return {"messages": talk(chosen), "rejected_response": rejected, **more}


def jsonl(*rows):
    return "".join(json.dumps(entry) + "\n" for entry in rows).encode()


# Of the other streams.
ALL = RowRules(streams=ORDER)
KTO = RowRules(streams=("trace", "empty", "expert"), unpaired=True)
GATE = replace(ALL, gate_threshold=0.0)
PROMPT = {"messages": talk()[:1]}
ALONE = {**PROMPT, **OWN}
SHORT = {"short_response": "<think>\nTwo.\n</think>\n\n4", "short_rejected_response": "Hm.</think>5"}
EXPERT = {"expert_response": "<think>\n2+2\n</think>\n\nFour."}
SINGLE = {"messages": talk(), "label": True}
