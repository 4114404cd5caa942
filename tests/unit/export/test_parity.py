"""What counts as the same, and how an export gets its name or the name of a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from picollm.config.model import Architecture
from picollm.errors import ConfigError, IntegrityError
from picollm.export import parity
from picollm.export.folding import open_checkpoint
from picollm.export.logits import native_logits
from picollm.export.parity import Check, claim, compare, finish, logit_checks, probes, report_path
from picollm.export.strings import PROMPTS, STRINGS, has_special
from picollm.model.gpt import GPT
from picollm.tokenizer.special import SPECIALS
from picollm.tokenizer.tokenizer import Tokenizer

from .conftest import MakeStage, randomise

GOOD = Check("a", 1, "1", True)
BAD = Check("logits", 0.5, "<= 0.1", False)
SKIPPED = parity.not_run("llama.cpp", "", "not installed")


# -- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["portable", "full"])
def test_native_logits_are_those_of_the_whole_model(
    small: Callable[..., Architecture], make_stage: MakeStage, arch: str
) -> None:
    model = randomise(GPT(small(arch, num_hidden_layers=5)))
    rows = [[1, 2, 3], list(range(200)), [4, 5, 6]]
    found = native_logits(open_checkpoint(make_stage(model)), rows)
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row]))[0], rtol=0, atol=1e-5)


def test_how_well_tokens_were_chosen(
    small: Callable[..., Architecture], make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the logits of the whole model, with a head that is read in several parts."""
    from picollm.export import logits

    monkeypatch.setattr(logits, "_HEAD_ROWS_AT_ONCE", 100)
    model = randomise(GPT(small("full")))
    rows = [[5, 6, 7, 8], [9, 2]]
    whole = [model(torch.tensor([row]))[0] for row in rows]
    native = logits.Native(open_checkpoint(make_stage(model)), rows)
    places = [(0, 3), (1, 0), (0, 1)]
    wanted = torch.stack([whole[row][at] for row, at in places])
    torch.testing.assert_close(native.logits(places), wanted, rtol=0, atol=1e-5)
    best = wanted.argmax(-1).tolist()
    leads, largest = native.leads([(*place, token) for place, token in zip(places, best, strict=True)])
    assert leads.tolist() == [0, 0, 0] and largest == pytest.approx(float(wanted.abs().max()), abs=1e-5)
    leads, _ = native.leads([(*place, token) for place, token in zip(places, (0, 250, 399), strict=True)])
    expected = wanted.amax(-1) - wanted[[0, 1, 2], [0, 250, 399]]
    assert (expected > 0).all()
    torch.testing.assert_close(leads, expected, rtol=0, atol=1e-5)


