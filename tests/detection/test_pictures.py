"""Pictures of detections: size, ground truth beside, names that do not cover each other, notes."""

import random

import pytest
import torch

from sn.training.detection import pictures
from sn.training.detection.pictures import FEW, FONT, LEAST, draw_detections, label_places, overlap

NAMES = ["cat", "a class whose name is much too long"]


def found(scores, masks=None):
    """As many boxes of 20 pixels as scores, side by side; classes in turn."""
    count = len(scores)
    boxes = torch.tensor([[25.0 * i, 5.0, 25.0 * i + 20, 25.0] for i in range(count)])
    result = {"boxes": boxes.reshape(-1, 4), "labels": 1 + torch.arange(count) % 2}
    result["scores"] = torch.tensor(scores)
    return result if masks is None else result | {"masks": masks}


@pytest.fixture
def told(monkeypatch):
    """What each panel is told to draw: (title, texts, number of boxes)."""
    seen, panel = [], pictures._panel

    def watched(picture, objects, names, texts, title, most):
        seen.append((title, texts, len(objects["boxes"])))
        return panel(picture, objects, names, texts, title, most)

    monkeypatch.setattr(pictures, "_panel", watched)
    return seen


def picture(width=100, height=60):
    return torch.zeros(3, height, width, dtype=torch.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_names_do_not_cover_each_other(seed):
    """Whatever the boxes, also where they all lie in one corner; and none leaves the picture."""
    rng = random.Random(seed)
    corners = [(rng.uniform(0, 460), rng.uniform(0, 300)) for _ in range(30)]
    if seed == 0:
        corners = [(479.0, 0.0)] * 30
    boxes = [(x, y, x + rng.uniform(1, 90), y + rng.uniform(1, 90)) for x, y in corners]
    places = label_places(boxes, [(80, 19)] * 30, (480, 320))
    assert None not in places
    for i, place in enumerate(places):
        assert 0 <= place[0] and place[2] <= 480 and 0 <= place[1] and place[3] <= 320
        assert not any(overlap(place, other) for other in places[:i])


def test_a_name_stands_above_its_box_if_it_can():
    assert label_places([(50, 50, 90, 90)], [(30, 10)], (200, 200)) == [(50, 40, 80, 50)]
    below = label_places([(50, 2, 90, 90), (50, 0, 90, 2)], [(30, 10)] * 2, (200, 200))[0]
    assert below == (50, 90, 80, 100)  # above, it would hide the other box


def test_names_without_room_are_left_out():
    places = label_places([(0, 0, 5, 5)] * 3, [(60, 10)] * 3, (60, 10))
    assert places == [(0, 0, 60, 10), None, None]


def test_only_what_has_the_score(told):
    drawn = draw_detections(picture(), found([0.2, 0.934, 0.5]), NAMES)
    assert told == [("2 detections of 50 % or more", ["93 %", "50 %"], 2)]
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 8 + 0.6 * LEAST + FONT + 6, LEAST + 8)


def test_the_best_few_with_a_note_if_none_has_the_score(told):
    draw_detections(picture(200), found([0.1, 0.2, 0.05, 0.4, 0.3]), NAMES)
    draw_detections(picture(200), found([]), NAMES)
    best = ["40 %", "30 %", "20 %"]
    assert told[0] == ("none of 50 % or more; the best 3", best, FEW)
    assert told[1] == ("no detections", [], 0)


def test_ground_truth_beside(told):
    """A picture twice as wide, its boxes and names without scores to the left."""
    truth = {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}
    one = draw_detections(picture(), found([0.9]), NAMES)
    both = draw_detections(picture(), found([0.9]), NAMES, truth=truth)
    assert told[1] == told[0] and told[2] == ("ground truth, 1 object", [""], 1)
    assert both.shape[2] == 2 * one.shape[2]
    assert torch.equal(both[:, :, one.shape[2] :], one)


def test_masks_are_drawn_where_they_are(told):
    """The right half of a box of 20 x 20 pixels, at its fifth row."""
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., 14:] = 1
    plain = draw_detections(picture(), found([0.9]), NAMES)
    drawn = draw_detections(picture(), found([0.9], mask), NAMES)
    scale, top = LEAST // 100, FONT + 6
    changed = (plain != drawn).any(0).nonzero()
    assert changed.min(0).values.tolist() == pytest.approx([top + 5 * 4.8, 10 * 4.8], abs=2 * scale)
    assert len(changed) == pytest.approx(10 * 20 * 4.8**2, rel=0.2)


@pytest.mark.parametrize("size, long", [((48, 30), LEAST), ((600, 900), 640), ((500, 100), 500)])
def test_size(size, long):
    """Small pictures are enlarged, large ones made smaller for a sheet."""
    drawn = draw_detections(picture(*size), found([0.9]), NAMES, most=640)
    height, width = drawn.shape[1] - 8 - FONT - 6, drawn.shape[2] - 8
    assert max(height, width) == long
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01)
