"""How nodes meet: the rounds, and the host that the others find."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_bvpo.cluster.meeting import Meeting, MeetingLost, MeetingRefused, Visitor
from megatron_bvpo.cluster.node_preflight import ROUNDS, Desk
from megatron_bvpo.errors import UserError
from tests.unit.cluster_ports import free_pair
from tests.unit.node_reports import job

# ---- the rounds


def test_a_round_ends_when_all_have_told_or_its_time_is_over():
    clock = [0.0]
    desk = Desk(job(), 100, now=lambda: clock[0])
    assert desk.answer("arrive", 0, "a") == {"open": True, "told": {}}
    assert desk.answer("arrive", 2, "c")["open"]
    clock[0] = 100 * ROUNDS["arrive"] + 1
    assert desk.answer("arrive", 0, "a") == {"open": False, "told": {0: "a", 2: "c"}}
    assert desk.answer("arrive", 1, "too late")["told"] == {0: "a", 2: "c"}, "all nodes must see the same"
    desk.answer("report", 0, "r")
    assert not desk.answer("report", 2, "r")["open"], "those that came are all there is to wait for"


# ---- the meeting


def test_nodes_meet_over_http_and_strangers_are_refused(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    port = free_pair()
    host = job(port=port, run="mine")
    heard = []
    meeting = Meeting(
        host, "preflight", lambda topic, rank, body: heard.append((topic, rank, body)) or {"n": len(heard)}
    )
    try:
        guest = Visitor(job(1, port=port, run="mine"), "preflight")
        assert guest.ask("arrive", {"ä": 1}) == {"n": 1} and heard == [("arrive", 1, {"ä": 1})]
        with pytest.raises(MeetingRefused, match="another job"):
            Visitor(job(1, port=port, run="other"), "preflight").ask("arrive")
        with pytest.raises(MeetingRefused, match="NNODES is 3 on node 0 and 4"):
            Visitor(job(1, 4, port=port, run="mine"), "preflight").ask("arrive")
        with pytest.raises(MeetingRefused, match="at its preflight"):
            Visitor(job(1, port=port, run="mine"), "run").ask("arrive")
        with pytest.raises(UserError, match=f"port {port + 1} .* cannot be opened"):
            Meeting(host, "run", lambda *_: None)
    finally:
        meeting.close()
    with pytest.raises(MeetingLost):
        guest.ask("arrive", timeout=0.5)


def test_a_guest_waits_for_a_host_that_comes_late():
    port = free_pair()
    guest, started = Visitor(job(1, port=port), "run"), []

    def later():
        time.sleep(0.7)
        started.append(Meeting(job(port=port), "run", lambda *_: "here"))

    thread = threading.Thread(target=later)
    thread.start()
    assert guest.ask_until("beat", None, time.monotonic() + 60) == "here"
    thread.join()
    started[0].close()