def test_native_logits_keep_one_layer_in_memory(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    from picollm.export import logits

    checkpoint = open_checkpoint(make_stage(randomise(GPT(small(num_hidden_layers=6)))))
    model = logits._streamed(checkpoint, torch.tensor([3, 8]))
    assert model.embed_tokens.shape == (2, 64) and model.lm_head.is_meta
    held: list[int] = []

    def count(*_: object) -> None:
        held.append(sum(p.numel() for block in model.layers for p in block.parameters() if not p.is_meta))

    for block in model.layers:
        block.mlp.register_forward_pre_hook(count)
    model.hidden(torch.zeros(1, 4, dtype=torch.int64))
    assert held == [model.layers[0].mlp.up_proj.weight.numel() * 2] * 6
    assert all(p.is_meta for block in model.layers for p in block.parameters())


def test_compare_knows_what_it_measures() -> None:
    native = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    same = compare(native, native + 3.0)  # a common offset is no other distribution
    assert same.logits == 3 and same.kl == pytest.approx(0, abs=1e-12) and same.agreement == 1 and same.lead == 0
    other = compare(native, torch.tensor([[2.0, 0.0, 0.0], [3.0, 1.0, 0.0]]))
    p = torch.tensor([0.0, 1.0, 0.0]).softmax(0)
    q = torch.tensor([3.0, 1.0, 0.0]).softmax(0)
    assert other.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    assert (other.logits, other.agreement, other.lead, other.positions) == (3, 0.5, 1, 2)
    assert compare(native, native * float("nan")).logits == float("inf")


def test_only_ties_may_change_places() -> None:
    native = torch.tensor([[1.0, 1.0 + 1e-5]])
    assert all(check.passed for check in logit_checks(compare(native, native.flip(-1)), max_error=1e-4))
    clear = torch.tensor([[1.0, 1.1]])
    passed = [check.passed for check in logit_checks(compare(clear, clear.flip(-1)), max_error=1e-4, max_kl=1.0)]
    assert passed == [False, True, False]
    assert not logit_checks(compare(clear, clear.flip(-1)), max_kl=1e-9)[1].passed


def test_probes_fill_the_positions(tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    for length, wanted in ((512, 256), (64, 64)):
        rows = probes(prompts, tokenizer.vocab_size, length, tokenizer.bos)
        assert [len(row) for row in rows] == [wanted, wanted]
        assert all(row[0] == tokenizer.bos and max(row) < tokenizer.vocab_size for row in rows)
        assert rows == probes(prompts, tokenizer.vocab_size, length, tokenizer.bos)


def test_the_strings_are_many_and_nasty() -> None:
    assert len(STRINGS) == len(set(STRINGS)) >= 100
    assert {special for special in SPECIALS if special in STRINGS} == set(SPECIALS)
    assert has_special("a<|bos|>b") and not has_special("<|bos |>")
    text = "".join(STRINGS)
    for what in ("\u200d", "\U0001f3fd", "\r\n", "\u3000", "\x00", "١", "한", "ไ", "ש", "\U0001d4d7", "'LL", "```"):
        assert what in text, ascii(what)


# -- names ------------------------------------------------------------------------------------------------------------


def write(path: Path, *, folder: bool, text: str = "new") -> Path:
    if folder:
        path.mkdir(parents=True)
        (path / "weights").write_text(text)
    else:
        path.write_text(text)
    return path


def content(path: Path) -> str:
    return (path / "weights" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_an_export_that_passes_gets_its_name(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "model"
    claim(target, force=False)
    report = finish(write(tmp_path / ".t", folder=folder), target, [GOOD, SKIPPED], {"format": "x"})
    assert content(target) == "new"
    assert json.loads(report_path(target).read_text()) == report
    assert report["ok"] and report["format"] == "x" and report["name"] == "model"
    assert [check["result"] for check in report["checks"]] == ["ok", "not run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"model", report_path(target).name} - {"export.json"}
    )


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_an_export_that_fails_keeps_away_from_the_name(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "model"
    finish(write(tmp_path / ".t", folder=folder, text="good"), target, [GOOD], {})
    for text in ("bad", "worse"):  # an earlier failure is replaced
        claim(target, force=True)
        with pytest.raises(IntegrityError, match="does not agree") as failed:
            finish(write(tmp_path / ".t", folder=folder, text=text), target, [GOOD, BAD], {})
        assert failed.value.exit_code == 5 and "logits: 0.5, wanted <= 0.1" in (failed.value.cause or "")
        left = tmp_path / "model.failed"
        assert content(left) == text and not json.loads(report_path(left).read_text())["ok"]
    assert content(target) == "good" and json.loads(report_path(target).read_text())["ok"]
    assert not (tmp_path / ".t").exists()


def test_a_report_of_infinities_is_json(tmp_path: Path) -> None:
    checks = [Check("a", float("inf"), "<= 1", False), Check("b", float("nan"), "<= 1", False)]
    with pytest.raises(IntegrityError):
        finish(write(tmp_path / ".t", folder=False), tmp_path / "model", checks, {})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(report_path(tmp_path / "model.failed").read_text(), parse_constant=refuse)
    assert [check["value"] for check in found["checks"]] == ["inf", "nan"]


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_an_export_is_replaced_on_request_only(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "model"
    finish(write(tmp_path / ".t", folder=folder, text="old"), target, [GOOD], {})
    with pytest.raises(ConfigError, match="exists") as refused:
        claim(target, force=False)
    assert "--force" in (refused.value.hint or "")
    claim(target, force=True)
    finish(write(tmp_path / ".t", folder=folder), target, [GOOD], {})
    assert content(target) == "new"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "folder of another program"])
def test_what_is_not_an_export_is_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thesis"
    if kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        write(target, folder=kind.startswith("folder"), text="years of work")
    if kind == "folder of another program":
        report_path(target).write_text('{"export": "settings"}')
    for force in (False, True):
        with pytest.raises(ConfigError, match="exists") as refused:
            claim(target, force=force)
        assert "--force" not in (refused.value.hint or "")


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    claim(target, force=False)
    finish(write(tmp_path / ".t", folder=True), target, [GOOD], {})
    assert content(target) == "new"
