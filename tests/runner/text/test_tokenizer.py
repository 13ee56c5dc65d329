"""Texts and chats to ids, and what a model directory must hold for that."""

from pathlib import Path

import pytest
from chats import chat_of

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest


def test_prompt_gets_its_special_tokens_once(byte_level: Tokenizer) -> None:
    bos = byte_level.encode("")
    assert len(bos) == 1
    assert byte_level.encode("hi") == [*bos, *b"hi"]
    ids = byte_level.encode_chat(chat_of(("system", "no"), ("user", "hi")))
    assert ids == [*bos, *b"hi>"]


def test_chat_without_template_says_so(merges: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        merges.encode_chat(chat_of(("user", "hi")))


def test_template_that_refuses_is_the_callers_error(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ raise_exception('roles must alternate') }}"
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Tokenizer(tmp_path).encode_chat(chat_of(("user", "hi")))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nonsense.path }}",
        "{{ 1 / 0 }}",
        "{% for x in messages %}{% if %}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_fails_within_a_template_stays_there(tmp_path: Path, template: str) -> None:
    made = byte_tokenizer()
    made.chat_template = template
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest) as refused:
        Tokenizer(tmp_path).encode_chat(chat_of(("user", "hi")))
    assert refused.value.field == "chat.messages"
    assert refused.value.message == (
        "chat.messages: the model's chat template cannot write them: "
        "check their roles, their order, and what the template expects of tools, documents and "
        "template_arguments"
    )


def test_template_may_not_make_a_flood(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ messages[0]['content'] * 100 }}"
    made.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="characters"):
        Tokenizer(tmp_path).encode_chat(chat_of(("user", "x" * 1_000_000)))


def test_panic_of_the_library_is_an_ordinary_error(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    class Panics:
        def decode(self, *_: object, **__: object) -> str:
            raise panic("at /src/lib.rs")

    monkeypatch.setattr(byte_level, "_fast", Panics())
    with pytest.raises(RuntimeError):
        byte_level.decode([1])


def test_end_tokens_of_model_and_generation_settings_count(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert Tokenizer(tmp_path).end_ids == {7, 8, 9, 258}


def test_text_of_a_token_alone(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.token_text(65) == "A"
    assert byte_level.token_text(258) == "</s>"
    assert sentencepiece.token_text(sentencepiece.encode("the")[0]) == " the"
