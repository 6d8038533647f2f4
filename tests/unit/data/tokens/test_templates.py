"""Token by token against the references: transformers' chat templates and mistral-common, on one corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from forge_ray.data.record.schema import DataRecord, Reject, parse_record
from forge_ray.data.tokens.chat import ChatTokenizer, chat_tokenizer, encode_batch, encode_chat, prompt_ids
from forge_ray.data.tokens.documents import MAX_RENDERED, ChatFormat
from forge_ray.data.tokens.encode import MAX_PREFIXES
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.mistral import load_mistral
from forge_ray.data.tokens.proof import NOTHING, OPEN_END, TWO_BEGINS, prove, prove_packed
from forge_ray.data.tokens.render import any_of
from forge_ray.data.tokens.template import Encoded

pytestmark = [pytest.mark.unit, pytest.mark.slow]
Messages = list[dict[str, Any]]

CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>{% endif %}"
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% if tools %}[SYS] {{ tools | tojson }}[/SYS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'tool' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYS] {{ m.content }}[/SYS]"
    "{% else %} {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[CALL]{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", None, ["<|im_start|>"]),
    "llama3": (LLAMA3, "<|eot_id|>", "<|begin|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "inst": (INST, "</s>", "<s>", ["[INST]", "[/INST]", "[SYS]", "[/SYS]", "[CALL]"]),
}
DATA = Path(__import__("mistral_common").__file__).parent / "data"
MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken-v3": "tekken_240718.json",
    "tekken-v11": "tekken-v11.json",
    "tekken-v13": "tekken-v13.json",
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def calls(*signatures: tuple[str, str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    tool_calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for i, name, arguments in signatures
    ]
    return {"role": "assistant", "tool_calls": tool_calls, **more}


def result(call: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers; für Zahlen",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]
ADD, MUL = ("abcdef123", "add", {"a": 2, "b": 2}), ("ABCDEF456", "add", {"a": "zwölf", "b": [1, {"c": None}]})
TEXTS = [
    ("2+2?", "four"),
    ("Größe 東京 🙂?", "Größe: 東京 🙂 naïve café"),
    ("a", "b"),
    ("?", "."),
    ("  spaces at both ends  ", "an answer"),
    ("\n\nlines\n\n", "first\n\nsecond\n\tthird"),
    ("code", "```python\ndef f(x):\n    return {'a': [x, 1.5e-3]}\n```"),
    ("json", '{"a": "\\u00e9", "b": "x\\ny"}'),
    ("html", '<b class="x">&amp; <br/></b> </s >'),
    ("templates", "{{ messages }} {% for %} ${x} %s {0}"),
    ("emoji", "👩‍👩‍👧‍👦 🇩🇪 é é \u200b|\u00a0|"),
    ("rtl", "שלום مرحبا hello"),
    ("numbers", "1234567890 3.14159 1,000,000 0x1F"),
    ("long " * 60, "answer " * 60 + "end"),
    ("quotes", "\"double\" 'single' `back` \\ slash"),
]
CORPUS: dict[str, tuple[Messages, list[Any] | None]] = {
    **{f"text {i}": ([user(q), says(a)], None) for i, (q, a) in enumerate(TEXTS)},
    **{f"system {i}": ([system("Be brief. Sei kurz."), user(q), says(a)], None) for i, (q, a) in enumerate(TEXTS[:6])},
    "turns": ([user("a"), says("one"), user("b"), says("two"), user("c"), says("three")], None),
    "turns with system": ([system("s"), user("a"), says("one"), user("b"), says("two")], None),
    "weight 0 first": ([user("a"), says("one", weight=0), user("b"), says("two")], None),
    "weight 0 last": ([user("a"), says("one"), user("b"), says("two", weight=0)], None),
    "weight 0 in the middle": ([user("a"), says("1"), user("b"), says("2", weight=0), user("c"), says("3")], None),
    "many turns": ([turn for i in range(8) for turn in (user(f"question {i}"), says(f"answer {i} 東"))], None),
    "tools unused": ([user("hello"), says("hi")], TOOLS),
    "call": ([user("2+2?"), calls(ADD)], TOOLS),
    "call and result": ([user("2+2?"), calls(ADD), result("abcdef123", "4"), says("four")], TOOLS),
    "json result": ([user("2+2?"), calls(ADD), result("abcdef123", '{"sum": 4}'), says("four")], TOOLS),
    "parallel": (
        [user("twice"), calls(ADD, MUL), result("abcdef123", "4"), result("ABCDEF456", "ü"), says("done")],
        TOOLS,
    ),
    "two rounds": (
        [user("x"), calls(ADD), result("abcdef123", "4"), calls(MUL), result("ABCDEF456", "5"), says("nine")],
        TOOLS,
    ),
    "call of weight 0": ([user("x"), calls(ADD, weight=0), result("abcdef123", "4"), says("four")], TOOLS),
    "turn after tools": (
        [user("x"), calls(ADD), result("abcdef123", "4"), says("four"), user("and?"), says("nothing")],
        TOOLS,
    ),
}
EDGES = {  # the answer's white space may join with the template's
    "leading newline": [user("a"), says("\n\nfour")],
    "leading space": [user("a"), says("  four")],
    "trailing newline": [user("a"), says("four\n\n")],
    "leading newline in history": [user("a"), says("\nfour"), user("b"), says("\n\n five")],
}


def hf(name: str) -> HfTokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, eos, bos, specials = TEMPLATES[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "llama3":  # as Llama 3 does: a run of line breaks is one piece, whatever follows
        lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|\s?\S+|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    every = ["<|pad|>", eos, *([bos] if bos else []), *specials]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=every, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*(a for _, a in TEXTS), "\n\n\n  \n\n system user assistant"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token=eos, bos_token=bos, additional_special_tokens=specials
    )
    tokenizer.chat_template = template
    return HfTokenizer(tokenizer)


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> HfTokenizer:
    return hf(request.param)


@pytest.fixture(scope="module", params=MISTRAL)
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The files in mistral-common's wheel; v11 and v13 are its newest tekken with their version and special tokens."""
    path = DATA / MISTRAL[request.param]
    if not path.is_file():
        tekken = json.loads((DATA / "tekken_240911.json").read_text(encoding="utf-8"))
        tekken["config"]["version"] = request.param.removeprefix("tekken-")
        tekken.pop("multimodal", None)
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        tekken["special_tokens"] = list(Tekkenizer.DEPRECATED_SPECIAL_TOKENS)
        more = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"]
        tokens = {token["token_str"] for token in tekken["special_tokens"]}
        for word in more:
            if word not in tokens:
                rank = len(tekken["special_tokens"])
                tekken["special_tokens"].append({"rank": rank, "token_str": word, "is_control": True})
        path = tmp_path_factory.mktemp("tekken") / "tekken.json"
        path.write_text(json.dumps(tekken), encoding="utf-8")
    return load_mistral(path)


