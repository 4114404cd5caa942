"""A worker that follows the protocol of a stage without torch; its recipe says how it behaves."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from picollm.events import EventWriter, attempts
from picollm.files import sha256_json, write_json
from picollm.locks import hold_lock
from picollm.run_dir import StageDir
from picollm.train.checkpoint_files import begin, checkpoint_dir, commit


def main() -> int:
    stage = StageDir(Path(sys.argv[1]))
    config = stage.read_config()
    recipe, rows = config["recipe"], config["runtime"].get("device_batch_size", 1)
    behaviour, steps = recipe.get("behaviour", "succeed"), recipe.get("steps", 1)
    with hold_lock(stage.lock_path, "stage", wait_s=1):
        events = EventWriter(stage.events_path, stage.name)
        if behaviour == "slow_start":
            time.sleep(1.0)
            stage.stop_path.unlink(missing_ok=True)
        events.write("stage_start", attempt=attempts(stage.events_path) + 1, resumed_from=0, total_steps=steps)
        if behaviour == "compiling":
            events.write("phase", text="compiling…")
            time.sleep(60)  # deaf, as torch is
        print(f"threads {os.environ['OMP_NUM_THREADS']} cwd {Path.cwd()}", flush=True)
        for step in range(1, steps + 1):
            events.write("step", step=step, loss=1.0 / step, tokens_per_s=100.0, mem_gib=0.1, dt_s=0.01)
            if stage.stop_path.exists() and behaviour != "deaf":
                write_json(stage.checkpoints / f"step_{step:06d}" / "meta.json", {"schema": 1, "step": step})
                events.write("stage_end", ok=False, reason="stopped")
                return 130
            time.sleep(recipe.get("sleep_s", 0.0))
        match behaviour:
            case "config_error":
                report = {"type": "ConfigError", "message": "bad rate", "cause": "it is 0", "hint": "raise it"}
                return fail(stage, {**report, "exit_code": 2, "rank": 0, "traceback": ""}, 2)
            case "bug":
                print("the last words", flush=True)
                report = {"type": "PicollmError", "message": "RuntimeError: boom", "cause": None, "hint": None}
                return fail(stage, {**report, "exit_code": 1, "rank": 3, "traceback": ""}, 1)
            case "out_of_memory" | "out_of_memory_stuck" if rows > recipe.get("rows_that_fit", 0):
                if behaviour == "out_of_memory":
                    write_json(stage.runtime_path, {"device_batch_size": rows // 2})
                report = {"type": "OutOfMemory", "message": f"out of memory with {rows}", "cause": None, "hint": None}
                return fail(stage, {**report, "exit_code": 7, "rank": 0, "traceback": "", "backed_off": True}, 7)
            case "killed":
                os.kill(os.getpid(), 9)
        output, result = make(stage, recipe, steps)
        stage.write_record({"recipe": sha256_json(recipe)}, [output], result)
        events.write("stage_end", ok=True)
    return 1 if behaviour == "aborts_after" else 0


def make(stage: StageDir, recipe: dict[str, Any], steps: int) -> tuple[Path, dict[str, Any]]:
    """One output and a result of the shape that the real stage has."""
    if stage.path.parent.name == "eval":
        scores = {"validation": {"n": 1, "score": 1.5, "stderr": 0.1}}
        output = stage.path / "results.json"
        suites = {recipe["suite"]: scores}
        values = {"schema": 1, "run": stage.run.name, "stage": recipe["source"], "step": recipe["step"]}
        write_json(output, values | {"suites": suites})
        return output, {"step": recipe["step"], **scores}
    temporary = begin(stage, steps)
    (temporary / "model.safetensors").write_text(json.dumps(recipe.get("init_from")))
    (temporary / "meta.json").write_text(json.dumps({"schema": 1, "step": steps}))
    commit(stage, steps, temporary, keep_last=1)
    output = checkpoint_dir(stage, steps) / "model.safetensors"
    return output, {"step": steps, "loss": 0.5, "tokens": steps * recipe.get("batch_tokens", 1)}


def fail(stage: StageDir, report: dict[str, object], code: int) -> int:
    (stage.log_dir / "error.json").write_text(json.dumps(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
