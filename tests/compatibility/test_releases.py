"""Every family's encoder and MLLM, as this package writes them, computes the same in the releases of three years."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pivot_plugin.encoders import save_encoder
from pivot_plugin.encoders.compatibility import CHECKED, save_model
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import FAMILIES, build
from tests.helpers import picture
from tests.helpers.releases import OTHERS, Reader

TOLERANCE = 1e-5


def with_other_rotation(model: PreTrainedModel) -> PreTrainedModel:
    """The model with another base of its rotary embeddings than any release takes by default."""
    model.config.get_text_config().rope_parameters["rope_theta"] = 500.0
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


@torch.no_grad()
def answers(model: PreTrainedModel, inputs: dict[str, torch.Tensor], states: bool) -> dict[str, torch.Tensor]:
    outputs = model(**inputs, output_hidden_states=states)
    named = {name: outputs[name] for name in ("last_hidden_state", "pooler_output", "logits") if name in outputs}
    named = {name: value for name, value in named.items() if torch.is_tensor(value)}
    return named | {f"hidden_states.{i}": state for i, state in enumerate(outputs.get("hidden_states") or ())}


class Saved:
    """Folders of one family, what is given to them, and what this process computes."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        model, processor = build(name)
        model = with_other_rotation(model)
        adapter = find_adapter(model)
        tower = adapter.tower
        self.name, self.folder = name, folder
        self.model_type = tower.config.model_type
        save_encoder(adapter, processor, folder / "encoder", {"note": "test"})
        save_model(model, folder / "mllm")
        images = adapter.image_processor(processor)(
            images=[picture(70, 60, 1), picture(60, 90, 2)], return_tensors="pt"
        )
        whole = self.whole_inputs(processor)
        self.image = folder / "image.png"
        picture(200, 150, 4).save(self.image)
        with Image.open(self.image) as image:
            self.pixels = adapter.image_processor(processor)(images=[image], return_tensors="pt")["pixel_values"]
        self.level = 1 / 255 / min(adapter.image_processor(processor).image_std)
        self.by_grid = "image_grid_thw" in images
        self.inputs = {
            "encoder": {"pixel_values": images["pixel_values"]}
            | ({"grid_thw": images["image_grid_thw"]} if self.by_grid else {}),
            "mllm": whole,
            # 4.37 wants one token for an image, which it expands itself
            "mllm-4.37.2": self.one_token_per_image(whole, model.config.image_token_id),
        }
        self.states = adapter.feature_layer is not None
        self.depth = getattr(tower.config, "num_hidden_layers", 0)
        self.headless = self.model_type == "siglip_vision_model" and not hasattr(tower, "head")
        self.expected = {
            "encoder": answers(adapter.extract(), dict(self.first(self.inputs["encoder"], tower)), self.states),
            "mllm": answers(model, whole, False),
        }
        self.classes = {
            "encoder": [
                *([] if self.by_grid else ["transformers.AutoModel"]),
                f"{type(tower).__module__}.{type(tower).__name__}",
            ],
            "mllm": [f"transformers.{type(model).__name__}"],
        }
        for kind, tensors in self.inputs.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{kind}.safetensors")

    @staticmethod
    def first(inputs: dict[str, torch.Tensor], tower: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Inputs by the names of this release's class."""
        if "pixel_values" in inspect.signature(tower.forward).parameters:
            return inputs
        return {"hidden_states": inputs["pixel_values"], **{k: v for k, v in inputs.items() if k != "pixel_values"}}

    @staticmethod
    def one_token_per_image(inputs: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
        """Inputs of one row with one image, of whose tokens one stays."""
        ids = inputs["input_ids"][0]
        kept = (ids != token) | (torch.arange(len(ids)) == (ids == token).nonzero()[0])
        short = {name: inputs[name][:, kept] for name in ("input_ids", "attention_mask")}
        return {**short, "pixel_values": inputs["pixel_values"]}

    def without_pooling(self, release: str) -> bool:
        """Whether a release adds a pooling head of its own."""
        return release == "4.37.2" and self.headless

    @staticmethod
    def whole_inputs(processor: ProcessorMixin) -> dict[str, torch.Tensor]:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
        )
        return dict(processor(images=[picture(80, 60, 3)], text=[text], return_tensors="pt"))

    def job(self, kind: str, release: str) -> dict[str, Any]:
        return {
            "folder": str(self.folder / kind),
            "classes": self.classes[kind],
            "inputs": str(
                self.folder / f"{f'{kind}-{release}' if f'{kind}-{release}' in self.inputs else kind}.safetensors"
            ),
            "outputs": str(self.folder / f"{kind}-{release}.safetensors"),
            "hidden_states": kind == "encoder" and self.states,
            "image": str(self.image) if kind == "encoder" and self.image else None,
        }


_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}


