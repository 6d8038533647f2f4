"""A conversation of several turns by openai-agents: python openai_agents.py URL chat|responses. Prints one line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

QUESTION = "Which colour?"
calls: list[Any] = []


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    sure: bool


@function_tool
def paint(colour: Literal["red", "blue"], sure: bool) -> str:
    """Paints."""
    calls.append({"colour": colour, "sure": sure})
    return f"painted {colour}"


async def converse(url: str, api: str) -> dict[str, Any]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel

    def agent(name: str, **more: Any) -> Agent:
        return Agent(name="painter", model=kind(model=name, openai_client=client), **more)

    painter = agent("agent", instructions="Be brief.", tools=[paint])
    first = await Runner.run(painter, QUESTION)
    streamed = Runner.run_streamed(painter, QUESTION)
    pieces = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    second = await Runner.run(painter, [*streamed.to_input_list(), {"role": "user", "content": "And now?"}])
    settings = ModelSettings(max_tokens=900, temperature=0.5, top_p=0.9)
    judged = await Runner.run(agent("tiny", output_type=Verdict, model_settings=settings), QUESTION)
    growing = Runner.run_streamed(agent("tiny", output_type=Verdict, model_settings=settings), QUESTION)
    async for _ in growing.stream_events():
        pass
    num_calls = len(calls)
    settings = ModelSettings(max_tokens=900, tool_choice="required", parallel_tool_calls=False, store=False)
    once: Any = {"tools": [paint], "model_settings": settings, "tool_use_behavior": "stop_on_first_tool"}
    await Runner.run(agent("tiny", **once), QUESTION)
    return {
        "first": first.final_output,
        "streamed": "".join(pieces),
        "second": second.final_output,
        "calls": calls[:num_calls],
        "outputs": [judged.final_output.model_dump(), growing.final_output.model_dump()],
        "forced": calls[num_calls:],
        "usage": first.context_wrapper.usage.output_tokens > 0,
    }


if __name__ == "__main__":
    set_tracing_disabled(True)
    print(json.dumps(asyncio.run(converse(*sys.argv[1:]))))
