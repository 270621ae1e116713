"""A model on a tree of sub-networks: as if each ran in a call of its own."""

from __future__ import annotations

import pytest
import torch

from dynabert_fast import ops
from dynabert_fast.errors import InputError
from dynabert_fast.models import PackedSequences
from dynabert_fast.ops.reference import keep_mask
from dynabert_fast.subnet import Subnet, grid
from dynabert_fast.tree import SubnetTree

# For 4 layers of 4 heads and 40 neurons.
RAGGED, LAST = "l0+2+3-h3+1+4-n7+40+1", "l3-h2-n13"
SETS = {
    "grid": [f"w{w:.2f}-d{d:.2f}" for d in (1, 0.75, 0.5) for w in (1, 0.75, 0.5, 0.25)],
    "explicit": [RAGGED, "w1.00-d1.00", "l0-h3-n7", LAST, "l0+2-h3+1-n7+40", "w0.25-d0.50"],
    "duplicates": ["w0.50-d0.50", "w0.50-d1.00", "w0.50-d0.50"],
    "extents that meet again": ["l0+1+2-h4+2+4-n40+20+40", "l0+1+2-h4+1+4-n40+9+40"],
    "one": [RAGGED],
}


@pytest.fixture(params=SETS.values(), ids=SETS.keys())
def names(request):
    return request.param


def subnets_of(model, names):
    return [Subnet.parse(model.config, name) for name in names]


