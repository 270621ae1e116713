"""The engine against float64, by the rule of the whole project: at most twice the error of plain
torch in the same type, and a few units in the last place.

An error here is the root mean square over all sub-networks and tokens. The largest of so many
numbers, each the end of a chain of roundings, is luck; a wrong result in one place outweighs them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dynabert_fast.cli.quickstart import pretrained_folder
from dynabert_fast.engine import DTYPES, Tokenizer
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig, DynaBertModel
from dynabert_fast.subnet import Subnet, grid

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = range(1, 71)
EMBEDDINGS = "hidden_states[0]"


def all_subnets(case):
    """Every sub-network on one batch."""
    return [(subnet, case.batch()) for subnet in case.subnets().values()]


def all_lengths(case):
    """Sequences of every length, long and short ones side by side, in batches of 1, 2, 3, ..."""
    lengths = sorted(LENGTHS, key=lambda n: n * 29 % 71)
    jobs = []
    while lengths:
        count = len(jobs) + 1
        part, lengths = lengths[:count], lengths[count:]
        jobs.append((Subnet.full(case.config), case.batch(part, seed=count)))
    return jobs


def all_paddings(case):
    """Padding anywhere, its id there or not, with and without ids of positions and types."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, case.config.vocab_size, (3, 6), generator=generator)
    ids[0, 1] = ids[2, 3] = ids[0, 4] = case.config.pad_token_id
    masks = {
        "none": None,
        "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]],
        "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1]],
    }
    sizes = {
        "token_type_ids": case.config.type_vocab_size,
        "position_ids": case.config.max_position_embeddings,
    }
    extras = {
        name: torch.randint(0, count, ids.shape, generator=generator)
        for name, count in sizes.items()
    }
    jobs = []
    for mask in masks.values():
        given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
        for names in ((), ("token_type_ids",), ("position_ids",), tuple(extras)):
            batch = {"input_ids": ids} | given | {name: extras[name] for name in names}
            jobs.append((case.subnets()["heterogeneous"], batch))
    return jobs


def gather(run, jobs):
    """Outputs of many (sub-network, batch) pairs, by name: of real tokens or sequences, `[n]`."""
    found = defaultdict(list)
    for subnet, batch in jobs:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for name, values in run(subnet, batch).items():
            assert values.isfinite().all(), (name, subnet)
            if values.dim() == 3:
                assert not values[~real].any(), (name, subnet)
                values = values[real]
            found[name].append(values.double().flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def size(x):
    return x.square().mean().sqrt().item()


def assert_judged(got, plain, truth, dtype):
    """`dtype` is the type whose units in the last place count."""
    assert got.keys() == plain.keys() == truth.keys()
    for name, want in truth.items():
        assert got[name].shape == want.shape
        error, allowed = size(got[name] - want), size(plain[name] - want)
        slack = 2 * torch.finfo(dtype).eps * size(want)
        assert error <= 2 * allowed + slack, f"{name}: error {error:.2e}, torch's {allowed:.2e}"


@dataclass
class Judge:
    """What plain torch makes of a case's jobs: in float64, and in the engine's type."""

    jobs: Any
    dtype: str
    truth: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor] | None  # int8: its arithmetic in float64

    def check(self, run):
        got = gather(run, self.jobs)
        assert_judged(got, self.plain, self.truth, TYPES.get(self.dtype, torch.float32))
        if self.exact is None:
            return
        # Nothing is rounded to int8 or bf16 before the first layer.
        first = ({EMBEDDINGS: x[EMBEDDINGS]} for x in (got, self.plain, self.exact))
        assert_judged(*first, torch.float32)
        # From there on, one rounding that falls the other way changes all that follows, in plain
        # torch too. Two equally good quantisations differ by sqrt(2) of their errors; this one is
        # the same.
        for name, want in self.exact.items():
            allowed = 2 * size(self.plain[name] - want), size(want - self.truth[name])
            assert size(got[name] - want) <= max(allowed), name


