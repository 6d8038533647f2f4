"""A model that is trained on the documents of a chat template ends its answers by itself, whatever the template writes.

For each kind of template a random model of two layers learns a few conversations by heart. The documents are those of
`encode_batch`, and the answers come by the path of a request: prompt, engine, stop tokens, reasoning, calls. A wrong mask,
end or prompt shows: the answer does not end, or is another one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from forge_ray.config.release import EngineConfig, Limits
from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.chat import ChatTokenizer, encode_batch, load_tokenizer_dir
from forge_ray.data.tokens.template import Encoded
from forge_ray.data.tokens.text_tools import Tools
from forge_ray.inference.engine import Engine
from forge_ray.inference.load import load_engine
from forge_ray.serve.choice import answer_choice
from forge_ray.serve.engines import end_token_ids
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.prompt import choices_of, prompts_of
from forge_ray.serve.reply import Part
from tests.template_models import templates, tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.numerics
ENGINE = EngineConfig(precision="fp32", page_size=16, num_blocks=256, max_batch_tokens=256)
MAX_STEPS, LEARNED = 200, 0.005  # nats per token at which greedy answers are those of the rows
Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def calls(*arguments: Turn) -> Turn:
    functions = [
        {"id": f"c{i}", "type": "function", "function": {"name": "look", "arguments": json.dumps(value)}}
        for i, value in enumerate(arguments)
    ]
    return {"role": "assistant", "tool_calls": functions}


def result(number: int, text: str) -> Turn:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


PLAIN = [
    [user("apple?"), says("Red, or green.")],
    [user("sky?"), says("Blue."), user("At night?"), says("Black\nwith stars.")],
]
THINKING = [
    [user("apple?"), says("Red.", reasoning_content="It is ripe.")],
    [
        user("sky?"),
        says("Blue.", reasoning_content="It is day."),
        user("At night?"),
        says("Black.", reasoning_content="No sun."),
    ],
]
CALLING = [
    [user("apple?"), calls({"at": "tree"}, {"at": "sky"}), result(0, "red"), result(1, "blue"), says("It is red.")],
    [user("hello"), says("Hi.")],
]
CALLING_ONCE = [[user("apple?"), calls({"at": "tree"}), result(0, "red"), says("It is red.")], [user("hello"), says("Hi.")]]
SCHEMA = {"type": "object", "properties": {"at": {"type": "string", "description": "Where."}}}
LOOK = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}]


@dataclass(frozen=True)
class Kind:
    """`holds`: what makes a template one of this kind, of its tokenizer and the documents of `chats`."""

    template: str
    chats: list[list[Turn]]
    holds: Callable[[ChatTokenizer, list[list[Encoded]]], bool]
    tools: Tools = "template"

    @property
    def declared(self) -> list[Any] | None:
        return LOOK if any(turn["role"] == "tool" for chat in self.chats for turn in chat) else None


def ends(model: ChatTokenizer) -> set[str]:
    return {model.decode([token]) for token in model.end_ids}


def ends_of_documents(documents: list[list[Encoded]]) -> set[int]:
    """The last trained token of each answer."""
    return {
        int(one.ids[place])
        for parts in documents
        for one in parts
        for place in range(len(one.ids))
        if one.loss_mask[place] and not one.loss_mask[place + 1 : place + 2].any()
    }


def untrained_tail(model: ChatTokenizer, documents: list[list[Encoded]]) -> str:
    one = documents[0][-1]
    return model.decode(one.ids[int(one.loss_mask.nonzero()[0][-1]) + 1 :])


KINDS = {
    "the end is eos": Kind("llama3", PLAIN, lambda model, docs: ends_of_documents(docs) == {model.eos_token_id}),
    "the end is not eos": Kind("phi3", PLAIN, lambda model, docs: model.eos_token_id not in ends_of_documents(docs)),
    "white space behind the end": Kind("qwen2_5_vl", PLAIN, lambda model, docs: untrained_tail(model, docs) == "\n"),
    "the next turn's token is the end": Kind(
        "glm4moe", CALLING, lambda model, docs: {"<|user|>", "<|observation|>"} <= ends(model)
    ),
    "two ends of a turn": Kind("gptoss", CALLING_ONCE, lambda model, docs: len(ends_of_documents(docs)) == 2),
    "history is written anew": Kind("qwen3", THINKING, lambda model, docs: len(docs[1]) == 2),
    "reasoning that the prompt opens": Kind(
        "qwen3_5_think", THINKING, lambda model, docs: model.decode(model.prompt_ids([user("x")])).endswith("<think>\n")
    ),
    "calls in the template": Kind("qwen2_5", CALLING, lambda model, docs: model.call_style == "hermes"),
    "calls in another form": Kind("gemma4", CALLING, lambda model, docs: model.call_form.kind == "braced"),
    "tools as text": Kind("phi3", CALLING, lambda model, docs: model.call_style == "hermes", "text"),
}
QUICK = ("the end is not eos", "history is written anew")


def learned(model: Any, documents: list[Encoded], pad: int) -> int:
    """Train on the masked targets of all documents, as one batch; the number of steps."""
    longest = max(len(one.ids) for one in documents)
    ids, targets = torch.full((2, len(documents), longest), pad)
    targets.fill_(-100)
    for row, one in enumerate(documents):
        ids[row, : len(one.ids)] = torch.from_numpy(one.ids.astype("int64"))
        trained = torch.from_numpy(one.loss_mask > 0)
        targets[row, : len(one.ids)][trained] = ids[row, : len(one.ids)][trained]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(MAX_STEPS):
        logits = model(input_ids=ids).logits[:, :-1]  # causal, so that what is behind a document reaches nothing of it
        loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        if loss.item() < LEARNED:
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"not learned in {MAX_STEPS} steps: loss {loss.item():.3f}")


def answered(engine: Engine, model: ChatTokenizer, folder: Path, messages: list[Turn], tools: list[Any] | None) -> Turn:
    """What an endpoint answers: content, calls and reasoning, and why the answer ended."""
    loaded = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", model, end_token_ids(model, folder))
    request: Turn = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 160}
    body = ChatRequest.model_validate(request | ({"tools": tools} if tools else {}))
    (choice,) = choices_of(Limits(), loaded, body, prompts_of(model, body))

    async def parts() -> list[Part]:
        return [part async for part in answer_choice(loaded, body, choice)]

    every = asyncio.run(parts())
    return {
        "content": "".join(part.text for part in every),
        "calls": [(call.name, json.loads(call.arguments)) for part in every for call in part.calls],
        "reasoning": "".join(part.reasoning for part in every),
        "finish": every[-1].finish_reason,
    }


def expected(turn: Turn) -> Turn:
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    return {
        "content": turn.get("content", ""),
        "calls": [(function["name"], json.loads(function["arguments"])) for function in functions],
        "reasoning": turn.get("reasoning_content", ""),
        "finish": "tool_calls" if functions else "stop",
    }


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.large) for name in KINDS])
def test_a_trained_model_ends_its_answers(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    own = tokenizer(kind.template, templates()[kind.template])
    own.save_pretrained(tmp_path)
    model = load_tokenizer_dir(tmp_path, tools=kind.tools)
    records = [DataRecord({"messages": chat, "tools": kind.declared}) for chat in kind.chats]
    documents = []
    for record, parts in zip(records, encode_batch(model, records, 4096, "reject"), strict=True):
        assert not isinstance(parts, Reject), f"{record}: {parts}"
        documents.append(parts)
    assert kind.holds(model, documents)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=model.eos_token_id,
    )
    network = LlamaForCausalLM(config)
    num_steps = learned(network, [one for parts in documents for one in parts], model.pad_id)
    print(f"{name}: {num_steps} steps, {sum(len(one.ids) for parts in documents for one in parts)} tokens")
    network.save_pretrained(tmp_path)
    engine = load_engine(tmp_path, None, ENGINE, use_gpu=False)
    try:
        for chat in kind.chats:
            for number, turn in enumerate(chat):
                if turn["role"] == "assistant":
                    assert answered(engine, model, tmp_path, chat[:number], kind.declared) == expected(turn)
    finally:
        engine.close()
