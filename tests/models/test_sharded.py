"""FSDP2: two processes with parts of the weights have the gradients of one with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from dynabert_fast.models import DynaBertConfig, DynaBertForSequenceClassification
from dynabert_fast.subnet import grid
from dynabert_fast.tree import SubnetTree

LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def make_model() -> DynaBertForSequenceClassification:
    config = DynaBertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=44,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return DynaBertForSequenceClassification(config).double()


def work() -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    whole, model = make_model(), make_model()
    for layer in model.base_model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    ids, labels = torch.randint(3, 60, (8, 7)), torch.randint(0, 3, (8,))
    mine = slice(4 * rank, 4 * rank + 4)
    subnets = grid(model.config)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    for trees in ([SubnetTree(subnets)], [SubnetTree(subnets[:4]), SubnetTree(subnets[4:])]):
        for tree in trees:
            whole(input_ids=ids, labels=labels, subnet=tree).loss.backward()
            model(input_ids=ids[mine], labels=labels[mine], subnet=tree).loss.backward()
        for (name, want), got in zip(whole.named_parameters(), model.parameters(), strict=True):
            assert want.grad is not None, name
            assert got.to_local().numel() < want.numel(), f"{name} is not sharded"
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=name)
        for optimizer in optimizers:  # the second step begins with other weights
            optimizer.step()
            optimizer.zero_grad()
    distributed.destroy_process_group()


if __name__ == "__main__":
    work()
    os._exit(0)  # gloo's threads may abort a process that is done


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each():
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *LAUNCH, Path(__file__)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
