"""Does the server see the prompt that we mean? Its own count of prompt tokens tells.

`swift deploy` puts its chat template around the prompt of a completion: an empty sample would be one of another prompt
than training's, and nothing would tell. A server whose model has no switch ignores `chat_template_kwargs`, and thinks.
"""

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.modes import COMPLETIONS, Asking, Request
from megatron_bvpo.sampling.samples import Prompt, Sample

# Chat prompts are rendered here for the first samples of a mode only.
_LOOKS = 20


class PromptCheck:
    """Compares servers' counts of prompt tokens with ours.

    Args:
        asking: how samples are asked for; without a tokenizer.json nothing can be compared.
    """

    def __init__(self, asking: Asking) -> None:
        self.asking = asking
        self._looks: dict[str, int] = {}

    def look(self, prompt: Prompt, request: Request, sample: Sample) -> str | None:
        """A line for the user where a chat's prompt has other tokens than its template gives.

        Raises:
            UserError: a rendered prompt has.
        """
        template = self.asking.template
        if sample.prompt_tokens is None or template is None or not template.has_tokens:
            return None
        if request.path == COMPLETIONS:
            if sample.prompt_tokens != (ours := len(request.tokens)):
                raise UserError(
                    f"{sample.server} counts {sample.prompt_tokens} tokens in a rendered prompt of {ours}: it puts "
                    "something around it, or has another tokenizer",
                    field="--server",
                    remedy="give --tokenizer the served model's folder, and serve it with vLLM or SGLang for these "
                    "modes: swift deploy puts its chat template around completions",
                )
            return None
        looks = self._looks.get(request.mode, 0)
        if looks >= _LOOKS:
            return None
        self._looks[request.mode] = looks + 1
        try:
            ours = len(template.encode(self.asking.chat_prompt(prompt, request.mode == "thinking")))
        except UserError:
            return None  # the server rendered what our template refuses
        if sample.prompt_tokens == ours:
            return None
        self._looks[request.mode] = _LOOKS  # said once
        switch = f", or ignores {self.asking.switch}" if self.asking.switch else ""
        return (
            f"{sample.server} counts {sample.prompt_tokens} tokens in a {request.mode} prompt, the chat template of "
            f"{template.folder} makes {ours}: it has another template{switch}"
        )
