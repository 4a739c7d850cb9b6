"""Step times, waits and peaks: each is what its name says, over all ranks."""

import torch
from torch import nn

from kd_dist.training import health, watch
from kd_dist.training.health import RankHealth
from kd_dist.training.watch import EpochSums, LossWatch, StepClock

CPU = torch.device("cpu")


def rank(wait_s=1.0, own_s=3.0, step_worst_s=0.5, step_median_s=0.1) -> RankHealth:
    return RankHealth(step_median_s, step_worst_s, wait_s, own_s, host_bytes=7, device_bytes=0)


def test_the_slowest_rank_is_the_one_with_most_work_of_its_own():
    ranks = [rank(), rank(wait_s=2.0, own_s=9.0, step_median_s=0.2), rank(step_worst_s=0.9), rank()]
    assert health.metrics_of(ranks, train_s=10.0) == {
        "data_wait_s": 2.0,
        "data_wait_share": 0.2,
        "step_median_s": 0.1,
        "step_worst_s": 0.9,
        "slowest_rank": 1,
        "slowest_rank_extra_share": 0.6,
        "host_memory_peak_bytes": 7,
    }


def test_an_epoch_whose_steps_were_taken_before_a_resume_has_no_health():
    assert health.health_of(StepClock(CPU), EpochSums()) is None
    assert health.metrics_of([None, None], 10.0) == {}


def test_steps_are_counted_from_end_to_end_and_a_pause_is_no_step(monkeypatch):
    clock = StepClock(CPU)
    clock.add(0.0, 0.25, 1.0)
    clock.add(1.5, 2.0, 3.0)
    clock.read()
    clock.pause()  # a save, for 97 seconds
    clock.add(100.0, 100.5, 101.0)
    clock.read()
    assert clock.steps_s == [1.0, 2.0, 1.0] and clock.forward_s == 1.25


def test_waiting_for_data_counts_the_loader_alone(monkeypatch):
    """What is done with a batch, on a GPU waiting for earlier steps too, is no wait for data."""
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)

    def loader():
        nonlocal now
        for batch in range(3):
            now += 2.0
            yield batch

    sums = EpochSums()
    for _ in sums.waited_for(loader()):
        now += 100.0
    assert sums.wait_seconds == 6.0


def test_the_gradients_norm_is_that_of_all_weights_together_and_is_fetched_once():
    model, losses = nn.Linear(2, 1), LossWatch()
    model.weight.grad, model.bias.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([6.0])
    losses.note_gradient(model)
    assert losses.fetch_grad_norm() == 7.0 and losses.fetch_grad_norm() is None


def test_operations_of_a_convolution_are_counted_for_forward_and_backward():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 6 * 6, 5, bias=False))
    convolution, linear = 2 * 3 * 4 * 9 * 6 * 6, 2 * 4 * 6 * 6 * 5
    # The first layer's backward pass has no gradient of the images.
    assert health.flops_an_image(network, 8) == 2 * convolution + 3 * linear
    assert health.flops_an_image(nn.Linear(2, 3), 8) is None


def test_the_longest_name_that_fits_gives_the_peak(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA A10G": None,
        "some GPU": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert health.peak_of(torch.device("cuda", 0), "bfloat16") == peak
        assert health.peak_of(torch.device("cuda", 0), "float32") is None
    assert health.peak_of(CPU, "bfloat16") is None
