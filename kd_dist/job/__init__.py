"""What the jobs do around training, each subject in a module of its own: begin (`entry`), open the data (`data`),
choose its images (`selection`), refuse what cannot work (`checks`), report progress (`progress`) and how they
ended (`lifecycle`), train (`training`), score (`validation`) and keep the result (`result`).

It knows configs, which the packages below it do not, and neither of the two jobs.
"""

from kd_dist.job.checks import batch_warnings, require_trainable, start_from
from kd_dist.job.data import Data, open_data
from kd_dist.job.entry import claim_folder, read_config, stored_settings
from kd_dist.job.lifecycle import emit, heartbeat, running
from kd_dist.job.progress import PROGRESS_SECONDS, progress_by_name, progress_lines, say
from kd_dist.job.result import keep, keep_model
from kd_dist.job.selection import Scored, fold_for, labelled_of, members_of, scored_on
from kd_dist.job.training import Supervision, Training, compose_training, execution_of, fresh_crops, optimisation_of
from kd_dist.job.validation import Validation, top1

__all__ = [
    "PROGRESS_SECONDS",
    "Data",
    "Scored",
    "Supervision",
    "Training",
    "Validation",
    "batch_warnings",
    "claim_folder",
    "compose_training",
    "emit",
    "execution_of",
    "fold_for",
    "fresh_crops",
    "heartbeat",
    "keep",
    "keep_model",
    "labelled_of",
    "members_of",
    "open_data",
    "optimisation_of",
    "progress_by_name",
    "progress_lines",
    "read_config",
    "require_trainable",
    "running",
    "say",
    "scored_on",
    "start_from",
    "stored_settings",
    "top1",
]
