"""Copies between the machine's memory and a GPU's, and that a GPU gives what a CPU gives."""

from __future__ import annotations

import pytest
import torch
from networks import make_network, make_vector, tune, write_recipe

from hf_datavec import copies, fuse
from hf_datavec.pipeline.prepare import prepare

METHODS = ("mean", "ties", "dare_ties", "median", "breadcrumbs", "sce", "magmax", "tsv", "iso_c", "geometric_median")


def test_rows_are_stacked_in_the_room_that_the_last_ones_took():
    rows = [torch.arange(5.0), torch.ones(5)]
    first = copies.stacked(rows, "cpu")
    again = copies.stacked([row + 1 for row in rows], "cpu", first)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, torch.stack(rows) + 1)
    shorter = copies.stacked([row[:2] for row in rows], "cpu", again)
    assert torch.equal(shorter, torch.stack(rows)[:, :2])


def test_a_single_row_is_not_copied_and_what_it_stands_in_is_never_written_to():
    row = torch.arange(5.0)
    alone = copies.stacked([row], "cpu")
    assert alone.shape == (1, 5)
    assert alone.data_ptr() == row.data_ptr()
    assert copies.stacked([torch.ones(5)], "cpu", alone).tolist() == [[1.0] * 5]
    assert row.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("device", "found"), [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False)])
def test_a_gpu_is_told_by_the_name_of_its_kind(device, found):
    assert copies.is_gpu(device) == found
    assert copies.is_gpu(torch.device(device)) == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_what_a_cpu_gives(method, tmp_path):
    base = make_network("test_resnet", tmp_path / "base")
    for site in range(4):
        make_vector(base, tune(base, tmp_path / f"tuned-{site}", seed=site), tmp_path / f"site-{site}")
    entries = [f"./site-{site}" for site in range(4)]
    plan = prepare(write_recipe(tmp_path / "r.yaml", base="./base", vectors=entries, merge={"method": method})).plan
    expected = dict(fuse.run(plan, device="cpu"))
    for name, tensor in fuse.run(plan, device="cuda"):
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
