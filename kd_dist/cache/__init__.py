"""The cache of soft labels: one HDF5 file that describes itself, proves itself complete and refuses the wrong data."""

from kd_dist.cache.card import LabelCard, card_of, render_info
from kd_dist.cache.combine import bare, combine
from kd_dist.cache.format import TOP_K, VIEW_FEATURES, Header, Table, TeacherRow, mean_of, rows_of
from kd_dist.cache.mixed import MIXED_VIEWS, Mixed
from kd_dist.cache.parts import BLOCK_SAMPLES, Block, blocks
from kd_dist.cache.reader import Cache, LabelledTable, SoftLabels, open_cache
from kd_dist.cache.topk import TopK, require_temperature
from kd_dist.cache.writer import BlockWriter

__all__ = [
    "BLOCK_SAMPLES",
    "MIXED_VIEWS",
    "TOP_K",
    "VIEW_FEATURES",
    "Block",
    "BlockWriter",
    "Cache",
    "Header",
    "LabelCard",
    "LabelledTable",
    "Mixed",
    "SoftLabels",
    "Table",
    "TeacherRow",
    "TopK",
    "bare",
    "blocks",
    "card_of",
    "combine",
    "mean_of",
    "open_cache",
    "render_info",
    "require_temperature",
    "rows_of",
]
