"""The kernel that computes all layers: its plans anywhere, what it computes where there is a GPU.

Its arithmetic and schedule are tested on a CPU by csrc/tests/test_cuda_encoder.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.engine import GpuEngine
from dynabert_fast.engine.gpu import Bucket
from dynabert_fast.engine.native import cuda_module
from dynabert_fast.engine.persistent import MOST_TOKENS, PersistentLayers, pack_layer, pack_weight
from dynabert_fast.errors import InputError
from dynabert_fast.subnet import Subnet, grid

ROOT = Path(__file__).resolve().parents[2]
#: Multiprocessors, shared memory of a block, and wgmma.
H200, A100 = (132, 232448, True), (108, 166912, False)
#: What the kernel asks of a model: heads of 32 or 64, neurons a multiple of 8 at each width.
SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "head_size": 32,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "max_position_embeddings": 160,
}
BASE = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 160,
}


@pytest.fixture
def built():
    try:
        return cuda_module()
    except InputError as error:
        pytest.skip(str(error))


def rounded_to_steps(weight: torch.Tensor) -> torch.Tensor:
    """What int8 makes of a weight [columns, sum]: 127 steps of a scale for each column."""
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scales).round() * scales


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("shape", [(8, 32), (16, 40), (24, 72), (13, 96)], ids=str)
def test_packed_weights(built, shape, int8):
    """Each element is where csrc/cuda/tile.h says, and all else is zero."""
    weight = torch.randn(shape).bfloat16()
    packed = pack_weight(weight, int8)
    (columns, depth), dtype = shape, torch.int8 if int8 else torch.bfloat16
    kept = weight
    scales = torch.ones(columns)
    if int8:
        scales = packed[: 4 * columns].view(torch.float32)
        kept = rounded_to_steps(weight)
    got = torch.zeros(shape)
    for c in range(columns):
        for i in range(depth):
            at = built.packed_offset(int8, columns, depth, c, i)
            got[c, i] = packed[at : at + dtype.itemsize].view(dtype).float() * scales[c]
            packed[at : at + dtype.itemsize] = 0
    assert torch.equal(got, kept.float())
    blocks = packed[4 * (-(-columns // 8) * 8) :] if int8 else packed
    assert blocks.numel() == -(-columns // 8) * 8 * -(-depth // 32) * 32 * dtype.itemsize
    assert not blocks.any()


def test_a_column_of_zeros_has_no_steps():
    weight = torch.randn(8, 32).bfloat16()
    weight[3] = 0
    packed = pack_weight(weight, int8=True)
    assert packed[:32].view(torch.float32)[3] == 0
    assert not packed[32:].view(8, 32)[3].any()


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_a_layer_is_in_the_kernels_order(make_model, int8):
    model = make_model(base=True, dtype=torch.bfloat16)
    layer = model.encoder.layer[0]
    attention, ffn = layer.attention, layer.ffn
    want = [
        *(attention.qkv.weight.flatten(0, 2), attention.qkv.bias),
        *(attention.out.weight_t.T, attention.out.bias),
        *(attention.norm.weight, attention.norm.bias),
        *(ffn.up.weight, ffn.up.bias, ffn.down.weight_t.T, ffn.down.bias),
        *(ffn.norm.weight, ffn.norm.bias),
    ]
    packed = pack_layer(layer, model.config, int8)
    for i, (found, expected) in enumerate(zip(packed, want, strict=True)):
        if i in (0, 2, 6, 8):
            assert torch.equal(found, pack_weight(expected, int8))
        else:
            assert found.data_ptr() == expected.data_ptr()


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_layers_of_an_exported_sub_network_are_packed_as_the_widest(make_model, int8):
    """The kernel reads its first heads and neurons at the distances that the widest layer gives."""
    config = make_model(base=True, **SIZES).config
    own = Subnet.from_extents(config, layers=(0, 2), heads=(4, 1), neurons=(40, 160))
    whole = make_model(base=True, dtype=torch.bfloat16, **SIZES)
    model = whole.extract(own)
    for layer, of in zip(model.encoder.layer, (0, 2), strict=True):
        narrow = pack_layer(layer, model.config, int8)
        wide = pack_layer(whole.encoder.layer[of], config, int8)
        heads, neurons = len(layer.attention.qkv.weight), len(layer.ffn.up.weight)
        shapes = (96 * heads, 96), (96, 32 * heads), (neurons, 96), (96, neurons)
        full = (3 * 128, 96), (96, 128), (160, 96), (96, 160)
        for i, shape, (columns, depth) in zip((0, 2, 6, 8), shapes, full, strict=True):
            assert narrow[i].shape == wide[i].shape
            if int8 and shape[1] < depth:  # a narrower sum has other scales
                continue
            scales = 4 * columns if int8 else 0
            size = 1 if int8 else 2
            used = torch.zeros(columns // 8, 8, depth // 32, 32, dtype=torch.bool)
            used.view(columns, depth)[: shape[0], : shape[1]] = True
            if shape[1] % 32 == 0:  # whole blocks: their order within does not matter
                used = used.transpose(1, 2).reshape(-1).repeat_interleave(size)
                got, want = narrow[i][scales:], wide[i][scales:]
                assert torch.equal(got[used], want[used])
                assert not got[~used].any()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_plans(built, make_model, device, weights):
    model = make_model(base=True, dtype=torch.bfloat16, **SIZES)
    layers = PersistentLayers(model, weights, device)
    sizes = 4 * (4 * 128 * 96 + 2 * 160 * 96)  # layers, elements of each
    scales = 4 * (3 * 128 + 96 + 160 + 96)
    assert layers.nbytes == (sizes + 4 * scales if weights == "int8" else 2 * sizes)
    for subnet in grid(model.config):
        for tokens in (1, 16, 128, MOST_TOKENS):
            plan = layers.plan(tokens, 1, tokens, subnet)
            assert 1 <= plan.blocks <= device[0]
            assert plan.tile_rows in (16, 32, 64)
            # At least what the products leave.
            widest = max(subnet.heads) * 32 * 4 + max(subnet.neurons)
            assert plan.workspace_bytes >= 2 * tokens * widest + 4 * tokens * 96
            assert layers.plan(tokens, 1, tokens, subnet) is plan


def test_the_fastest_kernel_is_measured_once(built, make_model, monkeypatch):
    import triton.testing

    layers = PersistentLayers(make_model(base=True, dtype=torch.bfloat16, **SIZES), device=H200)
    ran, timed = [], []
    monkeypatch.setattr(layers, "_run", lambda plan, x, offsets: ran.append(plan.tile_rows))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def do_bench(run, **_):
        run()
        timed.append(ran.pop())
        return abs(timed[-1] - 32)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    x, offsets = torch.zeros(16, 96, dtype=torch.bfloat16), torch.tensor([0, 16])
    subnet = Subnet.full(layers._config)
    for _ in range(3):
        layers(x, offsets, 16, subnet)
    assert timed == built.tile_rows == [16, 32, 64]
    assert ran == [32, 32, 32]
    monkeypatch.setenv("DYNABERT_FAST_TUNE", "0")
    layers(x[:8], torch.tensor([0, 8]), 8, subnet)
    assert len(timed) == 3


def test_says_why_not(built, make_model):
    model = make_model(base=True, dtype=torch.bfloat16, **SIZES)
    layers = PersistentLayers(model, device=H200)
    with pytest.raises(InputError, match=f"tokens must be at most {MOST_TOKENS}, got 512"):
        layers.plan(512, 1, 512, Subnet.full(model.config))
    odd = Subnet.parse(model.config, "l3-h2-n13")
    with pytest.raises(InputError, match="neurons must be a multiple of 8 up to 160, got 13"):
        layers.plan(16, 1, 16, odd)
    with pytest.raises(InputError, match=r"computes in bf16, got torch\.float32"):
        PersistentLayers(make_model(base=True, **SIZES), device=H200)
    with pytest.raises(InputError, match="weights must be one of bf16, int8, got 'fp8'"):
        PersistentLayers(model, "fp8", H200)
    with pytest.raises(InputError, match="weights='int8' needs persistent=True"):
        GpuEngine(model, weights="int8")


def test_an_engine_says_that_it_is_off(make_model):
    engine = GpuEngine(make_model(base=True), "fp32")
    why = engine.why_not_persistent(Bucket.of(8, 1, 8), Subnet.full(engine.config))
    assert why == "the engine was made without persistent=True"


def test_a_module_that_is_not_built_is_bad_input(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "dynabert_fast._cuda", None)
    with pytest.raises(InputError, match=r"not available \(.*_cuda.*DYNABERT_FAST_CUDA=0"):
        GpuEngine(make_model(base=True), "bf16", persistent=True)


def test_a_module_that_is_built_for_other_cards_is_bad_input(built, make_model, monkeypatch):
    model = make_model(base=True, dtype=torch.bfloat16, **SIZES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    with pytest.raises(InputError, match=r"kernel is built for 80.*this GPU is 7\.5: name it in"):
        PersistentLayers(model)


def with_steps(model) -> None:
    """The weights of products become those of int8."""
    for layer in model.encoder.layer:
        attention, ffn = layer.attention, layer.ffn
        for weight in (attention.qkv.weight.flatten(0, 2), ffn.up.weight):
            weight.copy_(rounded_to_steps(weight))
        for weight in (attention.out.weight_t, ffn.down.weight_t):
            weight.copy_(rounded_to_steps(weight.T).T)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        pytest.param(sizes, lengths, id=f"{name}-{lengths}")
        for name, sizes, some in (
            ("tiny", SIZES, ((1,), (16,), (31,), (128,), (5, 40, 17))),
            ("base", BASE, ((1,), (31,), (5, 40, 17))),  # seconds each, in float64
        )
        for lengths in some
    ],
)
def test_every_sub_network(built, make_model, sizes, lengths, weights):
    """Against the model in float64, with the weights that int8 makes; allowed is twice the error of
    plain torch in bfloat16."""
    model = make_model(base=True, **sizes).eval()
    ids = torch.randint(4, model.config.vocab_size, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rounded = make_model(base=True, dtype=torch.bfloat16, **sizes).eval()
    rounded.load_state_dict(model.state_dict())
    engine = GpuEngine(model.cuda(), "bf16", persistent=True, weights=weights)
    exact = make_model(base=True, dtype=torch.float64, **sizes).eval()
    exact.load_state_dict(rounded.state_dict())
    if weights == "int8":
        with torch.no_grad():
            with_steps(exact)
            rounded.load_state_dict(exact.state_dict())
    rounded = rounded.cuda()
    bucket = Bucket.of(sum(lengths), len(lengths), max(lengths))
    for subnet in grid(model.config):
        assert engine.why_not_persistent(bucket, subnet) is None
        got = engine(ids, mask, subnet=subnet).last_hidden_state.cpu().double()[mask]
        with torch.no_grad(), ops.use_backend("reference"):
            want = exact(ids, mask, subnet=subnet).last_hidden_state[mask]
            usual = rounded(ids.cuda(), mask.cuda(), subnet=subnet).last_hidden_state.cpu()
        allowed = 2 * (usual.double()[mask] - want).abs().max()
        error = (got - want).abs().max()
        assert error <= allowed, f"{subnet}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.gpu
def test_an_exported_sub_network_computes_the_bits_of_the_whole_model(built, make_model):
    whole = make_model(base=True, **SIZES).cuda()
    own = Subnet.from_extents(whole.config, layers=(0, 2), heads=(4, 1), neurons=(40, 160))
    exported = whole.extract(own)
    ids = torch.randint(4, whole.config.vocab_size, (2, 17))
    found = []
    for model, subnet in ((whole, own), (exported, Subnet.full(exported.config))):
        engine = GpuEngine(model, "bf16", persistent=True)
        assert engine.why_not_persistent(Bucket.of(34, 2, 17), subnet) is None
        found.append(engine(ids, subnet=subnet).last_hidden_state)
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_replays_do_not_see_each_other(built, make_model, weights):
    """Other sizes and sub-networks between two calls leave their bits as they were."""
    model = make_model(base=True, **SIZES).cuda()
    engine = GpuEngine(model, "bf16", persistent=True, weights=weights)
    calls = [
        (torch.randint(4, 40, (batch, length)), subnet)
        for batch, length in ((1, 9), (1, 64), (3, 20), (1, 16))
        for subnet in grid(engine.config)[::5]
    ]
    first = [engine(ids, subnet=s).last_hidden_state.clone() for ids, s in calls]
    for _ in range(20):
        for (ids, subnet), want in zip(calls, first, strict=True):
            assert torch.equal(engine(ids, subnet=subnet).last_hidden_state, want)


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> str:
    """csrc/tests/device_encoder.cu, for this machine's GPU."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, of the CUDA toolkit")
    target = tmp_path_factory.mktemp("device") / "device_encoder"
    major, minor = torch.cuda.get_device_capability()
    name = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    sources = [ROOT / "csrc" / "tests" / "device_encoder.cu", ROOT / "csrc" / "cuda" / "encoder.cu"]
    command = [
        nvcc,
        "-std=c++17",
        "-O2",
        "-lineinfo",
        f"-gencode=arch=compute_{name},code=sm_{name}",
    ]
    done = subprocess.run(
        [*command, *sources, "-o", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(target)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["small", "times", "base"])
def test_without_python(program, what):
    done = subprocess.run([program, what], capture_output=True, text=True, check=False, timeout=300)
    print(done.stdout)  # with microseconds of a launch
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitized(program, tool):
    found = [shutil.which("compute-sanitizer", path=p) for p in (None, "/usr/local/cuda/bin")]
    if not any(found):
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    command = [next(filter(None, found)), "--tool", tool, "--error-exitcode", "9", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == 0, done.stdout + done.stderr
