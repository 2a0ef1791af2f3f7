"""Options that say how a served model is asked, the same for `bvpo sample` and `bvpo eval`."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_bvpo.errors import UserError

# Fields of a request's body that are the command's own.
_OWN_FIELDS = (
    *("model", "messages", "prompt", "n", "seed", "logprobs", "stream"),
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "add_special_tokens", "echo"),
)


def check_requests(args: argparse.Namespace, number: str, of: str, counts: tuple[str, ...] = ()) -> None:
    """Check the numbers among the options.

    Args:
        number: the option that says how many answers are asked for.
        of: to what, in words.
        counts: further options that are 1 or more.

    Raises:
        UserError: one of them is out of its range.
    """
    least = dict.fromkeys((number, "max_tokens", "concurrency", "tries", "limit", *counts), 1)
    for name, low in (least | {"temperature": 0, "patience": 0}).items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"must be {low} or more, found {value}", field=f"--{name}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"must be above 0 and at most 1, found {args.top_p}", field="--top_p")
    if not 0 < args.timeout < math.inf:
        raise UserError(f"must be above 0, found {args.timeout}", field="--timeout")
    for name in ("temperature", "timeout"):
        if math.isinf(getattr(args, name)):
            raise UserError("must be a finite number, found inf", field=f"--{name}")
    if not args.model.strip():
        raise UserError("is empty", field="--model", remedy="give the name that the server knows the model by")
    if getattr(args, number) > 1 and args.temperature == 0:
        raise UserError(
            f"at 0 all answers to a {of} are the same", field="--temperature", remedy=f"raise it, or --{number} 1"
        )


def extra_body(text: str | None) -> dict[str, Any]:
    """--extra_body.

    Raises:
        UserError: it is no JSON object, or has fields that the command sets.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"no JSON: {error}", field="--extra_body", remedy="""write it as '{"top_k": 20}'""") from None
    if not isinstance(found, dict):
        raise UserError(f"expected an object, found {text[:40]!r}", field="--extra_body")
    if own := [name for name in _OWN_FIELDS if name in found]:
        raise UserError(f"{', '.join(own)} is set by the command itself", field="--extra_body", remedy="leave it out")
    if not isinstance(found.get("chat_template_kwargs", {}), dict):
        raise UserError("chat_template_kwargs: expected an object", field="--extra_body")
    return found


def api_key(path: str | None) -> str | None:
    """The servers' key: of a file, or OPENAI_API_KEY.

    Raises:
        UserError: the file has none.
    """
    if path is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        key = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", field="--api_key_file") from None
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise UserError("holds no key on one line", file=path, field="--api_key_file")
    return key


def raise_file_limit(concurrency: int) -> None:
    """Allow as many open files as requests in flight, each a socket; the usual soft limit is 1024.

    Raises:
        UserError: the hard limit is lower.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = concurrency + 256
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"{concurrency} requests need more open files than the {hard} that are allowed",
            field="--concurrency",
            remedy=f"give {max(1, hard - 256)} or less, or raise ulimit -Hn",
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_addresses(addresses: list[str]) -> None:
    """Raises UserError where an address is none."""
    from megatron_bvpo.sampling.asking.server_state import Server

    for address in addresses:
        Server.at(address)


def make_asking(args: argparse.Namespace, extra: dict[str, Any]):
    """How samples are asked for.

    Raises:
        UserError: it is not known how the model's thinking is switched off, or the tokenizer's folder is no good.
    """
    from megatron_bvpo.data.empty_trace import DEFAULT_EMPTY_BLOCK, empty_block
    from megatron_bvpo.sampling.asking.chat_templates import ChatTemplate
    from megatron_bvpo.sampling.asking.modes import COMPLETIONS, Asking

    folder = args.tokenizer or (args.model if (Path(args.model) / "tokenizer_config.json").is_file() else None)
    template = ChatTemplate(folder) if folder else None
    switch = args.thinking_switch or (template.switch if template else None)
    try:
        block = empty_block(None, args.empty_block)
    except UserError as error:
        raise UserError(error.message, field="--empty_block", remedy=error.remedy) from None
    asking = Asking(
        model=args.model,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        seed=args.seed,
        switch=switch,
        template=template,
        block=block or DEFAULT_EMPTY_BLOCK,
        own_block=bool(args.empty_block),
        short_budget=args.short_budget,
        extra=extra,
    )
    if template is None and COMPLETIONS in asking.uses(args.modes):
        mode = "short" if "short" in args.modes else "empty"
        raise UserError(
            f"the mode {mode} needs the model's chat template",
            field="--tokenizer",
            remedy="give the model's folder; for a hybrid's empty answers --thinking_switch enable_thinking is enough",
        )
    if "short" in args.modes and not template.has_tokens:
        raise UserError("no tokenizer.json, so that traces cannot be cut", file=str(folder), field="--tokenizer")
    if args.thinking_switch and template and template.switch not in (None, args.thinking_switch):
        raise UserError(
            f"the template of {folder} has {template.switch!r}, not {args.thinking_switch!r}",
            field="--thinking_switch",
            remedy="leave it out",
        )
    return asking
