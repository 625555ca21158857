"""LLaVA and LLaVA-NeXT checkpoints read without their code: the same logits, and the same files on the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pivot_plugin.adapters.foreign import read, write_back
from pivot_plugin.adapters.foreign.llava import pinpoints
from pivot_plugin.errors import ModelError
from pivot_plugin.models.find import check_processor, find_adapter
from pivot_plugin.models.loading import empty_model, load_model
from tests.helpers import hub_server, picture
from tests.helpers import repositories as repo
from tests.helpers.foreign import LLAVA_CASES, llava_apart, llava_made, smooth, tensors
from tests.helpers.hub_client import Client

KINDS = ("weight", "bias")
SIZES = [(56, 56), (120, 50), (48, 100), (170, 160)]


@pytest.mark.parametrize("case", LLAVA_CASES)
def test_a_folder_gives_the_logits_of_the_repositorys_own_forward(case: str, tmp_path: Path) -> None:
    theirs, folder = llava_made(tmp_path, case)
    model, processor = load_model(folder, None)
    assert type(model) is LLAVA_CASES[case][3]
    adapter = find_adapter(model)
    check_processor(model, processor, adapter)
    assert adapter.lora_targets()
    for size in SIZES:
        assert llava_apart(theirs, model, processor, size) < 1e-6


@pytest.mark.parametrize("case", LLAVA_CASES)
def test_what_is_written_back_is_the_folder_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, case)
    model, _ = load_model(str(folder), None)
    target = write_back(model, folder, tmp_path / "back")
    before, after = (tensors(place) for place in (folder, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    was, now = (json.loads((place / "config.json").read_text()) for place in (folder, target))
    assert now == {**was, "unfreeze_mm_vision_tower": True}


@pytest.mark.parametrize("case", [*LLAVA_CASES, "unknown token"])
def test_model_and_processor_are_saved_as_transformers_own(case: str, tmp_path: Path) -> None:
    if case == "unknown token":
        theirs, folder = llava_made(tmp_path, "llama, CLIP", vocab_size=len(repo.tokenizer("</s>", "<s>")))
    else:
        theirs, folder = llava_made(tmp_path, case)
    model, processor = load_model(folder, None)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved") is None
    again, same = load_model(tmp_path / "saved", None)
    assert type(same) is type(processor)
    assert same.image_token == processor.image_token
    check_processor(again, same, find_adapter(again))
    assert llava_apart(theirs, again, same, (120, 50)) < 1e-6


def test_the_deleted_block_is_accounted_for_and_the_encoder_loads_alone(tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, "qwen, own SigLIP")
    model, processor = load_model(folder, None)
    encoder = find_adapter(model).extract()
    assert type(encoder) is SiglipVisionModel
    assert encoder.config.num_hidden_layers == len(encoder.encoder.layers) == 2
    encoder.save_pretrained(tmp_path / "encoder")
    again = SiglipVisionModel.from_pretrained(tmp_path / "encoder")
    pixels = processor.image_processor(images=[picture(56, 56, 1)], return_tensors="pt")["pixel_values"]
    one, other = (m(pixels, output_hidden_states=True).hidden_states[-1] for m in (encoder, again))
    assert torch.equal(one, other)


def test_a_tower_that_lies_elsewhere_is_loaded_from_there(tmp_path: Path) -> None:
    theirs, folder = llava_made(tmp_path, "llama, CLIP")
    place = Path(json.loads((folder / "config.json").read_text())["mm_vision_tower"])
    theirs.model.vision_tower.vision_tower.save_pretrained(place)
    held = {name: tensor for name, tensor in repo.stored(theirs).items() if "vision_tower" not in name}
    settings = json.loads((folder / "config.json").read_text())
    lean = repo.write(tmp_path / "lean", settings, held, repo.tokenizer("</s>", "<s>"))
    model, processor = load_model(lean, None)
    assert llava_apart(theirs, model, processor, (56, 56)) < 1e-6
    # and what is written back keeps it, and says that it does
    back = write_back(model, lean, tmp_path / "back")
    assert tensors(back).keys() == tensors(folder).keys()
    (place / "model.safetensors").unlink()
    assert empty_model(str(lean)).config.vision_config.num_hidden_layers == 3
    with pytest.raises(ModelError, match=r"keeps no vision tower, and none could be loaded from mm_vision_tower="):
        load_model(lean, None)


def test_only_the_structure_is_read_where_no_weights_are_wanted(tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, "qwen, tiles with a limit")
    model = empty_model(str(folder))
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert all(parameter.is_meta for parameter in model.parameters())


def test_pytorch_files_are_read_without_code(tmp_path: Path) -> None:
    theirs, folder = llava_made(tmp_path, "llama, CLIP")
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(repo.stored(theirs), folder / "pytorch_model.bin")
    model, processor = load_model(folder, None)
    assert llava_apart(theirs, model, processor, (56, 56)) < 1e-6


class TestImageToken:
    """-200 becomes a token that no text contains; no embedding is added for it."""

    def test_it_is_added_where_there_is_a_row_for_it(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        model, processor = load_model(folder, None)
        assert processor.image_token == "<image>"
        assert model.config.image_token_id == len(repo.tokenizer("</s>", "<s>"))

    def test_a_full_vocabulary_gives_up_its_unknown_token(self, tmp_path: Path) -> None:
        rows = len(repo.tokenizer("</s>", "<s>"))
        theirs, folder = llava_made(tmp_path, "llama, CLIP", vocab_size=rows)
        tokens = repo.tokenizer("</s>", "<s>")
        tokens.pad_token = "<unk>"
        tokens.save_pretrained(folder)
        model, processor = load_model(folder, None)
        assert processor.image_token == "<unk>"
        assert model.get_input_embeddings().num_embeddings == rows
        assert processor.tokenizer.pad_token_id not in (None, model.config.image_token_id)
        check_processor(model, processor, find_adapter(model))
        assert llava_apart(theirs, model, processor, (90, 56)) < 1e-6

    def test_a_reserved_token_comes_before_the_unknown_one(self, tmp_path: Path) -> None:
        special = ("</s>", "<s>", "<|reserved_special_token_0|>")
        rows = len(repo.tokenizer(*special))
        _, folder = llava_made(tmp_path, "llama, CLIP", vocab_size=rows)
        repo.tokenizer(*special).save_pretrained(folder)
        _, processor = load_model(folder, None)
        assert processor.image_token == "<|reserved_special_token_0|>"

    def test_none_left_is_refused(self, tmp_path: Path) -> None:
        rows = len(repo.tokenizer("</s>", "<s>"))
        _, folder = llava_made(tmp_path, "llama, CLIP", vocab_size=rows)
        tokens = repo.tokenizer("</s>", "<s>")
        tokens.unk_token = None
        tokens.save_pretrained(folder)
        with pytest.raises(ModelError, match="no token left to stand for an image"):
            load_model(folder, None)


@pytest.mark.parametrize("case", ["llama, CLIP", "qwen, own SigLIP", "llama, tiles", "qwen, tiles with a limit"])
@pytest.mark.parametrize("size", [(56, 56), (200, 90), (90, 300), (260, 250)])
def test_pictures_are_cut_and_coloured_as_the_repository_does(case: str, size: tuple[int, int], tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, case)
    _, processor = load_model(folder, None)
    clip = LLAVA_CASES[case][1] == "clip"
    mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if clip else ([0.5] * 3, [0.5] * 3)
    image = smooth(*size)
    tiles = repo.anyres_tiles(image) if "tiles" in case else [repo.padded(image, mean)]
    reference = torch.stack([repo.pixels(tile, mean, std) for tile in tiles])
    ours = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = ours[0] if ours.ndim == 5 else ours
    assert ours.shape == reference.shape
    # resizing rounds in another place: a level or two of 255
    assert (ours - reference).abs().mean() < 0.02
    assert (ours - reference).abs().max() < 0.5


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([(336, 672), (672, 336)], [[672, 336], [336, 672]]),
        ("[(336, 672), [672, 336]]", [[672, 336], [336, 672]]),
        ("(1x1),...,(2x3)", [[h * 336, w * 336] for w in (1, 2) for h in (1, 2, 3)]),
    ],
)
def test_pinpoints_are_read_in_every_form(written: object, expected: list[list[int]]) -> None:
    assert pinpoints(written, 336, "x") == expected


@pytest.mark.parametrize("written", [None, "none", [336], [(300, 672)]])
def test_pinpoints_that_make_no_sense_are_refused(written: object) -> None:
    with pytest.raises(ModelError, match="image_grid_pinpoints"):
        pinpoints(written, 336, "x")


def test_transformers_own_folders_and_objects_are_left_to_transformers(llava: Any, tmp_path: Path) -> None:
    llava[0].save_pretrained(tmp_path)
    llava[1].save_pretrained(tmp_path)
    assert read(tmp_path) is None
    assert load_model(*llava) == llava


def test_generation_settings_are_kept_and_can_be_saved(tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, "llama, CLIP")
    # as Vicuna has them: likeliest tokens, and a temperature
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6})
    )
    model, _ = load_model(folder, None)
    assert model.generation_config.eos_token_id == 2
    model.save_pretrained(tmp_path / "saved")
    sampling = {"do_sample": True, "temperature": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    model, _ = load_model(folder, None)
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.9)


def test_a_hub_id_is_read_like_a_folder_and_no_weight_is_downloaded_for_its_structure(tmp_path: Path) -> None:
    _, folder = llava_made(tmp_path, "qwen, own SigLIP")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    code = """
