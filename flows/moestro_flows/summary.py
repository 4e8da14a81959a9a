"""A lifecycle run as a table: one row a step with its time, key figures and artifact."""

from typing import Any

from moestro.artifacts import ArtifactStore, LifecycleRun, Record, StepRun


def rows(run: LifecycleRun, store: ArtifactStore) -> list[dict[str, Any]]:
    """One row for each step that ended, in that order."""
    return [row(step, _record(step, store)) for step in run.steps]


def row(step: StepRun, record: Record | None) -> dict[str, Any]:
    """One row: `step`, `time` (of the work, also when it is reused), `figures`, `artifact`."""
    work = record.seconds if record else step.seconds
    return {
        "step": step.name,
        "status": "reused" if step.reused else step.status,
        "seconds": round(work, 1),
        "figures": figures(record) if record else step.message,
        "size_mb": round(record.size / 1e6, 2) if record else 0.0,
        "artifact": f"{step.stage}/{step.fingerprint[:16]}",
    }


def figures(record: Record) -> str:
    """The stage's key figures in a few words."""
    result = record.result
    show = SHOWN.get(record.stage, ())
    values = {label: _at(result, key) for key, label in show}
    parts = [f"{label} {_number(value)}" for label, value in values.items() if value is not None]
    if record.stage == "evaluate":
        losses = [f"{domain} {loss:.3f}" for domain, loss in result["held_out_loss"].items()]
        parts = [f"loss {', '.join(losses)}", *parts]
    if record.stage == "profile":
        shares = result["specialisation"].items()
        own = [f"{domain} {share:.2f}x" for domain, share in shares if share is not None]  # None: pruned everywhere
        parts = [f"own expert {', '.join(own)}", *parts]
    if record.stage == "deploy":
        parts += _served(result)
    return "; ".join(parts)


SHOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "corpus": (("documents", "documents"), ("held_out_documents", "held out")),
    "tokens": (("tokens", "tokens"), ("held_out_tokens", "held out")),
    "seed": (("parameters", "parameters"), ("final_loss", "loss"), ("tokens_per_second", "tokens/s")),
    "branch": (("final_loss", "loss"), ("tokens_per_second", "tokens/s"), ("source", "imported from a")),
    "mix": (("experts", "experts"), ("parameters", "parameters")),
    "append": (("expert", "expert"), ("num_experts", "of"), ("parameters", "parameters")),
    "remove": (("removed", "without"), ("num_experts", "leaves"), ("parameters", "parameters")),
    "tune": (("final_loss", "loss"), ("tokens_per_second", "tokens/s")),
    "rl": (("reward_first", "reward"), ("reward_last", "to"), ("k3", "k3")),
    "compress": (("before.parameters", "parameters"), ("after.parameters", "to"), ("size_ratio", "smaller by")),
    "evaluate": (("task_accuracy", "accuracy"), ("sampled_accuracy", "sampled")),
    "profile": (("dead_experts", "dead experts"),),
    "deploy": (
        ("max_logprob_difference", "max |dlogp|"),
        ("routing_agreement", "routes equal"),
        ("task_accuracy", "accuracy"),
        ("dead_experts", "dead experts"),
        ("load_variation", "load variation"),
    ),
}
"""Which figures of a stage's result stand in its row (dots lead inwards), with their labels."""


def _served(result: dict[str, Any]) -> list[str]:
    """Times and memory of a deployment, and how many refusals it was forced past."""
    shown = {"first_token_seconds": "first token {:.3f} s", "per_token_seconds": "per token {:.4f} s"}
    parts = [text.format(result[key]) for key, text in shown.items() if result.get(key) is not None]
    if peak := result.get("peak_memory_bytes"):
        parts.append(f"peak {peak / 1e9:.2f} GB")
    if refused := result.get("refused"):
        parts.append(f"forced past {len(refused)} refusals")
    return parts


def _at(result: Any, key: str) -> Any:
    for part in key.split("."):
        result = result.get(part) if isinstance(result, dict) else None
    return result


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(value) if isinstance(value, list) else str(value)


def _record(step: StepRun, store: ArtifactStore) -> Record | None:
    folder = store.folder(step.stage, step.fingerprint)
    return Record.read(folder) if (folder / "artifact.json").exists() else None
