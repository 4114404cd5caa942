"""`docs/learn/tiny.py` is the model, only shorter: it loads the same weights and gives the same logits."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from picollm.config.model import Architecture
from picollm.model.gpt import GPT

TINY = Path(__file__).resolve().parents[3] / "docs" / "learn" / "tiny.py"


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def architecture(num_key_value_heads: int = 2, vocab_size: int = 100) -> Architecture:
    return Architecture(
        arch="portable",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=16,
        intermediate_size=160,
        vocab_size=vocab_size,
        max_position_embeddings=48,
        rope_theta=100_000.0,
    )


def random_gpt(arch: Architecture) -> GPT:
    """Every weight random: `init_weights` leaves whole matrices at zero, which would hide a mistake."""
    model = GPT(arch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.1 if name == "resid_theta" else weight.size(-1) ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_same_logits_and_loss(tiny: ModuleType, num_key_value_heads: int) -> None:
    arch = architecture(num_key_value_heads)
    ours = random_gpt(arch)
    theirs = tiny.GPT(tiny.Architecture(**arch.model_dump()))
    theirs.load_state_dict(ours.state_dict())  # strict: no missing and no further names
    ids = torch.randint(0, arch.vocab_size, (2, 48), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.loss(ids, targets), ours.loss(ids, targets), rtol=1e-5, atol=0)


def test_same_names(tiny: ModuleType) -> None:
    import picollm.model.gpt as real

    for name in ("Attention", "MLP", "Block", "GPT"):
        assert inspect.isclass(getattr(real, name))
        assert inspect.isclass(getattr(tiny, name))
    assert {field.name for field in fields(tiny.Architecture)} == set(Architecture.model_fields)


@pytest.mark.parametrize(
    "feature",
    [
        {"sliding_window": 8},
        {"final_logit_softcapping": 15.0},
        {"value_embeddings": True},
        {"x0_scalars": True},
        {"smear": True},
        {"backout": True},
    ],
    ids=lambda feature: next(iter(feature)),
)
def test_refuses_what_it_leaves_out(tiny: ModuleType, feature: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match=r"extras\.py"):
        tiny.GPT(tiny.Architecture(**architecture().model_dump() | feature))


def test_is_one_page() -> None:
    assert len(TINY.read_text().splitlines()) <= 150


def test_reads_a_stage_folder(tiny: ModuleType, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    arch = architecture(vocab_size=5)
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3}, []))
    tokenizer.add_special_tokens(["<|bos|>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    stage = tmp_path / "pretrain"
    checkpoint = stage / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    model = random_gpt(arch)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    (stage / "config.json").write_text(json.dumps({"recipe": {"model": arch.model_dump()}}))
    ids = [4, 0, 1]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tiny.main(stage, "ab", num_tokens=6) == tokenizer.decode(ids)
