"""The model's own code in transformers: its cache, windows, padding, beams and training against the native model."""

from __future__ import annotations

import ast
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picollm.config.model import Architecture
from picollm.export.transformers import TransformersRequest, export_transformers
from picollm.export.transformers_files import REMOTE_CODE
from picollm.model.gpt import GPT
from picollm.tokenizer.tokenizer import Tokenizer

from .conftest import randomise, write_stage

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers; ours is what comes out


@pytest.fixture(scope="module")
def pair(
    small: Callable[..., Architecture], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPT, Any, Path]:
    """A native model with all features, the same in transformers, and its folder."""
    from picollm.run_dir import RunDir

    model = randomise(GPT(small("full")), seed=5)
    base = tmp_path_factory.mktemp("remote")
    out = base / "model"
    stage = write_stage(RunDir(base / "runs" / "test"), "sft", model, tokenizer)
    assert export_transformers(TransformersRequest(stage, out=out))["ok"]
    return model, load(out), out


def load(folder: Path, **options: Any) -> Any:
    from picollm.export.remote_code.modeling_picollm import PicollmForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PicollmForCausalLM.from_pretrained(folder, **options).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    new: list[int] = []
    for _ in range(count):
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


# -- one pass, and pass after pass ------------------------------------------------------------------------------------


def test_logits_beyond_the_windows(pair: tuple[GPT, Any, Path]) -> None:
    native, theirs, _ = pair
    assert native.arch.windows == (128, 128, 128, None)
    ids = random_ids(2, 400)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, native(ids), rtol=0, atol=1e-4)
        torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, native(ids)[:, -3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pieces", [[1] * 40, [100, 1, 1, 90, 1, 7, 1], [199, 1]], ids=str)
def test_a_cache_changes_nothing(pair: tuple[GPT, Any, Path], pieces: list[int]) -> None:
    """Windows, smear and value embeddings across the ends of pieces."""
    from transformers import DynamicCache

    native, theirs, _ = pair
    ids = random_ids(2, sum(pieces))
    for cache in (DynamicCache(), DynamicCache(config=theirs.config)):
        with torch.inference_mode():
            found = [theirs(part, past_key_values=cache).logits for part in ids.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(found, dim=1), native(ids), rtol=0, atol=1e-4)
        assert cache.get_seq_length() == sum(pieces)


def test_a_cache_can_be_cropped(pair: tuple[GPT, Any, Path]) -> None:
    native, theirs, _ = pair
    ids, other = random_ids(1, 150), random_ids(1, 5, seed=1)
    with torch.inference_mode():
        cache = theirs(ids).past_key_values
        cache.crop(-30)
        found = theirs(other, past_key_values=cache).logits
        expected = native(torch.cat([ids[:, :120], other], dim=1))[:, 120:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_padding_on_the_left_changes_nothing(pair: tuple[GPT, Any, Path]) -> None:
    native, theirs, _ = pair
    short, long = random_ids(1, 60), random_ids(1, 200, seed=1)
    padded = torch.cat([torch.full((1, 140), 7), short], dim=1)
    ids = torch.cat([padded, long])
    mask = torch.ones_like(ids)
    mask[0, :140] = 0
    with torch.inference_mode():
        found = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[0, 140:], native(short)[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1], native(long)[0], rtol=0, atol=1e-4)
        assert found.isfinite().all()


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}],
    ids=["cache", "no cache", "static cache", "speculation"],
)
def test_generate_is_greedy_as_we_are(pair: tuple[GPT, Any, Path], options: dict[str, Any]) -> None:
    native, theirs, _ = pair
    ids = torch.cat([random_ids(1, 40)] * 3, dim=1)  # repeats itself, so that speculation finds something
    expected = greedy(native, ids[0].tolist(), 30)
    out = theirs.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=511, **options)
    assert out[0, 120:].tolist() == expected


