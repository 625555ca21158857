"""Every family's encoder and MLLM, as this package writes them, computes the same in the releases of three years."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ProcessorMixin, Siglip2VisionConfig, Siglip2VisionModel

from pivot_plugin.encoders import save_encoder
from pivot_plugin.encoders.compatibility import CHECKED, save_model
from pivot_plugin.models.find import find_adapter
from pivot_plugin.testing import FAMILIES, build

from ..conftest import picture
from .conftest import OTHERS, Reader

TOLERANCE = 1e-5
# releases that have the class of a family's MLLM and read its names; what is older is to say so
MLLM_FROM = {"llava": "4.57.6"}


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
        images = adapter.image_processor(processor)(images=[picture(70, 60, 1), picture(60, 90, 2)], return_tensors="pt")
        whole = self.whole_inputs(processor)
        self.by_grid = "image_grid_thw" in images
        self.inputs = {
            "encoder": {"pixel_values": images["pixel_values"]}
            | ({"grid_thw": images["image_grid_thw"]} if self.by_grid else {}),
            "mllm": whole,
        }
        self.states = adapter.feature_layer is not None
        self.layer = adapter.feature_layer
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
        import inspect

        if "pixel_values" in inspect.signature(tower.forward).parameters:
            return inputs
        return {"hidden_states": inputs["pixel_values"], **{k: v for k, v in inputs.items() if k != "pixel_values"}}

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
            "inputs": str(self.folder / f"{kind}.safetensors"),
            "outputs": str(self.folder / f"{kind}-{release}.safetensors"),
            "hidden_states": kind == "encoder" and self.states,
        }


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {name: Saved(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="session")
def found(release: str, read_by: Reader, families: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a release found in every folder, by family and kind."""
    jobs = {
        f"{name} {kind}": saved.job(kind, release) for name, saved in families.items() for kind in ("encoder", "mllm")
    }
    return read_by(jobs, tmp_path_factory.mktemp("jobs"))


def test_show(release: str, found: Any, families: dict[str, Saved]) -> None:
    for name, answer in found.items():
        family, kind = name.split()
        saved = families[family]
        if "error" in answer:
            print(release, name, answer["error"][:150])
            continue
        outputs = load_file(saved.job(kind, release)["outputs"])
        expected = saved.expected[kind]
        apart = {
            key: largest(value, expected[key if key != "merged" else "pooler_output"])
            for key, value in outputs.items()
            if (key if key != "merged" else "pooler_output") in expected
        }
        print(release, name, answer["missing"][:2], answer["unexpected"][:2], len(answer["missing"]), apart)
