"""What holds in a store: its log, folded line by line. Who may sign, which events count, where each file has its line.

An event counts at its first line alone, under the signers and the policy as they stood there; the time that it claims is a
label. A signature counts where the line itself is signed by the same key, for that binds the event to its place, and as long
as the key was active there. Commands, endpoints and gateways ask the same functions, so that they follow the same facts.
The argument is in docs/design/authority.md.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Collection
from dataclasses import dataclass, field

from forge_ray.config.release import AliasRoute
from forge_ray.records import Event
from forge_ray.store import audit_log, paths, protection, signing
from forge_ray.store.aliases import gives_up_canaries, route_of
from forge_ray.store.authority import MAY, Authority, Policy
from forge_ray.store.files import Store
from forge_ray.store.governing import GOVERNING, governed, limits_of, reaches_back, refolded
from forge_ray.store.log_reader import FORMAT, Line, LogReader
from forge_ray.store.placed import (
    WITHDRAWN,
    Placed,
    content_of,
    event_of,
    is_envelope_of,
    is_readable,
    names,
)
from forge_ray.store.protection import Action, Decision, Shortfall, VersionFacts

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 3.0  # a look at an object store costs requests
TAKEN_OUT, BACK_IN = "archived", "active"  # states of a version that a releaser sets
NEXT = sys.maxsize  # the line that is yet to be written
MAX_IGNORED = 1000  # of which the reason is kept


@dataclass
class _Subject:
    """The events of one subject in the order of the log, and those of the first `num_judged` that count."""

    sources: list[Line | Event] = field(default_factory=list)
    num_judged: int = 0
    counted: list[Placed] = field(default_factory=list)
    is_judging: bool = False


class Standing:
    """The facts of one store as far as its log was read. `kinds`: of events, and folders of files, to keep beside the events
    that govern; None: everything."""

    def __init__(self, store: Store, *kinds: str) -> None:
        self.store = store
        self.reader = LogReader(store)
        self.poll_s = LOCAL_POLL_S if store.is_local else REMOTE_POLL_S
        self.kinds = frozenset(kinds)
        self.files: dict[str, Line] = {}
        self.ignored: dict[int, str] = {}
        self.num_ignored = 0
        self.needs_upgrade = False
        self.is_older = False  # whether files without a line count, because the log began after them
        self._event_paths: set[str] = set()
        self._subjects: dict[tuple[str, str], _Subject] = {}
        self.governing: list[Placed] = []
        self._history: list[tuple[int, Authority]] = [(0, Authority())]
        self._envelopes: dict[str, list[str]] = {}  # record → paths of envelopes
        self._signed: dict[int, bool] = {}  # line → whether its signatures are what they say
        self._listed: frozenset[str] = frozenset()  # digests of the events that an upgrade lists

    # ---------------------------------------------------------------- reading

    def refresh(self) -> list[Line]:
        """Fold the new lines of the log and return them. Raises `StoreError` for a log that was cut, rewritten or broken;
        what was read before stays in force."""
        is_first = not self.reader.number
        lines = self.reader.all() if is_first else self.reader.new()
        if is_first:
            self._fold_older(lines)
        for line in lines:
            folder = line.path.partition("/")[0]
            if folder == paths.EVENTS:
                self._fold_event(line)
            elif line.path and self._keeps(folder) and line.path not in self.files:
                self.files[line.path] = line
                if folder == paths.SIGNATURES:
                    self._envelopes.setdefault(line.subject, []).append(line.path)
        return lines

    def _keeps(self, kind: str) -> bool:
        return not self.kinds or kind in self.kinds

    def _fold_older(self, lines: list[Line]) -> None:
        """Events of a store from before its log, in the order of their names, if they are those that its first line
        counts."""
        if lines and lines[0].action != "begin":
            return
        logged = {line.path for line in lines}
        older = [path for path in sorted(self.store.list(paths.EVENTS)) if path not in logged]
        if lines and not audit_log.are_older(self.store, lines[0], logged):
            self._ignore(1, "the files from before the log are not those that its first line counts")
            return
        self.is_older = True
        for path in older:
            if path not in self._event_paths and (event := event_of(content_of(self.store, path), path)):
                self._event_paths.add(path)
                if self._keeps(event.kind) and event.kind not in GOVERNING:
                    self._subject(event.kind, event.subject).sources.append(event)

    def _fold_event(self, line: Line) -> None:
        if line.path in self._event_paths:
            self._ignore(line.number, "it repeats an event that has its line already")
            return
        self._event_paths.add(line.path)
        kind = line.action.partition(".")[0]
        if kind in GOVERNING:
            self._govern(line)
        elif self._keeps(kind):
            self._subject(kind, line.subject).sources.append(line)

    def _subject(self, kind: str, subject: str) -> _Subject:
        return self._subjects.setdefault((kind, subject), _Subject())

    def _ignore(self, line: int, reason: str) -> None:
        self.num_ignored += line not in self.ignored
        if len(self.ignored) < MAX_IGNORED:
            self.ignored[line] = reason

    # ---------------------------------------------------------------- signers and policy

    @property
    def authority(self) -> Authority:
        """Signers and policy behind the last line that was read."""
        return self._history[-1][1]

    def authority_before(self, line: int) -> Authority:
        """Signers and policy in front of a line, with what later revocations say of their keys."""
        place = bisect.bisect_left(self._history, line, key=lambda entry: entry[0])
        return self._history[max(0, place - 1)][1]

    def _govern(self, line: Line) -> None:
        event = event_of(line.body(), line.path)
        if event is None or event.kind not in GOVERNING or not names(line, event):
            self._ignore(line.number, "its content is no event, or not the one that the line names")
            return
        placed = Placed(event, line)
        before = self.authority
        after = governed(before, placed)
        if after is None:
            self._ignore(line.number, f"{event.kind}: not signed by an owner who could, or its content is not valid")
            return
        self.governing.append(placed)
        if event.kind == "upgrade":
            if not self.needs_upgrade:
                self._ignore(line.number, "upgrade: the store needed none")
                return
            self._listed = frozenset(event.data["events"])
            self.needs_upgrade = False
        elif after.genesis != before.genesis:
            self.needs_upgrade = line.format < FORMAT
        self._history.append((line.number, after))
        if reaches_back(event, line.number):
            self._refold()
        if event.kind == "upgrade" or event.data.get("action") in ("retired", "revoked"):
            self._judge_again()

    def _refold(self) -> None:
        """Fold signers and policy again, without what revoked keys signed behind the line that their revocation names."""
        self._history, void = refolded(self.governing, limits_of(self.authority))
        for line in void:
            self._ignore(line, "signed with a key that a revocation voids from before this line on")

    def _judge_again(self) -> None:
        """What was judged may stand differently under a later revocation or upgrade."""
        for entry in self._subjects.values():
            entry.num_judged, entry.counted = 0, []

    # ---------------------------------------------------------------- events that count

    def placed(self, kind: str, subject: str) -> list[Placed]:
        """The events of a subject that count, in the order of the log. They are judged when they are first asked for."""
        entry = self._subjects.get((kind, subject))
        if entry is None or entry.is_judging:
            return entry.counted if entry else []
        entry.is_judging = True
        try:
            while entry.num_judged < len(entry.sources):
                if placed := self._judged(kind, subject, entry.sources[entry.num_judged], entry.counted):
                    entry.counted.append(placed)
                entry.num_judged += 1
        finally:
            entry.is_judging = False
        return entry.counted

    def events(self, kind: str, subject: str) -> list[Event]:
        return [placed.event for placed in self.placed(kind, subject)]

    def subjects(self, kind: str) -> list[str]:
        """Everything that an event of this kind counts for, by its first line."""
        return [subject for of_kind, subject in list(self._subjects) if of_kind == kind and self.placed(kind, subject)]

    def last(self, kind: str) -> dict[str, Event]:
        """subject → its last event of this kind."""
        return {subject: self.placed(kind, subject)[-1].event for subject in self.subjects(kind)}

    def routes(self) -> dict[str, AliasRoute]:
        """alias → what it stands for now."""
        return {name: route for name, event in self.last("alias").items() if (route := route_of(event))}

    def moves(self) -> list[Placed]:
        """Every move of every alias that counts, in the order of the log."""
        moves = [placed for alias in self.subjects("alias") for placed in self.placed("alias", alias)]
        return sorted(moves, key=lambda placed: placed.line)

    def sources(self, *kinds: str) -> list[Line]:
        """The lines of all events of these kinds, whether they count or not."""
        entries = [entry for (kind, _), entry in self._subjects.items() if kind in kinds]
        return [source for entry in entries for source in entry.sources if isinstance(source, Line)]

    def all_ignored(self) -> dict[int, str]:
        """Line → why it has no effect; judges every event."""
        for kind, subject in list(self._subjects):
            self.placed(kind, subject)
        return dict(sorted(self.ignored.items()))

    def _judged(self, kind: str, subject: str, source: Line | Event, counted: list[Placed]) -> Placed | None:
        if isinstance(source, Event):
            return Placed(source, None) if is_readable(source) else None
        event = event_of(source.body(), source.path)
        if event is None or not names(source, event) or not is_readable(event):
            self._ignore(source.number, "its content is no event, or not the one that the line names")
            return None
        placed = Placed(event, source)
        if (placed.digest in self._listed and source.format < FORMAT) or not (reason := self._objection(placed, counted)):
            return placed
        self._ignore(source.number, f"{kind} of {subject}: {reason}")
        return None

    def _objection(self, placed: Placed, counted: list[Placed]) -> str:
        """Why an event does not count, or ""."""
        event, before = placed.event, self.authority_before(placed.line)
        if event.kind == "alias":
            return self._objection_to_move(placed, counted)
        action = f"{event.kind} events"
        if before.rules(action) and not self.is_signed(placed, *MAY[action]):
            return f"not signed by {' or '.join(MAY[action])} who could at its line"
        if event.kind == "model" and event.data["state"] in (TAKEN_OUT, BACK_IN):
            missing = self.shortfalls_of_state(event.subject, event.data["state"], event.key, placed.line)
            return "; ".join(f"policy.{rule.rule} for {alias}" for alias, rule in missing)
        return ""

    def _objection_to_move(self, placed: Placed, counted: list[Placed]) -> str:
        event, before = placed.event, self.authority_before(placed.line)
        is_protected = protection.is_protected(before.policy, event.subject)
        if not (before.rules("alias events") or is_protected):
            return ""
        now, new = (route_of(counted[-1].event) if counted else None), route_of(event)
        if not event.key and gives_up_canaries(now, new):
            return ""  # an endpoint's own
        if not self.is_signed(placed, *MAY["alias events"]):
            return "not signed by a releaser who could at its line"
        since = counted[-1].line if counted else 0
        missing = self.shortfalls(event.subject, now, new, event.key, since, placed.line)
        return "; ".join(f"policy.{rule.rule} for {rule.version}" for rule in missing)

    def is_signed(self, placed: Placed, *roles: str) -> bool:
        """Whether a signer who could at its line, in one of these roles (or in any), signed an event: its line holds its
        content, so one signature is over both."""
        line = placed.source
        return line is not None and line.key == placed.event.key and self._holds(line, line.key, roles)

    def _public_key(self, key: str) -> signing.PublicKey:
        return signing.load_public(self.authority.signers[key].public_key)

    def _could(self, key: str, line: int, roles: Collection[str]) -> bool:
        then, now = self.authority_before(line).signers.get(key), self.authority.signers.get(key)
        return bool(then and now and now.could_sign(line) and (not roles or set(then.roles) & set(roles)))

    # ---------------------------------------------------------------- records

    def line_of(self, path: str) -> Line | None:
        """The line of a file."""
        return self.files.get(path)

    def record_signers(self, kind: str, identifier: str, *roles: str) -> list[str]:
        """Keys whose signature on a record counts: that of the line that the record was written with, and those of envelopes
        that have a line of their own. `roles`: those that may sign such a record."""
        line = self.files.get(paths.record(kind, identifier))
        if line is None:
            return []
        keys = [line.key] if self._holds(line, line.key, roles) else []
        for path in self._envelopes.get(identifier, ()):
            envelope, key = self.files[path], path.rsplit("/", 1)[-1].removesuffix(".json")
            at = line.number if envelope.sha256 in self._listed else envelope.number
            if key not in keys and self._could(key, at, roles) and is_envelope_of(envelope, line, self._public_key(key)):
                keys.append(key)
        return keys

    def _holds(self, line: Line, key: str, roles: Collection[str]) -> bool:
        if not key or not self._could(key, line.number, roles):
            return False
        if line.number not in self._signed:
            self._signed[line.number] = line.is_signed(self._public_key(key))
        return self._signed[line.number]

    def version_facts(self, version: str) -> VersionFacts:
        """What the log says of a model version; empty where it has no line."""
        path = paths.record("models", version)
        line = self.files.get(path)
        if line is None and not (self.is_older and self.store.exists(path)):
            return VersionFacts("", "", None)
        body = line.body() if line else self.store.read_json(path)
        if not isinstance(body, dict):
            return VersionFacts("", "", None)
        run = str(body.get("run") or "")
        trainers = self.record_signers("runs", run, "trainer") if run else []
        people = frozenset(map(self.authority.person_of, trainers)) if trainers or not run else None
        base = version if body.get("weights") == "full" else str(body.get("base_model") or "")
        return VersionFacts(line.sha256 if line else audit_log.digest_of_file(self.store, path), base, people)

    # ---------------------------------------------------------------- two people

    def decisions(self, version: str, since: int, before: int) -> list[Decision]:
        """Approvals and refusals of a version behind line `since` and in front of line `before`, which name the digest of
        its record."""
        sha256, decisions = self.version_facts(version).sha256, []
        for placed in self.placed("approval", version):
            event = placed.event
            names_it = bool(sha256) and event.data.get("digest") == sha256
            if not since < placed.line < before or not (names_it or placed.digest in self._listed):
                continue
            if self.is_signed(placed, *protection.DECIDERS):
                roles = self.authority_before(placed.line).signers[event.key].roles
                is_yes, action = event.data["decision"] == "approve", event.data.get("action", "use")
                person = self.authority.person_of(event.key)
                decisions.append(Decision(placed.line, person, roles, is_yes, event.data["alias"], action))
        return decisions

    def shortfalls(
        self, alias: str, now: AliasRoute | None, new: AliasRoute | None, mover: str, since: int, line: int
    ) -> list[Shortfall]:
        """What is missing for the key `mover` to move an alias at `line` from the route `now`, which it has since the line
        `since`, to `new`; [] where nothing is, or the alias is not protected."""
        policy = self.authority_before(line).policy
        if not protection.is_protected(policy, alias):
            return []
        if new is None:
            if now is None or self.is_withdrawn(now.stable, line):
                return []
            return self._shortfalls(policy, alias, [now.stable], mover, "archive", since, line)
        versions = protection.to_approve(now, new, lambda version: self.version_facts(version).base)
        return self._shortfalls(policy, alias, versions, mover, "use", 0, line)

    def shortfalls_of_state(self, version: str, state: str, mover: str, line: int) -> list[tuple[str, Shortfall]]:
        """The same for archiving a version or taking it back into use, for each protected alias that can reach it."""
        policy, missing = self.authority_before(line).policy, []
        if not policy.protected:
            return []
        action: Action = "archive" if state == TAKEN_OUT else "restore"
        since = max((one.line for one in self.placed("model", version) if one.line < line), default=0)
        for alias in [one for one in self.subjects("alias") if protection.is_protected(policy, one)]:
            moves = [placed for placed in self.placed("alias", alias) if placed.line < line]
            route = route_of(moves[-1].event) if moves else None
            if version in protection.reached(route, lambda one: self.version_facts(one).base):
                rules = self._shortfalls(policy, alias, [version], mover, action, since, line)
                missing += [(alias, rule) for rule in rules]
        return missing

    def _shortfalls(
        self, policy: Policy, alias: str, versions: list[str], mover: str, action: Action, since: int, line: int
    ) -> list[Shortfall]:
        moving = self.authority.person_of(mover) if self._could(mover, line, ("releaser",)) else ""
        rules = (
            protection.shortfall(
                policy, alias, one, self.version_facts(one), moving, self.decisions(one, since, line), action
            )
            for one in versions
        )
        return [rule for rule in rules if rule]

    def is_withdrawn(self, version: str, line: int) -> bool:
        """Whether an erasure took a version out of use in front of a line; asked of the events themselves, for what counts
        of a version's other states depends on the aliases."""
        entry = self._subjects.get(("model", version))
        for source in entry.sources if entry else ():
            event = source if isinstance(source, Event) else event_of(source.body(), source.path)
            placed = event and Placed(event, None if isinstance(source, Event) else source)
            if placed and placed.line < line and placed.event.data.get("state") in WITHDRAWN:
                before = self.authority_before(placed.line)
                if not before.rules("model events") or self.is_signed(placed, *MAY["model events"]):
                    return True
        return False
