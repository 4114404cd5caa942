"""The `Modelfile` that Ollama makes a model of: our chat format as a Go template, and where a reply ends.

Ollama reads the chat template of a GGUF file only where it knows it, so the format is written out for it. It puts the
file's bos token before every prompt by itself.
"""

from __future__ import annotations

from picollm.tokenizer.special import ASSISTANT_END, ASSISTANT_START, BOS, USER_END, USER_START

# `.System` holds the system message and `.Messages` all of them, it included. Ours goes before the first user's text.
# The reply to come is rendered too: `<|assistant_start|>` follows the last message, which is the user's.
CHAT_TEMPLATE = (
    "{{- $system := .System }}"
    "{{- range .Messages }}"
    '{{- if eq .Role "user" }}'
    f"{USER_START}{{{{ if $system }}}}{{{{ $system }}}}\n\n{{{{ end }}}}{{{{ .Content }}}}{USER_END}"
    '{{- $system = "" }}'
    '{{- else if eq .Role "assistant" }}'
    f"{ASSISTANT_START}{{{{ .Content }}}}{ASSISTANT_END}"
    "{{- end }}"
    "{{- end }}"
    f"{ASSISTANT_START}"
)
BASE_TEMPLATE = "{{ .Prompt }}"


def modelfile(file: str, *, is_chat: bool, context: int) -> str:
    """Text of the `Modelfile`.

    Args:
        file: name of the GGUF file beside it.
        context: tokens that the model was trained with.
    """
    template = CHAT_TEMPLATE if is_chat else BASE_TEMPLATE
    stops = (ASSISTANT_END, BOS) if is_chat else (BOS,)
    return "\n".join(
        [
            f"FROM ./{file}",
            f'TEMPLATE """{template}"""',
            *(f'PARAMETER stop "{stop}"' for stop in stops),
            f"PARAMETER num_ctx {context}",
            "PARAMETER temperature 0",
            "",
        ]
    )
