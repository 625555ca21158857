"""Feature extraction against a bare forward loop: images per second, side by side in one run.

    python -m benchmarks.extraction

Two bare loops over the same images: one over pixels that are ready in memory, and one that decodes and processes each
batch before its forward pass, as a first script would. Medians of interleaved rounds.
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from pivot_plugin.probes import features

RESULTS = Path(__file__).parent / "results"
BATCH = 16


def encoder(device: str) -> SiglipVisionModel:
    """A SigLIP of 22 M parameters at 224 px, random weights."""
    config = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, vision_use_head=False
    )
    return SiglipVisionModel(config).eval().to(device)


def photographs(count: int) -> list[bytes]:
    """JPEG files of 640 x 480."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        rough = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        written = io.BytesIO()
        rough.resize((640, 480), Image.Resampling.BICUBIC).save(written, "JPEG", quality=85)
        encoded.append(written.getvalue())
    return encoded


def processed(files: Sequence[bytes], processor: SiglipImageProcessor) -> torch.Tensor:
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in files]
    pixels: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def run(count: int = 192, rounds: int = 3, device: str | None = None) -> dict[str, object]:
    """Images per second of the three ways.

    Args:
        count: images.
        rounds: of which the medians count.
        device: to run on.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor, files = (
        encoder(device),
        SiglipImageProcessor(size={"height": 224, "width": 224}),
        photographs(count),
    )
    batches = [files[start : start + BATCH] for start in range(0, count, BATCH)]
    ready = [processed(batch, processor) for batch in batches]

    def forward(pixels: torch.Tensor) -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(pixels.to(device)).last_hidden_state.cpu()

    ways: dict[str, Callable[[], object]] = {
        "bare, pixels ready": lambda: [forward(pixels) for pixels in ready],
        "bare, decoding in the loop": lambda: [forward(processed(batch, processor)) for batch in batches],
        "probes.features": lambda: features(
            model, files, processor=processor, batch_size=BATCH, cache=False, device=device
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores",
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "against pixels ready": round(rates["probes.features"] / rates["bare, pixels ready"], 3),
        "against decoding in the loop": round(rates["probes.features"] / rates["bare, decoding in the loop"], 3),
    }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    measured = run(**vars(parser.parse_args()))
    print(json.dumps(measured, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "extraction.json").write_text(json.dumps(measured, indent=1) + "\n")