def gradients(model):
    """The gradients, which are then no longer there."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


EXACT = {"rtol": 1e-9, "atol": 1e-10}


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "holes", None])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_encoder_equals_separate_calls(make_model, make_batch, names, family, padding):
    model = make_model(family, base=True, dtype=torch.float64)
    batch = make_batch(family, padding or "none")
    if padding is None:
        del batch["attention_mask"]
    subnets = subnets_of(model, names)

    def randn(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    got = model(**batch, subnet=SubnetTree(subnets))
    shape = (len(subnets), *batch["input_ids"].shape, model.config.hidden_size)
    outputs = {"last_hidden_state": randn(*shape), "pooler_output": randn(*shape[:2], shape[3])}
    sum((got[name] * weights).sum() for name, weights in outputs.items()).backward()
    found = gradients(model)
    for i, subnet in enumerate(subnets):
        want = model(**batch, subnet=subnet)
        for name, weights in outputs.items():
            torch.testing.assert_close(got[name][i], want[name], **EXACT)
            (want[name] * weights[i]).sum().backward(retain_graph=True)
    assert_same_gradients(found, gradients(model), **EXACT)


@pytest.mark.parametrize("kind", ["classes", "ignored", "regression"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_classifiers_loss_is_the_sum_of_all(make_model, make_batch, names, family, kind):
    batch = make_batch(family, labels=True)
    if kind == "ignored":
        batch["labels"][1] = -100
    if kind == "regression":
        batch["labels"] = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
    classes = 1 if kind == "regression" else 3
    model = make_model(family, dtype=torch.float64, num_labels=classes)
    subnets = subnets_of(model, names)
    got = model(**batch, subnet=SubnetTree(subnets))
    assert got.logits.shape == (len(subnets), 4, classes)
    assert got.hidden_states is None
    got.loss.backward()
    found = gradients(model)
    want = [model(**batch, subnet=subnet) for subnet in subnets]
    torch.testing.assert_close(got.logits, torch.stack([o.logits for o in want]), **EXACT)
    loss = sum(o.loss for o in want)
    torch.testing.assert_close(got.loss, loss, **EXACT)
    loss.backward()
    assert_same_gradients(found, gradients(model), **EXACT)


def test_the_whole_grid_reaches_every_parameter(make_model, make_batch):
    model = make_model()
    model(**make_batch(labels=True), subnet=SubnetTree(grid(model.config))).loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("padding", ["right", "none"])
def test_float32_has_the_bits_of_single_calls(make_model, make_batch, names, padding):
    if "cpp" not in ops.backends():
        pytest.skip("plain torch makes no such promise")
    model, batch = make_model(base=True), make_batch(padding=padding)
    subnets = subnets_of(model, names)
    with torch.no_grad():
        got = model(**batch, subnet=SubnetTree(subnets)).last_hidden_state
        want = [model(**batch, subnet=subnet).last_hidden_state for subnet in subnets]
    assert torch.equal(got, torch.stack(want))


@pytest.mark.parametrize("padding", ["right", "none"])
def test_hidden_states_are_those_of_the_edges(make_model, make_batch, names, padding):
    model, batch = make_model(dtype=torch.float64), make_batch(padding=padding)
    tree = SubnetTree(subnets_of(model, names))
    packed = PackedSequences.from_mask((4, 11), batch["attention_mask"], torch.device("cpu"))
    with torch.no_grad():
        got = model(**batch, subnet=tree, output_hidden_states=True, unpack=False)
        alone = [
            model(**batch, subnet=s, output_hidden_states=True, unpack=False).hidden_states
            for s in tree.subnets
        ]
    seen = [0] * len(tree.subnets)
    for state, edge in zip(got.hidden_states, tree.edges, strict=True):
        nodes = state.split(packed.tokens)
        for node, users in zip(nodes, edge.users, strict=True):
            for user in users:
                layers = tree.subnets[user].layers
                index = len(layers) if edge.layer is None else layers.index(edge.layer)
                torch.testing.assert_close(node, alone[user][index], **EXACT)
                seen[user] += 1
    assert seen == [len(s.layers) + 1 for s in tree.subnets]


def test_packed_sequences_in_place_of_a_mask(make_model, make_batch):
    model, batch = make_model(dtype=torch.float64), make_batch("bert", "holes", labels=True)
    tree = SubnetTree(subnets_of(model, SETS["explicit"]))
    packed = PackedSequences.from_mask((4, 11), batch["attention_mask"], torch.device("cpu"))
    want = model(**batch, subnet=tree)
    got = model(**{**batch, "attention_mask": packed}, subnet=tree)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    assert packed.rows is None  # it can serve another call


def test_a_tuple_in_place_of_an_output(make_model, make_batch):
    model, batch = make_model(), make_batch(labels=True)
    tree = SubnetTree(grid(model.config))
    loss, logits = model(**batch, subnet=tree, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (12, 4, 3))


def test_empty_batch(make_model):
    model = make_model(base=True)
    tree = SubnetTree(grid(model.config))
    with torch.no_grad():
        output = model(torch.zeros(0, 5, dtype=torch.int64), subnet=tree)
    assert output.last_hidden_state.shape == (12, 0, 5, model.config.hidden_size)
    assert output.pooler_output.shape == (12, 0, model.config.hidden_size)


def test_each_layer_is_called_once(make_model, make_batch):
    model = make_model()
    tree = SubnetTree(subnets_of(model, SETS["grid"]))
    calls = []
    for i, layer in enumerate(model.dynabert.encoder.layer):
        layer.register_forward_hook(lambda *call, i=i: calls.append((i, len(call[1][0]))))
    with torch.no_grad():
        model(**make_batch(padding="none"), subnet=tree)
    # Of 4 layers depth 0.75 keeps 0, 1 and 2, and depth 0.5 keeps 0 and 2.
    assert calls == [(0, 4 * 44), (1, 4 * 44), (2, 8 * 44), (3, 4 * 44)]


# --- dropout, checkpointing, types, compilation ---------------------------------------------------


class Masks:
    """Seeds and masks of a tree's dropout, for a loop that computes each sub-network by itself.

    In `order` seeds are drawn as a call of the whole tree draws them: one for the embeddings, then
    in each layer those of attention, of its output and of the feed-forward's.
    """

    def __init__(self, model, tree, total):
        self.total, self.tree, self.model = total, tree, model
        draw = lambda: torch.randint(2**63 - 1, ())  # noqa: E731
        self.embeddings = draw()
        self.layers = {level.layer: (draw(), draw(), draw()) for level in tree.levels}
        self.nodes = {}  # of each layer: the path of each node, in their order
        paths = [[()]]
        for level in tree.levels:
            pieces = [
                paths[output][sum(cut[:piece]) :][: cut[piece]]
                for output, piece in level.sources
                for cut in [(1,) if output == 0 else tree.levels[output - 1].pieces]
            ]
            rows = [path for piece in pieces for path in piece]
            own = zip([level.layer] * len(rows), level.heads, level.neurons, strict=True)
            paths.append([(*path, step) for path, step in zip(rows, own, strict=True)])
            self.nodes[level.layer] = paths[-1]

    def dropout(self, x, seed, first=0):
        """Of `[T, D]`, whose rows are counted from `first`."""
        rows = torch.arange(first, first + len(x))[:, None]
        p = self.model.config.hidden_dropout_prob
        return x * keep_mask(seed, rows, torch.arange(x.shape[1]), p) / (1 - p)

    def attention(self, probabilities, seed, start):
        """Of `[H, S, S]`, of a sequence that begins at packed row `start`."""
        heads, length = probabilities.shape[:2]
        rows = torch.arange(start, start + length)[None, :, None]
        columns = (torch.arange(heads)[:, None, None] << 16) + torch.arange(length)
        p = self.model.config.attention_probs_dropout_prob
        return probabilities * keep_mask(seed, rows, columns, p) / (1 - p)


def naive(model, batch, subnet, masks):
    """The first tokens of a sub-network's last hidden state: plain torch, sequence by sequence."""
    config, encoder = model.config, model.encoder
    mask = batch["attention_mask"] == 1
    lengths = mask.sum(1).tolist()
    table = model.embeddings
    positions = torch.arange(mask.shape[1]).expand_as(mask)
    x = table.norm(
        table.word(batch["input_ids"][mask])
        + table.token_type(batch["token_type_ids"][mask])
        + table.position(positions[mask])
    )
    x = masks.dropout(x, masks.embeddings)
    d, path = config.head_size, ()
    for layer, heads, neurons in zip(subnet.layers, subnet.heads, subnet.neurons, strict=True):
        path = (*path, (layer, heads, neurons))
        first = masks.nodes[layer].index(path) * masks.total
        seeds = masks.layers[layer]
        own = encoder.layer[layer]
        weight, bias = own.attention.qkv.weight[:heads], own.attention.qkv.bias[:heads]
        qkv = torch.einsum("td,hkpd->khtp", x, weight) + bias.transpose(0, 1)[:, :, None]
        contexts, start = [], 0
        for length in lengths:
            q, k, v = qkv[:, :, start : start + length]
            probabilities = (q @ k.mT / d**0.5).softmax(-1)
            contexts.append(masks.attention(probabilities, seeds[0], start) @ v)
            start += length
        context = torch.cat(contexts, 1).transpose(0, 1).flatten(1)  # [T, h * d]
        y = context @ own.attention.out.weight_t[: heads * d] + own.attention.out.bias
        x = own.attention.norm(masks.dropout(y, seeds[1], first) + x)
        inner = x @ own.ffn.up.weight[:neurons].T + own.ffn.up.bias[:neurons]
        y = torch.nn.functional.gelu(inner) @ own.ffn.down.weight_t[:neurons] + own.ffn.down.bias
        x = own.ffn.norm(masks.dropout(y, seeds[2], first) + x)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return model.pooler(x[starts])


