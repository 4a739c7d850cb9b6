"""The digest that binds a cache, or a run, to its images: their paths, labels and contents in their order."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

UNKNOWN = -1  # the label of an image without one, or whose label is not used


def fingerprint_of(paths: Sequence[str], labels_N: np.ndarray, sha256_N32: np.ndarray) -> str:
    """Hex SHA-256 over the samples in order, each as four fields without gaps:

    the path's length in bytes (unsigned 64 bit), the path in UTF-8, the label (signed 64 bit), the 32 bytes of the
    content's SHA-256; integers little-endian. The length in front keeps two lists from giving the same bytes.
    """
    digest = hashlib.sha256()
    for path, label, sha256_32 in zip(paths, labels_N, sha256_N32, strict=True):
        name = path.encode()
        digest.update(struct.pack("<Q", len(name)) + name + struct.pack("<q", label) + sha256_32.tobytes())
    return digest.hexdigest()
