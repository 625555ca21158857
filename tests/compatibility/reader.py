"""Runs in the environment of another release: loads folders and writes what they compute. Knows transformers alone.

Called with a JSON file of jobs: {name: {"folder", "classes", "inputs", "outputs"}}. The first class that there is reads
the folder. Prints one JSON line: {name: {"missing", "unexpected"} or {"error"}}, and the release under "transformers".
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor


def find(path):
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def tensors(outputs):
    """By name, what a release's class answers: a record, a tensor, or a tuple whose first tensor is the features."""
    if torch.is_tensor(outputs):
        return {"merged": outputs}
    if isinstance(outputs, tuple):
        return {"merged": outputs[0]}
    found = {}
    for name in ("last_hidden_state", "pooler_output", "logits"):
        if torch.is_tensor(outputs.get(name)):
            found[name] = outputs[name]
    for index, state in enumerate(outputs.get("hidden_states") or ()):
        found[f"hidden_states.{index}"] = state
    return found


def read(job):
    model_cls = next((found for path in job["classes"] if (found := find(path)) is not None), None)
    if model_cls is None:
        raise ImportError(f"no class among {job['classes']}")
    model, loading = model_cls.from_pretrained(job["folder"], output_loading_info=True)
    inputs = load_file(job["inputs"])
    taken = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in taken or "hidden_states" in name}
    if "pixel_values" not in taken and "hidden_states" in taken:
        inputs["hidden_states"] = load_file(job["inputs"])["pixel_values"]
    states = {"output_hidden_states": True} if job["hidden_states"] else {}
    with torch.no_grad():
        outputs = model.eval()(**inputs, **states)
    outputs = tensors(outputs)
    if job["image"]:
        with Image.open(job["image"]) as image:
            processed = AutoImageProcessor.from_pretrained(job["folder"])(images=[image], return_tensors="pt")
        outputs["pixel_values"] = processed["pixel_values"]
    save_file({name: value.contiguous().clone() for name, value in outputs.items()}, job["outputs"])
    return {
        "missing": sorted(map(str, loading["missing_keys"])),
        "unexpected": sorted(map(str, loading["unexpected_keys"])),
    }


def main():
    transformers.logging.set_verbosity_error()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = {"transformers": transformers.__version__}
    for name, job in jobs.items():
        try:
            answers[name] = read(job)
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    print("@@" + json.dumps(answers))


if __name__ == "__main__":
    main()
