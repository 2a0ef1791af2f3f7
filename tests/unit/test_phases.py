"""Timeouts of process groups, the parts of a run in its log, and the warning of a stop that would not end in time."""

from __future__ import annotations

import logging
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_bvpo.rehearsal import install

install(device=False, transformer_engine=True)
import swift.megatron.pipelines.train.rlhf  # noqa: E402, F401  before the other modules of swift.megatron
from mcore_bridge.bridge import gpt_bridge  # noqa: E402

from megatron_bvpo.host import timeouts  # noqa: E402
from megatron_bvpo.host.patches import apply_patches  # noqa: E402
from megatron_bvpo.host.phases import StepTimes, stop_warning, timed  # noqa: E402

RUN = timedelta(seconds=9000)


@pytest.fixture
def job(tmp_path):
    """A job of one rank whose collectives may take RUN."""
    apply_patches()
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1, timeout=RUN)
    yield
    dist.destroy_process_group()


def test_the_bridge_s_group_has_the_run_s_timeout(job):
    """As mcore-bridge makes it: without one. torch would give it NCCL's 10 minutes, gloo's 30."""
    assert timeouts.current(dist.new_group([0])) < RUN
    group = gpt_bridge.mpu.create_group([0], group_desc="EP-PP-GROUP")
    assert timeouts.current(group) == RUN
    own = gpt_bridge.mpu.create_group([0], timedelta(seconds=70))
    assert timeouts.current(own) == timedelta(seconds=70), "who names a timeout gets it"


def test_hours_until_the_first_step_and_ddp_timeout_after_it(job):
    args = SimpleNamespace(ddp_timeout=1800)
    with timeouts.patient_until_the_first_step(args):
        assert args.ddp_timeout == timeouts.START_S >= 4 * 3600
    assert args.ddp_timeout == 1800
    longer = SimpleNamespace(ddp_timeout=10 * timeouts.START_S)
    with timeouts.patient_until_the_first_step(longer):
        assert longer.ddp_timeout == 10 * timeouts.START_S

    groups = [dist.GroupMember.WORLD, gpt_bridge.mpu.create_group([0]), dist.new_group([0])]
    times = StepTimes(SimpleNamespace(args=args, state=None))
    times.on_step_begin()
    assert timeouts.current(groups[1]) == RUN, "not yet"
    times.on_step_end()
    assert [timeouts.current(group) for group in groups] == [timedelta(seconds=1800)] * 3
    assert times.longest == 0, "the first step compiles and connects"
    times.on_step_begin()
    times.on_step_end()
    assert times.longest > 0


def test_a_stop_that_would_not_end_in_time():
    assert stop_warning(100, 250, {}) is None
    told = stop_warning(100, 270, {})
    assert told and "370 s" in told and "60%" in told and "600 s" in told and "--signal" in told
    assert stop_warning(100, 270, {"BVPO_STOP_WINDOW_S": "900"}) is None
    assert stop_warning(10, 10, {"BVPO_STOP_WINDOW_S": "30"})


def test_each_part_has_its_line(caplog):
    class Bridge:
        def save_weights(self, folder):
            return f"saved {folder}"

    bridge = Bridge()
    with caplog.at_level(logging.INFO, logger="swift"):
        with timed("save: all", bridge, "save_weights"):
            assert bridge.save_weights("x") == "saved x"
        with pytest.raises(ValueError, match="no"), timed("save: other", bridge, "save_weights"):
            raise ValueError("no")
    lines = [message.rpartition(":")[0] for message in caplog.messages]
    assert lines == ["time: save: save_weights", "time: save: all"]
    assert vars(bridge) == {}, "left as it was"
