"""InternVLChatModel checkpoints read without their code: fused projections, four decoders, tiles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import InternVLForConditionalGeneration, InternVLVisionModel

from pivot_plugin.adapters.foreign import write_back
from pivot_plugin.adapters.foreign.names import THIRDS, grouped
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import empty_model, load_model
from tests.helpers import picture
from tests.helpers import repositories as repo
from tests.helpers.foreign import INTERNVL_CASES, INTERNVL_TOKENS, internvl_apart, internvl_made, smooth, tensors

SIZES = [(56, 56), (120, 50), (48, 100), (170, 160)]


@pytest.mark.parametrize("case", INTERNVL_CASES)
def test_a_folder_gives_the_logits_of_the_repositorys_own_forward(case: str, tmp_path: Path) -> None:
    theirs, folder = internvl_made(tmp_path, case)
    model, processor = load_model(folder, None)
    assert type(model) is InternVLForConditionalGeneration
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    assert any("attention.q_proj" in target for target in adapter.lora_targets())
    for size in SIZES:
        assert internvl_apart(theirs, model, processor, size) < 1e-6


@pytest.mark.parametrize("case", INTERNVL_CASES)
def test_what_is_written_back_is_the_folder_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, case)
    model, _ = load_model(str(folder), None)
    target = write_back(model, folder, tmp_path / "back")
    before, after = tensors(folder), tensors(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((target / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    again, _ = load_model(target, None)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_trained_weights_come_back_fused(tmp_path: Path) -> None:
    theirs, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2")
    model, processor = load_model(folder, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    back = write_back(model, folder, tmp_path / "back")
    theirs.load_state_dict(tensors(back))
    assert internvl_apart(theirs, model, processor, (120, 50)) < 1e-6


def test_the_processor_counts_tiles_and_a_thumbnail(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Qwen2")
    _, processor = load_model(folder, None)
    counts = []
    for size in ((56, 56), (120, 56), (112, 112)):
        inputs = processor(images=[picture(*size, seed=1)], text=["<IMG_CONTEXT>"], return_tensors="pt")
        counts.append((len(inputs["pixel_values"]), int((inputs["input_ids"] == processor.image_token_id).sum())))
    # four tokens a tile
    assert counts == [(1, 4), (3, 12), (5, 20)]


@pytest.mark.parametrize("size", [(56, 56), (200, 90), (90, 300), (260, 250), (500, 100)])
def test_pictures_are_cut_and_coloured_as_the_repository_does(size: tuple[int, int], tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Qwen2", max_dynamic_patch=6)
    _, processor = load_model(folder, None)
    image = smooth(*size)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = torch.stack([repo.pixels(tile, mean, std) for tile in repo.dynamic_tiles(image, 1, 6)])
    ours = processor(images=[image], text=["<IMG_CONTEXT>"], return_tensors="pt")["pixel_values"]
    assert ours.shape == reference.shape
    # resizing rounds in another place: a level or two of 255
    assert (ours - reference).abs().mean() < 0.02
    assert (ours - reference).abs().max() < 0.5


def test_without_dynamic_sizes_there_is_one_tile(tmp_path: Path) -> None:
    theirs, folder = internvl_made(tmp_path, "Qwen2", dynamic_image_size=False)
    model, processor = load_model(folder, None)
    inputs = processor(images=[picture(120, 56, seed=1)], text=["<IMG_CONTEXT>"], return_tensors="pt")
    assert len(inputs["pixel_values"]) == 1
    assert internvl_apart(theirs, model, processor, (120, 56)) < 1e-6


def test_the_processor_is_saved_and_read_with_its_tokens(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Qwen2")
    model, processor = load_model(folder, None)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    same, again = load_model(tmp_path / "saved", None)
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    image, text = picture(120, 50, 1), "<IMG_CONTEXT>what?"
    one, other = (made(images=[image], text=[text], return_tensors="pt") for made in (processor, again))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_the_encoder_is_a_plain_transformers_model(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Llama, normed queries")
    model, _ = load_model(folder, None)
    encoder = find_adapter(model).extract()
    assert type(encoder) is InternVLVisionModel
    encoder.save_pretrained(tmp_path / "encoder")
    again = InternVLVisionModel.from_pretrained(tmp_path / "encoder")
    assert all(map(torch.equal, encoder.state_dict().values(), again.state_dict().values()))


def test_only_the_structure_is_read_where_no_weights_are_wanted(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2")
    model = empty_model(str(folder))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_structure_of_the_published_8b_is_that_of_its_settings(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
    }
    settings = repo.internvl_settings("InternLM2ForCausalLM", vision, force_image_size=448, torch_dtype="bfloat16")
    settings["llm_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    decoder = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    decoder += ["attention_norm", "ffn_norm"]
    tower = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    kinds, block = ("weight", "bias"), "vision_model.encoder.layers."
    names = [f"language_model.{part}.weight" for part in ("model.tok_embeddings", "model.norm", "output")]
    names += [f"language_model.model.layers.{n}.{part}.weight" for n in range(32) for part in decoder]
    names += [f"{block}{n}.{part}.{kind}" for n in range(24) for part in tower for kind in kinds]
    names += [f"{block}{n}.{scale}" for n in range(24) for scale in ("ls1", "ls2")]
    names += [f"vision_model.embeddings.{part}" for part in ("class_embedding", "position_embedding")]
    names += [f"vision_model.embeddings.patch_embedding.{kind}" for kind in kinds]
    names += [f"mlp1.{layer}.{kind}" for layer in (0, 1, 3) for kind in kinds]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    repo.tokenizer(*INTERNVL_TOKENS).save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    parts = {"language_model": 0, "vision_tower": 0, "multi_modal_projector": 0}
    for name, parameter in model.named_parameters():
        parts[name.split(".")[1] if name.startswith("model.") else "language_model"] += parameter.numel()
    # InternLM2.5 7B with InternVL's nine tokens, InternViT 300M at 448 px, a norm and two linear layers
    assert parts["language_model"] == 7_737_708_544 + 2 * 4096 * 9
    assert parts["vision_tower"] == 304_012_288
    assert parts["multi_modal_projector"] == 2 * 4096 + (4096 * 4096 + 4096) * 2
    assert model.config.image_seq_length == 256
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"


class TestCuts:
    """Fused projections come internvl_apart and together again."""

    def test_thirds_are_views_of_the_whole(self) -> None:
        fused = torch.randn(12, 5)
        pieces = THIRDS.pieces(fused)
        assert torch.equal(THIRDS.whole(pieces), fused)
        pieces[1].zero_()
        assert bool((fused[4:8] == 0).all()) and bool((fused[:4] != 0).all())

    @pytest.mark.parametrize("shape", [(48, 5), (48,)])
    def test_groups_are_queries_key_and_value_side_by_side(self, shape: tuple[int, ...]) -> None:
        # two key heads with two query heads each, head width 6: rows in the order q q k v, q q k v
        fused = torch.arange(48 * (shape[1] if len(shape) > 1 else 1), dtype=torch.float).view(shape)
        cut = grouped(heads=4, key_value_heads=2)
        query, key, value = cut.pieces(fused)
        assert torch.equal(query, torch.cat([fused[0:12], fused[24:36]]))
        assert torch.equal(key, torch.cat([fused[12:18], fused[36:42]]))
        assert torch.equal(value, torch.cat([fused[18:24], fused[42:48]]))
        assert torch.equal(cut.whole([query, key, value]), fused)


class TestRefusals:
    """What transformers' InternVL cannot express is named before any weight is read."""

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"ps_version": "v1"}, "shuffles pixels by ps_version='v1'"),
            ({"use_thumbnail": False}, "adds no thumbnail"),
            ({"force_image_size": 112}, "force_image_size=112"),
        ],
    )
    def test_a_setting(self, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
        _, folder = internvl_made(tmp_path, "Qwen2")
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
        with pytest.raises(ModelError, match=message):
            load_model(folder, None)

    def test_a_decoder(self, tmp_path: Path) -> None:
        _, folder = internvl_made(tmp_path, "Qwen2")
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        settings["llm_config"]["architectures"] = ["Phi3ForCausalLM"]
        path.write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=r"'Phi3ForCausalLM' \(llm_config\); known are InternLM2ForCausalLM"):
            load_model(folder, None)

    @pytest.mark.parametrize("missing", ["<IMG_CONTEXT>", "<img>"])
    def test_a_tokenizer_without_the_tokens_of_an_image(self, missing: str, tmp_path: Path) -> None:
        _, folder = internvl_made(tmp_path, "Qwen2")
        repo.tokenizer(*(token for token in INTERNVL_TOKENS if token != missing)).save_pretrained(folder)
        with pytest.raises(ModelError, match=f"has no {missing}, by which InternVL shows an image"):
            load_model(folder, None)
