"""Text that may be sent to somebody: what secret_flags.py refuses is masked, wherever it stands.

Three nets, because each has holes. Names: a value behind a name that is called like a secret (`--hub_token x`,
`hub_token: x`, `"api_key": "x"`, `HF_TOKEN=x`). Values: what the environment's and the run's own secrets are, wherever
they appear, without a name too. Shapes: passwords and tokens in addresses, authorization headers, private keys, and the
forms in which well-known services write tokens. Too much masked is no harm: a report loses a word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from megatron_bvpo.launching.flag_names import flag_names
from megatron_bvpo.launching.run_file import RunFile
from megatron_bvpo.launching.secret_flags import is_secret_flag, is_secret_name

MASK = "***"
SHORTEST = 6  # a shorter secret would mask half of the text, and is none

_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
# A value: quoted, or up to where one ends. Behind a flag a blank parts it from the name, too, and it may begin with
# dashes; in a file it may stand on lines of its own, further in than its key.
_VALUE = r"""(?P<value>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s,;&}\])"']+)"""
_BEHIND_NAME = re.compile(rf"""["']?[ \t]*[:=][ \t]*{_VALUE}""")
_REST_OF_LINE = re.compile(r"""["']?[ \t]*[:=][ \t]*(?P<value>\S[^\n]*)""")
_BEHIND_FLAG = re.compile(rf"""["']?(?:=|,?\s+){_VALUE}""")
_NEXT_LINES = r":[ \t]*[|>]?[+\-]?[ \t]*\n(?P<value>(?:%s[ \t]+\S.*(?:\n|\Z))+)"
_IN_ADDRESS = re.compile(r"(?P<head>\w://)[^/\s@\"']+@")
_HEADER = re.compile(r"(?i)(?P<head>\b(?:bearer|basic)\s+)[\w.~+/=\-]{8,}")
_PRIVATE_KEY = re.compile(r"(?s)(?P<head>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)")
_WELL_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}|sk-[\w\-]{16,}"
    r"|xox[abprs]-[\w\-]{10,}|AKIA[A-Z0-9]{16}|ms-[0-9a-f]{8}-[0-9a-f\-]{20,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
)
# Words that stand behind a secret's name and say that there is none.
_NOTHING = re.compile(r"""(?i)["']?(?:none|null|true|false|unset|missing|\*+)?["']?""")


def masked(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with every secret replaced by `***`.

    Args:
        secrets: values that are known to be secret (`known_secrets`), masked wherever they stand.
    """
    for secret in sorted(set(secrets), key=len, reverse=True):  # a longer one may hold a shorter one
        text = text.replace(secret, MASK)
    text = _PRIVATE_KEY.sub(rf"\g<head>{MASK}", text)
    text = _IN_ADDRESS.sub(rf"\g<head>{MASK}@", text)
    text = _HEADER.sub(rf"\g<head>{MASK}", text)
    text = _WELL_KNOWN.sub(MASK, text)
    return _without_named(text)


def _without_named(text: str) -> str:
    """Mask what stands behind the name of a secret. Names are looked for one by one: `a: b?token=c` has two."""
    parts, done = [], 0
    for name in _NAME.finditer(text):
        if name.start() < done or not called_like_a_secret(name[0]):
            continue
        found = _value_behind(text, name)
        if found is None or _NOTHING.fullmatch(found["value"].strip()):
            continue
        parts += [text[done : found.start("value")], MASK, "\n" if found["value"].endswith("\n") else ""]
        done = found.end("value")
    return "".join([*parts, text[done:]])


def _value_behind(text: str, name: re.Match) -> re.Match | None:
    if text[max(name.start() - 2, 0) : name.start()] == "--":
        return _BEHIND_FLAG.match(text, name.end())
    indent = text[text.rfind("\n", 0, name.start()) + 1 : name.start()]
    if indent.strip() in ("", "-", "export", "#"):  # a line of a file of settings: all that is behind the name
        lines = re.compile(_NEXT_LINES % re.escape(indent)).match(text, name.end())
        word = _BEHIND_NAME.match(text, name.end())
        if word is None or not _NOTHING.fullmatch(word["value"]):
            return lines or _REST_OF_LINE.match(text, name.end())
    return _BEHIND_NAME.match(text, name.end())


@functools.cache
def called_like_a_secret(name: str) -> bool:
    """A flag's, a variable's or a key's name (of a.b: b), as secret_flags.py judges each; counts of tokens are none."""
    plain = name.rsplit(".", 1)[-1].replace("-", "_").strip("_")
    if plain in flag_names():  # what it means is known: `lazy_tokenize` and `moe_token_drop_policy` hold no token
        return is_secret_flag(plain, flag_names())
    if re.search(r"tokens(?:_|$)", plain):
        return False
    return is_secret_flag(plain.lower(), flag_names()) or is_secret_name(plain)


def known_secrets(env: Mapping[str, str], run: RunFile | None = None) -> set[str]:
    """Values of the variables and flags that are called like a secret, and passwords in their addresses."""
    pairs = list(env.items())
    if run is not None:
        pairs += list(run.env.items())
        for i, token in enumerate(run.flags):
            if token.startswith("--"):
                name, equals, value = token[2:].partition("=")
                pairs.append((name, value if equals else "".join(run.flags[i + 1 : i + 2])))
    found = set()
    for name, value in pairs:
        if called_like_a_secret(name):
            found.add(value.strip())
        for address in re.finditer(r"\w://([^/\s@\"']+)@", value):
            found |= set(address[1].split(":"))
    return {value for value in found if len(value) >= SHORTEST and not _NOTHING.fullmatch(value)}
