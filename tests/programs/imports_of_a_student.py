"""What the student's process has imported before and after a torchvision network."""

import sys

from kd_dist import models

for name in ("cnn5", "own_nets:build"):
    models.require_known(name)
    models.require_usable(name, models.build(name, 3), 3, 32)
print(sorted({"torchvision", "timm"} & set(sys.modules)))
models.build("torchvision:alexnet", 3)
print(sorted({"torchvision", "timm"} & set(sys.modules)))
