"""What the adapters say of their families, spelled out."""

import math
from typing import Any

import pytest
import torch

from pivot_plugin.adapters import VisionAdapter
from pivot_plugin.data.layout import normalise
from pivot_plugin.errors import EncoderError
from pivot_plugin.models.find import find_adapter
from pivot_plugin.models.image_tokens import ImageTokens
from pivot_plugin.training.batch import ForestCollator
from tests.helpers import picture

CLIP = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
INTERN = (
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.projection_layer",
    "mlp.fc1",
    "mlp.fc2",
)
TARGETS = {
    # layer -2 is read: of three blocks the last gets no LoRA
    "llava": ("model.vision_tower.encoder.layers", 2, CLIP),
    "llava_next": ("model.vision_tower.encoder.layers", 2, CLIP),
    "llava_onevision": ("model.vision_tower.encoder.layers", 3, CLIP),
    "qwen2_vl": ("model.visual.blocks", 2, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "qwen2_5_vl": (
        "model.visual.blocks",
        2,
        ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "qwen3_vl": ("model.visual.blocks", 3, ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")),
    "internvl": ("model.vision_tower.encoder.layer", 3, INTERN),
}
PROJECTORS = {
    "llava": ("model.multi_modal_projector",),
    "llava_next": ("model.multi_modal_projector",),
    "llava_onevision": ("model.multi_modal_projector",),
    "qwen2_vl": ("model.visual.merger",),
    "qwen2_5_vl": ("model.visual.merger",),
    "qwen3_vl": (
        "model.visual.merger",
        "model.visual.deepstack_merger_list.0",
        "model.visual.deepstack_merger_list.1",
    ),
    "internvl": ("model.multi_modal_projector",),
}


def test_lora_goes_where_the_features_in_use_come_from(family: str, tiny: Any) -> None:
    blocks, used, kinds = TARGETS[family]
    expected = {f"{blocks}.{index}.{kind}" for index in range(used) for kind in kinds}
    assert set(find_adapter(tiny[0]).lora_targets()) == expected


def test_projectors_are_found(family: str, tiny: Any) -> None:
    assert find_adapter(tiny[0]).projector_paths == PROJECTORS[family]


def image_inputs(processor: Any, *images: Any) -> dict[str, torch.Tensor]:
    text = [processor.image_token] * len(images)
    outputs = processor(images=[[image] for image in images], text=text, padding=True, return_tensors="pt")
    return {n: v for n, v in outputs.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")}


def test_what_the_loss_never_reaches_is_exactly_what_the_adapter_says(tiny: Any) -> None:
    model, processor = tiny
    adapter = find_adapter(model)
    pair = {**normalise({"images": [picture(60, 60, 1)], "prompt": "?", "chosen": "a", "rejected": "b"}, "row")}
    batch = ForestCollator(processor, adapter.image_token_id)([{**pair, "image_key": "1"}])["forest"]
    tokens = batch.forest.tokens[:, : len(batch.forest.paths[0])]
    kinds = {"mm_token_type_ids": (tokens == adapter.image_token_id).long()} if "qwen" in adapter.family else {}
    outputs = model(input_ids=tokens, **kinds, **batch.image_inputs)
    outputs.logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if adapter.part_of(name) == "encoder":
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            # a bias of keys shifts all scores of a query alike: its gradient is zero up to rounding
            assert reached == adapter.is_trainable(name) or "class_embedding" in name, name


def test_patch_features_stand_where_their_patch_stands(tiny: Any) -> None:
    """The features of the upper left change most when the upper left of the image changes, and so for each corner."""
    model, processor = tiny
    adapter = find_adapter(model)
    base = picture(112, 112, 3)
    for row_, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        changed = base.copy()
        changed.paste((255, 0, 0), (column * 84, row_ * 84, column * 84 + 28, row_ * 84 + 28))
        whole = adapter.image_processor(processor)
        with torch.no_grad():
            before, after = adapter.patch_features(dict(whole(images=[base, changed], return_tensors="pt")))
        rows, columns = before.grid
        assert rows * columns == len(before.values)
        moved = (after.values - before.values).norm(dim=-1).reshape(rows, columns)
        halves = moved.reshape(2, rows // 2, 2, columns // 2).sum(dim=(1, 3))
        assert divmod(int(halves.argmax()), 2) == (row_, column), adapter.family


def test_a_wide_image_has_a_wide_grid_on_towers_of_any_resolution(make: Any) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        model, processor = make(family)
        features = find_adapter(model).patch_features(image_inputs(processor, picture(120, 60, 1), picture(60, 60, 2)))
        (rows, columns), square = features[0].grid, features[1].grid
        assert columns > rows
        assert square[0] == square[1]
        assert math.prod(features[0].grid) == len(features[0].values)


def test_an_image_s_share_of_the_inputs_gives_the_same_features(make: Any) -> None:
    for family in ("llava", "llava_next", "llava_onevision", "qwen2_5_vl"):
        model, processor = make(family)
        adapter = find_adapter(model)
        inputs = image_inputs(processor, picture(120, 60, 1), picture(60, 60, 2))
        with torch.no_grad():
            both = adapter.patch_features(inputs)
            second = adapter.patch_features(adapter.select_images(inputs, 1, 2))
        assert len(second) == 1
        torch.testing.assert_close(both[1].values, second[0].values)


def test_grafting_another_class_or_size_names_the_mismatch_and_changes_nothing(make: Any) -> None:
    model, _ = make("llava")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = find_adapter(model)
    with pytest.raises(EncoderError, match=r"SiglipVisionModel.*CLIPVisionModel"):
        adapter.graft(find_adapter(make("llava_onevision")[0]).extract())
    config = adapter.tower.config
    small = type(adapter.tower)(type(config).from_dict({**config.to_dict(), "num_hidden_layers": 2}))
    with pytest.raises(EncoderError, match=r"Only the model's tower has the tensor 'encoder.layers.2"):
        adapter.graft(small)
    wide = type(adapter.tower)(type(config).from_dict({**config.to_dict(), "intermediate_size": 96}))
    with pytest.raises(EncoderError, match=r"mlp.fc1.bias' has shape \(96,\) in the encoder and \(64,\)"):
        adapter.graft(wide)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_view_of_the_whole_is_found_among_tiles(make: Any) -> None:
    """In the MLLM's own forward pass over two images, in tower and language model; images of different tile counts."""
    images = picture(120, 50, 1), picture(60, 60, 2)
    for family in ("llava", "llava_next", "internvl", "qwen2_5_vl"):
        model, processor = make(family)
        adapter = find_adapter(model)
        text = processor.image_token * 2
        outputs = processor(images=[list(images)], text=[text], padding=True, return_tensors="pt")
        about_text = ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs = {name: value for name, value in outputs.items() if name not in about_text}
        counts = ImageTokens(processor, adapter.image_token_id).process_images([images]).counts[0]
        seen: list[Any] = []
        hook = adapter.tower.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            tokens = model.base_model.get_image_features(**inputs).pooler_output
        hook.remove()
        flat = (
            torch.cat([part.flatten(0, -2) for part in tokens])
            if not torch.is_tensor(tokens)
            else tokens.flatten(0, -2)
        )
        hidden = adapter.hidden_state(seen[0])
        views = adapter.whole_views(inputs, counts)
        found = adapter.on_grid(hidden[views], inputs, adapter.tower)
        whole = adapter.image_processor(processor)
        with torch.no_grad():
            expected = adapter.patch_features(dict(whole(images=list(images), return_tensors="pt")))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.grid == theirs.grid
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-4)
        projected = adapter.tokens_on_grid(flat.split(counts)[0], adapter.select_images(inputs, 0, 1))
        with torch.no_grad():
            through = adapter.project(expected[0])
        assert projected.grid == through.grid
        torch.testing.assert_close(projected.values, through.values, rtol=1e-3, atol=1e-4)


def test_a_family_without_a_deeper_projector_says_so_and_stays_as_it_is(make: Any) -> None:
    model, _ = make("qwen2_5_vl")
    adapter = find_adapter(model)
    before = set(model.state_dict())
    tuned = {"linear_1.weight": torch.zeros(8, 32), "linear_2.weight": torch.zeros(8, 8)}
    with pytest.raises(EncoderError, match=r"family qwen2.5-vl.* cannot begin with the layers of another"):
        adapter.begin_projector(tuned, 1)
    assert set(model.state_dict()) == before
    assert adapter.projector_layers() == ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]


def test_a_name_given_to_an_adapter_is_its_own(llava: Any) -> None:
    named, unnamed = VisionAdapter(llava[0], family="mine"), VisionAdapter(llava[0])
    assert (named.family, unnamed.family, VisionAdapter.family) == ("mine", "generic", "generic")
