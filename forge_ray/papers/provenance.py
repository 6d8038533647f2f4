"""The provenance of the weights: an in-toto Statement v1 with a SLSA provenance v1 predicate. slsa.dev/spec/v1.0.

Evidence of how they were built; no SLSA level is claimed.
"""

from __future__ import annotations

import json
from typing import Any

from forge_ray.papers.facts import Facts, sha256_of
from forge_ray.records import RunRecord, hex_of

Json = dict[str, Any]
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPES = {kind: f"urn:forge-ray:{kind}:1" for kind in ("train", "import", "merge")}


def statement(facts: Facts) -> Json:
    return {
        "_type": STATEMENT,
        "subject": [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in facts.version.files],
        "predicateType": PREDICATE,
        "predicate": _trained(facts) if facts.training else _imported(facts),
    }


def provenance(facts: Facts) -> bytes:
    return (json.dumps(statement(facts), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _trained(facts: Facts) -> Json:
    assert facts.training is not None
    run, version = facts.training.run, facts.version
    needed = [_thing(run.base_model, run.base_digest)]
    if run.initial_adapter:
        needed.append(_thing(run.initial_adapter, run.initial_digest, "initial adapter"))
    if run.frozen_model:
        needed.append(_thing(run.frozen_model, run.frozen_digest, "teacher" if run.method == "distil" else "reference"))
    needed.append(_thing(run.dataset, sha256_of(facts.training.dataset) if facts.training.dataset else ""))
    if facts.training.dataset:
        needed += [_thing(source.path, source.sha256, "source") for source in facts.training.dataset.sources]
    needed.append(_code(run))
    if run.environment_digest:
        needed.append(_thing("environment lock", run.environment_digest, "environment"))
    needed += [
        {"uri": f"pkg:pypi/{package.name}@{package.version.replace('+', '%2B')}", "annotations": {"of": "environment"}}
        for package in facts.packages
        if package.name != "python"
    ]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPES["train"],
            "externalParameters": {"config": run.config, "config_digest": run.config_digest},
            "internalParameters": {
                "seed": run.seed,
                "order_digest": run.order_digest,
                "steps": run.num_steps,
                "samples": run.samples_seen,
                "export_step": run.export_step,
                "starts": [{"first_step": a["first_step"], "world_size": a["world_size"]} for a in run.attempts],
                "environment": run.environment,
                "hardware": run.hardware,
            },
            "resolvedDependencies": needed,
        },
        "runDetails": {
            "builder": {
                "id": f"urn:forge-ray:{facts.forge_version}",
                "version": {"python": run.environment.get("python", "")},
            },
            "metadata": _times(run.id, facts.training.started_at, run.created_at),
            "byproducts": [
                {"name": report.id, "digest": {"sha256": report.items_sha256}, "annotations": {"of": "evaluation"}}
                for report in facts.own_evals
                if report.items_sha256
            ]
            + [{"name": version.id, "digest": {"sha256": sha256_of(version)}, "annotations": {"of": "record"}}],
        },
    }


def _code(run: RunRecord) -> Json:
    """The digest of the code, and the git commit if the code was an unmodified checkout."""
    value = _thing("forge-ray", run.code_digest, "code")
    if run.code_commit and not run.code_commit.endswith("-dirty"):
        value["digest"]["gitCommit"] = run.code_commit
    return value


def _imported(facts: Facts) -> Json:
    """The provenance of weights without a run on record: imported, merged, or trained by a run that is not in this store."""
    version, is_merged = facts.version, facts.version.status == "merged"
    name, _, digest = version.source.rpartition(" ")
    needed = [_thing(name, digest, "import")] if name and not is_merged else []
    if is_merged and facts.base:
        full = next((below for below in facts.chain if below.id == facts.base.base_model), None)
        needed.append(_thing(facts.base.base_model, full.files_digest if full else ""))
    if version.base_model:
        needed.append(_thing(version.base_model, facts.base.files_digest if facts.base else ""))
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPES["merge" if is_merged else "import"],
            "externalParameters": {"source": version.source, "run": version.run, "step": version.step},
            "resolvedDependencies": needed,
        },
        "runDetails": {
            "builder": {"id": f"urn:forge-ray:{facts.forge_version}"},
            "metadata": _times(version.id, "", version.created_at),
        },
    }


def _thing(name: str, digest: str, what: str = "record") -> Json:
    value: Json = {"uri": f"urn:forge-ray:{what}:{name}", "name": name}
    sha256 = hex_of(digest)
    return value | ({"digest": {"sha256": sha256}} if sha256 else {})


def _times(invocation: str, began: str, ended: str) -> Json:
    """Times as RFC 3339 with Z, as SLSA's Timestamp requires."""
    times = {"startedOn": began, "finishedOn": ended}
    return {"invocationId": invocation} | {key: value.replace("+00:00", "Z") for key, value in times.items() if value}
