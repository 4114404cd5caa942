"""Stages with small models whose every weight says something, made in-process: random weights, and a trained toy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule, Source, TrainRecipe
from picollm.data.conversations import Conversation, Message, Part
from picollm.files import SCHEMA, sha256_json, write_json
from picollm.model.gpt import GPT
from picollm.run_dir import RunDir, StageDir
from picollm.tokenizer.chat_format import render
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_tensors as tensors

MakeStage = Callable[..., StageDir]


def randomise(model: GPT, seed: int = 0) -> GPT:
    """Weights of the size that training gives them; every scalar differs from its start value and from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "resid_theta":
                weight.uniform_(-0.3, 0.3, generator=generator)
            elif weight.dim() == 1:
                weight.uniform_(0.1, 0.5, generator=generator)
            else:
                std = 1.0 if name.startswith(("embed", "value_embeds")) else 1.5 / weight.size(1) ** 0.5
                weight.normal_(0, std, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small(tokenizer: Tokenizer) -> Callable[..., Architecture]:
    """Architectures of two layers with grouped queries; `full` has windows of 128 and all features."""

    def make(arch: str = "portable", **changes: object) -> Architecture:
        values: dict[str, object] = {
            "arch": arch, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 256, "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": 512, "rope_theta": 100_000.0,
        }  # fmt: skip
        if arch == "full":
            values |= {
                "num_hidden_layers": 4, "sliding_window": 128, "window_pattern": "SSSL",
                "final_logit_softcapping": 15.0, "value_embeddings": True, "x0_scalars": True, "smear": True,
                "backout": True,
            }  # fmt: skip
        return Architecture.model_validate(values | changes)

    return make


def write_stage(run: RunDir, name: str, model: GPT, tokenizer: Tokenizer, step: int = 10) -> StageDir:
    """A committed checkpoint with the weights alone, the stage's config, and the run's tokenizer."""
    stage = run.stage(name)
    if not run.tokenizer.exists():
        run.stage("tokenizer").write_record({}, tokenizer.save(run.tokenizer), {"vocab_size": tokenizer.vocab_size})
    recipe = TrainRecipe(
        stage=name, seed=0, model=model.arch, dtype="float32", dtype_reason="test", steps=step, batch_tokens=1024,
        rates=Rates(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01, scalar_lr=0.01, weight_decay=0.0),
        schedule=Schedule(
            warmup_steps=0, warmdown_steps=1, final_lr_fraction=0.0, momentum_start=0.85, momentum_peak=0.95,
            momentum_end=0.9, momentum_ramp_steps=1,
        ),
        data=(Source(dataset="toy-world", sha256="ab" * 32),), buffer_documents=1, tokenizer_sha256=tokenizer.sha256,
    )  # fmt: skip
    values = recipe.model_dump(mode="json")
    write_json(stage.config_path, {"schema": SCHEMA, "stage": name, "recipe": values, "runtime": {}})
    temporary = files.begin(stage, step)
    tensors.write_tensors(temporary / tensors.WEIGHTS, dict(model.named_parameters()))
    meta = {
        "schema": SCHEMA,
        "step": step,
        "model": model.arch.model_dump(mode="json"),
        "recipe_sha256": sha256_json(values),
        "tokenizer_sha256": tokenizer.sha256,
    }
    files.write_meta(temporary, meta)
    files.commit(stage, step, temporary, keep_last=1)
    return stage


@pytest.fixture
def make_stage(clean_environment: Path, tokenizer: Tokenizer) -> MakeStage:
    """A stage of a new run with the model's weights as its checkpoint."""

    def make(model: GPT, name: str = "sft", run: str = "test") -> StageDir:
        return write_stage(RunDir(clean_environment / "runs" / run), name, model, tokenizer)

    return make


@pytest.fixture(scope="session")
def trained(small: Callable[..., Architecture], tokenizer: Tokenizer) -> Callable[[str], GPT]:
    """Makes two layers that learnt three answers by heart, so that replies end; once for each architecture."""
    talk = {
        "Who are you?": "I am a toy model, trained to test exports.",
        "What is 7 plus 5?": "7 plus 5 is 12.",
        "How are you?": "Fine, thank you.",
    }
    made: dict[str, GPT] = {}

    def make(arch: str = "portable") -> GPT:
        if arch not in made:
            made[arch] = _train(GPT(small(arch)), tokenizer, talk)
        return made[arch]

    return make


def _train(model: GPT, tokenizer: Tokenizer, talk: dict[str, str]) -> GPT:
    model.init_weights(0)
    pairs = [
        (Message("user", (Part("text", question),)), Message("assistant", (Part("text", answer),)))
        for question, answer in talk.items()
    ]
    rendered = [render(tokenizer, Conversation(pair)) for pair in pairs]
    longest = max(len(ids) for ids, _ in rendered)
    bos = tokenizer.bos
    ids = torch.tensor([ids + [bos] * (longest + 1 - len(ids)) for ids, _ in rendered])
    targets = ids[:, 1:].clone()
    for row, (_, mask) in enumerate(rendered):
        targets[row, [i for i in range(longest) if i + 1 >= len(mask) or not mask[i + 1]]] = -1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], targets, scale=1 / int((targets >= 0).sum()))
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model.eval().requires_grad_(False)
