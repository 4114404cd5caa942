"""`picollm manifest`: the list of a run's files with their hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from picollm_cli import options
from picollm_cli.console import Output

if TYPE_CHECKING:
    from picollm.manifest import Problem
    from picollm.run_dir import RunDir

HELP = """List every file of a run with its hash, and check it.

\b
Examples:
  picollm manifest verify
  picollm manifest write --run demo
  picollm manifest show --run demo
"""
app = typer.Typer(no_args_is_help=True, help=HELP)


@app.command()
def write(run: options.Run = None, json: options.Json = False) -> None:
    """Hash every file of a run and write `manifest.json`.

    Files that a stage recorded must still have the recorded bytes.

    \b
    Examples:
      picollm manifest write
      picollm manifest write --run demo --json
    """
    from picollm.locks import hold_lock
    from picollm.manifest import write_manifest
    from picollm.run_dir import find_run

    out = Output(as_json=json)
    found = find_run(run)
    with hold_lock(found.lock_path, f"run `{found.name}`"), out.progress("hashing", unit="bytes") as update:
        manifest = write_manifest(found, on_progress=update)
    num_bytes = sum(entry["bytes"] for entry in manifest["files"])
    out.print(str(found.manifest_path))
    out.note(f"{len(manifest['files'])} files, {num_bytes:,} bytes")
    out.result(
        {"run": found.name, "path": str(found.manifest_path), "files": len(manifest["files"]), "bytes": num_bytes}
    )


@app.command()
def verify(run: options.Run = None, json: options.Json = False) -> None:
    """Hash every file again and compare; exits 5 when one is missing, changed or unlisted.

    \b
    Examples:
      picollm manifest verify
      picollm manifest verify --run demo --json
    """
    from picollm.errors import IntegrityError
    from picollm.manifest import describe, read_manifest, verify_manifest
    from picollm.run_dir import find_run

    out = Output(as_json=json)
    found = find_run(run)
    with out.progress("hashing", unit="bytes") as update:
        problems = verify_manifest(found, on_progress=update)
    num_files = len(read_manifest(found)["files"])
    if not problems:
        out.print(f"{num_files} files are as recorded in `{found.manifest_path}`")
        out.result({"run": found.name, "ok": True, "files": num_files, "problems": []})
        return
    out.result(
        {
            "run": found.name,
            "ok": False,
            "files": num_files,
            "problems": [{"path": p.path, "kind": p.kind, "detail": p.detail} for p in problems],
        }
    )
    raise IntegrityError(
        f"{len(problems)} {'file differs' if len(problems) == 1 else 'files differ'} from the manifest",
        cause=describe(problems),
        hint=_what_next(found, problems),
    )


@app.command()
def show(run: options.Run = None, json: options.Json = False) -> None:
    """Print the stored manifest: size, hash, stage and path of each file.

    \b
    Examples:
      picollm manifest show
      picollm manifest show --run demo --json
    """
    from picollm.manifest import read_manifest
    from picollm.run_dir import find_run

    out = Output(as_json=json)
    manifest = read_manifest(find_run(run))
    stages = max((len(entry["stage"]) for entry in manifest["files"]), default=0)
    for entry in manifest["files"]:
        out.print(f"{entry['bytes']:>14,}  {entry['sha256'][:12]}  {entry['stage']:<{stages}}  {entry['path']}")
    out.result(manifest)


def _what_next(run: RunDir, problems: list[Problem]) -> str:
    from picollm.manifest import stage_of
    from picollm_cli.commands.speedrun import NAMES

    damaged = {stage_of(problem.path).partition("/")[0] for problem in problems if problem.kind != "unlisted"}
    if not damaged:
        return f"nothing is damaged; list the new files with `picollm manifest write --run {run.name}`"
    # Files of no stage, such as `config.json`, can only be restored.
    first = next((name for name in NAMES if name in damaged), None)
    again = f", or make them again with `picollm speedrun --run {run.name} --force {first}`" if first else ""
    return f"restore the files{again}; when the change is meant, `picollm manifest write --run {run.name}`"