def template_view(messages: Messages) -> Messages:
    """As one calls transformers: no weight, arguments as objects."""
    seen = json.loads(json.dumps([{k: v for k, v in message.items() if k != "weight"} for message in messages]))
    for message in seen:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return list(seen)


def runs(encoded: Encoded) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(encoded.loss_mask, prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def trained_turns(messages: Messages) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]


@pytest.mark.parametrize("name", CORPUS)
def test_ids_are_those_of_the_chat_template(template: HfTokenizer, name: str) -> None:
    messages, tools = CORPUS[name]
    seen = template_view(messages)
    encoded = encode_chat(template, messages, tools)
    reference = template.tokenizer.apply_chat_template(seen, tools=tools, tokenize=True)["input_ids"]
    assert encoded.ids.tolist() == list(reference)
    for turn in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt = template.tokenizer.apply_chat_template(seen[:turn], tools=tools, add_generation_prompt=True)["input_ids"]
        assert template.prompt_ids(messages[:turn], tools) == list(prompt)


@pytest.mark.parametrize("name", [*CORPUS, *EDGES])
def test_trained_spans_follow_the_generation_prompt(template: HfTokenizer, name: str) -> None:
    messages, tools = CORPUS[name] if name in CORPUS else (EDGES[name], None)
    encoded = encode_chat(template, messages, tools)
    turns, spans = trained_turns(messages), list(runs(encoded))
    assert len(turns) == len(spans)
    for turn, (first, last) in zip(turns, spans, strict=True):
        assert encoded.ids[:first].tolist() == template.prompt_ids(messages[:turn], tools)
        assert encoded.ids[last - 1] == template.end_of_turn_id
        text = template.decode(encoded.ids[first : last - 1])
        if "tool_calls" not in messages[turn]:
            assert text.removeprefix(" " if template.tokenizer.chat_template == INST else "") == messages[turn]["content"]
        for call in messages[turn].get("tool_calls", []):
            assert json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False) in text
    assert template.decode(encoded.ids) == template.tokenizer.apply_chat_template(
        template_view(messages), tools=tools, tokenize=False
    )