@pytest.mark.parametrize("padding", ["right", "none"])
def test_with_dropout_shared_layers_share_their_masks(make_model, make_batch, names, padding):
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    model = make_model(base=True, dtype=torch.float64, **rates).train()
    batch = make_batch(padding=padding)
    tree = SubnetTree(subnets_of(model, names))
    generator = torch.Generator().manual_seed(7)
    shape = (len(names), 4, model.config.hidden_size)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(3)
    got = model(**batch, subnet=tree).pooler_output
    (got * weights).sum().backward()
    found = gradients(model)
    torch.manual_seed(3)
    masks = Masks(model, tree, int(batch["attention_mask"].sum()))
    want = torch.stack([naive(model, batch, subnet, masks) for subnet in tree.subnets])
    torch.testing.assert_close(got, want, **EXACT)
    (want * weights).sum().backward()
    # The naive loop leaves no gradient where nothing reaches; ours leaves none there either.
    assert_same_gradients(found, gradients(model), **EXACT)


def test_dropout_drops_different_things_in_different_nodes(make_model, make_batch):
    """Two widths of a layer are two nodes; with the same seed and rows they would agree."""
    model = make_model(base=True, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    names = ["l0+2-h4+4-n40+40", "l1+2-h4+4-n40+40"]
    with torch.no_grad():
        for name in ("attention.out.weight_t", "ffn.down.weight_t"):
            for layer in (0, 1, 2):
                model.get_parameter(f"encoder.layer.{layer}.{name}").zero_()
                model.get_parameter(f"encoder.layer.{layer}.{name[:-8]}bias").fill_(1.0)
        # Nothing but a constant goes through the masks: layers 0 and 1 are the same function.
        model.encoder.layer[1].load_state_dict(model.encoder.layer[0].state_dict())
        model.eval()
        one, other = model(**make_batch(), subnet=SubnetTree(subnets_of(model, names)))[0]
        assert torch.equal(one, other)
        model.train()
        one, other = model(**make_batch(), subnet=SubnetTree(subnets_of(model, names)))[0]
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, names, autocast):
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model, batch = make_model(**rates).train(), make_batch(labels=True)
    tree, found = SubnetTree(subnets_of(model, names)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, subnet=tree).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same_gradients(*found, rtol=0, atol=0)


