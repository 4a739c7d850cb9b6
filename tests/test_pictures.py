"""Pictures show the images and the numbers that they should, at any number of classes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kd_dist.job import pictures
from kd_dist.job.pictures import BLUE, CLASSES_SHOWN, RED, WHITE, Scores

K = 4
LABELS = np.array([0, 1, 2, 3, 0, 1])


def scores(classes=K, teacher=True) -> Scores:
    """Answers right with 0.7, but for image 2 (class 3 with 0.9) and image 4 (class 1 with 0.6)."""
    own = np.full((len(LABELS), classes), 0.3 / (classes - 1))
    own[np.arange(len(LABELS)), LABELS] = 0.7
    own[2], own[4] = 0.1 / (classes - 1), 0.4 / (classes - 1)
    own[2, 3], own[4, 1] = 0.9, 0.6
    of_teacher = np.roll(own, 1, axis=0) if teacher else None
    return Scores(own, of_teacher, LABELS, tuple(f"class {number}" for number in range(classes)))


def has(picture: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((np.asarray(picture) == color).all(axis=2).any())


def test_mistakes_come_with_the_most_confident_first():
    assert pictures.most_confident_mistakes(scores()).tolist() == [2, 4]


def test_disagreements_come_with_the_largest_divergence_first():
    found = scores()
    divergence = (found.teacher_MK * np.log(found.teacher_MK / found.own_MK)).sum(axis=1)
    order = pictures.largest_disagreements(found)
    assert order[0] == divergence.argmax() and (np.diff(divergence[order]) <= 1e-12).all()


def test_bins_of_confidence_hold_top1_and_confidence_of_their_images():
    found = {number: rest for number, *rest in pictures.bins_of(scores().own_MK, LABELS)}
    assert set(found) == {6, 7, 9} or set(found) == {6, 9}  # 0.7 lies on an edge
    assert found[9] == [0.0, pytest.approx(0.9), 1]
    assert sum(count for _, _, count in found.values()) == len(LABELS)


def test_captions_name_label_and_answers():
    found = scores()
    lines = pictures.captions(found.own_MK, found.teacher_MK, np.array([0, 1, 2, 3, 0, -1]), found.classes)
    assert lines[2][:2] == ["label class 2", "s 90 % class 3"]
    assert [line.split(" ", 1)[0] for line in lines[2]] == ["label", "s", "t", "t", "t"]
    assert lines[5][0] == "label not used"


def test_the_confusion_has_hits_in_blue_and_mistakes_in_red():
    picture = pictures.confusion(scores())
    own = np.eye(K)[LABELS]
    without = pictures.confusion(Scores(own, None, LABELS, ("a", "b", "c", "d")))
    assert has(picture, RED) and has(picture, BLUE)  # class 2 is always taken for 3, class 3 never for another
    assert has(without, BLUE) and not has(without, RED)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("draw", [pictures.confusion, pictures.reliability, pictures.top1_of_each_class])
def test_charts_stay_small_with_a_thousand_classes(draw, teacher):
    picture = draw(scores(1000, teacher))
    assert max(picture.size) < 26 * CLASSES_SHOWN + 200
    data = pictures.as_png(picture)
    assert len(data) < 60_000 and Image.open(io.BytesIO(data)).size == picture.size


def test_the_teacher_is_a_red_mark_beside_each_class():
    assert has(pictures.top1_of_each_class(scores()), RED)
    assert not has(pictures.top1_of_each_class(scores(teacher=False)), RED)


def test_a_grid_has_each_image_with_its_text():
    images = torch.zeros(5, 3, 20, 20, dtype=torch.uint8)
    images[4, 0] = 255
    picture = pictures.grid(images, [["one", "two"]] * 5)
    assert has(picture, (255, 0, 0)) and has(picture, WHITE)
    assert len(pictures.as_jpeg(picture)) < 30_000
    assert pictures.grid(images[:0], []).size[0] > 0  # no mistake is left


def test_pictures_come_every_few_epochs_and_at_the_end():
    def drawn(epochs, every):
        return [e for e in range(every, epochs + 1, every) if pictures.is_pictured(e, epochs, every)]

    assert drawn(3, 1) == [1, 2, 3]
    assert 8 <= len(drawn(300, 5)) <= 9 and drawn(300, 5)[-1] == 300
    assert drawn(45, 1)[-1] == 45 and len(drawn(45, 1)) <= 9
