from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynabert_fast.engine import load
from dynabert_fast.models import DynaBertForSequenceClassification, DynaBertModel


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_file_is_what_pack_makes(cli, checkpoints, tmp_path, ids, dtype):
    output = tmp_path / "deep" / "model.dynabert"
    result = cli("pack", checkpoints["classifier"], "--dtype", dtype, "--output", output)
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.out == f"saved: {output} ({dtype}, {output.stat().st_size:,} bytes)\n"
    assert list(output.parent.iterdir()) == [output]
    engine = load(output, verify=True)
    assert engine.config.dtype == dtype
    assert engine.config.label_names == ("good", "bad")
    model = DynaBertForSequenceClassification.from_pretrained(checkpoints["classifier"])
    assert torch.equal(engine(ids).logits, model.pack(dtype)(ids).logits)


def test_default_is_int8(cli, checkpoints, tmp_path):
    output = tmp_path / "model"
    assert cli("pack", checkpoints["regressor"], "--output", output).code == 0
    assert load(output).config.dtype == "int8"
    assert load(output).config.num_labels == 1


def test_an_encoder(cli, checkpoints, tmp_path, ids):
    output = tmp_path / "model"
    words = ("pack", checkpoints["pretrained"], "--dtype", "fp32", "--output", output)
    result = cli(*words)
    assert result.code == 0, result.err
    model = DynaBertModel.from_pretrained(checkpoints["pretrained"]).eval()
    with torch.no_grad():
        want = model(ids)
    got = load(output)(ids)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)
    torch.testing.assert_close(got.pooler_output, want.pooler_output)


@pytest.fixture
def lacking(checkpoints, tmp_path):
    """`lacking(prefix)`: the pretrained encoder without some of its weights."""

    def make(prefix):
        folder = shutil.copytree(checkpoints["pretrained"], tmp_path / "lacking")
        state = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in state.items() if not k.startswith(prefix)}
        assert len(kept) < len(state)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_an_encoder_without_a_pooler(cli, lacking, checkpoints, tmp_path, ids):
    output = tmp_path / "model"
    result = cli("pack", lacking("pooler."), "--dtype", "bf16", "--output", output)
    assert result.code == 0, result.err
    assert result.out.startswith("note: the checkpoint has no pooler; pooler_output will be 0\n")
    whole = DynaBertModel.from_pretrained(checkpoints["pretrained"]).pack("bf16")(ids)
    got = load(output)(ids)
    assert torch.equal(got.last_hidden_state, whole.last_hidden_state)
    assert not got.pooler_output.any()


def test_an_encoder_without_a_layer(refused, lacking, tmp_path):
    folder = lacking("encoder.layer.2.")
    assert "has no encoder.layer.2." in refused("pack", folder, "--output", tmp_path / "model")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "folder exists; name another file, or delete it first"),
        ("file", "file exists; name another file, or delete it first"),
        ("link", "link exists; name another file, or delete it first"),
        ("file/model", "file is a file; name a folder"),
    ],
    ids=["folder", "file", "dangling link", "in a file"],
)
def test_output_that_exists(refused, checkpoints, tmp_path, output, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    assert message in refused("pack", checkpoints["classifier"], "--output", tmp_path / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nope", "--output", "x"), "nope is not a folder, and from the hub it"),
        (("./nope", "--output", "x"), "./nope does not exist"),
        (("x", "--dtype", "fp16", "--output", "x"), "invalid choice: 'fp16'"),
        (("x",), "the following arguments are required: --output"),
    ],
    ids=["no checkpoint", "no folder", "type", "no output"],
)
def test_bad_arguments(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("pack", *words)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(cli, checkpoints, tmp_path, file_size_limit):
    output = tmp_path / "model"
    with file_size_limit(10_000):
        result = cli("pack", checkpoints["classifier"], "--output", output)
    assert result.code == 1
    assert result.err.startswith(f"dynabert-fast: error: could not save {output} (")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_weights_that_are_not_finite(refused, make_checkpoint, tmp_path, dtype):
    folder = make_checkpoint(tmp_path / "checkpoint", ("good", "bad"))
    model = DynaBertForSequenceClassification.from_pretrained(folder)
    model.dynabert.pooler.dense.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    words = ("pack", folder, "--dtype", dtype, "--output", tmp_path / "model")
    name = "bert.pooler.dense.weight"
    assert f"weights must be finite, and {name} has NaN" in refused(*words)
    assert list(tmp_path.iterdir()) == [folder]
