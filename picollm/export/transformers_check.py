"""An export for transformers, read back, and run in the real library beside our own model (MODEL 6)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from picollm.data.conversations import Message, Part
from picollm.errors import first_line
from picollm.export import parity, shards, strings, transformers_files
from picollm.export.folding import Checkpoint
from picollm.export.logits import native_logits
from picollm.export.parity import Check
from picollm.export.transformers_files import REMOTE
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.special import ASSISTANT_END
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train.checkpoint_tensors import open_tensors

LEAST_VERSION = 5  # the checks were written against its interface
INSTALL = 'install it with `python -m pip install "transformers>=5"` and export again with `--force`'
REINSTALL = INSTALL.replace("install it", "install it again").replace("pip install", "pip install --force-reinstall")
# Bounds by type: logits, KL in nats per token, argmax agreement. The reduced types compute in themselves too, as they
# do for whoever loads the folder.
BOUNDS: dict[str, dict[str, float]] = {
    "float32": {"max_error": parity.MAX_LOGIT_ERROR, "min_agreement": 1.0},
    "bfloat16": {"max_kl": 1e-2, "min_agreement": 0.9},
    "float16": {"max_kl": 1e-3, "min_agreement": 0.98},
}
QUESTION = "Who are you?"
REPLY_TOKENS = 64

Progress = Callable[[str, int, int], None]


def checks(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Float[Tensor, "..."]]],
    host: str,
    dtype: str,
    *,
    is_chat: bool,
    on_progress: Progress,
) -> list[Check]:
    """Every row of the table.

    Args:
        tensors: what must be in the files: name and float32 values.
    """
    on_progress("reading back", 0, 1)
    rows = [tensor_check(folder, tensors, dtype)]
    if host == REMOTE:
        rows.append(_code_check(folder))
    if reason := missing_library(host):
        names = ["names of weights", "token ids", "logits, largest difference", "argmax agreement", "greedy reply"]
        return rows + [parity.not_run(name, "", reason) for name in names]
    on_progress("transformers", 0, 1)
    with _quiet():
        return rows + run_checks(folder, checkpoint, tokenizer, host, dtype, is_chat=is_chat)


def missing_library(host: str) -> str | None:
    """Why the real library cannot be asked about an export of this architecture, and the cure; None when it can."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed; {INSTALL}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _unusable(host)
    except Exception as error:  # an installation can be broken in any way, of this package or of what it imports
        what = f"{type(error).__name__}: {first_line(error)}"
        return f"the installed transformers cannot be imported ({what}); {REINSTALL}"


def _unusable(host: str) -> str | None:
    """Import all that the check needs: names come when they are asked for, and some say only then what they lack."""
    import transformers

    found = transformers.__version__
    if int(found.split(".")[0]) < LEAST_VERSION:
        return f"transformers {found} is too old for the check; {INSTALL}"
    importlib.import_module("transformers.utils.logging")
    classes = [transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast, _loader(host)]
    if host != REMOTE:
        classes.append(getattr(transformers, transformers_files.CLASSES[host]))
    for each in classes:
        getattr(each, "from_pretrained")  # noqa: B009  asked for because a stand-in refuses then
    return None


def _loader(host: str) -> Any:
    """The class that loads an export.

    The model's own code is the same files that are in the folder; loading those would leave copies in the user's cache
    of foreign code.
    """
    if host == REMOTE:
        from picollm.export.remote_code.modeling_picollm import PicollmForCausalLM

        return PicollmForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


# -- what was written -------------------------------------------------------------------------------------------------


def tensor_check(folder: Path, tensors: Iterable[tuple[str, Float[Tensor, "..."]]], dtype: str) -> Check:
    """Every tensor is in the file that the index names, in its type, with the bits that the cast gives."""
    index = folder / shards.INDEX
    where: dict[str, str] = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as file:
            found |= dict.fromkeys(file.keys(), path.name)
    wrong = [f"`{name}` is not in its file" for name, file in where.items() if found.get(name) != file]
    total = 0
    for name, tensor in tensors:
        total += 1
        if name not in found:
            wrong.append(f"`{name}` is missing")
            continue
        with open_tensors(folder / found.pop(name)) as file:
            if not torch.equal(file.get_tensor(name), tensor.to(getattr(torch, dtype))):
                wrong.append(f"`{name}` has other values")
    wrong += [f"`{name}` is not in the table" for name in found]
    right = total - min(total, len(wrong))
    note = "; ".join(wrong[:3]) or f"bits of the folded weights in {dtype}"
    return Check("tensors", f"{right} of {total}", f"{total} of {total}", not wrong, note)


