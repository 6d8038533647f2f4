"""Chat template → ids and mask: trained are the answers and their end of turn, and what is served is what was trained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.record.schema import Reject, parse_record
from forge_ray.data.tokens.chat import Encoded, encode, encode_chat, load_tokenizer_dir, prompt_ids

pytestmark = pytest.mark.unit
CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
CORPUS = [
    "the answer is four\n\n\n  and the question was two and two\n\n\n",
    "Größe 東京 🙂",
    "assistant\n\n user\n\n system\n  ",
] * 9
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE in which runs of white space are tokens of their own, so that they can join template and answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|im_start|>", END]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token=END, additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@dataclass(frozen=True)
class Lists:
    """An `Encoded` as lists, which compare."""

    ids: list[int]
    loss_mask: list[int]


def lists(encoded: Encoded) -> Lists:
    return Lists(encoded.ids.tolist(), encoded.loss_mask.tolist())


def one(tokenizer: Any, messages: Messages, tools: list[Any] | None = None, sequence_length: int = 10_000) -> Lists:
    record = parse_record({"messages": messages, "tools": tools})
    (encoded,) = encode(tokenizer, record, sequence_length, "reject")
    assert len(encoded.ids) == len(encoded.loss_mask)
    return lists(encoded)


def trained(tokenizer: Any, encoded: Lists) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    for before, token, mask in zip([0, *encoded.loss_mask], encoded.ids, encoded.loss_mask, strict=False):
        if mask:
            if not before:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_the_answer_and_its_end_of_turn_are_trained_and_nothing_else(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "add"}, user("2+2?"), assistant("the answer is four")]
    encoded = one(tokenizer, messages)
    text = f"<|im_start|>system\nadd{END}\n<|im_start|>user\n2+2?{END}\n<|im_start|>assistant\nthe answer is four{END}\n"
    assert tokenizer.decode(encoded.ids) == text
    assert trained(tokenizer, encoded) == [f"the answer is four{END}"]
    end = tokenizer.eos_token_id
    assert [mask for token, mask in zip(encoded.ids, encoded.loss_mask, strict=True) if token == end] == [0, 0, 1]
    assert encoded.loss_mask[-1] == 0  # the newline behind the end of turn is the template's


def test_every_answer_of_weight_1_is_trained(tokenizer: Any) -> None:
    messages = [
        user("a"),
        assistant("first"),
        user("b"),
        assistant("second", weight=0),
        user("c"),
        assistant("third", weight=1),
    ]
    encoded = one(tokenizer, messages)
    assert trained(tokenizer, encoded) == [f"first{END}", f"third{END}"]
    assert "second" in tokenizer.decode(encoded.ids)
    assert "weight" not in tokenizer.decode(encoded.ids)


def test_tool_calls_are_trained_and_tool_results_are_not(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [
        user("2+2?"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        assistant("four"),
    ]
    encoded = one(tokenizer, messages, tools)
    calls, answer = trained(tokenizer, encoded)
    assert calls.startswith("<call>")
    assert '"name": "add"' in calls
    assert calls.endswith(f"</call>{END}")
    assert answer == f"four{END}"
    assert tokenizer.decode(encoded.ids).startswith("<|im_start|>system\nTools: [")
    assert one(tokenizer, messages).ids != encoded.ids


def prompts_and_answers(messages: Messages) -> list[tuple[Messages, str]]:
    return [(messages[:i], message["content"]) for i, message in enumerate(messages) if message["role"] == "assistant"]


@given(
    question=st.text(st.sampled_from("ab \n\tß東🙂"), max_size=8),
    answer=st.text(st.sampled_from("ab \n\tß東🙂"), min_size=1, max_size=8).filter(lambda text: bool(text.strip())),
)
@settings(max_examples=150, deadline=None)
def test_serving_prompt_equals_the_training_prefix(tokenizer: Any, question: str, answer: str) -> None:
    """The ids behind the prompt are exactly the trained ones, also where the answer starts with white space."""
    messages = [user(question), assistant(answer)]
    encoded = one(tokenizer, messages)
    prompt = prompt_ids(tokenizer, messages[:1])
    assert encoded.ids[: len(prompt)] == prompt
    assert encoded.loss_mask[: len(prompt)] == [0] * len(prompt)
    count = sum(encoded.loss_mask)
    assert encoded.loss_mask[len(prompt) :][:count] == [1] * count
    assert tokenizer.decode(encoded.ids[len(prompt) :][:count]) == answer + END


def test_answer_that_starts_with_newlines_keeps_the_prompt_ids(tokenizer: Any) -> None:
    """Tokenised in one go, the template's newline and the answer's would be one token that no prompt ends with."""
    text = "<|im_start|>assistant\n\n\nfour"
    joined = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert joined[: len(prompt)] != prompt
    assert trained(tokenizer, one(tokenizer, [user("2+2?"), assistant("\n\nfour")])) == [f"\n\nfour{END}"]


def test_each_turn_of_a_long_chat_continues_its_prompt(tokenizer: Any) -> None:
    messages = [user("a"), assistant("the answer"), user("b"), assistant("is four"), user("c"), assistant("東京 🙂")]
    encoded = one(tokenizer, messages)
    for before, answer in prompts_and_answers(messages):
        prompt = prompt_ids(tokenizer, before)
        assert encoded.ids[: len(prompt)] == prompt
        rest = tokenizer.decode(encoded.ids[len(prompt) :])
        assert rest.startswith(answer + END)
        assert encoded.loss_mask[len(prompt)] == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # drops the reasoning of all answers but the last, as some published templates do
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content[-1:] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "this model's template writes this answer behind another prompt than the one that serving sends",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "the chat template writes no special token behind an answer",
        ),
        ("{{ raise_exception('only system turns') }}", "the chat template refuses the conversation: only system turns"),
        ("{{ messages[9].content }}{% for m in %}", "the chat template refuses the conversation"),
    ],
)
def test_template_without_maskable_answers_is_rejected(tokenizer: Any, template: str, reason: str) -> None:
    messages = [user("a"), assistant("thinking. first"), user("b"), assistant("thinking. second")]
    tokenizer.chat_template = template
    try:
        with pytest.raises(Reject) as error:
            one(tokenizer, messages)
    finally:
        tokenizer.chat_template = CHATML
    assert str(error.value).startswith(reason)


def test_overlong_chats_are_rejected_or_cut(tokenizer: Any) -> None:
    record = parse_record({"messages": [user("2+2?"), assistant("the answer is four " * 20)]})
    whole = encode(tokenizer, record, 10_000, "reject")[0]
    assert [lists(piece) for piece in encode(tokenizer, record, len(whole.ids), "reject")] == [lists(whole)]
    with pytest.raises(Reject, match=r"^longer than sequence_length$"):
        encode(tokenizer, record, len(whole.ids) - 1, "reject")
    (cut,) = encode(tokenizer, record, 40, "truncate")
    assert lists(cut) == Lists(whole.ids[:40].tolist(), whole.loss_mask[:40].tolist())
    assert (whole.truncated, cut.truncated) == (False, True)
    with pytest.raises(Reject, match=r"^no trained token$"):
        encode(tokenizer, record, 8, "truncate")  # the answer starts behind the cut


@pytest.mark.parametrize("sequence_length", [8, 9, 10, 16, 64, 1000])
@pytest.mark.parametrize("text", ["a", "the answer is four " * 9, "Größe 東京 🙂 " * 5, "x y z " * 11])
def test_plain_text_is_split_without_loss(tokenizer: Any, text: str, sequence_length: int) -> None:
    pieces = encode(tokenizer, parse_record({"text": text}), sequence_length, "reject")
    ids = [token for piece in pieces for token in piece.ids]
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == text + END
    for piece in pieces:
        assert 2 <= len(piece.ids) <= sequence_length
        assert piece.loss_mask.tolist() == [0] + [1] * (len(piece.ids) - 1)


@given(length=st.integers(1, 40), sequence_length=st.integers(8, 17))
@settings(max_examples=60, deadline=None)
def test_split_text_has_no_single_token_piece(tokenizer: Any, length: int, sequence_length: int) -> None:
    text = "a " * length
    pieces = encode(tokenizer, parse_record({"text": text}), sequence_length, "reject")
    assert [token for piece in pieces for token in piece.ids] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert all(2 <= len(piece.ids) <= sequence_length for piece in pieces)


def test_text_that_ends_with_the_end_token_gets_no_second_one(tokenizer: Any) -> None:
    (piece,) = encode(tokenizer, parse_record({"text": f"the answer{END}"}), 100, "reject")
    assert piece.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_text_without_a_second_token_is_rejected(tokenizer: Any) -> None:
    with pytest.raises(Reject, match=r"^no trained token$"):
        encode(tokenizer, parse_record({"text": END}), 100, "reject")


def test_a_template_prints_the_date_of_the_build(tiny_model_dir: Path, tmp_path: Path) -> None:
    """However often the day changes while it is built, and in a reproduction."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "dated")
    printed = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
    (folder / "chat_template.jinja").write_text(printed)
    messages = [user("2+2?"), assistant("four")]
    texts = [
        load_tokenizer_dir(folder, date).decode(encode_chat(load_tokenizer_dir(folder, date), messages, None).ids)
        for date in ("2026-06-01", "2026-06-01", "2026-06-02")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert "Today is 01 Jun 2026" in texts[0]
