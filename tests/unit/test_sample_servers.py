"""Servers that are late, wrong, busy, dead and back again, and what becomes of the requests."""

import asyncio
import time

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking.modes import CHAT
from megatron_bvpo.sampling.asking.server_replies import retry_after
from megatron_bvpo.sampling.asking.server_state import Server
from megatron_bvpo.sampling.asking.servers import NoServer, Refused, ServerPool
from tests.unit.openai_server import Served, ServerProcess, free_port


def body(text, seed=1):
    return {"model": "m", "messages": [{"role": "user", "content": str(text)}], "seed": seed}


def ask(servers, texts=("Hi",), said=None, **given):
    """The replies to some prompts, at once; what was raised in place of a reply."""
    given = {"timeout": 20, "patience": 20, "probe_every": 0.2, "say": ([] if said is None else said).append} | given

    async def go():
        async with ServerPool([server.address for server in servers], "m", **given) as pool:
            asks = [pool.ask(CHAT, body(text)) for text in texts]
            return await asyncio.gather(*asks, return_exceptions=True)

    return asyncio.run(go())


def contents(replies):
    return [reply.choice["message"]["content"] for reply in replies]


TEXTS = [f"What is {i}?" for i in range(40)]


@pytest.fixture(scope="module")
def undisturbed():
    with Served() as server:
        return contents(ask([server], TEXTS))


@pytest.mark.parametrize("fault", ["429", "429_after", "500", "503", "drop", "json", "empty"])
def test_a_fault_costs_time_and_no_answer(fault, undisturbed):
    with Served(faults={fault: 0.3}) as server:
        assert contents(ask([server], TEXTS)) == undisturbed
        assert len(server.requests) > len(TEXTS)  # there were faults


def test_a_request_that_stalls_is_made_again(undisturbed):
    with Served(faults={"stall": 0.05}) as server:
        assert contents(ask([server], TEXTS, timeout=1)) == undisturbed