def _code_check(folder: Path) -> Check:
    source = transformers_files.REMOTE_CODE
    names = [path.name for path in source.glob("*_picollm.py")]
    same = [
        name
        for name in names
        if (folder / name).is_file() and (folder / name).read_bytes() == (source / name).read_bytes()
    ]
    count = f"{len(same)} of {len(names)}"
    return Check("code", count, f"{len(names)} of {len(names)}", len(same) == len(names), "files of the model's code")


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_checks(folder: Path, tokenizer: Tokenizer, host: str, *, is_chat: bool) -> list[Check]:
    """Token ids of texts that tokenizers disagree on, and of a rendered conversation."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The class that `tokenizer_config.json` names; Auto would ask whether it may run the model's code first.
    loader: Any = PreTrainedTokenizerFast if host == REMOTE else AutoTokenizer
    theirs = loader.from_pretrained(folder, local_files_only=True)
    wrong: list[str] = []
    for text in strings.STRINGS:
        ours = tokenizer.encode(text)
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        # Without that option the text of a special token becomes the token: transformers' way, and documented.
        usual = ours if strings.has_special(text) else theirs.encode(text, add_special_tokens=False)
        first = theirs.encode(text, split_special_tokens=True)
        if (
            not plain == usual == ours
            or first != [tokenizer.bos, *ours]
            or theirs.decode(plain) != tokenizer.decode(ours)
        ):
            wrong.append(repr(text[:30]))
    special = [theirs.encode(text, add_special_tokens=False) for text in tokenizer.special]
    if special != [[token] for token in tokenizer.special.values()]:
        wrong.append("special tokens")
    note = "; ".join(wrong[:3]) or "with bos first, decoded back, and as ours with `split_special_tokens=True`"
    rows = [Check("token ids, mismatches", len(wrong), f"0 of {len(strings.STRINGS)} strings", not wrong, note)]
    if is_chat:
        rendered = [_rendered(theirs, messages) == render_prompt(tokenizer, messages) for messages in _conversations()]
        right = f"{sum(rendered)} of {len(rendered)}"
        rows.append(Check("chat template, same ids", right, f"{len(rendered)} of {len(rendered)}", all(rendered)))
    return rows


def _conversations() -> list[list[Message]]:
    def said(role: str, text: str) -> Message:
        return Message(role, (Part("text", text),))  # type: ignore[arg-type]

    sum_ = Message(
        "assistant", (Part("text", "It is "), Part("python", "7+5"), Part("output", "12"), Part("text", "12."))
    )
    turns = [said("user", "  What is 7 plus 5?\n"), sum_, said("user", "And\n\nnow?")]
    return [[said("user", QUESTION)], turns, [said("system", "Be brief.\n"), *turns]]


def _rendered(theirs: Any, messages: list[Message]) -> list[int]:
    value = [message.to_json() for message in messages]
    return list(theirs.apply_chat_template(value, add_generation_prompt=True, return_dict=True)["input_ids"])


# -- the model --------------------------------------------------------------------------------------------------------


def _load(folder: Path, host: str) -> tuple[Any, Check]:
    """The model as a user loads it, in the type of the folder."""
    options: dict[str, Any] = {"local_files_only": True, "dtype": "auto", "output_loading_info": True}
    model, told = _loader(host).from_pretrained(folder, **options)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind.replace('_', ' ')}: {sorted(map(str, told[kind]))[:3]}" for kind in kinds if told.get(kind)]
    name = type(model).__name__
    row = Check("names of weights", "; ".join(wrong) or "all", "none missing, none unexpected", not wrong, name)
    return model.eval(), row


@torch.inference_mode()
def run_checks(
    folder: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, host: str, dtype: str, *, is_chat: bool
) -> list[Check]:
    """The rows for which the library runs: token ids, logits on text and on random ids, and a greedy reply.

    Of the two models one is in memory at a time.
    """
    arch = checkpoint.arch
    prompts = [tokenizer.encode(text) for text in strings.PROMPTS]
    ids = parity.probes(prompts, arch.vocab_size, arch.max_position_embeddings, tokenizer.bos)
    native = torch.cat(native_logits(checkpoint, ids))
    rows = tokenizer_checks(folder, tokenizer, host, is_chat=is_chat)
    model, loaded = _load(folder, host)
    found = torch.cat([model(torch.tensor([row]), use_cache=False).logits[0].float() for row in ids])
    rows += [loaded, *parity.logit_checks(parity.compare(native, found), **BOUNDS[dtype])]
    prompt = [tokenizer.bos, *tokenizer.encode("The ")]
    if is_chat:
        prompt = render_prompt(tokenizer, [Message("user", (Part("text", QUESTION),))])
    room = min(REPLY_TOKENS, arch.max_position_embeddings - len(prompt))
    if room < 1:
        return [*rows, parity.not_run("greedy reply", "", "the context is too short for a question")]
    asked = torch.tensor([prompt])
    out = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=room, do_sample=False)
    del model
    reply = out[0, len(prompt) :].tolist()
    return [*rows, reply_check(checkpoint, tokenizer, prompt, reply, room, dtype, is_chat=is_chat)]


def reply_check(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: list[int], reply: list[int], room: int, dtype: str,
    *, is_chat: bool,
) -> Check:  # fmt: skip
    """Whether a reply is our own greedy one, and ends where ours does.

    It is when every token is our most likely one after those before it, so our model need only read it, once.

    Args:
        room: tokens after which it was cut.
    """
    (logits,) = native_logits(checkpoint, [[*prompt, *reply[:-1]]])
    after = logits[len(prompt) - 1 :]
    lead = after.amax(-1) - after.gather(-1, torch.tensor(reply)[:, None])[:, 0]
    tie = 2 * parity.MAX_LOGIT_ERROR if dtype == "float32" else math.inf
    same = int((lead == 0).sum())
    ends = (tokenizer.special[ASSISTANT_END], tokenizer.bos) if is_chat else (tokenizer.bos,)
    stopped = [i for i, token in enumerate(reply) if token in ends]
    # It goes on to the limit, or up to the first token that ends it.
    right_end = stopped == [len(reply) - 1] or (not stopped and len(reply) == room)
    how = f"ends at {ASSISTANT_END}" if stopped and is_chat else f"no end in {room} tokens"
    note = f"{tokenizer.decode(reply).strip()[:40]!r} {how}" if is_chat else "a base model goes on"
    passed = right_end and bool((lead <= tie).all())
    bound = "our own greedy reply" if dtype == "float32" else "reported"
    return Check("greedy reply", f"{same} of {len(reply)} tokens", bound, passed, note)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars, notes and warnings are not ours to show; its errors still come through."""
    from transformers.utils import logging as theirs

    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
