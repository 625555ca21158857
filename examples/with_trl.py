"""For those who keep their own TRL script: only the trainer and the encoder export are ours.

python examples/with_trl.py                    # llava-hf/llava-1.5-7b-hf on RLAIF-V
python examples/with_trl.py MODEL PREFS        # any MLLM; a folder with a .jsonl file and images
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from pivot_plugin import PivotConfig, PivotTrainer
from pivot_plugin.encoders import save_encoder

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "llava-hf/llava-1.5-7b-hf"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    processor = AutoProcessor.from_pretrained(name)
    prefs = sys.argv[2] if len(sys.argv) > 2 else load_dataset("openbmb/RLAIF-V-Dataset", split="train[:5000]")

    trainer = PivotTrainer(
        model=model,
        # any field of TRL's DPOConfig
        args=PivotConfig(output_dir="with-trl", learning_rate=2e-4, max_steps=50, loss_type=["sigmoid", "sft"]),
        train_dataset=prefs,
        processing_class=processor,
        lora=16,
    )
    trainer.train()
    trainer.model.merge_and_unload()
    save_encoder(trainer.adapter, processor, "with-trl/encoder", {"script": "with_trl.py"})