def test_generate_for_a_padded_batch(pair: tuple[GPT, Any, Path]) -> None:
    native, theirs, _ = pair
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 50, 140)]
    ids = torch.tensor([[7] * (140 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (140 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=511)
    for row, prompt in zip(out[:, 140:].tolist(), prompts, strict=True):
        assert row == greedy(native, prompt, 12)


def test_beams_are_those_without_a_cache(pair: tuple[GPT, Any, Path]) -> None:
    _, theirs, _ = pair
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 511}
    ids = random_ids(2, 140)
    with_cache, without = (theirs.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


# -- everything else that people do with a model ----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_can_be_trained(pair: tuple[GPT, Any, Path], checkpointing: bool) -> None:
    native, _, folder = pair
    model = load(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = random_ids(2, 80)
    loss = model(ids, labels=ids).loss
    expected = native.loss(ids[:, :-1], ids[:, 1:], scale=1 / (2 * 79))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == set()


def test_gradients_do_not_depend_on_checkpointing(pair: tuple[GPT, Any, Path]) -> None:
    _, _, folder = pair
    ids = random_ids(1, 50)
    found = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_new_model_has_start_values(pair: tuple[GPT, Any, Path]) -> None:
    from picollm.export.remote_code.modeling_picollm import PicollmForCausalLM

    _, theirs, _ = pair
    torch.manual_seed(0)
    model = PicollmForCausalLM(theirs.config).eval()
    with torch.inference_mode():
        assert model(random_ids(1, 20)).logits.isfinite().all()
    assert model.model.layers[0].resid_scale.item() == 1 and model.model.layers[0].x0_scale.item() == 0
    assert 0.01 < model.lm_head.weight.std() < 0.03


def test_saved_again_it_is_the_same(pair: tuple[GPT, Any, Path], tmp_path: Path) -> None:
    _, theirs, _ = pair
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    found = again.state_dict()
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in theirs.state_dict().items())
    assert again.config.windows == theirs.config.windows


def test_loaded_in_another_type(pair: tuple[GPT, Any, Path]) -> None:
    native, _, folder = pair
    model = load(folder, dtype=torch.bfloat16)
    ids = random_ids(1, 100)
    with torch.inference_mode():
        logits = model(ids).logits
        assert logits.dtype == torch.float32
        kl = (native(ids).softmax(-1) * (native(ids).log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert 0 < kl < 5e-3


def test_what_it_cannot_do_is_said(pair: tuple[GPT, Any, Path]) -> None:
    _, theirs, _ = pair
    with pytest.raises(ValueError, match="input_ids"):
        theirs.model(None, inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="mask"):
        theirs(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(
    "features",
    [
        {"smear": True},
        {"value_embeddings": True},
        {"x0_scalars": True},
        {"backout": True},
        {"final_logit_softcapping": 5.0},
        {"sliding_window": 16, "window_pattern": "SL"},
        {},
    ],
    ids=str,
)
def test_each_feature_alone(
    small: Callable[..., Architecture], tokenizer: Tokenizer, tmp_path: Path, features: dict[str, Any]
) -> None:
    from picollm.run_dir import RunDir

    model = randomise(GPT(small(num_hidden_layers=3, **features)))
    stage = write_stage(RunDir(tmp_path / "runs" / "test"), "sft", model, tokenizer)
    report = export_transformers(TransformersRequest(stage, host="picollm"))
    assert {check["result"] for check in report["checks"]} == {"ok"}


def test_the_files_need_torch_and_transformers_only() -> None:
    sources = sorted(REMOTE_CODE.glob("*_picollm.py"))
    assert [path.name for path in sources] == ["configuration_picollm.py", "modeling_picollm.py"]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch"}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.module or "").split(".")[0] in ("torch", "transformers")


def test_the_auto_classes_find_it(pair: tuple[GPT, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `trust_remote_code`, from copies of the folder's own files; nothing is left in the user's cache."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    native, _, folder = pair
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    shutil.copytree(folder, tmp_path / "a-copy.of it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a-copy.of it", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    ids = random_ids(1, 60)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, native(ids), rtol=0, atol=1e-4)
