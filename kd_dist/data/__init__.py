"""Which images there are: layouts, the list of a set's images, releases, downloads, the demo data set, folds.

This package knows no pixels, no network and no config.
"""
