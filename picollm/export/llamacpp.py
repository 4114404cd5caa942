"""Stock llama.cpp behind a small interface, where it is installed: the package `xllamacpp` holds its server.

The server answers in this process and on a port of the loopback interface that the system chose; what its Python
functions lack (tokens of a text, the prompt of a template) is asked there.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picollm.errors import ConfigError, HostError, IntegrityError, WorkerError, first_line

PACKAGE = "xllamacpp"
INSTALL = "install it with `python -m pip install xllamacpp` (a wheel of 34 MB, no compiler)"
_TIMEOUT_S = 600


def version() -> str | None:
    """Version of the installed runtime; None without one."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a folder of that name, without the records of an installation
        return "of unknown version"


def require() -> str:
    """The installed runtime's version.

    Raises:
        HostError: there is none; the hint says how to get it.
    """
    if found := version():
        return found
    raise HostError("llama.cpp is not installed", cause=f"there is no Python package `{PACKAGE}`", hint=INSTALL)


class Runtime:
    """A GGUF file, loaded by llama.cpp on the CPU.

    Args:
        context: tokens of a prompt and its reply together.
        threads: None leaves the choice to llama.cpp.
        exact: keys and values are kept in float32 and attention is computed as written, so that float32 weights give
            our logits; the defaults round keys and values to float16.

    Raises:
        HostError: llama.cpp is not installed.
        IntegrityError: it cannot load the file.
    """

    def __init__(self, path: Path | str, *, context: int, threads: int | None = None, exact: bool = False) -> None:
        found = require()
        try:
            import xllamacpp

            params = self._params(xllamacpp, str(path), context, threads, exact)
        except Exception as error:  # an installation can be broken in any way, and its names change with releases
            raise HostError(
                f"xllamacpp {found} cannot be used here",
                cause=f"{type(error).__name__}: {first_line(error)}",
                hint="get another with `python -m pip install --upgrade xllamacpp`",
            ) from error
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the package raises bare Exception
            raise IntegrityError(f"llama.cpp cannot load `{path}`", cause=str(error), hint="export it again") from error
        self.context = context
        host, _, port = str(self._server.listening_address).rpartition("/")[2].rpartition(":")
        self._address = (host, int(port))
        self._whole = self.tokenize("a")[0]

    @staticmethod
    def _params(xllamacpp: Any, path: str, context: int, threads: int | None, exact: bool) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.n_predict = context
        params.warmup, params.verbosity = False, -1
        # No second copy of the weights in another order; it is also where broken AMX ends a process.
        params.no_extra_bufts = True
        params.cache_ram_mib = params.n_ctx_checkpoints = 0  # one conversation at a time: nothing to come back to
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.ui = params.endpoint_slots = False
        if threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.n_batch = params.n_ubatch = 128
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    # -- text and tokens ----------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            specials: text of special tokens becomes these tokens, and bos comes first, as in a rendered prompt.
        """
        asked = {"content": text, "add_special": specials, "parse_special": specials}
        return list(self._post("/tokenize", asked)["tokens"])

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of the prompt that the file's own template makes of a conversation."""
        prompt = self._post("/apply-template", {"messages": list(messages)})["prompt"]
        return self.tokenize(prompt, specials=True)

    # -- probabilities and greedy replies ---------------------------------------------------------------------------

    def log_probs(self, ids: Sequence[int], vocab_size: int) -> np.ndarray:
        """Log-probabilities (V,) of the token after `ids`; float64, -inf where they are below float32."""
        found = np.full(vocab_size, -np.inf)
        for entry in self._next(ids, vocab_size):
            if entry["logprob"] is not None:
                found[entry["id"]] = entry["logprob"]
        return found

    def best(self, ids: Sequence[int]) -> int:
        """The most likely token after `ids`."""
        return int(self._next(ids, 1)[0]["id"])

    def _next(self, ids: Sequence[int], count: int) -> list[dict[str, Any]]:
        """The `count` most likely tokens after `ids`.

        They are told only with a token that ends a character, so that one is chosen; what is told is before the bias.
        """
        asked = {"n_predict": 1, "n_probs": count, "temperature": 0, "logit_bias": [[self._whole, 1000.0]]}
        reply = self._post("/completion", {"prompt": list(ids), "cache_prompt": True, **asked})
        return list(reply["completion_probabilities"][0]["top_logprobs"])

    def complete(self, ids: Sequence[int], max_tokens: int) -> tuple[list[int], bool]:
        """Greedy continuation: its tokens, the one it stopped at included, and whether it stopped by itself."""
        asked = {"prompt": list(ids), "n_predict": max_tokens, "temperature": 0, "return_tokens": True}
        reply = self._post("/completion", asked)
        return list(reply["tokens"]), reply["stop_type"] == "eos"

    # -- streamed replies ---------------------------------------------------------------------------------------------

    def answer(
        self, messages: Sequence[dict[str, str]], *, temperature: float, seed: int, on_text: Callable[[str], None],
        max_tokens: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Answer a conversation with the file's own template.

        Args:
            max_tokens: the longest reply; None lets it fill the context, which llama.cpp rounds up to 256 tokens.
            on_text: called with each piece of text as it is decoded; what it raises ends the reply.

        Returns:
            {"text", "finish_reason", "tokens", "prompt_tokens"}

        Raises:
            ConfigError: the conversation does not fit the context.
        """
        asked = {"messages": list(messages), "stream_options": {"include_usage": True}, **_at_most(max_tokens)}
        return self._stream(self._server.handle_chat_completions, asked, temperature, seed, on_text)

    def continue_text(
        self, ids: Sequence[int], *, temperature: float, seed: int, on_text: Callable[[str], None],
        max_tokens: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Continue a prompt of ids, as `answer`."""
        asked = {"prompt": list(ids), "stream_options": {"include_usage": True}, **_at_most(max_tokens)}
        return self._stream(self._server.handle_completions, asked, temperature, seed, on_text)

    def _stream(
        self, handle: Callable[..., Any], asked: dict[str, Any], temperature: float, seed: int,
        on_text: Callable[[str], None],
    ) -> dict[str, Any]:  # fmt: skip
        pieces: list[str] = []
        told: dict[str, Any] = {"finish_reason": "stop", "tokens": 0, "prompt_tokens": 0}
        failed: list[BaseException] = []

        def on_chunk(chunk: dict[str, Any]) -> bool:
            """True ends the reply. What is raised here must not pass through the server's own code."""
            try:
                for choice in _checked(chunk).get("choices", ()):
                    piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    if piece:
                        pieces.append(piece)
                        on_text(piece)
                    told["finish_reason"] = choice.get("finish_reason") or told["finish_reason"]
                if usage := chunk.get("usage"):
                    told["tokens"], told["prompt_tokens"] = usage["completion_tokens"], usage["prompt_tokens"]
            except BaseException as error:
                failed.append(error)
                return True
            return False

        options = {"stream": True, "temperature": temperature, "seed": seed, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        reply = handle(asked | options, on_chunk)
        if failed:
            raise failed[0]
        if reply is not None:
            _checked(reply)
        return {"text": "".join(pieces), **told}

    def _post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        # Not urllib, which would ask a proxy of the environment for this machine's own port.
        connection = http.client.HTTPConnection(*self._address, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(value), {"Content-Type": "application/json"})
            return _checked(json.loads(connection.getresponse().read()))
        finally:
            connection.close()


def _at_most(max_tokens: int | None) -> dict[str, int]:
    return {} if max_tokens is None else {"max_tokens": max_tokens}


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply of the server that is no error.

    Raises:
        ConfigError: what was asked does not fit the context.
        WorkerError: any other error.
    """
    error = reply.get("error")
    if error is None:
        return reply
    if error.get("type") == "exceed_context_size_error":
        raise ConfigError(
            "the message does not fit the model's context",
            cause=f"it has {error['n_prompt_tokens']} tokens; the context has {error['n_ctx']}",
            hint="shorten it",
        )
    raise WorkerError("llama.cpp refused a request", cause=str(error.get("message", error)), hint="export it again")
