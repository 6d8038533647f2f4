"""Every check, in the order of the report."""

from __future__ import annotations

import os
from collections.abc import Iterator

from forge_ray.doctor import closed, hosts, locked, machine, startup, stored
from forge_ray.doctor.finding import Finding, Surroundings
from forge_ray.machine import hardware, supported
from forge_ray.models import quickstart_base
from forge_ray.store.files import Store


def examine(store: Store, around: Surroundings, address: str = "") -> Iterator[Finding]:
    """The findings of every check, with `address` those about the cluster's clocks too. Changes nothing and contacts no
    other host but the cluster's."""
    yield hosts.home_folder(around)
    yield closed.ray_token(around)
    yield closed.session_folders(around)
    yield closed.ray_tls(around, address)
    yield from closed.bind_addresses(closed.listening(around.proc), stored.keyless(store))
    yield from stored.deployments(store)
    yield from stored.modes(around, store)
    yield from closed.switches(around)
    yield closed.cloud_question(around)
    yield startup.startup_files(around)
    yield from machine.versions(machine.required_versions(), machine.installed_versions())
    yield locked.lock(locked.distributions())
    yield locked.base_model(quickstart_base.carried_file())
    yield machine.system(supported.this_machine())
    yield machine.memory(machine.installed_memory(), hardware.main_memory())
    yield hosts.cpus(os.cpu_count() or 1, hardware.bound_cpus(), hardware.cpus())
    yield machine.disk(store, store.free_bytes())
    yield hosts.shared_memory(around)
    yield hosts.proxies(around)
    yield machine.open_files()
    yield machine.gpus()
    yield machine.compiler(around.environ, supported.header_folders(), machine.has_gpu())
    if address:
        yield from machine.clocks(machine.clock_offsets(address))
    yield from stored.tombstones(store)
    yield from stored.health(store)
    yield from stored.log(store)


def lines(findings: list[Finding]) -> list[str]:
    """The report for a terminal: a line for each check; below one that is not ok, its rule and the command that fixes it."""
    width = max(len(finding.check) for finding in findings)
    text_lines = []
    for finding in findings:
        status = finding.status.upper() if finding.status == "fail" else finding.status
        text_lines.append(f"{status:<4}  {finding.check:<{width}}  {finding.observed}")
        if finding.status != "ok":
            text_lines += [f"{'':{width + 8}}rule: {finding.rule}", f"{'':{width + 8}}fix:  {finding.fix}"]
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    return [*text_lines, "", f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed"]
