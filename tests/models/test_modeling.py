"""What the models compute: parity with transformers and slices, gradients, dropout, bad input."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig, PackedSequences
from dynabert_fast.models.conversion import from_huggingface, to_huggingface
from dynabert_fast.subnet import Subnet, grid

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
PADDINGS = ("none", "right", "left", "holes")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def ours_from(hf, make_model, base=False):
    """Our model of the family of `hf`, holding its weights."""
    model = make_model(hf.config.model_type, base=base, dtype=hf.dtype)
    model.load_state_dict(
        from_huggingface(hf.state_dict(), model.config, not base), strict=not base
    )
    return model


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_agrees_with_transformers(make_hf, make_model, make_batch, family, padding):
    hf = make_hf(family, dtype=torch.float64)
    model, batch = ours_from(hf, make_model), make_batch(family, padding)
    with torch.no_grad():
        want = hf(**batch, output_hidden_states=True)
        got = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert len(got.hidden_states) == len(want.hidden_states)
    for g, w in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(g[real], w[real], rtol=1e-10, atol=1e-10)
        assert not g[~real].any()
    if padding != "left":  # transformers reads column 0, which is padding there
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_as_accurate_as_transformers(make_hf, make_model, make_batch, family):
    wide, hf = make_hf(family, dtype=torch.float64), make_hf(family)
    batch = make_batch(family)
    with torch.no_grad():
        truth = wide(**batch).logits
        errors = [(m(**batch).logits - truth).abs().max() for m in (ours_from(hf, make_model), hf)]
    assert errors[0] <= 2 * errors[1] + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
def test_pooler_output_and_defaults(make_hf, make_model, make_batch, base):
    hf = make_hf("bert", "Model" if base else "ForSequenceClassification", dtype=torch.float64)
    model, batch = ours_from(hf, make_model, base), make_batch(padding="none")
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():  # no mask: all real; no token types: 0
        for got, want in zip(model(**ids).to_tuple(), hf(**ids).to_tuple(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_position_ids_are_taken(make_hf, make_model, make_batch, family):
    hf = make_hf(family, dtype=torch.float64)
    model, batch = ours_from(hf, make_model), make_batch(family)
    batch["position_ids"] = torch.arange(44).view(4, 11) % 13 + 3
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, hf(**batch).logits)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_tokens_without_a_mask_are_tokens(make_hf, make_model, make_batch, family):
    """RoBERTa gives all of them the padding's own position."""
    hf = make_hf(family, "Model", dtype=torch.float64)
    model, ids = ours_from(hf, make_model, base=True), make_batch(family)["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        want = hf(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_activations(make_hf, make_model, make_batch, act):
    hf = make_hf("bert", dtype=torch.float64, hidden_act=act)
    model, batch = make_model(dtype=torch.float64, hidden_act=act), make_batch()
    model.load_state_dict(hf.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, hf(**batch).logits)


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_subnet_equals_sliced_weights(
    make_model, make_batch, dense_forward, subnet_of, family, padding
):
    model, batch = make_model(family, dtype=torch.float64), make_batch(family, padding)
    subnet = subnet_of(model.config)
    state = to_huggingface(model.state_dict(), model.config)
    with torch.no_grad():
        logits, hidden = dense_forward(state, model.config, subnet, batch)
        got = model(**batch, subnet=subnet, output_hidden_states=True)
    torch.testing.assert_close(got.logits, logits, rtol=1e-10, atol=1e-10)
    assert len(got.hidden_states) == len(hidden) == len(subnet.layers) + 1
    real = batch["attention_mask"].bool()
    for g, w in zip(got.hidden_states, hidden, strict=True):
        torch.testing.assert_close(g[real], w[real], rtol=1e-10, atol=1e-10)


def test_subnets_give_different_outputs(make_model, make_batch):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        logits = [model(**batch, subnet=s).logits for s in grid(model.config)]
    for i, a in enumerate(logits):
        assert all((a - b).abs().max() > 1e-2 for b in logits[:i])


def test_beyond_the_extents_no_weight_is_read(make_model, make_batch, subnet_of):
    model, batch = make_model(), make_batch()
    subnet = subnet_of(model.config)
    with torch.no_grad():
        want = model(**batch, subnet=subnet).logits
        for name, unread in _unread(model, subnet).items():
            model.get_parameter(name)[unread] = float("nan")
        assert torch.equal(model(**batch, subnet=subnet).logits, want)


def _unread(model, subnet):
    """Parameter name to the index of its rows that a sub-network does not use."""
    kept = dict(zip(subnet.layers, zip(subnet.heads, subnet.neurons, strict=True), strict=True))
    found = {}
    for layer in range(model.config.num_hidden_layers):
        heads, neurons = kept.get(layer, (0, 0))
        at = f"dynabert.encoder.layer.{layer}."
        for name in ("attention.qkv.weight", "attention.qkv.bias"):
            found[at + name] = slice(heads, None)
        found[at + "attention.out.weight_t"] = slice(heads * model.config.head_size, None)
        for name in ("ffn.up.weight", "ffn.up.bias", "ffn.down.weight_t"):
            found[at + name] = slice(neurons, None)
    return found


@pytest.mark.parametrize("unpack", [True, False], ids=["padded", "packed"])
def test_packed_and_padded_hidden_states(make_model, make_batch, unpack):
    model, batch = make_model(base=True), make_batch(padding="holes")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch, output_hidden_states=True)
        got = model(**batch, output_hidden_states=True, unpack=unpack)
    for g, w in zip(got.hidden_states, want.hidden_states, strict=True):
        assert torch.equal(g, w if unpack else w[real])
    last = want.last_hidden_state
    assert torch.equal(got.last_hidden_state, last if unpack else last[real])
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
def test_outputs_are_as_asked_for(make_model, make_batch, base):
    model, batch = make_model(base=base), make_batch()
    with torch.no_grad():
        assert model(**batch).hidden_states is None
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 5
        plain = model(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], model(**batch)[0])
        model.config.output_hidden_states = True
        assert len(model(**batch).hidden_states) == 5


