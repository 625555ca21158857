"""InternVL on questions with answers, by GRPO: roll-outs that share their picture, and rewards that can be checked.

python examples/grpo_internvl.py                      # the 2B model on 5,000 questions of GEOQA; 40 GB
python examples/grpo_internvl.py MODEL QUESTIONS      # any MLLM; a file with image, question and answer
"""

import sys

from datasets import load_dataset

import pivot_plugin as pivot

if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "OpenGVLab/InternVL3-2B-hf"
    questions = (
        sys.argv[2] if len(sys.argv) > 2 else load_dataset("leonardPKU/GEOQA_R1V_Train_8K", split="train[:5000]")
    )
    result = pivot.optimize(
        model,
        questions,
        objective="grpo",
        rewards=["accuracy", "format"],
        num_generations=8,
        max_completion_length=256,
        output_dir="internvl-pivot",
        max_steps=200,
    )
    print("held-out questions:", result.metrics)
    result.save("internvl-encoder")
