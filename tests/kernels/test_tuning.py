"""Choosing configurations, with a clock in place of a GPU."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import triton

from dynabert_fast.kernels import tuning
from dynabert_fast.kernels.common import Config
from dynabert_fast.ops import choices

CONFIGS = tuple(Config.of(BLOCK=size) for size in (16, 32, 64))
KEY = ("bf16", 128, False)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """`clock.times`: milliseconds by block; what is missing cannot run. `clock.measured` counts."""

    class Clock:
        times = {16: 3.0, 32: 1.0, 64: 2.0}
        measured = 0

        def do_bench(self, run, **_):
            self.measured += 1
            run()
            return self.times[self.launched["BLOCK"]]

        def launch(self, config):
            self.launched = config
            if config["BLOCK"] not in self.times:
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")

        def fresh(self):
            """As a new process."""
            choices.read.cache_clear()
            monkeypatch.setattr(tuning, "_answers", {})

    found = Clock()
    found.fresh()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card (1)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", found.do_bench)
    monkeypatch.setenv(choices.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(choices.TUNE_VARIABLE, raising=False)
    yield found
    choices.read.cache_clear()


def choose(clock, key=KEY, configs=CONFIGS):
    return tuning.choose("product", key, configs, clock.launch)["BLOCK"]


def test_the_fastest_is_measured_once_and_kept(clock, tmp_path):
    assert [choose(clock) for _ in range(3)] == [32] * 3
    assert clock.measured == 3
    (file,) = (tmp_path / "triton").glob("*.json")
    assert file.name == f"Card-1--triton-{triton.__version__}.json"
    assert json.loads(file.read_text()) == {f"product {KEY}": str(CONFIGS[1])}
    clock.fresh()
    assert choose(clock) == 32
    assert clock.measured == 3


def test_what_is_measured_may_have_a_choice_of_its_own(clock, tmp_path):
    """A product in parts adds them up by another kernel."""
    found = []

    def launch(config):
        found.append(choose(clock, ("parts",)))
        clock.launch(config)

    def outer():
        found.append(tuning.choose("sums", KEY, CONFIGS, launch)["BLOCK"])

    thread = threading.Thread(target=outer, daemon=True)  # daemon: it once waited for itself
    thread.start()
    thread.join(20)
    assert found == [32] * 4
    (file,) = (tmp_path / "triton").glob("*.json")
    assert len(json.loads(file.read_text())) == 2


def test_what_another_process_chose_meanwhile_holds_for_both(clock, tmp_path):
    """They sum in one order, and each keeps what the other found."""
    path = tuning.cache_file(torch.device("cuda", 0))
    name = f"product {KEY}"
    assert choose(clock, ("first",)) == 32
    others = {name: str(CONFIGS[0]), "product other": "x"}

    def launch(config):
        path.write_text(json.dumps(json.loads(path.read_text()) | others))
        clock.launch(config)

    assert tuning.choose("product", KEY, CONFIGS, launch)["BLOCK"] == 16
    assert choose(clock, ("second",)) == 32
    kept = {f"product {key}": str(CONFIGS[1]) for key in (("first",), ("second",))}
    assert json.loads(path.read_text()) == others | kept


def test_another_key_is_another_choice(clock):
    assert choose(clock) == 32
    clock.times = {16: 1.0, 32: 2.0, 64: 3.0}
    assert choose(clock, ("bf16", 256, False)) == 16
    assert choose(clock) == 32


def test_a_choice_that_is_shipped_no_more_is_made_again(clock):
    assert choose(clock) == 32
    assert choose(clock, configs=(CONFIGS[0], CONFIGS[2])) == 64


def test_what_does_not_fit_the_card_is_left_out(clock):
    clock.times = {16: 3.0, 64: 2.0}
    assert choose(clock) == 64
    clock.times = {}
    assert choose(clock, ("fp32",)) == 16


def test_what_does_not_compile_is_left_out_and_said(clock, caplog, tmp_path):
    def launch(config):
        if config["BLOCK"] == 32:
            raise triton.runtime.errors.PTXASError("ptxas: no such instruction")
        clock.launch(config)

    assert tuning.choose("product", KEY, CONFIGS, launch)["BLOCK"] == 64
    (said,) = caplog.messages
    assert said.startswith(f"{CONFIGS[1]} does not compile: ")
    assert "no such instruction" in said
    assert not list(tmp_path.rglob("*.json")), "it may compile the next time"

    def broken(config):
        raise triton.runtime.errors.PTXASError("out of memory")

    with pytest.raises(triton.runtime.errors.PTXASError, match="out of memory"):
        tuning.choose("product", ("other",), CONFIGS, broken)


@pytest.mark.parametrize("how", ["asked not to", "in a capture"])
def test_where_nothing_may_be_measured_the_first_serves(clock, monkeypatch, how):
    if how == "in a capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setenv(choices.TUNE_VARIABLE, "0")
    assert choose(clock) == 16
    assert clock.measured == 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"product": "no such"}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(clock, text):
    path = tuning.cache_file(torch.device("cuda", 0))
    path.parent.mkdir()
    path.write_text(text)
    assert choose(clock) == 32