@pytest.mark.parametrize(
    ("labels", "overrides", "loss"),
    [
        (torch.tensor([2, 0, 1, 1]), {}, F.cross_entropy),
        (
            torch.tensor([0.5, 2.0, -1.0, 3.0]),
            {"num_labels": 1},
            lambda logits, y: F.mse_loss(logits[:, 0], y),
        ),
    ],
    ids=["classes", "regression"],
)
def test_loss(make_model, make_batch, labels, overrides, loss):
    model, batch = make_model(**overrides), make_batch()
    out = model(**batch, labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
    assert model(**batch).loss is None


def test_a_sequence_does_not_depend_on_its_batch_mates(make_model, make_batch, subnet_of):
    model, batch = make_model(dtype=torch.float64), make_batch()
    subnet = subnet_of(model.config)
    with torch.no_grad():
        together = model(**batch, subnet=subnet).logits
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
            torch.testing.assert_close(
                model(**alone, subnet=subnet).logits[0], together[row], rtol=1e-10, atol=1e-10
            )
        others = {k: v.clone() for k, v in batch.items()}
        others["input_ids"][1:] = (others["input_ids"][1:] + 7) % model.config.vocab_size
        assert torch.equal(model(**others, subnet=subnet).logits[0], together[0])


def test_what_is_in_the_padding_does_not_matter(make_model, make_batch):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        want = model(**batch).logits
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)
        assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("convert", [torch.Tensor.bool, torch.Tensor.float, lambda m: 5 * m])
def test_any_non_zero_is_a_real_token(make_model, make_batch, convert):
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        want = model(**batch).logits
        batch["attention_mask"] = convert(batch["attention_mask"])
        assert torch.equal(model(**batch).logits, want)


def test_empty_batch(make_model, make_batch):
    model = make_model()
    batch = {k: v[:0] for k, v in make_batch().items()}
    assert model(**batch).logits.shape == (0, 3)


