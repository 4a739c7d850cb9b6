"""The input of a step on a simulated GPU: launches, bytes an image, memory; no wait, no tensor on the wrong device."""

import pytest

IMAGEWOOF = (160, 213)
LARGE = (375, 500)


def test_an_input_of_imagewoof_is_few_launches_and_bytes(simulated):
    found = simulated("input", "device", 0, 128, *IMAGEWOOF)
    assert found["launches"] <= 20
    assert found["mb_an_image"] <= 5
    assert found["copies_to_device"] <= 2


@pytest.mark.parametrize("mix", [0.25, 0.5])
def test_mixes_add_few_launches(simulated, mix):
    found = simulated("input", "device", mix, 128, *IMAGEWOOF)
    assert found["launches"] <= 34
    assert found["mb_an_image"] <= 5 * (1 + 2 * mix) + 2


@pytest.mark.parametrize("mix", [0, 0.25])
def test_images_drawn_by_the_host_are_two_copies_and_one_kernel(simulated, mix):
    assert simulated("input", "host", mix, 32, *IMAGEWOOF)["launches"] <= 3


@pytest.mark.parametrize("size", [128, 224])
def test_a_few_large_images_at_most_double_the_cost(simulated, size):
    alone = simulated("input", "device", 0, size, *LARGE)
    mixed = simulated("input", "device", 0, size, *LARGE, 2000, 3000)
    assert mixed["launches"] <= 2 * alone["launches"] and alone["launches"] <= 66
    assert mixed["mb_an_image"] <= 2 * alone["mb_an_image"] and alone["mb_an_image"] <= 35
    for found in (alone, mixed):
        assert found["peak_bytes"] <= found["work_bytes"] + found["result_bytes"]
