"""Folders that cannot be read: what is wrong is named and counted, and no weight is ever left to chance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pivot_plugin.adapters.foreign import write_back
from pivot_plugin.errors import ModelError
from pivot_plugin.models.loading import load_model
from tests.helpers import repositories as repo
from tests.helpers.foreign import INTERNVL_TOKENS, internvl_made, llava_made


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def rewritten(folder: Path, model: Any, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The checkpoint with other tensors."""
    tensors = repo.stored(model)
    edit(tensors)
    return repo.write(folder, json.loads((folder / "config.json").read_text()), tensors)


def test_an_unknown_layout_says_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpmv", "architectures": ["MiniCPMV"]}))
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, None)
    for words in (str(tmp_path), "model_type='minicpmv'", "class MiniCPMV", "InternVLChatModel", "LLaVA-NeXT"):
        assert words in str(caught.value)


def test_remote_code_of_an_unknown_layout_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')\nclass X: ...\n")
    settings = {"model_type": "x", "architectures": ["X"], "auto_map": {"AutoConfig": "modeling_x.X"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"code of its own \(auto_map\), which is not run.*hook pivot_model"):
        load_model(tmp_path, None)
    assert not mark.exists()


def test_remote_code_of_a_known_layout_is_not_needed_and_not_run(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Qwen2")
    mark = tmp_path / "ran"
    (folder / "modeling_internvl_chat.py").write_text(f"open({str(mark)!r}, 'w')\nclass InternVLChatModel: ...\n")
    model, _ = load_model(folder, None)
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert not mark.exists()


def test_a_tokenizer_that_is_code_is_refused_and_not_run(tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2")
    mark = tmp_path / "ran"
    (folder / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')\nclass Tokens: ...\n")
    named = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["tokenization_x.Tokens", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    kept = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* its class Tokens is code of its own, which is not run"):
        load_model(folder, None)
    # its published conversion is enough, and so is a tokenizer that is given
    assert load_model(folder, repo.tokenizer(*INTERNVL_TOKENS))[1].image_token == "<IMG_CONTEXT>"
    (folder / "tokenizer.json").write_bytes(kept)
    assert load_model(folder, None)[1].image_token == "<IMG_CONTEXT>"
    assert not mark.exists()


@pytest.mark.parametrize("damage", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": None}])
def test_a_configuration_that_makes_no_sense_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2")
    settings = json.loads((folder / "config.json").read_text())
    change(folder, llm_config={**settings["llm_config"], **damage})
    with pytest.raises(ModelError, match=r"The configuration of .*InternVLChatModel.* cannot be understood: \w+: "):
        load_model(folder, None)


class TestHalfAFolder:
    """Files that are missing or cut short."""

    @pytest.mark.parametrize("case", ["llama, CLIP", "qwen, own SigLIP"])
    @pytest.mark.parametrize("kept", [True, False])
    def test_the_tokenizers_vocabulary_is_missing(self, case: str, kept: bool, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, case)
        (folder / "tokenizer.json").unlink()
        settings = {"tokenizer_class": "LlamaTokenizer" if "llama" in case else "Qwen2Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings if kept else {}))
        with pytest.raises(ModelError, match=r"knows no word: its vocabulary is missing|cannot be read: ValueError"):
            load_model(folder, None)

    def test_shards_that_the_index_names_are_missing(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match=r"half downloaded: 1 of the 2 .* missing: model-00002-of-00002"):
            load_model(folder, None)

    def test_a_file_is_cut_short(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors of .* cannot be read"):
            load_model(folder, None)

    def test_the_index_is_missing(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        (folder / "model.safetensors.index.json").unlink()
        with pytest.raises(ModelError, match=r"2 weight files .* and no index"):
            load_model(folder, None)

    def test_the_index_is_broken(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        (folder / "model.safetensors.index.json").write_text("{")
        with pytest.raises(ModelError, match=r"index.json of .* cannot be read"):
            load_model(folder, None)

    def test_the_index_promises_a_tensor_that_its_file_lacks(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        name, file = next(iter(index["weight_map"].items()))
        tensors = {other: torch.ones(1) for other, place in index["weight_map"].items() if place == file}
        del tensors[name]
        save_file(tensors, folder / file)
        with pytest.raises(ModelError, match=f"has no tensor '{name}', which the index says"):
            load_model(folder, None)

    def test_there_are_no_weights(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
            file.unlink()
        with pytest.raises(ModelError, match=r"has a config\.json and no weights"):
            load_model(folder, None)

    def test_a_pickle_that_is_more_than_tensors(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
            file.unlink()
        torch.save({"weight": Path("x")}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"pytorch_model.bin of .* cannot be read: UnpicklingError"):
            load_model(folder, None)


class TestTensors:
    """Each has its place, or is named."""

    def test_missing_ones_are_named_as_the_repository_does(self, tmp_path: Path) -> None:
        model, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2")
        name = "language_model.model.layers.1.attention.wqkv.weight"
        rewritten(folder, model, lambda tensors: [tensors.pop(name), tensors.pop("mlp1.3.bias")])
        with pytest.raises(ModelError, match=rf"2 tensors are missing: mlp1.3.bias, {name}|missing: {name}, mlp1.3.b"):
            load_model(folder, None)

    def test_those_left_over_are_named(self, tmp_path: Path) -> None:
        model, folder = llava_made(tmp_path, "qwen, own SigLIP")
        extra = {"model.mm_projector.4.weight": torch.ones(2, 2), "model.vision_resampler.query": torch.ones(3)}
        rewritten(folder, model, lambda tensors: tensors.update(extra))
        with pytest.raises(ModelError, match=r"2 tensors are left over: .*mm_projector.4.weight"):
            load_model(folder, None)

    @pytest.mark.parametrize("name", ["mlp1.1.weight", "vision_model.encoder.layers.0.attn.qkv.weight"])
    def test_those_of_another_shape_are_named(self, name: str, tmp_path: Path) -> None:
        model, folder = internvl_made(tmp_path, "Qwen2")
        rewritten(folder, model, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
        with pytest.raises(ModelError, match=rf"other shapes than its configuration says: {name}"):
            load_model(folder, None)

    def test_what_the_classes_compute_themselves_is_no_weight(self, tmp_path: Path) -> None:
        model, folder = llava_made(tmp_path, "llama, CLIP")
        extra = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        }
        rewritten(folder, model, lambda tensors: tensors.update(extra))
        read, _ = load_model(folder, None)
        back = write_back(read, folder, tmp_path / "back")
        assert set(extra) <= set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
        assert load_model(back, None)[0].dtype is torch.float32

    def test_precision_is_that_of_the_configuration(self, tmp_path: Path) -> None:
        model, folder = llava_made(tmp_path, "llama, CLIP")
        change(folder, torch_dtype="bfloat16")
        read, _ = load_model(folder, None)
        assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}
        change(folder, torch_dtype=None)
        rewritten(folder, model.half(), lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"]}))
        assert load_model(folder, None)[0].dtype is torch.float16


class TestLlavaSettings:
    """What transformers' classes cannot express is named before any weight is read."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mm_projector_type": "linear"}, "is of type 'linear'"),
            ({"mm_projector_type": "mlp3x_gelu"}, "is of type 'mlp3x_gelu'"),
            ({"architectures": ["LlavaMptForCausalLM"]}, "of class 'LlavaMptForCausalLM'; known are LlavaLlama"),
            ({"mm_vision_select_feature": "slicefour_patch"}, "mm_vision_select_feature='slicefour_patch'"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres' and mm_patch_merge_type='flat'"),
            ({"mm_patch_merge_type": "spatial_unpad"}, "image_aspect_ratio='pad' and mm_patch_merge_type='spatial_"),
            ({"mm_use_im_start_end": True}, "tokens of its own around images"),
            ({"mm_resampler_type": "perceiver"}, "mm_resampler_type='perceiver'"),
            ({"mm_vision_tower": "somebody/clip-of-their-own"}, "mm_vision_tower='somebody/clip-of-their-own', is not"),
            ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "has 3 blocks; .* should leave 24"),
        ],
    )
    def test_a_setting(self, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        change(folder, **settings)
        with pytest.raises(ModelError, match=message):
            load_model(folder, None)

    def test_a_siglip_tower_from_which_no_block_was_deleted(self, tmp_path: Path) -> None:
        model, folder = llava_made(tmp_path, "qwen, own SigLIP")
        head = "model.vision_tower.vision_tower.vision_model.encoder.layers."

        tensors = repo.stored(model)
        tensors |= {f"{head}2.{n[len(head) + 2 :]}": t for n, t in list(tensors.items()) if n.startswith(f"{head}1.")}
        repo.write(folder, json.loads((folder / "config.json").read_text()), tensors)
        with pytest.raises(ModelError, match=r"has 3 blocks; .* should leave 2"):
            load_model(folder, None)


class TestWritingBack:
    """A target is never half written, and never another model than was meant."""

    def test_a_folder_with_something_in_it_is_left_alone(self, tmp_path: Path) -> None:
        _, folder = llava_made(tmp_path, "llama, CLIP")
        model, _ = load_model(folder, None)
        with pytest.raises(ModelError, match="is no empty folder"):
            write_back(model, folder, folder)

    def test_a_template_of_no_known_layout_is_refused(self, llava: Any, tmp_path: Path) -> None:
        llava[0].save_pretrained(tmp_path / "own")
        with pytest.raises(ModelError, match=r"no checkpoint of a known layout.*InternVLChatModel"):
            write_back(llava[0], tmp_path / "own", tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_a_model_of_another_kind_or_size_is_refused(self, make: Any, tmp_path: Path) -> None:
        _, folder = internvl_made(tmp_path, "Qwen2")
        _, other = internvl_made(tmp_path / "wider", "Qwen2", vision={"intermediate_size": 44})
        wider, _ = load_model(other, None)
        more, _ = load_model(folder, None)
        more.another = torch.nn.Parameter(torch.ones(1))
        for model, message in (
            (make("llava")[0], r"is read as a InternVLFor\w+; this is a LlavaForConditionalGeneration"),
            (more, r"1 tensors of .* have no place in the repository's form: another"),
            (make("internvl")[0], r"lacks .*q_proj.bias, .* which .*attn.qkv.bias .* holds"),
            (wider, r"does not fit the form of .*: 9 tensors differ"),
        ):
            with pytest.raises(ModelError, match=message):
                write_back(model, folder, tmp_path / "back")
        assert not (tmp_path / "back").exists()
