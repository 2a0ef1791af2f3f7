"""A model's chat template and its tokenizer without transformers: what the server makes of messages.

Rendered as transformers does it (a sandbox, the same filters and globals, the special tokens as variables), and
encoded by `tokenizer.json` without added special tokens, since templates write them themselves.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_bvpo.data.empty_trace import DEFAULT_TAGS
from megatron_bvpo.errors import UserError

# Variables with which chat templates switch thinking, the commonest first.
_SWITCHES = ("enable_thinking", "thinking")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a model's folder.

    Args:
        folder: where tokenizer_config.json (and chat_template.jinja, tokenizer.json) are.

    Attributes:
        switch: the variable that switches thinking; None where the template has none.
        opens_trace: whether the prompt itself opens the trace when thinking is on.
        digest: of the template's text.
        has_tokens: whether there is a tokenizer.json.

    Raises:
        UserError: there is no template, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config = _read_config(self.folder)
        text = _template_text(self.folder, config)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._special = {name: token for name in _SPECIAL_TOKENS if (token := _token_text(config.get(name)))}
        self._template = _compile(text, self.folder)
        self._tokenizer = None
        self.has_tokens = (self.folder / "tokenizer.json").is_file()
        self.switch = self._find_switch()
        end = self.render([{"role": "user", "content": "Hi"}], thinking=True).rstrip()
        self.opens_trace = end.endswith(DEFAULT_TAGS.open)

    def render(
        self, messages: list[dict[str, Any]], tools: Any = None, *, thinking: bool, more: dict | None = None
    ) -> str:
        """The prompt's text, up to where the model's response begins; `more` are further variables of the template.

        Raises:
            UserError: the template refuses the messages.
        """
        import jinja2

        switch = {self.switch: thinking} if self.switch else {}
        return self._render(jinja2, messages, tools, (more or {}) | switch)

    def conversation(self, messages: list[dict[str, Any]]) -> str:
        """The text of a conversation that ends in a response, as a reward model reads it.

        Raises:
            UserError: the template refuses the messages.
        """
        import jinja2

        return self._render(jinja2, messages, None, {"add_generation_prompt": False})

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return self._tokens().encode(text, add_special_tokens=False).ids

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text, without half a character at the end."""
        ids = self.encode(text)
        if len(ids) <= tokens:
            return text
        return self._tokens().decode(ids[:tokens], skip_special_tokens=False).rstrip("\ufffd")

    def _find_switch(self) -> str | None:
        import jinja2

        self.switch = None
        talk = [{"role": "user", "content": "Hi"}]
        for name in _SWITCHES:
            if self._render(jinja2, talk, None, {name: True}) != self._render(jinja2, talk, None, {name: False}):
                return name
        return None

    def _render(self, jinja2, messages, tools, variables) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                **self._special,
                **{"add_generation_prompt": True, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"its chat template cannot render a prompt: {error}",
                file=str(self.folder),
                remedy="mend the prompt or the template",
            ) from None

    def _tokens(self):
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            path = self.folder / "tokenizer.json"
            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises bare Exception
                raise UserError(
                    f"cannot be read: {error}", file=str(path), remedy="copy it from the model again"
                ) from None
        return self._tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not folder.is_dir():
        raise UserError(
            f"no folder: {folder}",
            field="--tokenizer",
            remedy="give the local folder with the model's tokenizer_config.json and tokenizer.json",
        )
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", file=str(path), remedy="copy it from the model again") from None
    extra = folder / "special_tokens_map.json"
    if extra.is_file():
        try:
            config = {**json.loads(extra.read_text("utf-8")), **config}
        except (OSError, ValueError):
            pass  # tokenizer_config.json says the same
    return config


def _template_text(folder: Path, config: dict[str, Any]) -> str:
    """A file of its own wins over the configuration, as in transformers."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text("utf-8")
        path = folder / "chat_template.json"
        found = json.loads(path.read_text("utf-8")) if path.is_file() else config
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", file=str(path), remedy="copy it from the model again") from None
    text = found.get("chat_template")
    if isinstance(text, list):
        named = {item.get("name"): item.get("template") for item in text if isinstance(item, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        raise UserError(
            "no chat template: neither chat_template.jinja nor `chat_template` in tokenizer_config.json",
            file=str(folder),
            remedy="give the folder of a chat model with --tokenizer",
        )
    return text


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _compile(text: str, folder: Path):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what is trained and writes nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(
            f"its chat template is broken: {error}", file=str(folder), remedy="copy it from the model again"
        ) from None