MERGING = CHATML.replace("<|im_start|>{{ message.role }}\n", "<|im_start|>{{ message.role }}\n\n").replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant\n\n"
)


def test_template_end_that_merges_with_the_answer() -> None:
    """GPT-2's pattern takes the last of several white spaces apart only where a word follows: no token straddles the
    answer's start, and still the prompt alone has other tokens."""
    tokenizer = hf("chatml")
    tokenizer.tokenizer.chat_template = MERGING
    messages = [user("a"), says("four"), user("b"), says("five")]
    whole = tokenizer.tokenizer.apply_chat_template(messages)["input_ids"]
    encoded = encode_chat(tokenizer, messages, None)
    assert encoded.ids.tolist() != list(whole)
    assert tokenizer.decode(encoded.ids) == tokenizer.decode(whole)
    for turn, (first, _) in zip((1, 3), runs(encoded), strict=True):
        assert encoded.ids[:first].tolist() == tokenizer.prompt_ids(messages[:turn])


@pytest.mark.parametrize("content", ["message.content or ''", "(message.content or '') if not loop.last else ''"])
def test_work_of_a_prompt_grows_with_its_length_alone(content: str) -> None:
    """Where a prompt is the beginning of the next one, and where the template writes history anew."""
    tokenizer = hf("chatml")
    tokenizer.tokenizer.chat_template = CHATML.replace("message.content or ''", content)
    turns = [turn for i in range(150) for turn in (user(f"question {i}?"), says(f"\n\nanswer {i}"))]
    num_turns, rendering = [0], type(tokenizer._rendering).render

    def counted(messages: Messages, tools: list[Any] | None, for_answer: bool) -> str:
        num_turns[0] += len(messages)
        return rendering(tokenizer._rendering, messages, tools, for_answer)

    tokenizer._formats[tokenizer._rendering.source(None)] = ChatFormat(counted, tokenizer.special.pattern, "")
    chat = tokenizer.chat_format(None)
    assert chat.opening == "<|im_start|>assistant\n"
    text = chat.render(turns[:-1], None, True)
    num_turns[0] = 0
    spans = chat.answers_in(text, turns[:-1], None)
    assert num_turns[0] <= MAX_RENDERED * len(turns)
    if content == "message.content or ''":
        assert num_turns[0] < len(turns)
    assert all(text[: span.start].endswith(chat.opening) for span in spans)


def test_every_earlier_answer_of_a_prompt_is_found() -> None:
    tokenizer = hf("chatml")
    tokenizer.tokenizer.chat_template = MERGING
    turns = [turn for i in range(40) for turn in (user(f"question {i}?"), says(f"answer {i}"))]
    turns = [system("s"), *turns, user("and?")]
    chat = tokenizer.chat_format(None)
    text = chat.render(turns, None, True)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    expected = [len(chat.render(turns[:number], None, True)) for number in answers]
    assert [span.start for span in chat.answers_in(text, turns, None)] == expected
    assert [span.start for span in chat.answers_in(text, turns, None, answers[1::2])] == expected[::2]
    whole = tokenizer.encoder.encodings([text])[0].ids
    bounds = [0, *expected, len(text)]
    pieces = tokenizer.encoder.encodings([text[a:b] for a, b in pairwise(bounds)])
    assert tokenizer.prompt_ids(turns) == [token for piece in pieces for token in piece.ids] != whole


