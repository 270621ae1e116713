"""Checkpoints in and out: any plain Hugging Face folder loads, what is saved opens there again."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dynabert_fast.errors import InputError
from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification, DynaBertModel
from dynabert_fast.models.conversion import from_huggingface, to_huggingface
from dynabert_fast.subnet import Subnet

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
WEIGHTS = "model.safetensors"


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def rewrite(folder, change):
    """Replace the weights of a checkpoint folder by `change(weights)`."""
    state = change(load_file(folder / WEIGHTS))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


# --- layouts --------------------------------------------------------------------------------------


def test_layout_is_one_row_block_per_head_and_neuron(make_hf, make_model, sizes):
    hf, model = make_hf("bert"), make_model()
    theirs = hf.state_dict()
    ours = from_huggingface(theirs, model.config, True)
    at, to = "bert.encoder.layer.2.", "dynabert.encoder.layer.2."
    heads, d, hidden = 4, 6, sizes["hidden_size"]
    qkv = ours[f"{to}attention.qkv.weight"]
    assert qkv.shape == (heads, 3, d, hidden)
    assert ours[f"{to}attention.qkv.bias"].shape == (heads, 3, d)
    for i, part in enumerate(("query", "key", "value")):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            weight = theirs[f"{at}attention.self.{part}.weight"][rows]
            assert torch.equal(qkv[head, i], weight)
    out = theirs[f"{at}attention.output.dense.weight"]
    assert torch.equal(ours[f"{to}attention.out.weight_t"], out.T)
    assert torch.equal(ours[f"{to}ffn.up.weight"], theirs[f"{at}intermediate.dense.weight"])
    assert torch.equal(ours[f"{to}ffn.down.weight_t"], theirs[f"{at}output.dense.weight"].T)
    assert all(t.is_contiguous() for t in ours.values())


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_only_move_numbers(make_model, family, base):
    model = make_model(family, base=base)
    theirs = to_huggingface(model.state_dict(), model.config)
    assert all(t.is_contiguous() for t in theirs.values())
    equal(from_huggingface(theirs, model.config, not base), dict(model.state_dict()))


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_folders_load(make_hf, make_batch, tmp_path, family, kind):
    """Also a language model's, whose own head is left out without a word."""
    hf, batch = make_hf(family, kind, dtype=torch.float64), make_batch(family)
    hf.save_pretrained(tmp_path)
    model, info = DynaBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert model.dtype == torch.float64
    assert model.config.backbone == family
    assert not model.training
    encoder = hf if kind == "Model" else hf.base_model
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got, want = model(**batch), encoder(**batch)
    torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real])
    assert not info["unexpected_keys"]
    has_pooler = kind == "Model" or (family == "bert" and kind != "ForMaskedLM")
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(info["missing_keys"]) == (set() if has_pooler else pooler)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_loads_with_its_head(make_hf, make_batch, tmp_path, family):
    hf, batch = make_hf(family, dtype=torch.float64), make_batch(family)
    hf.save_pretrained(tmp_path)
    model, info = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 3
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, hf(**batch).logits)


@pytest.mark.parametrize("kind", ["Model", "ForPreTraining"])
def test_a_new_head_is_drawn_for_an_encoder(make_hf, tmp_path, kind):
    hf = make_hf("bert", kind)
    hf.save_pretrained(tmp_path)
    model, info = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert model.classifier.weight.shape == (7, 24)
    assert model.classifier.weight.std() < 0.05  # drawn with initializer_range 0.02
    pooler = hf.state_dict()[f"{'bert.' if kind != 'Model' else ''}pooler.dense.weight"]
    assert torch.equal(model.dynabert.pooler.dense.weight, pooler)


def test_a_head_of_another_size_is_replaced_when_asked(make_hf, tmp_path):
    make_hf("bert").save_pretrained(tmp_path)
    model = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert model.classifier.weight.shape == (5, 24)


def test_configuration_fields_can_be_overridden(make_hf, tmp_path):
    make_hf("bert").save_pretrained(tmp_path)
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    model = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, hidden_dropout_prob=0.25, id2label=labels, dtype=torch.bfloat16
    )
    assert model.config.hidden_dropout_prob == 0.25
    assert model.config.id2label == labels
    assert model.dtype == torch.bfloat16


def test_legacy_names_load(make_hf, make_batch, tmp_path):
    hf, batch = make_hf("bert", dtype=torch.float64), make_batch()
    hf.save_pretrained(tmp_path)

    def legacy(state):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        named = {}
        for name, tensor in state.items():
            for new, before in old.items():
                name = name.replace(new, before)
            named[name] = tensor
        positions = {"bert.embeddings.position_ids": torch.arange(24)[None]}
        return named | positions

    rewrite(tmp_path, legacy)
    model, info = DynaBertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, hf(**batch).logits)


