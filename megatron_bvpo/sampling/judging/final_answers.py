"""The final answer in a response's text, and when two answers are the same text. Pure text in, pure text out."""

import re
import unicodedata

_SPACES = re.compile(r"\s+")
_MINUS = str.maketrans({c: "-" for c in "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"})
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "′": "'", "″": '"'})
# "The answer is X", "Final answer: X"; in Japanese and Chinese texts 答え and 答案.
_PHRASE = re.compile(
    r"(?:\b(?:final\s+)?answer\b\**\s*(?:is\b\s*:?|are\b\s*:?|:|=)|(?:答え|答案|解答)\s*(?:は|是|为|:|:))\**\s*(?P<rest>[^\n]+)",
    re.IGNORECASE,
)
_OPENING_TAG, _CLOSING_TAG = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
_LAYERS = 8  # of what may wrap an answer
_BRACE = re.compile(r"\\[{}\\]|(?:\\boxed\s*)?\{|\}")
_WRAPPED = re.compile(
    r"\$\$(?P<a>.*)\$\$|\$(?P<b>[^$]*)\$|\\\((?P<c>.*)\\\)|\\\[(?P<d>.*)\\\]"
    r"|\*\*(?P<e>[^*]*)\*\*|`(?P<f>[^`]*)`|\\(?:text|mathrm|textbf|mathbf)\{(?P<g>[^{}]*)\}",
    re.DOTALL,
)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} that is closed, braces matched; of nested ones the innermost."""
    found, opened = None, []
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append((match.end(), match[0] != "{"))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (found is None or start > found[0]):
                found = start, match.start()
    return text[slice(*found)].strip() if found else None


def _tagged(text: str) -> str | None:
    """What stands in the last <answer> that is closed. No one pattern: a text of opening tags would take it hours."""
    ends = [match.start() for match in _CLOSING_TAG.finditer(text)]
    starts = [match.end() for match in _OPENING_TAG.finditer(text) if ends and match.end() <= ends[-1]]
    return text[starts[-1] : ends[-1]].strip() if starts else None


def stated(text: str) -> str | None:
    r"""The answer that the text marks as final: \boxed{…}, `<answer>…</answer>`, "the answer is …", "#### …"; the
    last of the first of these forms that is there. None where it marks none."""
    inside = boxed(text)
    if inside is not None:
        return inside
    tagged = _tagged(text)
    if tagged is not None:
        return tagged
    if phrases := [match["rest"].strip() for match in _PHRASE.finditer(text)]:
        # **The answer is 42.** leaves one end of the bold type behind.
        phrase = phrases[-1].replace("**", "") if phrases[-1].count("**") % 2 else phrases[-1]
        return phrase[:-1].rstrip() if phrase[-1:] in (".", "。") else phrase
    return text.rpartition("####")[2].strip() or None if "####" in text else None


def final(text: str) -> str | None:
    """The marked answer; else the text, where it is one line."""
    found = stated(text)
    if found is None:
        found = text.strip() if "\n" not in text.strip() else None
    return found or None


def readings(answer: str) -> tuple[str, ...]:
    """An answer, and its first sentence where more follow ("42. I have checked it.")."""
    first = re.split(r"(?<=\w)[.。]\s", answer, maxsplit=1)[0]
    return (answer,) if first == answer else (answer, first)


def gold(answer: str) -> str:
    """The right answer of a row, of a GSM8K solution the part behind its ####."""
    return answer.rpartition("####")[2].strip() or answer.strip()


def normalised(text: str, ignore_case: bool = False) -> str:
    """The text by which answers are compared.

    Unicode's compatible forms are one (full width, ligatures), so are minus signs and quotation marks; white space is
    one space; what wraps the whole ($…$, **…**, `…`, \\text{…}) and a full stop at the end fall away. Letters keep
    their case unless `ignore_case`.
    """
    text = unicodedata.normalize("NFKC", text.translate(_MINUS).translate(_QUOTES))
    text = _SPACES.sub(" ", text).strip()
    for _ in range(_LAYERS):
        bare = text[:-1].rstrip() if text[-1:] in (".", "。") and text[-2:-1] != "." else text
        if match := _WRAPPED.fullmatch(bare):
            bare = match[match.lastgroup].strip()
        if bare == text:
            break
        text = bare
    return text.casefold() if ignore_case else text
