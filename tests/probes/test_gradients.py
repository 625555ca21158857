"""Saliency: gradients by finite differences, a place that is known, masks by hand, and what cannot be looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from pivot_plugin.adapters import ImageFeatures, VisionAdapter
from pivot_plugin.errors import DataError, ModelError, SettingsError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.preferences import load
from pivot_plugin.probes import pointing_game, saliency, subject
from pivot_plugin.probes.gradients import LOSSES, _map, pair_loss
from pivot_plugin.probes.pointing import concentration, energy_inside, mask_shares, points_inside
from pivot_plugin.training.batch import ForestCollator
from pivot_plugin.training.forward import answering
from tests.helpers import picture, row

PAIRS = [
    row("what is it?", "a red cat", "a red dog!", picture(120, 90, 1)),
    row("<image>which <image>?", "left", "the right one", picture(60, 60, 2), picture(90, 40, 3)),
]


def _first_pair(model: Any, processor: Any) -> Any:
    adapter = find_adapter(model)
    return ForestCollator(processor, adapter.image_token_id)([load(PAIRS[:1])[0]])["forest"]


@pytest.mark.parametrize("at", ["encoder", "projector"])
def test_a_map_is_the_gradient_by_finite_differences(family: str, tiny: Any, at: str) -> None:
    """In float64 (but for the norms, which transformers computes in float32), in plain passes of whole sequences."""
    model, processor = tiny
    model.double()
    adapter = find_adapter(model)
    batch = _first_pair(model, processor)
    who, reference = subject(model, processor), (-3.0, -5.0)
    with answering(model, adapter):
        loss_of = {loss: partial(pair_loss, loss=loss, reference=reference, beta=0.1) for loss in LOSSES}
        maps = {loss: _map(who, batch, loss_of[loss], at) for loss in LOSSES}
    place = (maps["sft"].shape[0] - 1, 0)
    step, totals = 5e-3, {"sft": 0.0, "dpo": 0.0}
    for channel in range(_width(adapter, batch, at)):
        up, down = (_losses(adapter, batch, at, place, channel, sign * step, reference) for sign in (1, -1))
        for loss in totals:
            totals[loss] += abs(up[loss] - down[loss]) / (2 * step)
    for loss, total in totals.items():
        assert total == pytest.approx(maps[loss][place], rel=0.02), (family, loss)


def _width(adapter: Any, batch: Any, at: str) -> int:
    tower, head = adapter.tower.config, adapter.model.config.get_text_config()
    return int(tower.hidden_size if at == "encoder" else head.hidden_size)


def _losses(
    adapter: Any, batch: Any, at: str, place: tuple[int, int], channel: int, amount: float, reference: Any
) -> dict[str, float]:
    """Both losses after one channel of the first image's features was moved at one place of its grid."""
    model, forest = adapter.model, batch.forest
    images = {n: v.double() if v.is_floating_point() else v for n, v in batch.image_inputs.items()}
    lengths, rows = (forest.edge_of >= 0).sum(dim=1), []
    for path, length in zip(forest.paths, lengths.tolist(), strict=True):
        tokens = forest.tokens[:, path]
        kinds = {"mm_token_type_ids": (tokens == adapter.image_token_id).long()} if "qwen" in adapter.family else {}
        with torch.no_grad(), _moved(adapter, batch, images, at, place, channel, amount):
            logits = model(input_ids=tokens, **images, **kinds, use_cache=False).logits[0].double()
        answer = tokens[0, -length:]
        rows.append(logits[-length - 1 : -1].log_softmax(dim=-1)[torch.arange(length), answer])
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {loss: pair_loss(log_probs, lengths, loss, reference, 0.1).item() for loss in ("sft", "dpo")}  # type: ignore[arg-type]