def test_autocast_is_as_near_as_single_calls(make_model, make_batch, names):
    model, batch = make_model(), make_batch(labels=True)
    subnets = subnets_of(model, names)

    def step(run):
        model.zero_grad()
        run().backward()
        return torch.cat([g.flatten().double() for g in gradients(model).values()])

    truth = step(lambda: sum(model(**batch, subnet=s).loss for s in subnets))
    with torch.autocast("cpu", torch.bfloat16):
        alone = step(lambda: sum(model(**batch, subnet=s).loss for s in subnets))
        output = model(**batch, subnet=SubnetTree(subnets), output_hidden_states=True, unpack=False)
        ours = step(lambda: model(**batch, subnet=SubnetTree(subnets)).loss)
    assert {h.dtype for h in output.hidden_states} == {torch.float32}
    assert output.logits.dtype == torch.bfloat16
    error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, alone))
    assert 0 < error <= 2 * allowed


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["one graph", "with a mask"])
def test_compiled_tree_equals_eager(make_model, make_batch, masked):
    torch.compiler.reset()
    model = make_model(problem_type="single_label_classification")
    batch = make_batch(padding="right" if masked else "none", labels=True)
    if not masked:
        del batch["attention_mask"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not masked)
    tree, outputs = SubnetTree(grid(model.config)), []
    for run in (model, compiled):
        loss = run(**batch, subnet=tree).loss
        loss.backward()
        outputs.append({"loss": loss.detach(), **gradients(model)})
    assert_same_gradients(*outputs)


# --- bad input ------------------------------------------------------------------------------------


def test_unpacked_hidden_states_are_refused(make_model, make_batch):
    for base in (True, False):
        model = make_model(base=base)
        with pytest.raises(InputError, match="ask for them with unpack=False"):
            model(
                **make_batch(),
                subnet=SubnetTree(grid(model.config)),
                output_hidden_states=True,
            )


def test_a_subnet_that_does_not_fit_is_refused(make_model, make_batch):
    model = make_model()
    tree = SubnetTree([Subnet.full(model.config), Subnet((0, 4), (1, 1), (1, 1))])
    with pytest.raises(InputError, match="layer"):
        model(**make_batch(), subnet=tree)


def test_something_else_than_a_subnet_is_refused(make_model, make_batch):
    model = make_model()
    tree = SubnetTree([Subnet.full(model.config)])
    with pytest.raises(InputError, match="subnet must be a Subnet, got SubnetTree"):
        model(**make_batch(), subnet=[tree])


def test_packing_of_another_shape_is_refused(make_model, make_batch):
    model, batch = make_model(), make_batch()
    packed = PackedSequences.from_mask((4, 10), None, torch.device("cpu"))
    with pytest.raises(InputError, match=r"packed as \[4, 10\], got ids \[4, 11\]"):
        model(**{**batch, "attention_mask": packed}, subnet=SubnetTree(grid(model.config)))
