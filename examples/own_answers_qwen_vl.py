"""Qwen2.5-VL on questions with answers: it answers eight times, its better answers are paired with its worse ones.

python examples/own_answers_qwen_vl.py                      # the 3B model on 5,000 questions of A-OKVQA; 24 GB
python examples/own_answers_qwen_vl.py MODEL QUESTIONS      # any MLLM; a file with image, question and answer
"""

import sys

from datasets import load_dataset

import pivot_plugin as pivot

if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-VL-3B-Instruct"
    if len(sys.argv) > 2:
        questions: object = sys.argv[2]
    else:
        rows = load_dataset("HuggingFaceM4/A-OKVQA", split="train[:5000]")
        questions = [
            {"images": [row["image"]], "question": row["question"], "answer": row["choices"][row["correct_choice_idx"]]}
            for row in rows
        ]
    result = pivot.optimize(
        model,
        questions,
        rewards=["normalised_match"],
        objective="dpo",
        samples=8,
        max_new_tokens=32,
        output_dir="qwen-pivot",
        num_train_epochs=1,
    )
    print(result.answers[0])
    print("held-out pairs:", result.metrics)
    result.save("qwen-encoder")
