"""How work is split over a GPU: from shapes alone, and within what the kernels can do."""

import itertools

import pytest
import torch

from sparsekv.ops import plans
from sparsekv.ops.formulas import kernel_of, with_kernels
from sparsekv.ops.launch import Gpu
from sparsekv.ops.plans import MAX_SPLITS, Split, fitted, max_warps, split_attention, split_latents, split_step

H200, A100, B200, RTX = (
    Gpu(132, (9, 0), 220_000),
    Gpu(108, (8, 0), 150_000),
    Gpu(148, (10, 0), 220_000),
    Gpu(170, (12, 0), 90_000),
)


@pytest.mark.parametrize("gpu", [H200, A100, B200, RTX], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 32, 128, 512, 5000])
@pytest.mark.parametrize("units", [1, 8, 128, 8192, 65536])
def test_attention_is_split_within_bounds(gpu: Gpu, rows: int, units: int) -> None:
    split = split_attention(gpu, rows, units, 16)
    assert 1 <= split.ctas <= (gpu.max_cluster if split.clustered else MAX_SPLITS)
    assert split.warps in (8, 16)
    assert split.clustered or split.ctas > 1  # else a second launch would have nothing to merge


@pytest.mark.parametrize("gpu", [H200, A100, B200, RTX], ids=str)
def test_latents_are_split_over_lone_ctas(gpu: Gpu) -> None:
    for head_dim, rows in itertools.product((288, 576), (1, 8, 64, 5000)):
        splits = [split_latents(gpu, rows, units, head_dim) for units in (1, 128, 8192)]
        assert [split.cluster for split in splits] == [1] * 3
        assert splits[0].ctas == 1  # which leaves its part to merge_attention like all others
        assert splits[1].ctas * 2 <= max(128, 2)
        assert splits[2].ctas * rows <= max(2 * gpu.sms, rows)


@pytest.mark.parametrize("gpu", [H200, A100, B200, RTX], ids=str)
@pytest.mark.parametrize("name", with_kernels())
def test_scoring_fits_the_shared_memory(gpu: Gpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "gpu", lambda device: gpu)
    kernel = kernel_of(name)
    assert kernel is not None
    for head_dim, group in itertools.product((64, 256, 576), (4, 16)):
        if kernel.of_latents or head_dim < 576:
            plan = plans.score_plan.__wrapped__(0, torch.bfloat16, 3, 8, head_dim, group, kernel, 4096)
            assert plan.shared <= gpu.shared
            assert 8 % plan.heads == plan.warps % plan.heads == 0


def test_long_work_fills_the_gpu_and_short_work_merges_in_one_launch() -> None:
    assert split_attention(H200, 8, 8192, 16).ctas * 8 >= 2 * 120
    assert not split_attention(H200, 8, 8192, 16).clustered
    assert split_attention(H200, 8, 128, 16).clustered
    assert split_attention(A100, 8, 128, 16) == Split(16, False, 8)  # no clusters there


def test_the_step_takes_the_largest_cluster_of_which_all_run_at_once() -> None:
    fits = {1: 132, 2: 66, 3: 42, 4: 28, 8: 14, 9: 14, 16: 7}
    for rows, ctas in [(7, 16), (8, 9), (14, 9), (28, 4), (32, 3), (128, 1), (132, 1)]:
        assert split_step(H200, rows, 16, lambda c, warps: fits.get(c, 0)).ctas == ctas
    crowded = split_step(H200, 512, 16, lambda c, warps: fits.get(c, 0))
    assert (crowded.ctas, crowded.warps) == (1, 8)  # two CTAs to an SM, so that one works while the other waits


def test_a_step_that_reads_everything_takes_few_warps() -> None:
    assert split_step(H200, 8, 16, lambda c, warps: 100, fits=True) == Split(8, True, 8)
    assert split_step(RTX, 2, 16, lambda c, warps: 100, fits=True) == Split(8, True, 8)


def test_registers_limit_the_warps() -> None:
    assert [max_warps(d, g) for d, g in [(64, 8), (128, 8), (64, 9), (128, 9), (256, 1)]] == [16, 16, 16, 8, 8]


def test_small_shared_memory_means_fewer_warps() -> None:
    small = Gpu(84, (8, 6), shared=90_000)
    assert fitted(Split(4, True, 8), small, lambda split: split.warps * 16_384).warps == 4
    assert fitted(Split(4, True, 8), small, lambda split: split.warps * 1_000_000).warps == 2
    assert fitted(Split(4, True, 8), H200, lambda split: split.warps * 16_384).warps == 8