@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin shards"])
def test_every_form_of_weight_file_loads(make_hf, tmp_path, form):
    hf = make_hf("bert")
    whole = tmp_path / "whole"
    hf.save_pretrained(whole)
    folder = tmp_path / "other"
    hf.save_pretrained(folder, max_shard_size="20KB" if form == "safetensors shards" else "1GB")
    if form == "safetensors shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        shards = {"pytorch_model.bin": list(state)}
        if form == "bin shards":
            names = list(state)
            shards = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
            index = {"weight_map": {n: file for file, names in shards.items() for n in names}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, names in shards.items():
            torch.save({name: state[name] for name in names}, folder / file)
    want, got = (
        DynaBertForSequenceClassification.from_pretrained(f).state_dict() for f in (whole, folder)
    )
    equal(dict(got), dict(want))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_that_a_configuration_leaves_out_are_the_familys(
    make_hf, make_batch, tmp_path, family
):
    """RoBERTa counts positions from the padding id, which is not BERT's."""
    make_hf(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    needed = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    needed |= {"intermediate_size", "max_position_embeddings", "model_type", "id2label", "label2id"}
    path.write_text(json.dumps({k: v for k, v in written.items() if k in needed}))
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model, batch = DynaBertForSequenceClassification.from_pretrained(tmp_path), make_batch(family)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, hf.eval()(**batch).logits)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact(make_model, make_batch, tmp_path, family, base, dtype):
    model = make_model(family, base=base, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    equal(dict(again.state_dict()), dict(model.state_dict()))
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    first, second = (
        {k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (model, again)
    )
    assert first == second
    again.save_pretrained(tmp_path / "again")
    equal(load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_opens_in_transformers(make_hf, make_batch, tmp_path, family):
    """Theirs -> ours -> theirs: the same names, the same bits, the same function."""
    hf, batch = make_hf(family), make_batch(family)
    hf.save_pretrained(tmp_path / "theirs")
    model = DynaBertForSequenceClassification.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    equal(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    again, info = type(hf).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    equal(dict(again.state_dict()), dict(hf.state_dict()))
    encoder = type(hf.base_model).from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, hf(**batch).logits)
        want = hf.base_model(**batch).last_hidden_state
        assert torch.equal(encoder.eval()(**batch).last_hidden_state, want)


def test_a_loaded_model_does_not_hang_on_its_file(make_model, make_batch, tmp_path):
    """Weights mapped from the file would change when it is written to, or end the process."""
    make_model().save_pretrained(tmp_path)
    model, batch = DynaBertForSequenceClassification.from_pretrained(tmp_path), make_batch()
    want = model(**batch).logits
    path = tmp_path / WEIGHTS
    with path.open("r+b") as file:  # in place, as `cp` does
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(model(**batch).logits, want)


def test_saves_in_shards(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    equal(dict(again.state_dict()), dict(model.state_dict()))


def test_a_shard_is_not_loaded_by_itself(make_model, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    model = make_model(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {}
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        with pytest.raises(InputError, match="a shard cannot be loaded by itself"):
            model.load_state_dict(load_file(shard), strict=False)
        state |= load_file(shard)
    equal(dict(model.state_dict()), before)
    assert not model.load_state_dict(state).missing_keys


def test_a_device_map_of_one_device(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "whole")
    load = DynaBertForSequenceClassification.from_pretrained
    assert load(tmp_path / "whole", device_map="cpu").device.type == "cpu"
    parts = dict.fromkeys(("dynabert.embeddings", "dynabert.pooler", "classifier"), "cpu")
    spread = {**parts, "dynabert.encoder": "disk"}
    with pytest.raises(
        InputError, match="runs on one device, device_map spreads it over cpu, disk"
    ):
        load(tmp_path / "whole", device_map=spread, offload_folder=tmp_path / "disk")


def test_a_variant_and_a_state_dict(make_model, tmp_path):
    plain, other = make_model(seed=1), make_model(seed=2)
    plain.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="other")
    assert (tmp_path / "model.other.safetensors").is_file()
    load = DynaBertForSequenceClassification.from_pretrained
    equal(dict(load(tmp_path).state_dict()), dict(plain.state_dict()))
    equal(dict(load(tmp_path, variant="other").state_dict()), dict(other.state_dict()))
    with pytest.raises(InputError, match=r"allowed are model\.none\.safetensors or"):
        load(tmp_path, variant="none")
    state = load_file(tmp_path / "model.other.safetensors")
    for given in (state, other.state_dict()):
        equal(dict(load(tmp_path, state_dict=given).state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("max_positions", [24, 512])
def test_saves_whatever_the_longest_sequence(make_model, tmp_path, max_positions):
    model = make_model(max_position_embeddings=max_positions)
    model.save_pretrained(tmp_path)
    again = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.max_tokens == max_positions


def test_a_view_saves_the_whole_model(make_model, tmp_path):
    model = make_model()
    model.at(Subnet.from_multipliers(model.config, 0.25, 0.5)).save_pretrained(tmp_path)
    again = DynaBertForSequenceClassification.from_pretrained(tmp_path)
    equal(dict(again.state_dict()), dict(model.state_dict()))


def test_an_encoder_and_a_classifier_open_each_others_files(make_model, tmp_path):
    classifier = make_model()
    classifier.save_pretrained(tmp_path / "classifier")
    encoder = DynaBertModel.from_pretrained(tmp_path / "classifier")
    equal(dict(encoder.state_dict()), dict(classifier.dynabert.state_dict()))
    encoder.save_pretrained(tmp_path / "encoder")
    again = DynaBertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    equal(dict(again.dynabert.state_dict()), dict(encoder.state_dict()))


@pytest.mark.parametrize("base", [True, False], ids=["encoder", "classifier"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_names_load_into_a_living_model(make_model, tmp_path, family, base):
    """The Trainer resumes so: `load_state_dict` of the file's tensors."""
    model = make_model(family, base=base, seed=1)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    names = set(state)
    other = make_model(family, base=base, seed=2)
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    equal(dict(other.state_dict()), dict(model.state_dict()))
    assert set(state) == names  # the caller's dict is the caller's
    other.load_state_dict(make_model(family, base=base, seed=3).state_dict())  # and our own names


def test_strict_loading_still_names_what_is_missing(make_model, tmp_path):
    model = make_model()
    state = to_huggingface(model.state_dict(), model.config)
    del state["bert.encoder.layer.0.output.dense.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*ffn\.down\.bias"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [
        "dynabert.encoder.layer.0.ffn.down.bias"
    ]


# --- bad checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "of model type 'gpt2'; allowed are bert, roberta, xlm-roberta,"),
        ({"model_type": "distilbert"}, "of model type 'distilbert'"),
        ({"is_decoder": True}, "is a decoder"),
        ({"add_cross_attention": True}, "is a decoder"),
        ({"position_embedding_type": "relative_key"}, "has relative_key position embeddings"),
        ({"hidden_act": "silu"}, "hidden_act must be one of"),
    ],
)
def test_another_architecture_is_refused(make_hf, tmp_path, change, message):
    make_hf("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (
        DynaBertForSequenceClassification.from_pretrained,
        DynaBertModel.from_pretrained,
        DynaBertConfig.from_pretrained,
    ):
        with pytest.raises(InputError) as error:
            load(tmp_path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, "),
        ({"heads_per_layer": [4]}, "heads_per_layer must have one entry for each of the 4 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
    ],
)
def test_fields_that_are_set_on_loading_are_checked(make_model, tmp_path, change, message):
    make_model().save_pretrained(tmp_path)
    for load in (
        DynaBertForSequenceClassification.from_pretrained,
        DynaBertConfig.from_pretrained,
        transformers.AutoModelForSequenceClassification.from_pretrained,
    ):
        with pytest.raises(InputError) as error:
            load(tmp_path, **change)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def _truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _garbage_bin(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")


def _empty_bin(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def _missing_shard(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bad_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def _without_key(folder):
    name = "bert.encoder.layer.1.attention.self.key.weight"
    rewrite(folder, lambda state: {k: v for k, v in state.items() if k != name})


def _other_head_size(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_size": 7}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors cannot be read"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors cannot be read"),
        (_garbage_bin, "pytorch_model.bin cannot be read"),
        (_empty_bin, "pytorch_model.bin cannot be read"),
        (_missing_shard, "lacks model-00001-of-00001.safetensors"),
        (_bad_index, "model.safetensors.index.json cannot be read"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no weights; allowed are model.safetensors or"),
        (_without_key, "lacks encoder.layer.1.attention.self.key.weight"),
        (_other_head_size, "a multiple of the head size 7, got [24, 24, 24]"),
    ],
    ids=[
        "truncated",
        "empty",
        "garbage bin",
        "empty bin",
        "missing shard",
        "bad index",
        "no weights",
        "a tensor missing",
        "heads of another size",
    ],
)
def test_a_damaged_checkpoint_is_one_clear_sentence(make_hf, tmp_path, damage, message):
    make_hf("bert").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        DynaBertForSequenceClassification.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_feed_forward_tensor_is_reported_not_hidden(make_hf, tmp_path):
    make_hf("bert").save_pretrained(tmp_path)
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite(tmp_path, lambda state: {k: v for k, v in state.items() if k != name})
    _, info = DynaBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"dynabert.encoder.layer.1.ffn.down.weight_t"}


def test_unknown_tensors_are_reported_not_swallowed(make_hf, tmp_path):
    make_hf("bert").save_pretrained(tmp_path)
    extra = {"bert.encoder.layer.1.adapter.weight": torch.ones(2), "other.bias": torch.ones(2)}
    rewrite(tmp_path, lambda state: state | extra)
    _, info = DynaBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {
        "dynabert.encoder.layer.1.adapter.weight",
        "other.bias",
    }


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        DynaBertForSequenceClassification.from_pretrained(tmp_path)
