"""As sitecustomize of a study's ranks: the loss of T 8 fails with a sentence, that of alpha 0.25 with a defect, that of
alpha 0.125 kills its rank, and the baseline's waits at each step, so that a signal meets it.
"""

import os
import signal
import sys
import time


class _Patch:
    """Changes kd_dist.distill once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "kd_dist.study.runs":
            sys.meta_path.remove(self)
            from kd_dist import distill
            from kd_dist.errors import UserError

            original = distill.loss_of

            def loss_of(settings, classes):
                if settings.distillation.temperature == 8:
                    raise UserError("the loss is not finite.")
                if settings.distillation.alpha == 0.25:
                    return 1 / 0
                if settings.distillation.alpha == 0.125:
                    os.kill(os.getpid(), signal.SIGKILL)
                terms = original(settings, classes)
                if settings.distillation.alpha:
                    return terms

                def slow(model, batch):
                    time.sleep(2)
                    return terms(model, batch)

                return slow

            distill.loss_of = loss_of


sys.meta_path.insert(0, _Patch())
