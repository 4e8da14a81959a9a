"""`lint` finds what an engine will compute wrongly of a checkpoint; `repair` writes a copy with it mended."""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from moestro.artifacts import RECORD_NAME, disk_space_errors, sync
from moestro.errors import InputError
from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Engine, Finding
from moestro.linting.rules import RULES
from moestro.models.files import CONFIG, read_config
from moestro.models.layouts import EXPERT_COUNTS
from moestro.models.weights import write_weights

MAX_SHARD_BYTES = 5_000_000_000
WEIGHT_PARTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
"""Endings of files that hold weights, or say where they are."""
FOLDERS_KEPT = ("additional_chat_templates",)

Progress = Callable[[int, int], None]


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


def lint(
    folder: Path, *, engines: Sequence[Engine] = (), costly: bool = True, progress: Progress = _silent
) -> list[Finding]:
    """What is wrong with the Mixture-of-Experts in `folder`, errors first, else in the order of `RULES`.

    `engines` keeps only what one of them fails or goes wrong at, and warnings that no engine minds. Without
    `costly` only rules on config and headers are run. `progress` is told bytes of weights read, and
    bytes in all. Raises `InputError` if there is no config.json, or it is a dense model's.
    """
    parsed = read_config(folder)
    if not any(parsed.get(field) for field in EXPERT_COUNTS):
        raise InputError(
            f"{folder} is a dense model, or none that says how many experts it has.",
            hint="lint checks Mixture-of-Experts.",
        )
    checkpoint = Checkpoint(folder, progress=progress)
    findings: list[Finding] = []
    for rule in RULES.values():
        if rule.costly and not costly:
            continue
        found = rule.findings(checkpoint)
        findings += found
        if found and rule.final:
            break
    kept = [item for item in findings if not engines or not item.affects or set(item.affects) & set(engines)]
    return sorted(kept, key=lambda item: item.severity)


def refuse_errors(folder: Path, *, but: Collection[str] = ()) -> None:
    """Raise `InputError` naming the rule if a checkpoint made here has an error that config and headers show.

    `but` names rules that found an error in what it was made from, which the work did not add.
    """
    for finding in _errors(folder):
        if finding.rule in but:
            continue
        raise InputError(f"The checkpoint would be wrong ({_told(finding)}", hint=finding.remedy)


def refuse_faulty(folder: Path) -> frozenset[str]:
    """Raise `InputError` naming the rule if the tensors of a given checkpoint are not those of its config.

    Config and headers are looked at. Returns the names of the rules that found another error: one of an engine, which
    experts may join or leave all the same.
    """
    errors = list(_errors(folder))
    for finding in errors:
        if not RULES[finding.rule].structural:
            continue
        mend = f"`moestro lint {folder} --fix --out FOLDER` writes a mended copy."
        hint = mend if finding.fixable else finding.remedy
        raise InputError(f"{folder} is wrong already ({_told(finding)}", hint=hint)
    return frozenset(finding.rule for finding in errors)


def _errors(folder: Path) -> Iterator[Finding]:
    return (finding for finding in lint(folder, costly=False) if finding.severity == "error")


def _told(finding: Finding) -> str:
    return f"{finding.rule}): {finding.what} transformers: {finding.transformers} vLLM: {finding.vllm}"


def repair(folder: Path, findings: Sequence[Finding], out: Path, *, progress: Progress = _silent) -> None:
    """Write a copy of the checkpoint in `folder` to `out`, with every fixable one of `findings` mended.

    Weights are copied as a stream; all other files are copied as they are, but for the record of an artifact, which the
    copy no longer is. `out` appears when it is complete.
    Raises `InputError` if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists.", hint="Name a folder that does not: nothing is overwritten.")
    checkpoint = Checkpoint(folder)
    draft = Draft.of(checkpoint.parsed, checkpoint.weights)
    mended = {finding.rule for finding in findings if finding.fixable}
    for rule in RULES.values():
        if rule.name in mended and rule.mend:
            rule.mend(checkpoint, draft)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with disk_space_errors(out.parent):
            _write(checkpoint, draft, work, progress)
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(checkpoint: Checkpoint, draft: Draft, work: Path, progress: Progress) -> None:
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.name not in {CONFIG, RECORD_NAME} and not path.name.endswith(WEIGHT_PARTS):
            shutil.copyfile(path, work / path.name)
        elif path.is_dir() and path.name in FOLDERS_KEPT:
            shutil.copytree(path, work / path.name)
    (work / CONFIG).write_text(json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_weights(work, draft.tensors, max_shard_bytes=MAX_SHARD_BYTES, progress=progress)
    for path in [*work.rglob("*"), work]:
        sync(path)