# --- packing --------------------------------------------------------------------------------------


def test_packing():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1]])
    packed = PackedSequences.from_mask((3, 3), mask, "cpu")
    assert packed.offsets.tolist() == [0, 2, 3, 5]
    assert packed.max_length == 2
    x = torch.arange(9.0).view(3, 3)
    assert packed.pack(x).tolist() == [0, 1, 4, 6, 8]
    assert torch.equal(packed.unpack(packed.pack(x)), x * mask)
    wide = torch.randn(3, 3, 2)
    assert torch.equal(packed.unpack(packed.pack(wide)), wide * mask[..., None])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)], ids=["no mask", "all ones"])
def test_nothing_is_gathered_where_nothing_is_padded(mask):
    packed = PackedSequences.from_mask((2, 3), mask, "cpu")
    assert packed.indices is None
    assert packed.offsets.tolist() == [0, 3, 6]
    x = torch.randn(2, 3, 4)
    assert packed.pack(x).data_ptr() == packed.unpack(packed.pack(x)).data_ptr() == x.data_ptr()


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
def test_a_view_runs_its_subnet_and_shares_every_weight(make_model, make_batch, subnet_of, base):
    model, batch = make_model(base=base), make_batch()
    subnet = subnet_of(model.config)
    view = model.at(subnet)
    assert type(view) is type(model)
    for (name, mine), (_, its) in zip(
        model.named_parameters(), view.named_parameters(), strict=True
    ):
        assert mine is its, name
        assert mine.data_ptr() == its.data_ptr()
    with torch.no_grad():
        want = model(**batch, subnet=subnet)[0]
        full = model(**batch)[0]
        assert torch.equal(view(**batch)[0], want)
        assert torch.equal(view(**batch, subnet=Subnet.full(model.config))[0], full)
        assert torch.equal(model(**batch)[0], full)  # the model itself has not changed
        other = view.at(Subnet.full(model.config))  # a view of a view
        assert torch.equal(other(**batch)[0], full)
        assert torch.equal(view(**batch)[0], want)


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
def test_an_engine_of_a_view_runs_its_subnet(make_model, make_batch, subnet_of, base):
    model, batch = make_model(base=base), make_batch()
    engine = model.at(subnet_of(model.config)).pack("fp32")
    whole = model.pack("fp32")
    name = "last_hidden_state" if base else "logits"
    for subnet in (subnet_of(model.config), Subnet.full(model.config)):
        want = getattr(whole(**batch, subnet=subnet), name)
        assert torch.equal(getattr(engine(**batch, subnet=subnet), name), want)
        default = getattr(engine(**batch), name)
        assert torch.equal(default, want) == (subnet == subnet_of(model.config))


def test_a_view_outlives_the_model_it_was_made_of(make_model, make_batch):
    model = make_model()
    state, subnet = model.state_dict(), Subnet.from_multipliers(model.config, 0.5)
    want = model(**make_batch(), subnet=subnet).logits
    view = model.at(subnet)
    del model
    gc.collect()
    view.load_state_dict(state)
    assert torch.equal(view(**make_batch()).logits, want)


@pytest.mark.parametrize("wrap", ["accelerate", "compile"])
def test_a_view_of_a_wrapped_model_still_runs_its_subnet(make_model, make_batch, wrap):
    """Mixed-precision training and `compile` patch the model object, bound to that object."""
    model = make_model().eval()
    batch, small = make_batch(), Subnet.from_multipliers(model.config, 0.25, 0.5)
    expected = model(**batch, subnet=small).logits
    if wrap == "accelerate":
        whole = model.forward
        model.forward = lambda *args, **kwargs: whole(*args, **kwargs)
    else:
        model.compile(backend="eager")
    assert torch.equal(model.at(small)(**batch).logits, expected)


def test_training_a_view_trains_the_model(make_model, make_batch):
    model = make_model()
    view = model.at(Subnet.from_multipliers(model.config, 0.5))
    before = model.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    view(**make_batch(labels=True)).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before)


