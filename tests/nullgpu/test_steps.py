"""A step and its input on a simulated GPU: no tensor on the wrong device, no host wait, bounded launches and bytes."""

import pytest

from kd_dist.models import STUDENTS, TEACHERS
from kd_dist.training.losses import SOFT_LOSSES


@pytest.mark.parametrize(("model", "loss", "images", "pixels"), [
    *((model, "hard", "fresh", "device") for model in (*TEACHERS, *STUDENTS)),
    *(("cnn5", loss, "plain", "device") for loss in SOFT_LOSSES),
    ("cnn5", "kl", "mixed", "device"),
    *(("cnn5", "kl", images, "memory") for images in ("plain", "mixed")),
    ("cnn5", "hard", "fresh", "memory"),
])  # fmt: skip
def test_the_host_waits_for_nothing(simulated, model, loss, images, pixels):
    assert simulated("step", model, loss, images, pixels)["launches"] > 0


def test_launches_of_a_step_are_bounded(simulated):
    """A GPU that is done sooner waits for the host, which needs some microseconds a launch."""
    assert simulated("step", "cnn5", "kl", "plain", "device")["launches"] <= 145
    assert simulated("step", "resnet18", "hard", "fresh", "device")["launches"] <= 325


def test_bytes_of_a_step_are_bounded(simulated):
    """Of an image of 16 at 128 px, the update of the weights included. Half are max pooling's: docs/decisions/0026."""
    assert simulated("step", "cnn5", "kl", "plain", "device", 128)["step_bytes"] <= 26e6
