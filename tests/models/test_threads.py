"""Two sub-networks of one model at once: nothing about a call is kept in the model."""

from __future__ import annotations

import threading

import pytest
import torch

from dynabert_fast.subnet import Subnet, grid

ROUNDS = 30


def run_at_once(*jobs):
    """Run every job `ROUNDS` times, all in step; returns each job's results."""
    barrier = threading.Barrier(len(jobs))
    results = [[] for _ in jobs]

    def work(job, out):
        for _ in range(ROUNDS):
            barrier.wait(timeout=60)
            out.append(job())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(r) for r in results] == [ROUNDS] * len(jobs)
    return results


@pytest.mark.parametrize("how", ["argument", "views"])
def test_two_subnets_of_one_model_at_once(make_model, make_batch, how):
    model, batch = make_model(dtype=torch.float64), make_batch()
    subnets = (
        Subnet.from_multipliers(model.config, 0.25, 0.5),
        Subnet.from_extents(model.config, (0, 1, 3), (4, 1, 3), (40, 3, 11)),
    )

    def job(subnet):
        view = model.at(subnet)

        def run():
            with torch.no_grad():
                if how == "views":
                    return view(**batch).logits
                return model(**batch, subnet=subnet).logits

        return run

    jobs = [job(subnet) for subnet in subnets]
    wants = [run() for run in jobs]
    assert (wants[0] - wants[1]).abs().max() > 1e-2
    for results, want in zip(run_at_once(*jobs), wants, strict=True):
        for got in results:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients_at_once(make_model, make_batch):
    """Gradients taken in two threads do not mix: each is asked for by itself."""
    model, batch = make_model(dtype=torch.float64), make_batch(labels=True)
    weight = model.dynabert.encoder.layer[0].ffn.up.weight

    def job(subnet):
        return lambda: torch.autograd.grad(model(**batch, subnet=subnet).loss, weight)[0]

    jobs = [job(Subnet.from_multipliers(model.config, width)) for width in (0.25, 0.75)]
    wants = [run() for run in jobs]
    for results, want in zip(run_at_once(*jobs), wants, strict=True):
        for got in results:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_fresh_model_meets_all_subnets_at_once(make_model, make_batch):
    """The first use of a sub-network, where the model checks it, may happen in several threads."""
    model, batch = make_model(dtype=torch.float64), make_batch()
    subnets = grid(model.config)[:4]
    twin = make_model(dtype=torch.float64)
    with torch.no_grad():
        wants = [twin(**batch, subnet=s).logits for s in subnets]

    def job(subnet):
        def run():
            with torch.no_grad():
                return model(**batch, subnet=subnet).logits

        return run

    for results, want in zip(run_at_once(*map(job, subnets)), wants, strict=True):
        torch.testing.assert_close(torch.stack(results), want.expand(ROUNDS, -1, -1))
