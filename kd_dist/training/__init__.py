"""How a network learns: the one training loop, its optimiser, its input on a GPU, and what it saves as it goes.

Teacher, hard-label baseline and distilled student differ in the data and the loss that are handed in, not in here. This
package knows neither settings nor command lines.
"""

from kd_dist.training.optimiser import Optimisation
from kd_dist.training.saving import HEARTBEAT_SECONDS
from kd_dist.training.trainer import Evaluate, Execution, LossTerms, Trainer

__all__ = ["HEARTBEAT_SECONDS", "Evaluate", "Execution", "LossTerms", "Optimisation", "Trainer"]