@pytest.mark.parametrize("fault", ["500", "drop", "json", "empty"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_request_that_always_fails_fails_for_good(fault, alone):
    """Alone, a request for one token tells that it is not the server."""
    with Served(always={"poison": fault}) as server:
        texts = ["poison"] if alone else ["poison", *TEXTS]
        said = []
        first, *others = ask([server], texts, said, tries=3)
        assert isinstance(first, Refused) and "failed 3 times" in str(first)
        assert not any(isinstance(other, Exception) for other in others)
        assert not said


def test_a_server_that_fails_all_requests_is_no_reason_to_give_one_up():
    with Served(always={"": "500"}) as server:
        said = []
        (reply,) = ask([server], said=said, tries=2, patience=1.5)
        assert isinstance(reply, NoServer) and "500: a fault" in str(reply)
        assert "does not answer a request for one token" in said[0]


def test_what_is_refused_is_asked_once():
    with Served(always={"long": "400"}) as server:
        (reply,) = ask([server], ["long"])
        assert isinstance(reply, Refused) and str(reply) == "400: a fault: 400"
        assert len(server.requests) == 1


def test_load_is_even():
    with Served(delay=0.05) as one, Served(delay=0.05) as two, Served(delay=0.05) as three:
        ask([one, two, three], [f"{i}" for i in range(90)])
        assert {len(server.requests) for server in (one, two, three)} == {30}


def test_retry_after_is_kept():
    with Served(faults={"429_after": 1.0}) as server:
        start = time.monotonic()
        ask([server])
        assert time.monotonic() - start >= 0.2
    assert retry_after("3") == 3 and retry_after(None) is retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_server_dies_and_comes_back(undisturbed):
    """Its requests go to the other; it is named once, and used again."""
    said = []

    async def go():
        with ServerProcess(delay=0.1) as dying, Served(delay=0.1) as other:
            addresses = [dying.address, other.address]
            async with ServerPool(addresses, "m", patience=60, probe_every=0.2, say=said.append) as pool:
                asks = [asyncio.ensure_future(pool.ask(CHAT, body(text))) for text in TEXTS]
                await asyncio.sleep(0.05)
                dying.kill()
                assert contents(await asyncio.gather(*asks)) == undisturbed
                dying.start(wait=False)
                while not any("is back" in line for line in said):
                    await asyncio.sleep(0.05)
                replies = await asyncio.gather(*(pool.ask(CHAT, body(text)) for text in TEXTS[:10]))
                assert {reply.server for reply in replies} == {dying.address, other.address}
            return dying.address

    address = asyncio.run(asyncio.wait_for(go(), 60))
    assert [line.split(":")[0] for line in said if "down" in line] == ["server http"]
    assert f"server {address} is down: " in said[0] and "go to the other 1" in said[0]
    assert said[1:] == [f"server {address} is back"]


def test_a_server_that_has_gone_silent_loses_its_requests():
    """A machine without power sends no word: neither an answer nor the end of a connection."""
    said = []
    with Served() as good, Served() as silent:

        async def go():
            async with ServerPool([silent.address, good.address], "m", probe_every=0.2, say=said.append) as pool:
                silent.behaviour.options["silent"] = True
                return await asyncio.gather(*(pool.ask(CHAT, body(text)) for text in TEXTS))

        replies = asyncio.run(asyncio.wait_for(go(), 60))
    assert {reply.server for reply in replies} == {good.address}
    assert f"server {silent.address} is down: does not answer" in said[0]


def test_a_server_of_another_model_is_not_waited_for():
    """No request has succeeded, and no waiting would mend the name."""
    with Served(models=False, model="other") as server:
        (reply,) = ask([server])
    assert isinstance(reply, NoServer) and "404: no model m" in str(reply)
    assert "mend --model" in str(reply) and "start the servers" not in str(reply)


def test_no_server_is_waited_for_and_then_told():
    said = []
    address = f"http://127.0.0.1:{free_port()}"

    async def go():
        async with ServerPool([address], "m", patience=1.5, probe_every=0.2, say=said.append) as pool:
            await pool.ask(CHAT, body("Hi"))

    with pytest.raises(NoServer, match="no server has answered for .* goes on where it was"):
        asyncio.run(go())
    assert [line for line in said if "waiting for up to 1.5 s" in line] == [said[-1]]


def test_a_server_that_comes_late_is_waited_for(undisturbed):
    with ServerProcess() as server:
        server.kill()

        async def go():
            async with ServerPool([server.address], "m", probe_every=0.2, say=lambda line: None) as pool:
                asks = [asyncio.ensure_future(pool.ask(CHAT, body(text))) for text in TEXTS]
                await asyncio.sleep(0.5)
                server.start(wait=False)
                return await asyncio.gather(*asks)

        assert contents(asyncio.run(asyncio.wait_for(go(), 60))) == undisturbed


@pytest.mark.parametrize(
    ("options", "key", "complaint"),
    [
        ({"model": "other"}, None, "serves other, not 'm'"),
        ({"model": "other", "models": False}, None, "404: no model m"),
        ({"key": "secret"}, "wrong", "401: who are you?"),
    ],
)
def test_wrong_settings_are_told_at_once(options, key, complaint):
    with Served(**options) as server:
        with pytest.raises(UserError, match=complaint) as told:
            for reply in ask([server], key=key):
                raise reply
        assert "wrong" not in str(told.value)


def test_the_right_key_and_a_server_without_a_list_of_models():
    with Served(key="secret") as server, Served(models=False) as other:
        assert contents(ask([server, other], key="secret"))


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("http://node:8000", "http://node:8000"),
        ("http://node:8000/v1/", "http://node:8000"),
        ("node:8000", "http://node:8000"),
        ("http://node:8000/v1/chat/completions", "http://node:8000"),
        ("http://node:8000/v1/models/", "http://node:8000"),
        ("https://host.org/gate/v1", "https://host.org/gate"),
    ],
)
def test_addresses(address, base):
    assert Server.at(address).base == base


@pytest.mark.parametrize(
    "address", ["", "http://", "ftp://node", "http://node:99999", "http://a:b@node:1", "http://a?b"]
)
def test_no_addresses(address):
    with pytest.raises(UserError, match="--server"):
        Server.at(address)


def test_proxies_are_for_far_servers(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://proxy:1")
    monkeypatch.setenv("no_proxy", "near.org")
    near = ("localhost", "127.0.0.1", "[::1]", "node17", "10.0.0.3", "near.org")
    assert {Server.at(f"http://{host}:1").proxy for host in near} == {None}
    assert Server.at("http://far.org:1").proxy == "http://proxy:1"
    with Served() as server:
        assert contents(ask([server]))
