"""LLaVA-1.5 on RLAIF-V: a better CLIP encoder out of 5,000 preference pairs. One GPU with 24 GB.

python examples/optimize_llava.py
accelerate launch examples/optimize_llava.py        # several GPUs
"""

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

import pivot_plugin as pivot

MODEL = "llava-hf/llava-1.5-7b-hf"

if __name__ == "__main__":
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="bfloat16")
    prefs = load_dataset("openbmb/RLAIF-V-Dataset", split="train[:5000]")
    result = pivot.optimize(
        model,
        prefs,
        processor=AutoProcessor.from_pretrained(MODEL),
        output_dir="llava-pivot",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        logging_steps=5,
    )
    print("held-out pairs:", result.metrics)
    print("relative change per block:", result.weight_change)
    result.save("clip-vit-large-patch14-336-pivot")