@contextmanager
def _moved(
    adapter: Any, batch: Any, images: Any, at: str, place: tuple[int, int], channel: int, amount: float
) -> Iterator[None]:
    """Add to one number among the features; which row it is in is found by putting row numbers on the grid."""

    def move(hidden: torch.Tensor) -> None:
        count = hidden.shape[:-1].numel()
        numbers = torch.arange(count, dtype=torch.float64).reshape(*hidden.shape[:-1], 1)
        views = adapter.whole_views(images, batch.image_tokens)
        first = adapter.on_grid(numbers if len(views) == len(numbers) else numbers[views], images, adapter.tower)[0]
        row_ = np.unravel_index(int(first.values.reshape(first.grid)[place]), hidden.shape[:-1])
        hidden[(*map(int, row_), channel)] += amount

    def tower_hook(module: Any, args: Any, output: Any) -> Any:
        move(adapter.hidden_state(output))
        return output

    def merger_hook(module: Any, args: Any) -> None:
        move(args[0])

    backbone = adapter.model.base_model
    encode = backbone.get_image_features

    def moved_features(*args: Any, **kwargs: Any) -> Any:
        outputs = encode(*args, **kwargs)
        parts = outputs.pooler_output
        flat = parts.view(-1, parts.shape[-1]) if torch.is_tensor(parts) else parts[0]
        numbers = torch.arange(batch.image_tokens[0], dtype=torch.float64)[:, None]
        first = adapter.tokens_on_grid(numbers, adapter.select_images(images, 0, 1))
        flat[int(first.values.reshape(first.grid)[place]), channel] += amount
        return outputs

    if at == "encoder":
        if "qwen" in adapter.family:
            # the merger stands in the tower, and has read the features by the time the tower answers
            hook = adapter.tower.merger.register_forward_pre_hook(merger_hook)
        else:
            hook = adapter.tower.register_forward_hook(tower_hook)
        yield
        hook.remove()
    else:
        backbone.get_image_features = moved_features
        yield
        del backbone.get_image_features


def test_both_losses_are_what_they_are_called() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -1.0, 0.0]])
    lengths = torch.tensor([3, 2])
    assert pair_loss(log_probs, lengths, "sft", (0, 0), 0.1).item() == pytest.approx(2.0)
    expected = -logsigmoid(torch.tensor(0.1 * ((-6 + 5) - (-5 + 7))))
    assert pair_loss(log_probs, lengths, "dpo", (-5, -7), 0.1).item() == pytest.approx(expected.item())


