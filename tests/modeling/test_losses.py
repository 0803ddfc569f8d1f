"""The two losses, against values worked out by hand."""

import math

import pytest
import torch

from fwd2bot.losses_fwd2bot import autoregressive_loss, contrastive_loss, different_content, sigmoid_loss

SCALE = torch.tensor(2.0)
IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def cross_entropy(positive: float, *negatives: float) -> float:
    """-log softmax of the positive."""
    return math.log(sum(math.exp(value) for value in (positive, *negatives))) - positive


def test_autoregressive_loss_is_next_token_cross_entropy_of_the_learnt_labels():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [5.0, -5.0]]])  # (1, 3, 2)
    loss = autoregressive_loss(logits, torch.tensor([[-100, 1, 1]]))
    # position 0 gives label 1 the probability 3/4, position 1 gives label 1 the probability 1/5
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(5)) / 2)
    only_last = autoregressive_loss(logits, torch.tensor([[-100, -100, 1]]))
    assert only_last.item() == pytest.approx(math.log(5))


def test_autoregressive_loss_divides_by_the_items_of_the_whole_step():
    logits = torch.zeros(1, 3, 2)
    loss = autoregressive_loss(logits, torch.tensor([[0, 1, 1]]), num_items_in_batch=8)
    assert loss.item() == pytest.approx(2 * math.log(2) / 8)


def test_autoregressive_loss_without_labels_is_zero_with_a_gradient():
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    loss = autoregressive_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_contrastive_loss_of_one_text_per_image():
    texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])  # logits [[1.6, 1.2], [1.2, 1.6]]
    loss = contrastive_loss(IMAGES, texts, SCALE, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(cross_entropy(1.6, 1.2), rel=1e-6)


def test_contrastive_loss_with_hard_negative_and_two_texts_of_one_image():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.6, 0.8]])
    text_image = torch.tensor([0, 1, 0, -1])
    # logits: image 0 (2, 0, 1.6, 1.2), image 1 (0, 2, 1.2, 1.6)
    text_to_image = (cross_entropy(2, 0) + cross_entropy(2, 0) + cross_entropy(1.6, 1.2)) / 3
    image_to_text = (
        cross_entropy(2, 0, 1.2)  # image 0 and its first text: not against its other one
        + cross_entropy(2, 0, 1.2, 1.6)
        + cross_entropy(1.6, 0, 1.2)
    ) / 3
    loss = contrastive_loss(IMAGES, texts, SCALE, text_image)
    assert loss.item() == pytest.approx((text_to_image + image_to_text) / 2, rel=1e-6)


def test_contrastive_loss_leaves_out_masked_negatives():
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    mask = torch.tensor([[True, False, True], [True, True, False]])  # text 1 is true of image 0, text 2 of image 1
    # logits: image 0 (2, 0, 1.2), image 1 (0, 2, 1.6)
    text_to_image = (cross_entropy(2, 0) + cross_entropy(2)) / 2
    image_to_text = (cross_entropy(2, 1.2) + cross_entropy(2, 0)) / 2
    loss = contrastive_loss(IMAGES, texts, SCALE, torch.tensor([0, 1, -1]), mask)
    assert loss.item() == pytest.approx((text_to_image + image_to_text) / 2, rel=1e-6)


def test_contrastive_loss_ignores_the_mask_at_the_images_own_text():
    texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    mask = torch.tensor([[False, True], [True, False]])
    loss = contrastive_loss(IMAGES, texts, SCALE, torch.tensor([0, 1]), mask)
    assert loss.item() == pytest.approx(cross_entropy(1.6, 1.2), rel=1e-6)


def test_contrastive_loss_is_exact_under_autocast():
    texts = torch.nn.functional.normalize(torch.tensor([[0.777, 0.333], [0.123, 0.999]]), dim=-1)
    exact = contrastive_loss(IMAGES, texts, torch.tensor(100.0), torch.tensor([0, 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = contrastive_loss(IMAGES, texts, torch.tensor(100.0), torch.tensor([0, 1]))
    assert torch.equal(exact, cast)


@pytest.mark.parametrize("text_image", [[0], [0, 2], [0, 1, 1], [0, -2]])
def test_contrastive_loss_refuses_owners_that_do_not_fit(text_image):
    with pytest.raises(ValueError, match=r"each of the 2 texts a row in 0\.\.1 or -1"):
        contrastive_loss(IMAGES, IMAGES, SCALE, torch.tensor(text_image))


def test_contrastive_loss_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got \(1, 2\)"):
        contrastive_loss(IMAGES, IMAGES, SCALE, torch.tensor([0, 1]), torch.ones(1, 2, dtype=torch.bool))


def test_contrastive_loss_of_hard_negatives_alone_is_an_error():
    with pytest.raises(ValueError, match="at least one text"):
        contrastive_loss(IMAGES, IMAGES, SCALE, torch.tensor([-1, -1]))


# Sigmoid loss


def minus_log_sigmoid(value: float) -> float:
    return math.log(1 + math.exp(-value))


BIAS = torch.tensor(-1.0)


def test_sigmoid_loss_of_one_text_per_image_is_the_papers():
    texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])  # logits [[1.6, 1.2], [1.2, 1.6]] - 1
    loss = sigmoid_loss(IMAGES, texts, SCALE, BIAS, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(minus_log_sigmoid(0.6) + minus_log_sigmoid(-0.2), rel=1e-6)


def test_sigmoid_loss_with_two_texts_of_one_image_a_hard_negative_and_a_mask():
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])  # of image 0, of image 0, of none
    mask = torch.tensor([[False, True, True], [True, False, True]])  # at an own text it says nothing
    # logits: image 0 (2, 1.6, 1.2) - 1, image 1 (0, 1.2, 1.6) - 1; image 1 against text 1 is left out
    own = minus_log_sigmoid(1) + minus_log_sigmoid(0.6)
    others = minus_log_sigmoid(-0.2) + minus_log_sigmoid(1) + minus_log_sigmoid(-0.6)
    loss = sigmoid_loss(IMAGES, texts, SCALE, BIAS, torch.tensor([0, 0, -1]), mask)
    assert loss.item() == pytest.approx((own + others) / 2, rel=1e-6)


def test_sigmoid_loss_of_hard_negatives_alone_is_an_error():
    with pytest.raises(ValueError, match="at least one text"):
        sigmoid_loss(IMAGES, IMAGES, SCALE, BIAS, torch.tensor([-1, -1]))


def test_equal_texts_and_texts_of_equal_images_are_no_negatives():
    text_image = torch.tensor([0, 1, 2, -1, -1])
    text_group = torch.tensor([10, 11, 10, 11, 12])  # texts 0 and 2 are equal, hard negative 3 equals text 1
    image_group = torch.tensor([7, 8, 9])
    expected = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(different_content(text_image, text_group, image_group), expected)
    same_image = torch.tensor([7, 8, 7])  # images 0 and 2 are equal: so far it is the same; then text 2 is another
    assert torch.equal(different_content(text_image, text_group, same_image), expected)
    found = different_content(text_image, torch.tensor([10, 11, 13, 11, 12]), same_image)
    assert torch.equal(found, expected)


def test_text_that_equals_another_caption_of_an_equal_picture_is_no_negative():
    """Pictures P, P, Q with captions c1, c2, c2: all three texts are true of P, and c2 of Q."""
    found = different_content(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2]), torch.tensor([7, 7, 9]))
    expected = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    assert torch.equal(found, expected)
