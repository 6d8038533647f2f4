"""One page for the person who finds a run that failed: `runs/<id>/diagnosis.md` (no torch)."""

from __future__ import annotations

from typing import Any

from forge_ray.errors import ForgeError
from forge_ray.records import utc_now
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import attempts, checkpoint, incidents, metrics, validation
from forge_ray.train.job import TrainJob

PAGE = "diagnosis.md"

# a word of the error → what to do about it; the first that fits
REMEDIES = (
    ("out of memory", "Lower train.micro_batch_size, set train.activation_checkpointing=true, or raise train.zero_stage."),
    ("DefaultCPUAllocator", "Lower train.micro_batch_size or run fewer workers per node: main memory is used up."),
    ("No space left", "Free space on the store's disk; the newest checkpoints are whole."),
    ("CUDA error", "Look at the node's GPU (nvidia-smi, kernel log); take the node out if it says Xid or ECC."),
    ("NCCL", "Look at the network between the nodes that the incidents name, and at NCCL_DEBUG=WARN in the logs."),
    ("finite", "Lower train.optimizer.lr, or lengthen train.schedule.warmup_ratio; look at the rows below."),
    ("ActorDied", "A process was killed from outside: look for the out-of-memory killer in the kernel log of that node."),
    (
        "WorkerCrashed",
        "A process was killed from outside: look for the out-of-memory killer in the kernel log of that node.",
    ),
)


def write(job: TrainJob, cause: BaseException) -> str:
    """Write the page; returns where it is."""
    relative = paths.run(job.run, PAGE)
    job.store.write(relative, page(job, cause).encode())
    return f"{job.store.place}/{relative}"


def page(job: TrainJob, cause: BaseException) -> str:
    text = str(cause).strip() or type(cause).__name__
    remedy = next((advice for word, advice in REMEDIES if word.lower() in text.lower()), "")
    if isinstance(cause, ForgeError) and cause.hint:
        remedy = cause.hint
    run_facts = facts(job.store, job.run)
    newest = run_facts["checkpoints"][0] if run_facts["checkpoints"] else 0
    error = "".join(f"    {row}\n" for row in text.splitlines()[-20:])
    return (
        f"# {job.run} ({job.name}) failed, {utc_now()[:19]} UTC\n\n{type(cause).__name__}:\n\n{error}\n"
        f"**What to do.** {remedy or 'Read the error above and the incidents below.'} Then give the same command again:"
        f" it goes on from step {newest}.\n\n" + overview(run_facts) + "\n"
    )


def facts(store: Store, run: str) -> dict[str, Any]:
    """What the store knows of a run, finished or not."""
    path = paths.run(run, metrics.METRICS)
    lines = metrics.parse(store.read(path).decode()) if store.exists(path) else []
    is_finished = store.exists(paths.result(run))
    return {
        "run": run,
        "finished": is_finished,
        "stopped_early": store.read_json(paths.result(run)).get("stopped_early") if is_finished else None,
        "validations": [vars(result) for result in validation.read(store, run)],
        "last_step": lines[-1] if lines else None,
        "checkpoints": checkpoint.steps(store, run),
        "starts": attempts.read(store, run),
        "incidents": incidents.read(store, run),
    }


def overview(run_facts: dict[str, Any]) -> str:
    last = run_facts["last_step"] or {"step": 0, "of": "?"}
    loss = f", loss {last['loss']:.4f}" if "loss" in last else ""
    state = "finished" if run_facts["finished"] else "not finished"
    parts = [
        f"{run_facts['run']}: {state}, step {last['step']} of {last['of']}{loss}",
        f"checkpoints: {', '.join(f'step {step}' for step in run_facts['checkpoints']) or 'none'}",
        *([f"stopped early: {run_facts['stopped_early']['why']}"] if run_facts["stopped_early"] else []),
        f"validations: {len(run_facts['validations'])}",
        *(f"  {_validation(result)}" for result in run_facts["validations"][-10:]),
        f"starts: {len(run_facts['starts'])}",
        *(f"  {_start(start)}" for start in run_facts["starts"][-10:]),
        f"incidents: {len(run_facts['incidents'])}",
        *(f"  {line(incident)}" for incident in run_facts["incidents"][-20:]),
    ]
    return "\n".join(parts)


def _validation(result: dict[str, Any]) -> str:
    outcome = f"loss {result['loss']:.4f}" if result["loss"] is not None else result["problem"] or "asked for"
    return f"step {result['step']}: {outcome}{' (in the background)' if result['background'] else ''}"


def _start(start: incidents.Incident) -> str:
    return f"{start['at'][:19]} on {start['host']}, {start['world_size']} workers, from step {start['first_step']}"


def line(incident: incidents.Incident) -> str:
    """One incident in a line."""
    facts = {name: value for name, value in incident.items() if name not in ("number", "at", "kind", "step", "records")}
    listed = ", ".join(f"{name}={value}" for name, value in facts.items())
    records = f"; records {_short(incident['records'])}" if incident.get("records") else ""
    return f"{incident['at'][:19]} step {incident['step']}: {incidents.KINDS[incident['kind']]} ({listed}){records}"


def _short(records: list[list[str]]) -> str:
    ids = [record for row in records for record in row]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
