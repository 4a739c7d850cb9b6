"""Networks of a user: two that work, and each way to be wrong."""

from torch import nn


def build(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def without_head(classes):
    return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def features(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def large_images_alone(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 20), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


class Changed(nn.Module):
    def __init__(self, classes, change):
        super().__init__()
        self.network, self.change = build(classes), change

    def forward(self, images):
        return self.change(self.network(images), self)


def a_pair(classes):
    return Changed(classes, lambda logits, own: (logits, logits) if own.training else logits)


def a_number(classes):
    return Changed(classes, lambda logits, own: logits.mean())


def whole_numbers(classes):
    return Changed(classes, lambda logits, own: logits.long())


def infinite(classes):
    return Changed(classes, lambda logits, own: logits / 0)


def not_for_training(classes):
    return Changed(classes, lambda logits, own: 1 / 0 if own.training else logits)


def frozen(classes):
    return build(classes).requires_grad_(False)


def unused(classes):
    network = Changed(classes, lambda logits, own: logits)
    network.extra = nn.Linear(2, 2)
    return network


def broken(classes):
    raise KeyError("depth")


def no_arguments():
    return build(10)


def no_network(classes):
    return classes


SIZES = [1, 2]
