"""Tokenizers of other repositories, the token that stands for an image, and their prompts as chat templates."""

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from pivot_plugin.errors import ModelError

from .weights import Weights

IMAGE = "<image>"
VIDEO = "<video>"


def tokenizer_of(weights: Weights, processor: object | None, decoder: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A model's tokenizer, a copy where it was given.

    Args:
        weights: of the model.
        processor: a tokenizer or a processor with one; None to read it from the model's folder.
        decoder: configuration of its language model, which tells the tokenizer's class where the folder does not.

    Raises:
        ModelError: if there is none that can be read without running a repository's code.
    """
    passed = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if isinstance(passed, PreTrainedTokenizerBase):
        return copy.deepcopy(passed)
    if passed is not None:
        raise ModelError(
            f"The processor given with {weights.label!r} is a {type(passed).__name__}.",
            "Pass processor=, its tokenizer (AutoTokenizer.from_pretrained(...)).",
        )
    if weights.folder is None:
        raise ModelError(
            f"No tokenizer was given with this {weights.label}, and the folder it was loaded from is not known.",
            "Pass processor=, its tokenizer (AutoTokenizer.from_pretrained(...)).",
        )
    tokenizer = _from_folder(weights.folder, weights.label, decoder)
    ids = set(tokenizer("a red cat", add_special_tokens=False)["input_ids"])
    if not ids - {tokenizer.unk_token_id}:
        # transformers makes an empty tokenizer where the files of its vocabulary are missing
        raise ModelError(
            f"The tokenizer of {weights.label!r} ({type(tokenizer).__name__}, {len(tokenizer)} tokens) knows no word: "
            "its vocabulary is missing.",
            "Download the tokenizer's files too: tokenizer.json, or tokenizer.model, or vocab.json and merges.txt.",
        )
    return tokenizer


def _from_folder(folder: Path, label: str, decoder: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, by transformers' classes alone."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    try:
        if "auto_map" not in settings:
            return AutoTokenizer.from_pretrained(folder, config=decoder, trust_remote_code=False)
        # a class of the repository's own: transformers' class for such a decoder might cut texts in another way
        return PreTrainedTokenizerFast.from_pretrained(folder)
    # files or packages that are not there: every library involved has its own error
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if "auto_map" in settings:
            why = f"its class {settings.get('tokenizer_class')} is code of its own, which is not run"
        raise ModelError(
            f"The tokenizer of {label!r} cannot be read: {why}.",
            "Put the tokenizer.json of its published conversion into the folder, or pass processor=, a tokenizer.",
        ) from error


def image_token(tokenizer: PreTrainedTokenizerBase, rows: int, label: str) -> str:
    """The token that stands for an image where a repository has the number -200, added to the tokenizer if need be.

    No embedding is added: that would change what the model says. So it is `<image>` where there is a row for it, else a
    token that no text ever becomes: a reserved one, or the unknown token, which then pads no more.

    Args:
        tokenizer: of the model, changed.
        rows: of its input embeddings.
        label: of the model, for errors.

    Raises:
        ModelError: if there is no token for it.
    """
    vocabulary = tokenizer.get_vocab()
    if IMAGE in vocabulary and vocabulary[IMAGE] < rows:
        _make_special(tokenizer, IMAGE)
        return IMAGE
    if len(tokenizer) < rows:
        _make_special(tokenizer, IMAGE)
        return IMAGE
    reserved = sorted(token for token in tokenizer.all_special_tokens if re.search("reserved|unused", token))
    reserved += sorted(token for token in tokenizer.get_added_vocab() if re.search("reserved|unused", token))
    spare = [token for token in reserved if vocabulary[token] < rows]
    unknown = tokenizer.unk_token
    if not spare and unknown is not None and unknown != tokenizer.eos_token:
        if tokenizer.pad_token == unknown:
            tokenizer.pad_token = tokenizer.eos_token
        spare = [unknown]
    if not spare:
        raise ModelError(
            f"{label!r} embeds {rows} tokens and its tokenizer has {len(tokenizer)}, none of them reserved or unknown: "
            "there is no token left to stand for an image.",
            f"Give the checkpoint one more embedding row, and its tokenizer the token {IMAGE}.",
        )
    return spare[0]


def _make_special(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)


def ready(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token one, which attention masks hide anyway."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def name_tokens(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> None:
    """Give tokens of the vocabulary names that a processor asks its tokenizer for.

    Args:
        tokenizer: changed; it keeps the names when it is saved.
        tokens: by name.
    """
    tokenizer._set_model_specific_special_tokens(special_tokens=tokens)
    tokenizer.init_kwargs["model_specific_special_tokens"] = {
        **tokenizer.init_kwargs.get("model_specific_special_tokens", {}),
        **tokens,
    }


@dataclass(frozen=True)
class PromptForm:
    """How a repository writes a conversation.

    Attributes:
        system: around a system message.
        user: around what the user says.
        assistant: around an answer; up to its text it is what asks for one.
        default: system message where a conversation has none; "" for none.
        starts: whether the tokenizer's first token comes first.
        before_answer: stands between what asks for an answer and the answer.
        joined: whether a system message stands inside the first turn of the user.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str = ""
    starts: bool = False
    before_answer: str = ""
    joined: bool = False

    def template(self, image: str) -> str:
        """The form as a Jinja template.

        Args:
            image: what stands for an image.
        """
        image_text = json.dumps(image + "\n", ensure_ascii=False)
        words = (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        ).replace("IMAGE", image_text)
        parts = []
        if self.starts:
            parts.append("{{ bos_token or '' }}")
        if self.default:
            default = _literal(self.system[0] + self.default + self.system[1])
            parts.append("{% if messages and messages[0]['role'] != 'system' %}" + default + "{% endif %}")
        parts.append("{% for message in messages %}{% if message['role'] == 'system' %}")
        parts.append(_literal(self.system[0]) + words + _literal(self.system[1]))
        parts.append("{% elif message['role'] == 'user' %}")
        opening = _literal(self.user[0])
        if self.joined:
            opening = "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}" + opening + "{% endif %}"
        parts.append(opening + words + _literal(self.user[1]))
        parts.append("{% else %}")
        parts.append(_literal(self.assistant[0] + self.before_answer) + words + _literal(self.assistant[1]))
        parts.append("{% endif %}{% endfor %}{% if add_generation_prompt %}")
        parts.append(_literal(self.assistant[0]) + "{% endif %}")
        return "".join(parts)


def _literal(text: str) -> str:
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def chatml(default: str = "", after: str = "\n") -> PromptForm:
    """ChatML, as Qwen, InternLM2 and InternVL write it.

    Args:
        default: system message.
        after: what follows a turn's end.
    """
    end = f"<|im_end|>{after}"
    return PromptForm(
        ("<|im_start|>system\n", end), ("<|im_start|>user\n", end), ("<|im_start|>assistant\n", end), default
    )


def started_as(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> PromptForm:
    """A form that starts with the tokenizer's first token where the tokenizer puts it before every text.

    The repositories let the tokenizer decide; here prompts are written by the template alone.

    Args:
        tokenizer: of the model.
        form: as the repository has it.
    """
    first = tokenizer.bos_token_id
    adds = first is not None and tokenizer("a")["input_ids"][:1] == [first]
    return dataclasses.replace(form, starts=form.starts or adds)


# LLaVA names its forms by the model's name, in eval/run_llava.py and serve/cli.py; conversation.py has what they are
VICUNA = PromptForm(
    ("", " "),
    ("USER: ", " "),
    ("ASSISTANT:", "</s>"),
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.",
    starts=True,
    before_answer=" ",
)
"""vicuna_v1: LLaVA-1.5, LLaVA-NeXT of Vicuna."""
MISTRAL = PromptForm(
    ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    ("[INST] ", " [/INST]"),
    ("", " </s>"),
    starts=True,
    before_answer=" ",
    joined=True,
)
"""mistral_instruct: LLaVA-NeXT of Mistral."""
LLAMA_3 = PromptForm(
    ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
    starts=True,
)
"""llava_llama_3: LLaVA-NeXT of Llama 3."""
QWEN = chatml("You are a helpful assistant.")
"""qwen_1_5: LLaVA-NeXT and LLaVA-OneVision of Qwen, PIVOT."""
CHATML_DIRECT = chatml("Answer the questions.", after="")
"""chatml_direct, mistral_direct: LLaVA-NeXT of Nous Hermes 2 Yi 34B."""
