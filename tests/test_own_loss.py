"""A soft loss of the user's own: `--loss my_module:function`, checked once at the start."""

import sys
from pathlib import Path

import pytest
import torch

from kd_dist.config import DistillConfig
from kd_dist.distill import loss_of, require_known
from kd_dist.errors import UserError
from kd_dist.training import losses

OWN = (Path(__file__).parent / "programs/own_losses.py").read_text()


@pytest.fixture(autouse=True)
def own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_losses", None)


def test_it_is_what_the_student_minimises():
    config = DistillConfig.of(loss="own_losses:l1", alpha=1.0, temperature=2.0)
    require_known(config.distillation)
    losses.require_usable_loss("own_losses:l1", 2.0, 5)
    student_BK, teacher_BK = torch.randn(3, 5), torch.randn(3, 5)

    class Batch:
        images_BCHW, teacher_logits_BK, labels_B, is_mixed = student_BK, teacher_BK, torch.tensor([0, 1, 2]), False

    terms = loss_of(config, 5)(torch.nn.Identity(), Batch)
    assert torch.equal(terms["total"], (student_BK - teacher_BK).abs().mean(dim=1) / 2)


@pytest.mark.parametrize(
    "name, expected",
    {
        "own_losses:l11": "own_losses has no function l11 (did you mean l1?)",
        "no_losses:l1": "there is no module no_losses",
        "kld": "--loss kld is not known (did you mean kl?); choose from kl, ce, mse, std, dkd, or name a function as",
        "own_losses:one_number": "gives the shape [] for 3 samples; a loss of each, [3], is needed",
        "own_losses:plain": "gives a float for 3 samples",
        "own_losses:infinite": "not finite numbers",
        "own_losses:constant": "without a gradient",
        "own_losses:steep": "no gradient, or one that is not finite",
        "own_losses:broken": "raises RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        "own_losses:two_arguments": "raises TypeError: two_arguments() takes 2 positional arguments but 3 were given",
    }.items(),
)
def test_one_that_cannot_be_used_is_refused_in_one_sentence(name, expected):
    with pytest.raises(UserError) as caught:
        losses.require_usable_loss(name, 4.0, 5)
    sentence = str(caught.value)
    assert expected in sentence and "\n" not in sentence and sentence.endswith(".")


def test_the_check_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    losses.require_usable_loss("own_losses:l1", 4.0, 5)
    assert torch.equal(torch.get_rng_state(), state)
