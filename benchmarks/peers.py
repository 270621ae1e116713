"""One BERT-base behind many engines: what `bench_cpu_engine.py` compares with, and ours.

A builder returns a `Candidate`, or raises `Absent` with the reason why its engine has no row. All
of them compute the same random model with the same number of threads.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertModel

from dynabert_fast.engine import CpuEngine
from dynabert_fast.models import DynaBertConfig, DynaBertModel

from .race import THREADS
from .report import REPORTS, versions

#: Names the folder that keeps exported models from run to run; default a temporary one.
FOLDER_VARIABLE = "DYNABERT_FAST_PEERS"
# Loose enough for every honest engine (fp32 leaves up to 1e-5, int8 a cosine of 0.9993 on this
# model), far from what another function or an ignored mask would give.
LARGEST_ERROR = 5e-5
LEAST_COSINE = 0.99

torch.set_num_threads(THREADS)
if FOLDER_VARIABLE in os.environ:
    # Compiled kernels are kept too.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.environ[FOLDER_VARIABLE] + "/inductor")


class Absent(Exception):
    """Why an engine has no row."""


@dataclass(frozen=True)
class Batch:
    """Token ids `[B, S]` int64, and the real tokens of each row, `None` where all are."""

    ids: np.ndarray
    lengths: np.ndarray | None = None

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """`[B, S]` int64, 1 at real tokens."""
        batch, length = self.ids.shape
        ends = np.full(batch, length) if self.lengths is None else self.lengths
        return (np.arange(length) < ends[:, None]).astype(np.int64)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Ids and mask as torch takes them: no mask is its fastest path where all are real."""
        mask = None if self.lengths is None else torch.from_numpy(self.mask)
        return torch.from_numpy(self.ids), mask

    def real(self, hidden: np.ndarray) -> np.ndarray:
        """The real tokens of `[B, S, D]`, `[T, D]`."""
        return hidden[self.mask.astype(bool)]


@dataclass(frozen=True)
class Candidate:
    """One engine on one precision."""

    name: str
    dtype: str
    run: Callable[[Batch], Any]  # what is timed
    hidden: Callable[[Any], Any]  # the last hidden state `[B, S, D]` of what `run` returned


def random_batch(batch: int, length: int, lengths: Iterable[int] | None = None) -> Batch:
    ids = np.random.default_rng(1000 * batch + length).integers(1000, 30000, (batch, length))
    return Batch(ids, None if lengths is None else np.asarray(lengths))


@functools.cache
def bert() -> BertModel:
    """BERT-base with weights of an ordinary size: normal, biases small, layer norms about 1."""
    model = BertModel(BertConfig(attn_implementation="sdpa")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("LayerNorm.weight")
            mean, std = (1.0, 0.1) if norm else (0.0, 0.02)
            parameter.normal_(mean, std, generator=generator)
    return model


@functools.cache
def dynabert() -> DynaBertModel:
    """The same weights in this library's model."""
    model = DynaBertModel(DynaBertConfig()).eval()
    model.load_state_dict(bert().state_dict())
    return model


@functools.cache
def _double() -> BertModel:
    return copy.deepcopy(bert()).double()


def reference(batch: Batch) -> np.ndarray:
    """The last hidden state in float64, real tokens only, `[T, D]`."""
    ids, mask = batch.tensors
    with torch.inference_mode():
        return batch.real(_double()(ids, attention_mask=mask).last_hidden_state.numpy())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of all values together."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def check(candidate: Candidate, batch: Batch, want: np.ndarray) -> float:
    """Compare with `want`, real tokens only; the cosine of the two.

    Raises:
        Absent: It computes something else.
    """
    hidden = candidate.hidden(candidate.run(batch))
    got = batch.real(np.array(hidden, dtype=np.float32))
    error, similar = float(np.abs(got - want).max()), cosine(got, want)
    if not (similar >= LEAST_COSINE and (candidate.dtype != "fp32" or error <= LARGEST_ERROR)):
        raise Absent(f"computes something else: cosine {similar:.4f}, error up to {error:.1e}")
    return similar


# ---- torch ----


def _hidden_of_torch(output: Any) -> np.ndarray:
    return output.last_hidden_state.float().numpy()


@functools.cache
def _torch_model(dtype: str) -> BertModel:
    return copy.deepcopy(bert()).bfloat16() if dtype == "bf16" else bert()


def transformers_eager(dtype: str) -> Candidate:
    model = _torch_model(dtype)

    def run(batch: Batch) -> Any:
        ids, mask = batch.tensors
        with torch.inference_mode():
            return model(ids, attention_mask=mask)

    return Candidate("transformers", dtype, run, _hidden_of_torch)


def torch_compile(dtype: str, backend: str = "inductor") -> Candidate:
    """Compiled at the first call. Frozen constants make both backends 3 to 7 % faster (Zen 4)."""
    name = "torch.compile" if backend == "inductor" else f"torch.compile, {backend}"
    if backend == "zentorch":
        try:
            import zentorch  # noqa: F401  # registers the backend
        except ImportError as error:
            raise Absent(f"zentorch cannot be imported: {error}") from error
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # zentorch leaves its pass behind for whatever inductor compiles next.
    torch._inductor.config.joint_custom_post_pass = None
    dynabert()  # transformers notes the classes it has seen; one more would mean to compile again
    compiled = torch.compile(_torch_model(dtype), backend=backend, dynamic=False)

    def run(batch: Batch) -> Any:
        ids, mask = batch.tensors
        with torch.inference_mode():
            return compiled(ids, attention_mask=mask)

    return Candidate(name, dtype, run, _hidden_of_torch)


# ---- exported models ----


@functools.cache
def _folder() -> Path:
    """Where artefacts of this file and these versions lie."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named is None:
        base = Path(tempfile.mkdtemp(prefix="dynabert-peers-"))
        atexit.register(shutil.rmtree, base, ignore_errors=True)
    else:
        base = Path(named)
    recipe = Path(__file__).read_bytes() + repr(versions(REPORTS["cpu_engine"].packages)).encode()
    folder = base / hashlib.sha256(recipe).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _artefact(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, whole or absent."""
    folder = _folder() / name
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=_folder()))
        try:
            make(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _textbook_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention in the steps that ONNX Runtime's optimizer knows; it fuses no form of sdpa."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask
    weights = torch.softmax(scores, -1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _Exported(nn.Module):
    """Ids and mask to last hidden state and pooler output; the mask is added, as in textbooks."""

    def __init__(self) -> None:
        super().__init__()
        AttentionInterface.register("textbook", _textbook_attention)
        self.bert = copy.deepcopy(bert())
        self.bert.set_attn_implementation("textbook")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        output = self.bert(input_ids, attention_mask=mask)
        return output.last_hidden_state, output.pooler_output


def _export(folder: Path) -> None:
    batch = random_batch(2, 16, (16, 9))
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        # The newer exporter's graph has 13 % slower int8 and no attention that the optimizer fuses.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Exported().eval(),
            (torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)),
            str(folder / "model.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_axes={
                "input_ids": axes,
                "attention_mask": axes,
                "last_hidden_state": axes,
                "pooler_output": {0: "batch"},
            },
        )