def test_a_pattern_of_words_finds_the_longest_at_each_place() -> None:
    words = {f"<unused{number}>" for number in range(600)} | {"<s>", "<s>>", "<", "  ", "   ", "[a]", "a|b", "é"}
    text = "<s>>x<unused599><unused<s>     é[a]a|b<unused1"
    flat = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    assert any_of(words).findall(text) == flat.findall(text)
    assert any_of([]).search("") is None
    nested = any_of({"x" * length for length in range(1, 500)})
    assert nested.findall("x" * 600) == ["x" * 499, "x" * 101]


def reference(tokenizer: Any, messages: Messages, tools: list[Any] | None, finetuning: bool) -> list[int]:
    from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    request: Any = ChatCompletionRequest.from_openai(plain, tools, model="m")
    if not finetuning:
        return list(tokenizer.serving.encode_chat_completion(request).tokens)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            weighted = FinetuningAssistantMessage(**request.messages[i].model_dump(), weight=message.get("weight", 1))
            request.messages[i] = weighted
    return list(tokenizer.finetuning.encode_chat_completion(request).tokens)


@pytest.mark.parametrize("name", [*CORPUS, *EDGES])
def test_ids_are_those_of_mistral_common(mistral: Any, name: str) -> None:
    """One document where its finetuning and its serving mode agree, else one per answer behind serving's prompt."""
    messages, tools = CORPUS[name] if name in CORPUS else (EDGES[name], None)
    (documents,) = mistral.encode_chats([(messages, tools)])
    try:
        expected = reference(mistral, messages, tools, finetuning=True)
    except Exception:  # v1 knows no tools, v2 no parallel results
        assert str(documents).startswith("mistral-common refuses the conversation: ")
        return
    assert not isinstance(documents, Reject)
    turns = trained_turns(messages)
    spans = [(document, *run) for document in documents for run in runs(document)]
    assert len(spans) == len(turns)
    for turn, (document, first, last) in zip(turns, spans, strict=True):
        prompt = prompt_ids(mistral, messages[:turn], tools)
        assert document.ids[:first].tolist() == prompt == reference(mistral, messages[:turn], tools, finetuning=False)
        assert document.ids[last - 1] == mistral.end_of_turn_id
        assert document.ids.tolist().count(mistral.bos_id) == 1
        text = mistral.decode(document.ids[first : last - 1], skip_special_tokens=True)
        if "tool_calls" not in messages[turn]:
            content = messages[turn]["content"]
            assert text in (content, content.rstrip(" "))
        for call in messages[turn].get("tool_calls", []):
            assert call["function"]["name"] in text
            assert json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False) in text
    if len(documents) == 1:
        assert documents[0].ids.tolist() == expected
    else:
        assert name in ("turns with system", "turn after tools")


