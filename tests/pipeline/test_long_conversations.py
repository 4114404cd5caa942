"""Fine-tuning on conversations that are longer than the rows, of 16 tokens here."""

from __future__ import annotations

import json
import math

from picollm.events import read_all

SHORT = ("--set", "model.max_position_embeddings=16", "--set", "train.steps=2", "--set", "sft.steps=3")


def talk(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def test_no_row_is_without_a_trained_token_and_the_rest_is_counted(lab) -> None:
    source = lab.base / "long.jsonl"
    cut = [talk(f"Say {i}", "the cat sees the dog and runs home " * 5) for i in range(40)]
    lost = [talk("the old red house by the river and the small tree " * 5 + str(i), "cat") for i in range(20)]
    source.write_text("\n".join([*cut, *lost]) + "\n")
    lab.ok("data", "import", "long", str(source))
    done = lab.ok(*lab.speedrun("r", *SHORT, "--set", 'sft.mix=[{dataset="long"}]', "--skip", "eval"))
    assert "left out" in done.stderr
    events = list(read_all(lab.run_dir("r").stage("sft").events_path))
    notes = [event["text"] for event in events if event["kind"] == "note" and "left out" in event["text"]]
    counted = {text.split(":")[0]: int(text.split("left out ")[1].split()[0]) for text in notes}
    assert sum(counted.values()) == 20  # every lost one, in its split; the cut ones are trained on
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert len(losses) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_conversations_of_which_nothing_can_be_learnt(lab) -> None:
    source = lab.base / "long.jsonl"
    source.write_text("".join(talk("the old red house by the river " * 9 + str(i), "cat") + "\n" for i in range(20)))
    lab.ok("data", "import", "long", str(source))
    done = lab.run(*lab.speedrun("r", *SHORT, "--set", 'sft.mix=[{dataset="long"}]', "--skip", "eval"))
    assert done.returncode == 2, done.stderr
    assert "there is nothing to fine-tune on" in done.stderr
    assert "model.max_position_embeddings" in done.stderr