def _onnx() -> Path:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise Absent(f"the export needs onnx: {error}") from error
    return _artefact("onnx", _export) / "model.onnx"


def _optimise(folder: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    config = bert().config
    model = optimize_model(
        str(_onnx()),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    fused = model.get_fused_operator_statistics()["Attention"]
    if fused != config.num_hidden_layers:
        raise Absent(f"the optimizer fused the attention of {fused} layers")
    model.save_model_to_file(str(folder / "model.onnx"))


def _onnx_optimised() -> Path:
    return _artefact("onnx-optimised", _optimise) / "model.onnx"


def _quantise(source: Path, folder: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        folder / "model.onnx",
        weight_type=QuantType.QInt8,
        # A scale per channel is 1 to 2 % slower; the type is for fused nodes, whose own is unknown.
        per_channel=False,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def onnx_runtime(dtype: str, optimised: bool) -> Candidate:
    """Two graphs: as exported, which the runtime fuses at load, and after its offline optimizer."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Absent(f"onnxruntime cannot be imported: {error}") from error
    path = _onnx_optimised() if optimised else _onnx()
    if dtype == "int8":
        make = functools.partial(_quantise, path)
        path = _artefact(f"{path.parent.name}-int8", make) / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch: Batch) -> Any:
        return session.run(None, {"input_ids": batch.ids, "attention_mask": batch.mask})

    name = "ONNX Runtime, optimizer" if optimised else "ONNX Runtime"
    return Candidate(name, dtype, run, lambda output: output[0])


def _nncf(folder: Path) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    batches = [random_batch(1, length) for length in range(8, 128, 4)]  # without padding
    samples = [{"input_ids": b.ids, "attention_mask": b.mask} for b in batches]
    model = openvino.Core().read_model(_onnx())
    quantised = nncf.quantize(
        model,
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    openvino.save_model(quantised, folder / "model.xml", compress_to_fp16=False)


def openvino_cpu(dtype: str, shape: tuple[int, int] | None) -> Candidate:
    """With fixed shapes where they are known: 2 to 4 % faster."""
    # Both report their use, and leave an id in the home folder, unless this cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import nncf  # noqa: F401
        import openvino
    except ImportError as error:
        raise Absent(f"OpenVINO or NNCF cannot be imported: {error}") from error
    core = openvino.Core()
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bf16" and not bf16:
        raise Absent("OpenVINO finds no bf16 on this processor")
    model = core.read_model(_artefact("nncf", _nncf) / "model.xml" if dtype == "int8" else _onnx())
    if shape is not None:
        model.reshape({"input_ids": shape, "attention_mask": shape})
    settings = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        # int8: of what NNCF leaves in floating point.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 and dtype != "fp32" else "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(batch: Batch) -> Any:
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        return request.infer(inputs, share_inputs=True, share_outputs=True)

    name = "OpenVINO, NNCF" if dtype == "int8" else "OpenVINO"
    return Candidate(name, dtype, run, lambda output: output["last_hidden_state"])


# ---- ours ----


@functools.cache
def engine(dtype: str) -> CpuEngine:
    return dynabert().pack(dtype, threads=THREADS)


def ours(dtype: str) -> Candidate:
    packed = engine(dtype)
    return Candidate(
        "dynabert_fast",
        dtype,
        lambda batch: packed(batch.ids, lengths=batch.lengths),
        lambda output: output.last_hidden_state,
    )
