"""The canary guard: outcomes of the versions behind an alias, and when a canary is rolled back (pure)."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from forge_ray.config.release import AliasRoute, Guard

FAILED = 500  # this status and higher ones are failures of the server


@dataclass(frozen=True)
class AnswerOutcome:
    """One answer of `version` under `alias`: its status, and seconds per token (0: no token was generated)."""

    alias: str
    version: str
    status: int
    token_s: float


@dataclass
class Outcomes:
    """The recent answers of every (alias, version), kept as long as the longest window of a guard."""

    clock: Callable[[], float] = time.monotonic
    recent: dict[tuple[str, str], deque[tuple[float, AnswerOutcome]]] = field(default_factory=dict)
    keep_s: float = 3600.0

    def add(self, outcome: AnswerOutcome) -> None:
        answers = self.recent.setdefault((outcome.alias, outcome.version), deque(maxlen=10_000))
        answers.append((self.clock(), outcome))

    def within(self, alias: str, version: str, seconds: float) -> list[AnswerOutcome]:
        since = self.clock() - min(seconds, self.keep_s)
        return [outcome for at, outcome in self.recent.get((alias, version), ()) if at >= since]

    def forget(self, alias: str) -> None:
        """Drop the answers under an alias: a new route is judged by what follows it."""
        for key in [key for key in self.recent if key[0] == alias]:
            del self.recent[key]

    def verdict(self, alias: str, route: AliasRoute) -> str:
        """Why the route's canaries are rolled back, or ""."""
        stable = self.within(alias, route.stable, route.guard.window_s)
        for version in list(route.versions)[1:]:
            if why := judge(version, self.within(alias, version, route.guard.window_s), stable, route.guard):
                return why
        return ""


def judge(version: str, canary: list[AnswerOutcome], stable: list[AnswerOutcome], guard: Guard) -> str:
    """Why this canary exceeds its bounds, or "". Latency is compared once both versions have enough answers."""
    if len(canary) < guard.min_requests:
        return ""
    rate = sum(outcome.status >= FAILED for outcome in canary) / len(canary)
    if rate > guard.max_error_rate:
        return f"{version}: {rate:.1%} of {len(canary)} answers failed, more than {guard.max_error_rate:.1%}"
    if len(stable) >= guard.min_requests:
        own, other = _median(canary), _median(stable)
        if other and own / other > guard.max_latency_ratio:
            ratio = own / other
            rule = f"{guard.max_latency_ratio:g} times is allowed"
            return f"{version}: {own * 1e3:.0f} ms per token, {ratio:.1f} times the stable one's; {rule}"
    return ""


def _median(outcomes: list[AnswerOutcome]) -> float:
    times = [outcome.token_s for outcome in outcomes if outcome.token_s]
    return statistics.median(times) if times else 0.0


def without_canaries(route: AliasRoute) -> AliasRoute:
    """The route with all traffic on its stable version."""
    return route.model_copy(update={"versions": {route.stable: 1.0}})
