"""From a judge's specification (`--with`, `--judge`) to the judge.

math                      math-verify, in processes with a time limit
exact                     the same text, up to white space and typography
choice                    the letter of a multiple choice
reward:URL                a reward model behind vLLM's or SGLang's routes
llm:URL                   a judge model with a rubric
package.module:function   a function of one's own
"""

import importlib.util
import os
import re
import sys

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.judging.judge_items import Item, Judge, JudgeOptions, item

__all__ = [
    "Item", "Judge", "JudgeOptions", "check_name", "check_spec", "is_function", "is_importable", "item", "judge_name",
    "make_judge",
]  # fmt: skip

KINDS = ("math", "exact", "choice", "reward:URL", "llm:URL", "package.module:function")
_NAME = re.compile(r"\w[\w.-]{0,63}")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def make_judge(spec: str, **options) -> Judge:
    """The judge that a specification names.

    Args:
        spec: one of `KINDS`.
        options: as in `JudgeOptions`.

    Raises:
        UserError: no such judge, a server that does not answer, a function or a package that is not there.
    """
    given = JudgeOptions(**options)
    check_spec(spec)
    kind, _, rest = spec.partition(":")
    if kind in ("reward", "llm"):
        return _server_judge(kind, rest, given)
    if spec == "math":
        from megatron_bvpo.sampling.judging.math_judge import math_judge

        return math_judge(given.processes, given.limit(10.0))
    if spec in ("exact", "choice"):
        from megatron_bvpo.sampling.judging import text_judges

        return text_judges.exact(given.ignore_case) if spec == "exact" else text_judges.choice()
    from megatron_bvpo.sampling.judging.pool_judges import function_judge

    return function_judge(spec, given.processes, given.limit(10.0), given.threshold)


def check_spec(spec: str) -> None:
    """Raise UserError for what names no judge. Looks at no server, no package and no function."""
    kind, _, url = spec.partition(":")
    if kind in ("reward", "llm"):
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(
                f"expected an address such as {kind}:http://host:8000, found {kind}:{url}",
                field="--with",
                remedy="give the server's http:// or https:// address",
            )
    elif spec not in ("math", "exact", "choice") and not is_function(spec):
        raise UserError(f"no judge {spec!r}; there are {', '.join(KINDS)}", field="--with")


def check_name(name: str) -> None:
    """Raise UserError for what cannot name a judge's folder."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a judge: letters, digits, dots, dashes are expected", field="--name")


def is_function(spec: str) -> bool:
    """Whether a specification names a function."""
    return _FUNCTION.fullmatch(spec) is not None


def is_importable(module: str) -> bool:
    """Whether a judge's processes find a module: they look in the current folder, too. Nothing but the packages above
    it is imported."""
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove(os.getcwd())


def judge_name(spec: str) -> str:
    """The default name of a judge's folder: its kind, or the function's name."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind in ("reward", "llm"):
        return kind
    return rest.rpartition(".")[2]


def _server_judge(kind: str, url: str, options: JudgeOptions) -> Judge:
    if kind == "reward":
        from megatron_bvpo.sampling.judging.reward_judge import RewardJudge

        return RewardJudge(url, options)
    from megatron_bvpo.sampling.judging.llm_judge import LlmJudge

    return LlmJudge(url, options)
