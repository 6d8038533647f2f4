"""Seats for the requests that generate text: 429 where one would wait longer than it may (no ray).

A request is judged once, before it is tokenised, by the characters of its texts; what is admitted stays so. `seating` has
the estimate, the deployment's `limits` have the rule.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from forge_ray.serve.context import Caller, ServingContext
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.limits import retry_after
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import Choice, longest_answer
from forge_ray.serve.reply import Part
from forge_ray.serve.seating import RequestSeats, Seat, late_by

Generating = ChatRequest | CompletionRequest


def take_seats(
    context: ServingContext, caller: Caller, loaded: Loaded, body: Generating, sizes: Sequence[tuple[str, int, int]]
) -> None:
    """The caller's seats in the version's engine, one per choice, or `ApiError` 429. `sizes`: of `prologue.sizes_of`."""
    limits, longest = context.config.limits, longest_answer(context.config.limits, body)
    tokens = [num_tokens or context.seating.tokens_of(characters) for _, characters, num_tokens in sizes]
    asked = tuple(Seat(caller.holder, num, longest) for num in tokens for _ in range(body.num_choices))
    engine = context.seating.of(loaded.engine, context.config.engine.max_running)
    expected = engine.expected(asked)
    context.metrics.expected_wait(expected.wait_s)
    waiting = engine.waiting_by_holder()
    if late_s := late_by(expected, caller.holder, waiting, limits.max_wait_share, limits.short_wait_s):
        context.metrics.refused("wait")
        raise ApiError(
            429,
            f"this request would wait {expected.wait_s:.1f} s, too long for one that takes {expected.own_s:.1f} s; try again"
            f" in {late_s:.1f} s",
            code="overloaded",
            headers=retry_after(late_s),
        )
    caller.seats = RequestSeats(engine, asked).enter()


def sent_seats(
    context: ServingContext, holder: str, seats: RequestSeats | None, loaded: Loaded, choices: Sequence[Choice]
) -> RequestSeats:
    """The seats with the tokens of their prompts and answers, which are known by now, in the engine of the version that was
    chosen, as the choices are sent there. Shadows have had none before."""
    engine = context.seating.of(loaded.engine, context.config.engine.max_running)
    if seats is None or seats.engine is not engine:
        if seats is not None:
            seats.leave()
        seats = RequestSeats(engine, tuple(Seat(holder, 0, 0) for _ in choices))
    for seat, choice in zip(seats.seats, choices, strict=True):
        seat.num_prompt, seat.max_new = len(choice.generation.prompt_ids), choice.generation.max_new_tokens
    return seats.send()


async def counted(seats: RequestSeats, number: int, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
    """The same parts of a choice, counted as the engine makes them, however slowly the client reads. At the end the
    seat is free."""
    engine, seat = seats.engine, seats.seats[number]
    try:
        async with aclosing(parts):
            async for part in parts:
                if (num_tokens := part.num_tokens - seat.num_new) > 0:
                    engine.made(seat, num_tokens)
                yield part
    finally:
        engine.leave(seat)