def test_a_deep_copy_shares_nothing_and_keeps_its_subnet(make_model, make_batch):
    model, batch = make_model(), make_batch()
    view = model.at(Subnet.from_multipliers(model.config, 0.5))
    twin = copy.deepcopy(view)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in twin.parameters()}
    assert torch.equal(twin(**batch).logits, view(**batch).logits)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_gradients_equal_those_of_sliced_weights(
    make_model, make_batch, dense_forward, subnet_of, family
):
    model, batch = make_model(family, dtype=torch.float64), make_batch(family, labels=True)
    subnet, labels = subnet_of(model.config), batch.pop("labels")
    model(**batch, labels=labels, subnet=subnet).loss.backward()
    state = to_huggingface(model.state_dict(), model.config)
    leaves = {k: v.clone().requires_grad_() for k, v in state.items()}
    logits, _ = dense_forward(leaves, model.config, subnet, batch)
    F.cross_entropy(logits, labels).backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    for name, got in to_huggingface(grads, model.config).items():
        want = leaves[name].grad
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_of_unused_heads_neurons_and_layers_are_exactly_zero(
    make_model, make_batch, subnet_of
):
    model = make_model()
    subnet = subnet_of(model.config)
    model(**make_batch(labels=True), subnet=subnet).loss.backward()
    for name, unread in _unread(model, subnet).items():
        grad = model.get_parameter(name).grad
        if int(name.split(".")[3]) in subnet.layers:
            assert not grad[unread].any(), name
            assert grad[: unread.start].any(), name
        else:
            assert grad is None, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, device):
    batch = on(device, make_batch(labels=True))

    def grads(checkpointing):
        model = make_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
        model = model.to(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        subnet = Subnet.from_multipliers(model.config, 0.5, 0.75)
        loss = model(**batch, subnet=subnet).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for got, want in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(got, want)


# --- dropout --------------------------------------------------------------------------------------

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("knob", OFF)
def test_each_dropout_is_on_in_training_and_off_in_evaluation(make_model, make_batch, knob, family):
    model, batch = make_model(family, **OFF | {knob: 0.3}), make_batch(family)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**batch).logits

    quiet = run(0)
    assert torch.equal(quiet, run(1))
    model.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), quiet)


@pytest.mark.parametrize(("family", "before_dense"), [("bert", False), ("roberta", True)])
def test_the_classifier_drops_out_where_its_family_does(
    make_model, make_batch, family, before_dense
):
    model = make_model(family, **OFF | {"classifier_dropout": 0.5}).train()
    seen = {}
    for name in ("dynabert.pooler.dense", "classifier"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: bool((args[0] == 0).any())})
        )
    model(**make_batch(family))
    assert seen == {"dynabert.pooler.dense": before_dense, "classifier": True}


def test_without_dropout_training_equals_evaluation(make_model, make_batch):
    model, batch = make_model(**OFF), make_batch()
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


def test_dropout_has_the_stated_rate_and_keeps_the_mean(make_model, make_batch):
    p = 0.3
    model, batch = make_model(base=True, **OFF | {"hidden_dropout_prob": p}), make_batch()
    with torch.no_grad():
        clean = model.embeddings(
            batch["input_ids"], None, None, PackedSequences.from_mask((4, 11), None, "cpu")
        )
        model.train()
        torch.manual_seed(0)
        draws = torch.stack(
            [
                model.embeddings(
                    batch["input_ids"], None, None, PackedSequences.from_mask((4, 11), None, "cpu")
                )
                for _ in range(200)
            ]
        )
    assert (draws == 0).double().mean().item() == pytest.approx(p, abs=0.01)
    kept = draws != 0
    torch.testing.assert_close(draws[kept], (clean / (1 - p)).expand_as(draws)[kept])


