from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dynabert_fast
from dynabert_fast.errors import InputError
from dynabert_fast.evaluation import Latency, environment, latency, measure_latency
from dynabert_fast.evaluation.latency import inference
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.subnet import Subnet, grid

CONFIG = DynaBertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=24,
)


class Recorder(nn.Module):
    """Stands in for a model and writes down its calls."""

    def __init__(self, pad_token_id: int | None = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=5, pad_token_id=pad_token_id, max_tokens=512)
        self.device = torch.device("cpu")
        self.inner = nn.Dropout()
        self.calls: list[tuple[Subnet, torch.Tensor]] = []
        self.modes: set[tuple[bool, bool, bool]] = set()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, subnet: Subnet
    ) -> None:
        assert attention_mask.shape == input_ids.shape
        assert attention_mask.all()
        self.calls.append((subnet, input_ids))
        self.modes.add((self.training, self.inner.training, torch.is_inference_mode_enabled()))


@pytest.fixture
def subnets() -> tuple[Subnet, ...]:
    return grid(CONFIG)


def test_every_round_runs_each_subnet_once_in_a_new_order(subnets: tuple[Subnet, ...]) -> None:
    model = Recorder()
    measured = measure_latency(model, subnets, warmup=2, rounds=4)
    assert list(measured) == list(subnets)
    order = [subnet for subnet, _ in model.calls]
    rounds = [tuple(order[i : i + 12]) for i in range(0, len(order), 12)]
    assert len(rounds) == 6
    assert all(set(turn) == set(subnets) for turn in rounds)
    assert len(set(rounds)) > 1


def test_median_and_percentiles_are_milliseconds_without_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One sub-network: each pass reads the clock twice. The 11 counted passes take 0.0 to 1.0 s, the
    # one before them an hour.
    elapsed = [3600.0, *(i / 10 for i in range(11))]

    def clock() -> Iterator[float]:
        for seconds in elapsed:
            yield 0.0
            yield seconds

    ticks = clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    subnet = Subnet.full(CONFIG)
    measured = measure_latency(Recorder(), [subnet], warmup=1, rounds=11)[subnet]
    assert measured == Latency(pytest.approx(500), pytest.approx(100), pytest.approx(900))


def test_repeated_subnets_are_measured_once(subnets: tuple[Subnet, ...]) -> None:
    model = Recorder()
    measured = measure_latency(model, [subnets[0], subnets[1], subnets[0]], warmup=0, rounds=3)
    assert list(measured) == [subnets[0], subnets[1]]
    assert len(model.calls) == 6


@pytest.mark.parametrize("pad", [0, 2, 4, None], ids=lambda pad: f"pad-{pad}")
def test_tokens_are_real_and_repeatable(pad: int | None) -> None:
    runs = []
    for seed in (1, 1, 2):
        model = Recorder(pad_token_id=pad)
        measure_latency(model, [Subnet.full(CONFIG)], 3, 64, warmup=0, rounds=1, seed=seed)
        runs.append(model.calls[0][1])
    assert runs[0].shape == (3, 64)
    assert runs[0].dtype == torch.int64
    assert set(runs[0].unique().tolist()) == {0, 1, 2, 3, 4} - {4 if pad is None else pad}
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_runs_in_inference_and_gives_every_module_its_mode_back() -> None:
    model = Recorder()
    model.train()
    model.inner.eval()
    measure_latency(model, [Subnet.full(CONFIG)], warmup=0, rounds=1)
    assert model.modes == {(False, False, True)}
    assert model.training
    assert not model.inner.training


def test_modes_come_back_after_an_error() -> None:
    model = Recorder().train()
    with pytest.raises(RuntimeError, match="stop"), inference(model):
        raise RuntimeError("stop")
    assert model.training
    assert model.inner.training


def test_waits_for_a_gpu_before_each_reading_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    ticks = count()

    def read_clock() -> int:
        events.append("clock")
        return next(ticks)

    model = Recorder()
    model.register_forward_hook(lambda *_: events.append("run"))
    # Tokens stay on the CPU: only the waiting is looked at.
    monkeypatch.setattr(latency, "_random_tokens", lambda *_: torch.ones(1, 4, dtype=torch.int64))
    model.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=read_clock))
    measure_latency(model, [Subnet.full(CONFIG)], warmup=0, rounds=1)
    assert events == ["wait", "clock", "run", "wait", "clock"]


BAD = [
    pytest.param({"batch_size": 0}, "batch_size must be at least 1, got 0", id="batch_size"),
    pytest.param({"length": 0}, "length must be at least 1, got 0", id="length"),
    pytest.param({"length": 25}, "length must be at most 24.*got 25", id="too-long"),
    pytest.param({"warmup": -1}, "warmup must be at least 0, got -1", id="warmup"),
    pytest.param({"rounds": 0}, "rounds must be at least 1, got 0", id="rounds"),
    pytest.param({"subnets": []}, "number of sub-networks must be at least 1", id="subnets"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    model = DynaBertForSequenceClassification(CONFIG)
    given = {"subnets": [Subnet.full(CONFIG)], "length": 8, **arguments}
    with pytest.raises(InputError, match=message):
        measure_latency(model, **given)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_real_model(device: str, subnets: tuple[Subnet, ...]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = DynaBertForSequenceClassification(CONFIG).to(device).train()
    measured = measure_latency(model, subnets, batch_size=2, length=8, warmup=1, rounds=3)
    assert set(measured) == set(subnets)
    for value in measured.values():
        assert 0 < value.p10_ms <= value.median_ms <= value.p90_ms
    assert model.training


def test_environment_names_machine_and_versions() -> None:
    found = environment(DynaBertForSequenceClassification(CONFIG).to(torch.bfloat16))
    assert found["dtype"] == "bfloat16"
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert found["device"] == found["cpu"]
    assert found["cpu"]
    for name in ("python", "transformers"):
        assert re.match(r"\d+\.\d+", found[name])
    assert found["dynabert_fast"] == dynabert_fast.__version__