@pytest.fixture(scope="module")
def judge(run_model, simulate_int8):
    """`judge(case, jobs_of, dtype)`: a `Judge`; nothing is computed twice."""
    known = {}

    def run(function, dtype, case, jobs_of):
        key = function, dtype, id(case.model), jobs_of
        if key not in known:
            known[key] = gather(lambda *job: function(case, dtype, *job), jobs_of(case))
        return known[key]

    def make(case, jobs_of, dtype):
        truth = run(run_model, torch.float64, case, jobs_of)
        if dtype == "int8":
            types = torch.float32, torch.float64
            plain, exact = (run(simulate_int8, t, case, jobs_of) for t in types)
        else:
            plain, exact = run(run_model, TYPES[dtype], case, jobs_of), None
        return Judge(jobs_of(case), dtype, truth, plain, exact)

    return make


@pytest.fixture(scope="session")
def runner(outputs):
    """`runner(engine)`: a function of a job."""
    return lambda engine: (
        lambda subnet, batch: outputs(engine(**batch, subnet=subnet, output_hidden_states=True))
    )


@pytest.fixture
def check(make_case, dtype, isa, judge, runner):
    """`check(name, jobs_of)`: the engine of a model by its name."""

    def run(name, jobs_of):
        # In bf16 both sides, and float64, get the same weights.
        case = make_case(name, TYPES.get(dtype, torch.float32))
        engine = case.model.pack(dtype, threads=1, isa=isa)
        assert (engine.isa, engine.threads, engine.config.dtype) == (isa, 1, dtype)
        judge(case, jobs_of, dtype).check(runner(engine))

    return run


def test_subnets(case, check):
    check(case.name, all_subnets)


def test_paddings(case, check):
    check(case.name, all_paddings)


# Head sizes 6, 11 and 64.
@pytest.mark.parametrize("name", ["bert", "bert, odd sizes, base", "xlm-roberta, base"])
def test_lengths(name, check):
    check(name, all_lengths)


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta, base"])
def test_batches_hold_padding_ids_between_real_tokens(make_case, name):
    """RoBERTa's positions do not count them: the tests above are meant to see that."""
    batch = make_case(name).batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ((ids == 1) & (mask == 1)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_twelve_layers_with_all_hidden_states_on_two_threads(
    make_model, case_of, dtype, judge, runner
):
    """As many layers as BERT-base."""
    weights = TYPES.get(dtype, torch.float32)
    model = make_model(num_hidden_layers=12, max_position_embeddings=77, base=True)
    case = case_of("twelve layers", model.to(weights).float())
    judge(case, one_batch, dtype).check(runner(case.model.pack(dtype, threads=2)))


def one_batch(case):
    return [(Subnet.full(case.config), case.batch())]


def test_int8_is_close_to_float_on_ordinary_weights(case_of, run_model):
    """Weights as pretraining starts from, in a model deep enough for errors to add up."""
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=500, hidden_size=256, num_attention_heads=4, intermediate_size=1024
    )
    case = case_of("ordinary", DynaBertModel(config).eval())
    batch = case.batch((50, 7, 29))
    real = batch["attention_mask"].bool()
    engine = case.model.pack("int8", threads=1)
    for subnet in grid(config):
        want = run_model(case, torch.float32, subnet, batch)["last_hidden_state"][real]
        got = engine(**batch, subnet=subnet).last_hidden_state[real]
        assert F.cosine_similarity(got, want, dim=-1).min() >= 0.999


@pytest.mark.slow
def test_real_weights(case_of, dtype, judge, runner):
    """A pretrained MiniLM on text."""
    try:
        folder = pretrained_folder()
    except InputError as error:
        pytest.skip(str(error))
    model = DynaBertModel.from_pretrained(folder).eval()
    case = case_of("MiniLM", model.to(TYPES.get(dtype, torch.float32)).float())
    texts = [
        "Return a socket object connected to the address, or raise an error if the connection "
        "could not be made before the timeout.",
        "A great film, with a cast to match; the plot is thin, though.",
        "What?",
    ]
    batch = {k: torch.from_numpy(v) for k, v in Tokenizer(folder)(texts).items()}

    def jobs(case):
        return [(Subnet.from_multipliers(case.config, *m), batch) for m in ((1, 1), (0.5, 0.5))]

    judge(case, jobs, dtype).check(runner(model.pack(dtype, threads=1)))
