"""Our own networks by name: TEACHERS and STUDENTS, each a function of the number of classes.

Only the teachers need torchvision, and it is imported when one is built: a student's process does not, unless it is
asked for such a network.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class Float32Linear(nn.Linear):
    """A linear layer that keeps out of autocast, so that logits are not rounded to bfloat16. For the last layer of
    every network.
    """

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            return super().forward(features_BD.to(self.weight.dtype))


class Cnn5(nn.Module):
    """Five convolutions, each conv -> 2x2 max pool -> BatchNorm -> ReLU, then global average pooling and one linear
    layer.

    With the default channels, 3x3 kernels and ten classes: 1,574,698 weights. Pooling comes first so that the
    normalisation works on a quarter of the pixels.
    """

    def __init__(
        self,
        classes: int,
        channels: tuple[int, ...] = (32, 64, 128, 256, 512),
        kernels: tuple[int, ...] | None = None,
    ):
        super().__init__()
        sides = zip((3, *channels[:-1]), channels, kernels or (3,) * len(channels), strict=True)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False) for before, after, kernel in sides
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in channels)
        self.pool = nn.MaxPool2d(2)
        self.classifier = Float32Linear(channels[-1], classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = images_BCHW
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = relu(norm(self.pool(convolution(x))))
        return self.classifier(x.mean(dim=(2, 3)))


def cnn5_wide(classes: int) -> nn.Module:
    """Cnn5 with its weights moved to the early layers, which see finer maps, and a wider view there: 1,541,450 weights
    at ten classes, several times the work of the default.
    """
    return Cnn5(classes, (64, 128, 192, 256, 288), (5, 5, 3, 3, 3))


def origin_cnn(classes: int) -> nn.Module:
    """The student of the project this one descends from, rebuilt from its description: 5.28 M weights at ten classes.

    Its flattened map is 6x6 at 224 px. The pooling to 6x6 is the identity there, and lets the network run at other
    sizes.
    """
    return nn.Sequential(
        *[nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(64, 128, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(128)],
        *[nn.Conv2d(128, 264, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(264)],
        *[nn.AdaptiveAvgPool2d(6), nn.Flatten()],
        *[nn.Linear(264 * 36, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), Float32Linear(64, classes)],
    )


def resnet18(classes: int) -> nn.Module:
    """torchvision's ResNet18 from random weights (He et al. 2016): the first layers reduce the image four times."""
    from torchvision.models import resnet18 as build

    model = build(weights=None, num_classes=classes)
    model.fc = Float32Linear(model.fc.in_features, classes)
    return model


def resnet18_s1(classes: int) -> nn.Module:
    """ResNet18 with a stride-1 3x3 first convolution, its max pool kept: half the reduction, four times the work at a
    given size.
    """
    model = resnet18(classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


TEACHERS = {"resnet18": resnet18, "resnet18_s1": resnet18_s1}
STUDENTS = {"cnn5": Cnn5, "cnn5_wide": cnn5_wide, "origin": origin_cnn}


def count_weights(model: nn.Module) -> int:
    """Number of trained values in a model."""
    return sum(parameter.numel() for parameter in model.parameters())
