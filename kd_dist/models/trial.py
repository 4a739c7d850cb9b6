"""A network is tried on one small batch before a job begins: what it gives, and from which image size on."""

import copy

import torch
from torch import Tensor, nn

from kd_dist.errors import UserError
from kd_dist.functions import cause

LARGEST_TRIED_SIZE = 257  # pixels a side, in search of one that a network takes
TRIED_IMAGES = 2  # BatchNorm needs two
REFUSALS = (RuntimeError, AssertionError, ValueError)  # what networks raise where an image is too small for them


def require_usable(name: str, model: nn.Module, classes: int, size: int) -> None:
    """Raise UserError unless a network turns images [B, 3, size, size] into logits [B, K], of a floating type and
    finite, when it is evaluated and when it trains, and every weight that is trained gets a gradient.

    The network is left as it is, and so are torch's random numbers.
    """
    require_image_size(size, model, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images_BCHW = torch.randn(TRIED_IMAGES, 3, size, size)
        tried = copy.deepcopy(model)
        with torch.inference_mode():
            _require_logits(name, tried.eval()(images_BCHW), classes)
        try:
            logits_BK = tried.train()(images_BCHW)
        except Exception as error:
            raise UserError(f"{name} cannot be trained: in training mode it raises {cause(error)}.") from error
        _require_logits(name, logits_BK, classes)
        _require_gradients(name, tried, logits_BK)


def _require_logits(name: str, logits: object, classes: int) -> None:
    wanted = f"logits [B, K] are needed, here [{TRIED_IMAGES}, {classes}]"
    if not isinstance(logits, Tensor):
        raise UserError(f"{name} gives a {type(logits).__name__} for {TRIED_IMAGES} images; {wanted}.")
    if tuple(logits.shape) != (TRIED_IMAGES, classes):
        raise UserError(f"{name} gives the shape {list(logits.shape)} for {TRIED_IMAGES} images; {wanted}.")
    if not logits.is_floating_point():
        raise UserError(f"{name} gives values of {logits.dtype}; logits of a floating type are needed.")
    if not logits.isfinite().all():
        raise UserError(f"{name} gives logits that are not finite on a batch of random images.")


def _require_gradients(name: str, model: nn.Module, logits_BK: Tensor) -> None:
    """DistributedDataParallel waits for the gradient of every weight."""
    trained = {weight: value for weight, value in model.named_parameters() if value.requires_grad}
    if not trained or not logits_BK.requires_grad:
        raise UserError(f"{name} has no weights to train, or its logits do not depend on them.")
    logits_BK.logsumexp(dim=1).sum().backward()
    unused = [weight for weight, value in trained.items() if value.grad is None]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UserError(
            f"{name} has weights that its logits do not depend on ({', '.join(unused[:3])}{more}); remove them, or set "
            "requires_grad to False."
        )


def require_image_size(size: int, model: nn.Module, name: str) -> None:
    """Raise UserError where a network cannot take images of so many pixels a side, naming the smallest size that
    works.
    """
    tried = copy.deepcopy(model).eval()
    error = _refusal(tried, size)
    if error is None:
        return
    by_size = isinstance(error, REFUSALS) and "allocate memory" not in str(error)
    sizes = range(size + 1, LARGEST_TRIED_SIZE) if by_size else ()
    larger = next((side for side in sizes if _refusal(tried, side) is None), None)
    if larger is None:
        raise UserError(f"--image-size {size} does not suit {name} ({cause(error)}); choose another size.")
    raise UserError(f"--image-size {size} is too small for {name}; the smallest that works is {larger}.")


def _refusal(model: nn.Module, size: int) -> Exception | None:
    """What a network raises at an image of so many pixels a side, None where it takes it."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size))
    except Exception as error:
        return error
    return None
