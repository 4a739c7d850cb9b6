"""The cache of soft labels: one HDF5 file that describes itself, carries its checksums and refuses the wrong data."""

from kd_dist.cache.combine import combine
from kd_dist.cache.format import TABLE_FEATURES, TOP_K, UNLABELLED_IMAGES, Header, Table, TeacherRow, mean_of
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.plan import BLOCK_SAMPLES, Block, CachePlan, check_top_k
from kd_dist.cache.reader import Cache, LabelledTable, SoftLabels, open_cache
from kd_dist.cache.statistics import LabelStatistics, render_info, statistics_of
from kd_dist.cache.topk import TopK, require_temperature
from kd_dist.cache.writer import BlockWriter

__all__ = [
    "BLOCK_SAMPLES",
    "MIXED_VIEWS",
    "TABLE_FEATURES",
    "TOP_K",
    "UNLABELLED_IMAGES",
    "Block",
    "BlockWriter",
    "Cache",
    "CachePlan",
    "Header",
    "LabelStatistics",
    "LabelledTable",
    "Mixed",
    "SoftLabels",
    "Table",
    "TeacherRow",
    "TopK",
    "check_top_k",
    "combine",
    "mean_of",
    "open_cache",
    "render_info",
    "require_temperature",
    "statistics_of",
]