def test_layers_draw_different_masks(make_model, make_batch):
    """One sequence of one token attends to itself: a dropped head is a dropped output."""
    model = make_model(base=True, **OFF | {"attention_probs_dropout_prob": 0.5}).train()
    ids = torch.full((200, 1), 5)
    torch.manual_seed(0)
    outputs = []
    hooks = [
        layer.attention.out.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        for layer in model.encoder.layer
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    dropped = [(x.view(200, 4, 6) == 0).all(-1) for x in outputs]  # [sequence, head]
    for i, mask in enumerate(dropped):
        assert mask.double().mean().item() == pytest.approx(0.5, abs=0.1)
        assert not any(torch.equal(mask, other) for other in dropped[:i])


# --- types and compilation ------------------------------------------------------------------------


def test_autocast(make_model, make_batch, subnet_of, device):
    model, batch = make_model().to(device), on(device, make_batch(labels=True))
    subnet = subnet_of(model.config)
    with torch.autocast(device, torch.bfloat16):
        out = model(**batch, subnet=subnet, output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.float32}
    want = model(**batch, subnet=subnet, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], want.hidden_states[-1], rtol=0.2, atol=0.2)
    assert not torch.equal(out.hidden_states[-1], want.hidden_states[-1])
    out.loss.backward()
    used = [p for p in model.parameters() if p.grad is not None]
    assert {p.grad.dtype for p in used} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in used)


def test_a_training_step_under_autocast_is_as_exact_as_plain_torchs(
    make_model, make_batch, subnet_of, device
):
    model, batch = make_model().to(device), on(device, make_batch(labels=True))
    subnet = subnet_of(model.config)

    def step(model):
        """The loss and all gradients."""
        model.zero_grad()
        loss = model(**batch, subnet=subnet).loss
        loss.backward()
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)])

    truth = step(copy.deepcopy(model).double())
    with torch.autocast(device, torch.bfloat16):
        with ops.use_backend("reference"):
            plain = step(model)
        ours = step(model)
        if device == "cuda":  # nothing falls back unseen
            with ops.use_backend("triton"):
                assert torch.equal(step(model), ours)
    error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (ours, plain))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(make_model, make_batch, dtype):
    model, batch = make_model(), make_batch(labels=True)
    want = model(**batch).logits
    half = copy.deepcopy(model).to(dtype)
    out = half(**batch)
    assert out.logits.dtype == dtype
    assert (out.logits - want).abs().max() < 0.1 * want.abs().max()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["one graph", "with a mask"])
