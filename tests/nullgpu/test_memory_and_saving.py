"""Training's use of memory, streams and launches on a GPU."""

import pytest


@pytest.mark.parametrize("streams", ["one", "many"])
def test_reserved_memory_is_flat_over_many_epochs(simulated, streams):
    """A stream for each epoch, the control, makes it climb: the allocator keeps the blocks of each stream apart.

    Not flat to the byte, because crops of other sizes come up.
    """
    reserved = simulated("memory", 64, streams)["reserved"]
    assert (max(reserved) < 1.5 * reserved[1]) == (streams == "one")


def test_the_host_is_at_most_three_steps_ahead_of_the_gpu(simulated):
    """The step it enqueues and two before it."""
    assert max(simulated("ahead")["unfinished"]) == 2


def test_a_snapshot_lies_in_pinned_memory_and_costs_the_host_no_wait(simulated):
    facts = simulated("checkpoint")
    assert facts["same"] and any(facts["on_gpu"])
    assert facts["pinned"] == facts["on_gpu"]  # counters of batches are on the host
