"""Build and run all students where torchvision cannot be imported."""

import sys

sys.modules["torchvision"] = None  # importing it raises
import torch  # noqa: E402

from kd_dist.models import STUDENTS  # noqa: E402

for build in STUDENTS.values():
    build(10).eval()(torch.zeros(1, 3, 64, 64))
print(sorted({"torchvision", "kd_dist.teacher", "kd_dist.label"} & {m for m in sys.modules if sys.modules[m]}))