def test_maps_are_the_same_on_a_frozen_model_and_leave_it_as_it_was(llava: Any) -> None:
    model, processor = llava
    who = subject(model, processor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = saliency(who, PAIRS)
    model.requires_grad_(False)
    second = saliency(who, PAIRS)
    for one, other in zip(first.artefacts, second.artefacts, strict=True):
        for loss in ("sft", "dpo"):
            np.testing.assert_allclose(one.maps[loss], other.maps[loss], rtol=1e-5)
    assert "forward" not in model.__dict__
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_scales_a_dpo_map_and_changes_it_in_no_other_way(llava: Any) -> None:
    who = subject(*llava)
    own = saliency(who, PAIRS[:1]).artefacts[0]
    far = {own.pair: (own.logps[0] - 30, own.logps[1])}
    other = saliency(who, PAIRS[:1], reference=far).artefacts[0]
    ratio = other.maps["dpo"] / own.maps["dpo"]
    # s(-z) at z = 3, against s(0)
    np.testing.assert_allclose(ratio, 2 * torch.sigmoid(torch.tensor(-3.0)).item(), rtol=1e-3)
    np.testing.assert_allclose(other.maps["sft"], own.maps["sft"], rtol=1e-5)


def test_a_patch_whose_features_decide_the_answer_has_the_gradient(llava: Any) -> None:
    """The language model sees one image token alone; all others are cut off from it."""
    model, processor = llava
    projector = find_adapter(model).projector_paths[0]
    kept = 6

    def cut(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(output)
        mask[:, kept] = 1
        return output * mask

    hook = model.get_submodule(projector).register_forward_hook(cut)
    found = saliency(subject(model, processor), PAIRS[:1], masks=[np.ones((90, 120), bool)])
    hook.remove()
    values = found.artefacts[0].maps["dpo"]
    assert values.argmax() == kept
    assert values.ravel()[kept] == pytest.approx(values.sum())
    assert found.scores["dpo/concentration"].value == pytest.approx(1 - 1 / values.size)


def test_steps_on_one_pair_train_on_it_and_are_undone(llava: Any) -> None:
    model, processor = llava
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    still = saliency(subject(model, processor), PAIRS[:1])
    moved = saliency(subject(model, processor), PAIRS[:1], steps=3, learning_rate=1e-2)
    assert (still.artefacts[0].maps["sft"] != moved.artefacts[0].maps["sft"]).any()
    assert moved.settings["steps on the pair"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shares_inside_a_mask_by_hand() -> None:
    values = np.array([[1.0, 3.0], [0.0, 4.0]])
    inside = np.array([[0.0, 1.0], [0.0, 0.5]])
    assert energy_inside(values, inside) == pytest.approx(5 / 8)
    assert energy_inside(np.zeros((2, 2)), inside) == pytest.approx(inside.mean())
    mask = np.zeros((10, 20), bool)
    mask[5:, 10:] = True
    assert points_inside(values, mask) == 1
    assert points_inside(values.T, ~mask) == 0
    # the map covers the central square alone: its largest patch lies left of the mask then
    mask[:] = False
    mask[5:, 15:] = True
    assert points_inside(values, mask) == 1
    assert points_inside(values, mask, (0.25, 0.0, 0.75, 1.0)) == 0
    assert concentration(np.ones((4, 4))) == pytest.approx(0)
    assert concentration(np.zeros((4, 4))) == 0


def test_no_mask_lies_on_the_border_around_an_image() -> None:
    """A picture of 40 x 20 pixels in the middle of a square, on 4 x 4 patches of 10 pixels each."""
    box = (0.0, -0.5, 1.0, 1.5)
    whole = np.ones((20, 40))
    shares = mask_shares(whole, (4, 4), box, (40, 20), "pair 1")
    np.testing.assert_allclose(shares, [[0] * 4, [1] * 4, [1] * 4, [0] * 4])
    left = whole.copy()
    left[:, 15:] = 0
    np.testing.assert_allclose(mask_shares(left, (4, 4), box, (40, 20), "pair 1")[1], [1, 0.5, 0, 0])
    at_border, in_picture = np.zeros((4, 4)), np.zeros((4, 4))
    at_border[0, 1], in_picture[1, 1] = 1, 1
    assert points_inside(at_border, whole, box) == 0
    assert points_inside(in_picture, whole, box) == 1


def test_masks_are_cut_to_what_the_encoder_sees(make: Any) -> None:
    """LLaVA-1.5 looks at the central square of an image, the others at the whole."""
    size, left = (120, 60), np.zeros((60, 120), bool)
    left[:, :30] = True
    pair = [row("?", "a", "b", picture(*size, seed=1))]
    model, processor = make("llava")
    assert processor.image_processor.do_center_crop
    found = saliency(subject(model, processor), pair, masks=[left])
    assert found.artefacts[0].box == (0.25, 0, 0.75, 1)
    assert found.scores["sft/area"].value == 0
    for family in ("llava_next", "llava_onevision", "qwen2_5_vl", "internvl"):
        found = saliency(subject(*make(family)), pair, masks=[left])
        assert found.artefacts[0].box == (0, 0, 1, 1), family
        assert found.scores["sft/area"].value == pytest.approx(0.25, abs=0.01), family


def test_the_shown_box_is_what_the_image_processor_shows(make: Any) -> None:
    """A picture whose colour says where it is, read back from the pixels that the tower gets."""
    for family in ("llava", "llava_next", "llava_onevision", "internvl"):
        model, processor = make(family)
        adapter = find_adapter(model)
        width, height = 160, 80
        ramp = np.zeros((height, width, 3), np.uint8)
        ramp[..., 0] = np.linspace(0, 255, width)[None]
        pixels = processor.image_processor(images=[Image.fromarray(ramp)], return_tensors="pt")["pixel_values"]
        view = pixels.flatten(0, -4)[-1 if family == "internvl" else 0]
        mean, spread = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
        reds = (view[0] * spread + mean).mean(dim=0)
        left, _, right, _ = adapter.shown_box(processor, (width, height))
        assert reds[0].item() == pytest.approx(left, abs=0.04), family
        assert reds[-1].item() == pytest.approx(right, abs=0.04), family


def test_pairs_without_masks_cannot_play_the_pointing_game(llava: Any) -> None:
    with pytest.raises(DataError, match="The pointing game needs masks"):
        pointing_game(subject(*llava), PAIRS)
    found = pointing_game(subject(*llava), PAIRS[:1], [np.ones((90, 120))])
    assert found.main.value == 1
    assert next(iter(found.scores)).endswith("pointing")


def test_what_cannot_be_looked_at_is_named(llava: Any) -> None:
    who = subject(*llava)
    with pytest.raises(DataError, match="No pair of prefs has an image"):
        saliency(who, [row("say hello", "hello", "bye")])
    with pytest.raises(DataError, match="There are 1 masks for 2 pairs"):
        saliency(who, PAIRS, masks=[np.ones((3, 3))])
    with pytest.raises(DataError, match=r"mask of pair .* is 3 x 3, its image 120 x 90"):
        saliency(who, PAIRS[:1], masks=[np.ones((3, 3))])
    with pytest.raises(SettingsError, match=r"losses is \['kto'\]"):
        saliency(who, PAIRS, losses=["kto"])  # type: ignore[list-item]
    with pytest.raises(SettingsError, match="at is 'head'"):
        saliency(who, PAIRS, at="head")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="steps is -1"):
        saliency(who, PAIRS, steps=-1)
    encoder = find_adapter(llava[0]).extract()
    with pytest.raises(ModelError, match="Saliency needs an MLLM"):
        saliency(subject(encoder, llava[1]), PAIRS)


def test_text_only_pairs_are_left_out(llava: Any) -> None:
    found = saliency(subject(*llava), [row("say hello", "hello", "bye"), *PAIRS], limit=1)
    assert found.settings["pairs"] == 1
    assert found.artefacts[0].question == "what is it?"


@pytest.mark.parametrize(("at", "method"), [("encoder", "on_grid"), ("projector", "tokens_on_grid")])
def test_a_grid_that_the_model_does_not_see_is_refused(
    llava: Any, at: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    right = getattr(VisionAdapter, method)

    def transposed(one: ImageFeatures) -> ImageFeatures:
        return ImageFeatures(one.values.reshape(*one.grid, -1).transpose(0, 1).flatten(0, 1), one.grid)

    def wrong(*given: Any) -> Any:
        found = right(*given)
        return transposed(found) if isinstance(found, ImageFeatures) else [transposed(one) for one in found]

    examined = subject(model, processor)
    assert saliency(examined, PAIRS[:1], at=at).settings["patch grid"] == "verified"
    monkeypatch.setattr(VisionAdapter, method, wrong)
    with pytest.raises(ModelError, match="patches show another place, such as patch"):
        saliency(examined, PAIRS[:1], at=at)


def test_a_grid_that_cannot_be_verified_is_said_with_the_maps(
    llava: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = llava
    on_grid = VisionAdapter.on_grid
    monkeypatch.setattr(
        VisionAdapter,
        "on_grid",
        lambda *given: [ImageFeatures(one.values.mean(0).expand_as(one.values), one.grid) for one in on_grid(*given)],
    )
    result = saliency(subject(model, processor), PAIRS[:1])
    assert str(result.settings["patch grid"]).startswith("not verified: on the 4x4 grid of a picture of 240x96 px")
    assert "is not verified" in caplog.text