def test_batch_encoding_equals_single_encoding(template: HfTokenizer) -> None:
    records = [parse_record({"messages": messages}) for messages in EDGES.values()]
    records += [parse_record({"messages": CORPUS[name][0]}) for name in ("text 1", "turns", "weight 0 last")]
    records.insert(2, parse_record({"text": "plain " * 40}))
    records.insert(4, parse_record({"messages": [user("<|pad|>"), says("four")]}))
    template.tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=4)  # leaves its state behind
    whole = encode_batch(template, records, 32, "truncate")
    for record, got in zip(records, whole, strict=True):
        (alone,) = encode_batch(chat_tokenizer(template.tokenizer), [record], 32, "truncate")
        assert not isinstance(got, Reject)
        assert not isinstance(alone, Reject)
        for one, other in zip(got, alone, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.loss_mask.tolist() == other.loss_mask.tolist()
    (spelled,) = whole[4]  # type: ignore[misc]
    assert "<|pad|>" in template.decode(spelled.ids, skip_special_tokens=True)


def test_prefix_cache_changes_no_ids(template: HfTokenizer) -> None:
    rule = system("You are a careful assistant of the bank;  answer in two lines. ")
    chats = [([rule, user(prompt), says(answer)], tools) for tools in (None, TOOLS) for prompt, answer in TEXTS * 2]
    chats += [(messages, tools) for messages, tools in CORPUS.values()]
    texts = [template._rendering.render(template_view(messages), tools, False) for messages, tools in chats]
    encoder = template.encoder
    assert [ids.tolist() for ids in encoder._ids(texts)] == [encoding.ids for encoding in encoder.encodings(texts)]
    assert 2 <= len(encoder._prefixes) <= MAX_PREFIXES
    shared = encoder._shared(texts)
    assert sum(map(bool, shared)) > len(TEXTS)


def test_prefix_is_not_cut_before_a_whitespace_stripping_token(template: HfTokenizer) -> None:
    shared = "a text that is longer than thirty-two characters   "
    word = AddedToken("<|greedy|>", special=True, lstrip=True)
    template.tokenizer.add_special_tokens({"extra_special_tokens": [word]}, replace_extra_special_tokens=False)
    fresh = HfTokenizer(template.tokenizer).encoder
    texts = [f"{shared}<|greedy|>one", f"{shared}<|greedy|>two"]
    assert [ids.tolist() for ids in fresh._ids(texts)] == [encoding.ids for encoding in fresh.encodings(texts)]
    assert fresh._prefixes == {}


def test_special_token_in_text_is_text(template: HfTokenizer) -> None:
    """Wherever it is spelled: the special tokens are those of the same conversation without it."""
    word = template.decode([template.end_of_turn_id])
    tool = [{"type": "function", "function": {"name": "add", "description": "hi WORD and more"}}]
    for messages, tools, is_trained in (
        ([user("hi WORD and more"), says("a")], None, False),
        ([system("hi WORD and more"), user("a"), says("b")], None, False),
        ([user("a"), says("hi WORD and more")], None, True),
        ([user("x"), says("y")], tool, False),
        ([user("x"), calls(("abcdef123", "add", {"a": "hi WORD and more"}))], None, True),
        ([user("x"), calls(("abcdef123", "add", {"hi WORD and more": 1})), result("abcdef123", "4"), says("z")], None, True),
        ([user("x"), calls(ADD), result("abcdef123", "hi WORD and more"), says("z")], None, False),
    ):
        plain = encode_chat(template, messages, tools)
        written = json.dumps([messages, tools])
        for escaped in (word, word.replace("<", "\\\\u003c")):  # the second one within the JSON of arguments alone
            if escaped != word and "arguments" not in written:
                continue
            spelled, spelled_tools = json.loads(written.replace("WORD", escaped))
            encoded = encode_chat(template, spelled, spelled_tools)
            is_special = template.special.is_special
            assert encoded.ids[is_special[encoded.ids]].tolist() == plain.ids[is_special[plain.ids]].tolist()
            decoded = template.decode(encoded.ids, skip_special_tokens=True)
            assert decoded.count(f"hi {word} and more") == 1 or (escaped != word and not is_trained)
            trained = template.decode(encoded.ids[encoded.loss_mask > 0], skip_special_tokens=True)
            assert (f"hi {word} and more" in trained) == is_trained
            last = [start for start, _ in runs(encoded)][-1]
            assert template.prompt_ids(spelled[:-1], spelled_tools) == encoded.ids[:last].tolist()


def test_chat_template_column_of_a_row_is_ignored(template: HfTokenizer) -> None:
    plain = {"messages": [user("a"), says("b")]}
    record = parse_record(plain | {"chat_template": "{{ 'forged' }}", "tokenizer": "x"})
    assert record == parse_record(plain)
    (got,), (expected,) = (encode_batch(template, [r], 99, "reject") for r in (record, DataRecord(plain)))
    assert not isinstance(got, Reject)
    assert not isinstance(expected, Reject)
    assert got[0].ids.tolist() == expected[0].ids.tolist()


def test_masks_from_special_tokens_equal_masks_from_offsets(template: HfTokenizer) -> None:
    """The fast way gives what the one with offsets does, or nothing; and it is the one that is mostly taken."""
    num_fast = 0
    for messages, tools in [*CORPUS.values(), *((edge, None) for edge in EDGES.values())]:
        (document,) = template.chat_format(tools).documents(messages, tools)
        text, spans = document.text, list(document.spans)
        encoder = template.encoder
        (encoding,) = encoder.encodings([text])
        fast, slow = (
            encoder._by_special_tokens(text, spans, np.array(encoding.ids, np.int32)),
            encoder._marked(text, spans, encoding),
        )
        if fast is not None:
            num_fast += 1
            assert not isinstance(slow, Reject)
            assert fast.ids.tolist() == slow.ids.tolist()
            assert fast.loss_mask.tolist() == slow.loss_mask.tolist()
    assert num_fast > len(CORPUS) / 2


def test_slow_tokenizer_gives_the_same_ids_and_masks(template: HfTokenizer) -> None:
    slow = HfTokenizer(template.tokenizer)
    slow.encoder.__dict__["backend"] = None
    for name in ("text 1", "turns", "weight 0 first"):
        got, expected = (encode_chat(t, CORPUS[name][0], None) for t in (slow, template))
        assert got.ids.tolist() == expected.ids.tolist()
        assert got.loss_mask.tolist() == expected.loss_mask.tolist()


def document(ids: list[int], mask: list[int], truncated: bool = False) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(mask, np.int8), truncated)


