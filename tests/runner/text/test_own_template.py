"""Chat templates that adapters bring, against transformers; and hostile ones."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from chats import CASES, CHATML, TEMPLATES, USER, wire

from granatum.adapters_store.chat import ChatSettings
from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    directory = tmp_path_factory.mktemp("base")
    made = byte_tokenizer()
    made.chat_template = CHATML
    made.save_pretrained(directory)
    tokenizer = Tokenizer(directory)
    yield tokenizer
    tokenizer.chat.close()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] != "chatml"])
def test_ids_are_those_of_the_adapters_folder(base: Tokenizer, name: str) -> None:
    template, messages, options = CASES[name]
    theirs = byte_tokenizer()  # as the folder's tokenizer files say
    theirs.chat_template, theirs.eos_token = TEMPLATES[template], "<pad>"
    begins = {"add_generation_prompt": not options.get("continue_final_message")}
    expected = theirs.apply_chat_template(messages, **(begins | options))["input_ids"]
    own = ChatSettings(TEMPLATES[template], ("<pad>",))
    assert base.encode_chat(wire(messages, options), own=own) == expected


def test_a_folder_without_a_template_uses_the_models(base: Tokenizer) -> None:
    assert base.encode_chat(wire([USER], {}), own=ChatSettings("", ("<pad>",))) == base.encode_chat(
        wire([USER], {})
    )
    assert not base.chat.is_foreign(ChatSettings(CHATML))
    assert base.ends_of(ChatSettings("", ("<pad>", "a"))) == {256, ord("a")}


HOSTILE: dict[str, tuple[str, str]] = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "SIGPROF",
    ),
    "a constant without end": ("{{ 7 ** 999999999 }}", "SIGPROF"),
    "memory": ("{{ ('x' * 1000000000) | length }}", "MemoryError"),
    "a flood": ("{{ 'x' * 9000000 }}", "Flood"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.environ }}", "SecurityError"),
    "no such filter": ("{{ 1 | nosuch }}", "TemplateAssertionError"),
}


TOLD = {
    "SIGPROF": "takes longer than it may",
    "MemoryError": "takes more memory than it may",
    "Flood": "makes more than 8,388,608 characters of them",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_template_does_stays_with_its_chat(base: Tokenizer, name: str) -> None:
    template, kind = HOSTILE[name]
    with structlog.testing.capture_logs() as logged, pytest.raises(InvalidRequest) as refused:
        base.encode_chat(wire([USER], {}), own=ChatSettings(template))
    assert refused.value.field == "chat.messages"
    assert f"the adapter's chat template {TOLD.get(kind, 'cannot write them')}" in str(
        refused.value
    )
    assert [event["error"] for event in logged] == [kind]
    fine = base.encode_chat(wire([USER], {}), own=ChatSettings("{{ messages[0].content }}"))
    assert bytes(fine) == USER["content"].encode()


def test_what_the_template_itself_says_is_told(base: Tokenizer) -> None:
    own = ChatSettings("{{ raise_exception('speak, friend') }}")
    with pytest.raises(
        InvalidRequest, match="the adapter's chat template refuses them: speak, friend"
    ):
        base.encode_chat(wire([USER], {}), own=own)


# Each of them imports or reads something at its first use, which the renderer may not do.
LATE = {
    "the time": "{{ strftime_now('%Y-%m-%d %H:%M %A') }}",
    "text of a page": "{{ '<b>fish</b> &lt; chips' | striptags }}",
    "filler": "{{ lipsum(1) | length > 9 }}",
    "wrapped": "{{ 'one two three' | wordwrap(4) }}",
    "a named character": "{{ '\\N{DIGIT ONE}' }}",
    "a link": "{{ 'www.example.org' | urlize }}",
}


@pytest.mark.parametrize("name", LATE)
def test_an_adapters_template_has_the_runners_time_and_all_filters(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TZ", "XYZ-11:30")
    time.tzset()
    theirs = byte_tokenizer()
    theirs.save_pretrained(tmp_path)
    theirs.chat_template = LATE[name]
    ours = Tokenizer(tmp_path)
    try:
        around = [theirs.apply_chat_template([USER])["input_ids"]]
        found = ours.encode_chat(wire([USER], {}), own=ChatSettings(LATE[name]))
        around.append(theirs.apply_chat_template([USER])["input_ids"])  # a minute may have passed
    finally:
        ours.chat.close()
        monkeypatch.undo()
        time.tzset()
    assert found in around


def test_a_template_sees_no_key(base: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    base.chat.close()
    monkeypatch.setenv("GRANATUM_CLUSTER_KEY", "secret")
    base.encode_chat(wire([USER], {}), own=ChatSettings("x"))
    server = base.chat._foreign._server
    assert server is not None
    environment = Path(f"/proc/{server.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment


def test_a_server_that_was_killed_is_started_again(base: Tokenizer) -> None:
    base.encode_chat(wire([USER], {}), own=ChatSettings("x"))
    server = base.chat._foreign._server
    assert server is not None
    server.kill()
    server.wait()
    assert base.encode_chat(wire([USER], {}), own=ChatSettings("xy")) == [*b"xy"]


def test_half_a_character_is_refused(base: Tokenizer) -> None:
    own = ChatSettings(json.loads("\"{{ '\\\\ud83d' }}\""))
    with pytest.raises(InvalidRequest, match="half characters"):
        base.encode_chat(wire([USER], {}), own=own)
