"""The command line, as a user runs it: real processes against a server on a real port."""

import json
import sys
from pathlib import Path

import pytest
from command_line import granatum
from doubles import KEY, Service
from typer.testing import CliRunner

from granatum.cli.__main__ import main
from granatum.cli.main import app
from granatum.v1.errors import PreconditionFailed


async def test_generate_streams_the_text(service: Service) -> None:
    status, output, errors = await granatum(
        "generate",
        "--address",
        service.address,
        "--key",
        KEY,
        "--adapter",
        "style",
        "abc",
        "--stats",
    )
    assert (status, output) == (0, "abc\n")
    assert "3 + 3 tokens" in errors
    assert service.requests[0].adapter == "style"


async def test_a_chat_has_what_its_template_takes(service: Service, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "weather"}]')
    where = ("--address", service.address, "--key", KEY)
    given = ("--template-arguments", '{"enable_thinking": false}', "--prefill", "Sure")
    tools = ("--tools", str(tmp_path / "tools.json"))
    status, _, errors = await granatum("generate", *where, "--chat", *given, *tools, "hi")
    assert (status, errors) == (0, "")
    (request,) = service.requests
    said = [(message.role, message.content) for message in request.chat.messages]
    assert said == [("user", "hi"), ("assistant", "Sure")]
    assert request.chat.continue_final_message
    assert json.loads(request.chat.template_arguments) == {"enable_thinking": False}
    assert json.loads(request.chat.tools) == [{"name": "weather"}]
    status, _, errors = await granatum("generate", *where, "--prefill", "Sure", "hi")
    assert status == 2
    assert "--chat" in errors


async def test_address_and_key_come_from_the_environment(service: Service) -> None:
    env = {"GRANATUM_ADDRESS": service.address, "GRANATUM_KEY": KEY}
    status, output, _ = await granatum("adapters", "list", **env)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()[1:]] == ["a0", "a1", "a2"]
    status, output, _ = await granatum("runners", **env, COLUMNS="20")
    assert status == 0
    assert "runner-0" in output
    assert "runner-0 cannot load adapters: ADAPTER_DISK_FULL: [full]" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("generate", "--key", KEY, "busy"), "the queue is full: try again (retry in 2 s)"),
        (("generate", "x"), "with --key or GRANATUM_KEY"),
        (("generate", "--key", "another", "x"), "no such key"),
        (
            ("generate", "--key", KEY, "--max-tokens", "-1", "x"),
            "stop.max_tokens: give a whole number",
        ),
        (
            ("generate", "--key", KEY, "--seed", str(2**64), "x"),
            "sampling.seed: give a whole number",
        ),
        (("generate", "--key", KEY, "--stop", b"\xff", "x"), "stop.strings[0]: character 0 is not"),
        (
            ("generate", "--key", KEY, "--chat", "--system", b"\xff", "x"),
            "chat.messages[0].content: ",
        ),
        (("generate", "--key", KEY, b"\xff"), "prompt: character 0 is not Unicode"),
        (("adapters", "show", "--key", KEY, b"\xff"), "adapter: character 0 is not Unicode"),
        (("generate", "--key", KEY, "--tools", "/nowhere", "--chat", "x"), "cannot read /nowhere"),
        (
            ("generate", "--key", KEY, "--template-arguments", "{x}", "--chat", "x"),
            "--template-arguments: no JSON",
        ),
        (("generate", "--key", KEY, "--timeout", "1e-6", "x"), "--timeout: give it longer"),
        (("generate", "--key", KEY, "--timeout", "0", "x"), "timeout: give seconds, above 0"),
        (("generate", "--address", "127.0.0.1", "x"), "'127.0.0.1' is no host:port"),
        (("adapters", "show", "--key", KEY, "nobody"), "no adapter nobody"),
        (("adapters", "upload", "--key", KEY, "x", "/nowhere"), "save_pretrained"),
        (("generate", "--address", "127.0.0.1:1", "x"), "nothing answers on 127.0.0.1:1: start it"),
        (("generate", "--address", "192.0.2.1:7", "x"), "--insecure"),
    ],
)
async def test_an_error_is_one_clear_line(
    service: Service, arguments: tuple[str | bytes, ...], complaint: str
) -> None:
    env = {"GRANATUM_ADDRESS": service.address, "GRANATUM_KEY": ""}
    status, _, errors = await granatum(*arguments, **env)
    assert status == 1
    (line,) = errors.splitlines()
    assert line.startswith("granatum: ")
    assert complaint in line


async def test_health_is_an_exit_status(service: Service) -> None:
    assert (await granatum("health", service.address))[:2] == (0, "serving\n")
    service.health.set([""], serving=False)
    assert (await granatum("health", service.address))[:2] == (1, "not serving\n")
    assert (await granatum("health", "127.0.0.1:1"))[0] == 1


async def test_up_says_what_a_model_is(tmp_path: Path) -> None:
    status, _, errors = await granatum("up", "--model", str(tmp_path), "--state", str(tmp_path))
    assert status == 1
    assert "no config.json" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--listen", "0.0.0.0:0"), "beyond this machine: give --tls-cert and --tls-key"),
        (("--listen", "nowhere"), "no host:port"),
        (("--tls-cert", "cert.pem"), "give both or none"),
        (("--tls-ca", "ca.pem"), "give --tls-cert, too"),
    ],
)
async def test_up_says_what_it_cannot_listen_on(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    where = ("--model", str(tmp_path), "--state", str(tmp_path / "state"))
    status, output, errors = await granatum("up", *where, *arguments)
    assert (status, output) == (1, "")
    (line,) = errors.splitlines()
    assert said in line
    assert not (tmp_path / "state" / "keys.json").exists()


def test_without_its_libraries_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "granatum.cli.main", raising=False)
    with pytest.raises(SystemExit, match=r"typer is missing: pip install 'granatum\[cli\]'"):
        main()


@pytest.mark.parametrize(("service", "library"), [("router", "redis"), ("runner", "torch")])
def test_a_service_that_is_not_installed_is_one_clear_line(
    service: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granatum.cli.main.find_spec", lambda name: None if name == library else 1)
    ran = CliRunner().invoke(app, [service])
    assert isinstance(ran.exception, PreconditionFailed)
    assert f"pip install 'granatum[{service}]'" in ran.exception.message


async def test_services_get_their_arguments_as_they_are() -> None:
    status, output, _ = await granatum("router", "--help")
    assert status == 0
    assert "usage: granatum router" in output
    status, _, errors = await granatum("router", "--max-queue", "-1")
    assert status == 2
    assert "--max-queue" in errors
