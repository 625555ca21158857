"""Prompts are written letter by letter as the repositories write them.

The expected texts follow from llava/conversation.py of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT (df17966), and from
internvl_chat/internvl/conversation.py and train/dataset.py of OpenGVLab/InternVL (2410d1d): names of roles, what stands
between turns, and the system message of each form.
"""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pivot_plugin.adapters.foreign.tokens import CHATML_DIRECT, LLAMA_3, MISTRAL, QWEN, VICUNA, PromptForm
from pivot_plugin.errors import ModelError
from pivot_plugin.models.loading import load_model
from tests.helpers import repositories as repo
from tests.helpers.foreign import INTERNVL_TOKENS, internvl_made, llava_made

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# form, two turns without a system message, and their beginning with the system message "Be brief."
FORMS = {
    "vicuna_v1": (
        VICUNA,
        f"<s>{VICUNA_SYSTEM} USER: <image>\nwhat? ASSISTANT: a cat</s>USER: sure? ASSISTANT:",
        "<s>Be brief. USER: <image>\nwhat? ASSISTANT:",
    ),
    "mistral_instruct": (
        MISTRAL,
        "<s>[INST] <image>\nwhat? [/INST] a cat </s>[INST] sure? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nwhat? [/INST]",
    ),
    "llava_llama_3": (
        LLAMA_3,
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na cat<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen_1_5": (
        QWEN,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n",
    ),
    # nothing follows the end of a turn
    "chatml_direct": (
        CHATML_DIRECT,
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nwhat?<|im_end|>"
        "<|im_start|>assistant\na cat<|im_end|><|im_start|>user\nsure?<|im_end|><|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\nwhat?<|im_end|><|im_start|>assistant\n",
    ),
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "sure?"},
]
BRIEF = {"role": "system", "content": "Be brief."}


def written(tokens: Any, messages: list[dict[str, Any]], form: PromptForm | None = None) -> str:
    template = {} if form is None else {"chat_template": form.template("<image>")}
    text: str = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
    return text


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_llava_is_written_in_the_repositorys_way(name: str) -> None:
    form, expected, brief = FORMS[name]
    tokens = repo.tokenizer("<s>")
    tokens.bos_token = "<s>"
    text = written(tokens, MESSAGES, form)
    assert text == expected
    # what asks for an answer is the beginning of the conversation with the answer
    assert text.startswith(written(tokens, MESSAGES[:1], form))
    assert written(tokens, [BRIEF, *MESSAGES[:1]], form) == brief


def adding_its_first(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before every text, as InternLM2's does."""
    tokens = repo.tokenizer(*special, "<s>")
    tokens.bos_token = "<s>"
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.convert_tokens_to_ids("<s>"))]
    )
    return tokens


EARLY = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
INTERNVL_FORMS = {"Hermes-2": (EARLY, ""), "internlm2-chat": (EARLY, ""), "internvl2_5": (LATER, "\n")}


@pytest.mark.parametrize("name", INTERNVL_FORMS)
@pytest.mark.parametrize("adds", [False, True], ids=["no first token", "a first token"])
def test_a_form_of_internvl_is_written_in_the_repositorys_way(name: str, adds: bool, tmp_path: Path) -> None:
    system, between = INTERNVL_FORMS[name]
    end = f"<|im_end|>{between}"
    _, folder = internvl_made(tmp_path, "InternLM2, normed queries, layer -2", template=name)
    tokens = adding_its_first(*INTERNVL_TOKENS) if adds else repo.tokenizer(*INTERNVL_TOKENS)
    _, processor = load_model(folder, tokens)
    assert written(processor, MESSAGES) == (
        f"{'<s>' if adds else ''}<|im_start|>system\n{system}{end}<|im_start|>user\n<IMG_CONTEXT>\nwhat?{end}"
        f"<|im_start|>assistant\na cat{end}<|im_start|>user\nsure?{end}<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["internvl_zh", "phi3-chat", None])
def test_an_internvl_of_an_unknown_form_is_refused(name: str | None, tmp_path: Path) -> None:
    _, folder = internvl_made(tmp_path, "Qwen2", template=name)
    with pytest.raises(ModelError, match=rf"prompts by template={name!r}; known are internlm2-chat, Hermes-2, intern"):
        load_model(folder, None)


@pytest.mark.parametrize(
    ("case", "special", "expected"),
    [
        ("llama, CLIP", ("</s>", "<s>"), "vicuna_v1"),
        ("llama, CLIP", ("<|start_header_id|>", "<|eot_id|>"), "llava_llama_3"),
        ("llama, CLIP", ("<|im_start|>",), "chatml_direct"),
        ("mistral, CLIP, last layer, square", ("</s>", "<s>"), "mistral_instruct"),
        ("qwen, own SigLIP", ("<|im_start|>",), "qwen_1_5"),
    ],
)
def test_the_form_of_a_llava_is_read_off_its_decoder_and_tokens(
    case: str, special: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    _, folder = llava_made(tmp_path, case)
    _, processor = load_model(folder, repo.tokenizer(*special))
    marker = processor.image_token
    text = FORMS[expected][1].removeprefix("<s>").replace("<image>", marker)
    assert written(processor, MESSAGES) == text