def test_every_fault_of_a_document_is_detected() -> None:
    tokenizer = hf("inst")
    end, bos = tokenizer.end_of_turn_id, tokenizer.bos_id
    assert bos is not None
    good = [
        document([bos, 9, 8, end], [0, 0, 1, 1]),
        document([bos, 9, end, 8, 7, end], [0, 1, 1, 0, 1, 1]),
        document([bos, 9, 8, 7], [0, 0, 1, 1], truncated=True),
        document([bos, 9, 8, 7], [0, 1, 1, 1]),  # a piece of a plain text
    ]
    bad = {
        NOTHING: [document([bos, 9, end], [0, 0, 0]), document([9, end], [1, 0]), document([], [])],
        OPEN_END: [
            document([bos, 9, 8, end], [0, 0, 1, 0]),
            document([bos, 9, 8, 7], [0, 0, 1, 1]),
            document([bos, 9, 8, 7, end], [0, 1, 0, 1, 1]),
        ],
        TWO_BEGINS: [document([bos, bos, 8, end], [0, 0, 1, 1])],
    }
    assert prove(tokenizer, []) == prove(tokenizer, good) == {}
    for reason, documents in bad.items():
        assert prove(tokenizer, documents) == dict.fromkeys(range(len(documents)), reason)
        assert prove(tokenizer, [*good, *documents, *good]) == {4 + i: reason for i in range(len(documents))}


PACKED = {
    "input_ids": [[5, 6, 7, 5, 6, 0], [5, 6, 7, 8, 9, 9]],
    "loss_mask": [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1]],
    "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize(
    ("column", "row", "at", "value", "problem"),
    [
        ("loss_mask", 1, 0, 1, "row 1: the first token of a segment is trained, across its border (1 of 2 rows)"),
        ("loss_mask", 0, 3, 1, "row 0: the first token of a segment is trained, across its border (1 of 2 rows)"),
        ("loss_mask", 0, 5, 1, "row 0: padding is trained (1 of 2 rows)"),
        ("loss_mask", 0, 1, 2, "row 0: the loss mask is neither 0 nor 1 (1 of 2 rows)"),
        ("input_ids", 0, 5, 4, "row 0: padding is not the pad token (1 of 2 rows)"),
        ("segment_ids", 0, 3, 3, "row 0: segments are not numbered from 1 in order (1 of 2 rows)"),
        ("segment_ids", 0, 5, 1, "row 0: segments are not numbered from 1 in order (1 of 2 rows)"),
        ("segment_ids", 0, 0, 0, "row 0: a segment stands behind padding (1 of 2 rows)"),
    ],
)
def test_every_fault_of_a_packed_row_is_detected(column: str, row: int, at: int, value: int, problem: str) -> None:
    arrays = {name: np.array(rows) for name, rows in PACKED.items()}
    assert prove_packed(**arrays, pad_id=0) == []
    arrays[column][row, at] = value
    assert problem in prove_packed(**arrays, pad_id=0)