class SavedEncoder(Saved):
    """The folder of an encoder that no tiny family has."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], folder: Path) -> None:
        self.folder, self.model_type, self.headless = folder, model.config.model_type, False
        self.image = None
        self.states, self.depth, self.inputs = True, 3, {"encoder": inputs}
        save_model(model.eval(), folder / "encoder")
        self.expected = {"encoder": answers(model, inputs, True)}
        self.classes = {"encoder": ["transformers.AutoModel"]}
        save_file(inputs, folder / "encoder.safetensors")


def naflex_inputs() -> dict[str, torch.Tensor]:
    """Two images of 3 x 4 and 2 x 5 patches, in rows of twelve."""
    grids = torch.tensor([[3, 4], [2, 5]])
    mask = torch.arange(12)[None] < grids.prod(dim=1)[:, None]
    pixels = torch.randn(2, 12, 14 * 14 * 3, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": grids}


@pytest.fixture(scope="session")
def encoders(families: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """All families' encoders, and beside them a SigLIP with its head and the SigLIP 2 of any resolution."""
    torch.manual_seed(0)
    siglip = SiglipVisionModel(SiglipVisionConfig(**_VIT, image_size=56))
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**_VIT, num_patches=16))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    return families | {
        "siglip": SavedEncoder(siglip, {"pixel_values": pixels}, tmp_path_factory.mktemp("siglip")),
        "siglip2": SavedEncoder(naflex, naflex_inputs(), tmp_path_factory.mktemp("siglip2")),
    }


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {name: Saved(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="session")
def found(release: str, read_by: Reader, encoders: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a release found in every folder, by family and kind."""
    jobs = {f"{name} {kind}": saved.job(kind, release) for name, saved in encoders.items() for kind in saved.classes}
    return read_by(jobs, tmp_path_factory.mktemp("jobs"))


def compared(saved: Saved, kind: str, release: str) -> dict[str, float]:
    """How far a release's answers are from this process's, by output."""
    outputs = load_file(saved.job(kind, release)["outputs"])
    expected = saved.expected[kind]
    # releases before 5 answer for a Qwen-VL tower with what is the pooled output now
    names = {name: "pooler_output" if name == "merged" else name for name in outputs}
    if saved.without_pooling(release):
        names = {name: ours for name, ours in names.items() if ours != "pooler_output"}
    assert set(names.values()) & set(expected), (names, list(expected))
    return {ours: largest(outputs[name], expected[ours]) for name, ours in names.items() if ours in expected}


def test_an_encoder_gives_the_same_features_or_is_refused(release: str, found: Any, encoders: dict[str, Saved]) -> None:
    for name, saved in encoders.items():
        answer = found[f"{name} encoder"]
        if release not in CHECKED[saved.model_type]:
            assert "error" in answer, f"{name} was loaded: {answer}"
            continue
        assert "error" not in answer, f"{name}: {answer['error']}"
        # 4.37 does not know a SigLIP without a head, and adds one behind everything that is read
        missing = [key for key in answer["missing"] if not (saved.without_pooling(release) and ".head." in key)]
        assert not missing and not answer["unexpected"], f"{name}: {answer}"
        apart = compared(saved, "encoder", release)
        assert "last_hidden_state" in apart or apart.keys() == {"pooler_output"}
        assert not saved.states or f"hidden_states.{saved.depth}" in apart
        assert max(apart.values()) < TOLERANCE, f"{name}: {apart}"


def test_an_image_becomes_the_same_numbers(release: str, found: Any, families: dict[str, Saved]) -> None:
    compared_with = 0
    for name, saved in families.items():
        if "error" in found[f"{name} encoder"]:
            continue
        apart = (load_file(saved.job("encoder", release)["outputs"])["pixel_values"] - saved.pixels).abs()
        # PIL and torchvision round a few pixels of a resized image to neighbouring levels
        assert apart.max() < 1.01 * saved.level, name
        assert (apart > 1e-5).float().mean() < 0.02, name
        compared_with += 1
    assert compared_with >= 3


def test_an_mllm_gives_the_same_logits_or_is_refused(release: str, found: Any, families: dict[str, Saved]) -> None:
    for name, saved in families.items():
        answer = found[f"{name} mllm"]
        if release == "4.37.2" and name != "llava":
            assert "no class among" in answer["error"], name
            continue
        assert "error" not in answer, f"{name}: {answer['error']}"
        assert not answer["missing"] and not answer["unexpected"], f"{name}: {answer}"
        assert max(compared(saved, "mllm", release).values()) < TOLERANCE, name


def test_the_list_of_checked_releases_is_what_these_tests_check() -> None:
    checked = {release for releases in CHECKED.values() for release in releases}
    assert checked == {*OTHERS, transformers.__version__}
