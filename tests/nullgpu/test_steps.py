"""A step and its input: no tensor on the wrong device, no wait of the host."""

import pytest

from kd_dist.models import STUDENTS, TEACHERS
from kd_dist.training.losses import SOFT_LOSSES


@pytest.mark.parametrize(("model", "loss"), [
    *((model, "hard") for model in (*TEACHERS, *STUDENTS)),
    *(("cnn5", loss) for loss in SOFT_LOSSES),
])  # fmt: skip
def test_the_host_waits_for_nothing(simulated, model, loss):
    assert simulated("step", model, loss)["launches"] > 0
