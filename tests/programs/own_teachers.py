"""Teachers of a user."""

from kd_dist.models import Cnn5


def small(classes):
    return Cnn5(classes, (4, 8))


def of_five(classes):
    return Cnn5(5, (4, 8))