from pathlib import Path
from huggingface_hub import scan_cache_dir
from pivot_plugin.models.loading import empty_model, load_model
def held():
    revisions = [revision for repo in scan_cache_dir().repos for revision in repo.revisions]
    return sorted(Path(file.file_name).suffix for revision in revisions for file in revision.files)
structure = empty_model("tester/model")
before = held()
model, processor = load_model("tester/model", None)
total = sum(p.double().sum().item() for p in model.parameters())
answer = [before, held(), model.name_or_path, model.config._commit_hash, processor.image_token, total]
"""
    with hub_server.serving() as hub:
        hub.repos["models/tester/model"] = hub_server.Repo()
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        commit = hub.repos["models/tester/model"].add("main", files, "checkpoint")
        (tmp_path / "home").mkdir()
        client = Client(hub.url, tmp_path / "home")
        reply = client(code)
        client.close()
    assert "error" not in reply, reply
    before, after, name, revision, token, total = reply["answer"]
    assert ".safetensors" not in before and after.count(".safetensors") == 2
    assert ".py" not in after
    assert (name, revision, token) == ("tester/model", commit, "<image>")
    assert total == pytest.approx(sum(p.double().sum().item() for p in load_model(folder, None)[0].parameters()))


def test_the_structure_of_the_published_7b_is_that_of_its_settings(tmp_path: Path) -> None:
    settings = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-05,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "pad",
        "torch_dtype": "float16",
    }
    decoder = [f"{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")]
    decoder += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    decoder += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    tower = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    tower += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    head = "model.vision_tower.vision_tower.vision_model."
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.{name}" for n in range(32) for name in decoder]
    names += [f"{head}encoder.layers.{n}.{part}.{kind}" for n in range(24) for part in tower for kind in KINDS]
    names += [f"{head}{part}.{kind}" for part in ("pre_layrnorm", "post_layernorm") for kind in KINDS]
    names += [f"{head}embeddings.{part}" for part in ("class_embedding", "patch_embedding.weight")]
    names += [f"{head}embeddings.position_embedding.weight"]
    names += [f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in KINDS]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    repo.tokenizer("</s>", "<s>").save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    # LLaMA 7B, the tower of CLIP ViT-L/14 at 336 px, two linear layers
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616 + 303_507_456 + 20_979_712
    assert model.config.image_seq_length == 576