@pytest.mark.parametrize(
    ("device", "compiler"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_compiled_model_equals_eager(make_model, make_batch, masked, device, compiler):
    torch.compiler.reset()
    model = make_model().to(device)
    batch = on(device, make_batch(padding="right" if masked else "none", labels=True))
    if not masked:
        del batch["attention_mask"]
    compiled = torch.compile(model, backend=compiler, fullgraph=not masked)
    for width in (1.0, 0.5, 0.25):
        subnet = Subnet.from_multipliers(model.config, width, 0.75)
        outputs = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(**batch, subnet=subnet).loss
            loss.backward()
            outputs.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        for got, want in zip(*outputs, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_a_compiled_model_has_one_graph_for_each_sub_network(make_model, make_batch, device):
    torch.compiler.reset()
    counters.clear()
    # The first call with labels would set it, and so compile again.
    model = make_model(problem_type="single_label_classification").to(device)
    batch = on(device, make_batch(padding="none", labels=True))
    del batch["attention_mask"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    choices = [(1.0, 1.0), (0.5, 1.0), (0.75, 0.5), (0.25, 0.75)]
    subnets = [Subnet.from_multipliers(model.config, *chosen) for chosen in choices]
    first = [compiled(**batch, subnet=subnet).loss for subnet in subnets]
    with torch.compiler.set_stance("fail_on_recompile"):
        again = [compiled(**batch, subnet=subnet).loss for subnet in reversed(subnets)]
        sum(again).backward()
    assert torch.equal(torch.stack(first), torch.stack(again[::-1]))
    assert counters["stats"]["unique_graphs"] == len(subnets)


# --- bad input ------------------------------------------------------------------------------------

IDS = torch.full((2, 5), 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.full((5,), 7)}, "input_ids must be [batch, length] integers, got [5]"),
        ({"input_ids": IDS.float()}, "integers, got [2, 5] torch.float32"),
        ({"input_ids": IDS[:, :0]}, "a sequence may have 1 to 24 tokens, got 0"),
        (
            {"input_ids": torch.full((1, 25), 7)},
            "a sequence may have 1 to 24 tokens, got 25; truncate it",
        ),
        ({"input_ids": IDS + 54}, "token ids must be in 0 to 60, got 61 to 61"),
        ({"input_ids": IDS - 8}, "token ids must be in 0 to 60, got -1 to -1"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask must be [2, 5], got [2, 4]"),
        ({"attention_mask": torch.ones(2, 1, 1, 5)}, "attention_mask must be [2, 5], got [2, 1, 1"),
        (
            {"attention_mask": torch.tensor([[1] * 5, [0] * 5])},
            "attention_mask leaves no token in row 1; drop the row",
        ),
        ({"token_type_ids": IDS[:1]}, "token_type_ids must be [2, 5], got [1, 5]"),
        ({"token_type_ids": IDS}, "token_type_ids must be in 0 to 1, got 7 to 7"),
        ({"position_ids": IDS[:1]}, "position_ids must be [2, 5], got [1, 5]"),
        ({"position_ids": IDS + 20}, "position_ids must be in 0 to 23, got 27 to 27"),
        ({"subnet": "w0.50-d1.00"}, "subnet must be a Subnet, got str"),
        ({"subnet": 0.5}, "subnet must be a Subnet, got float"),
        ({"subnet": [1]}, "subnet must be a Subnet, got int"),
        ({"subnet": 0}, "subnet must be a Subnet, got int"),
        ({"subnet": Subnet((4,), (1,), (1,))}, "layers must be in 0 to 3, got 4"),
        ({"subnet": Subnet((0,), (5,), (1,))}, "heads of layer 0 must be in 1 to 4, got 5"),
        ({"subnet": Subnet((0,), (1,), (41,))}, "neurons of layer 0 must be in 1 to 40, got 41"),
    ],
)
@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
def test_bad_input(make_model, base, arguments, message):
    model = make_model(base=base)
    with pytest.raises(InputError) as error:
        model(**{"input_ids": IDS} | arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_subnet_of_a_view(make_model):
    with pytest.raises(InputError, match="heads of layer 0 must be in 1 to 4, got 5"):
        make_model().at(Subnet((0,), (5,), (1,)))


@pytest.mark.parametrize("method", ["at", "extract"])
@pytest.mark.parametrize(("given", "kind"), [("w0.50-d0.50", "str"), (None, "NoneType")])
def test_what_is_no_subnet_has_no_view_and_no_copy(make_model, method, given, kind):
    with pytest.raises(InputError, match=f"subnet must be a Subnet, got {kind}"):
        getattr(make_model(), method)(given)


@pytest.mark.parametrize("family", ["roberta", "camembert"])
def test_roberta_positions_leave_fewer_tokens(make_model, family):
    model = make_model(family)  # 24 positions, of which those up to the padding id's are reserved
    assert model(torch.full((1, 22), 7)).logits.shape == (1, 3)
    with pytest.raises(InputError, match="a sequence may have 1 to 22 tokens, got 23"):
        model(torch.full((1, 23), 7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 25}, "multiple of num_attention_heads, got 25 and 4"),
        ({"backbone": "gpt2"}, "backbone must be one of bert, roberta, xlm-roberta, camembert"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, "),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1, got 0"),
        ({"heads_per_layer": [4, 4]}, "one entry for each of the 4 layers, got 2"),
        ({"neurons_per_layer": [4] * 5}, "one entry for each of the 4 layers, got 5"),
    ],
)
def test_bad_configuration(sizes, fields, message):
    with pytest.raises(InputError) as error:
        DynaBertConfig(**sizes | fields)
    assert message in str(error.value)
