"""Where completions come from: transformers in this process, or a vLLM server."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.errors import SettingsError, TrainingError
from pivot_plugin.models.control_text import NO_PLAIN_TEXT, ControlText
from pivot_plugin.models.evaluating import evaluating, undisturbed
from pivot_plugin.models.image_tokens import ImageTokens, about_images

from .shared_prefill import PromptImages, SharedPrefill


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        n: completions per question.
        temperature: 0 takes the most probable token each time.
        top_p: share of the probability mass to draw from.
        max_new_tokens: longest completion.
    """

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise SettingsError(
                f"{self} cannot be sampled.", "n and max_new_tokens are at least 1, temperature 0, top_p in (0, 1]."
            )
        if self.temperature == 0 and self.n > 1:
            raise SettingsError(
                f"temperature is 0 and n is {self.n}: all completions would be equal.", "Raise the temperature."
            )


class Engine(Protocol):
    """Draws completions. The same questions, settings and seed give the same completions."""

    def __call__(self, questions: Sequence[dict[str, Any]], sampling: Sampling, seed: int) -> list[list[str]]:
        """n texts per question; questions have `prompt` (messages) and `images` (PIL)."""
        ...


class TransformersEngine:
    """Generates with transformers; a question, with its images, is prefilled once for its n completions.

    Args:
        model: an MLLM, on the device to use.
        processor: its own.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor
        self._image_tokens = ImageTokens(processor)
        self._prefill = SharedPrefill(model)

    def __call__(self, questions: Sequence[dict[str, Any]], sampling: Sampling, seed: int) -> list[list[str]]:
        completions = self.processor.tokenizer.batch_decode(
            self._generated(questions, sampling, seed).sequences, skip_special_tokens=True
        )
        return [completions[start : start + sampling.n] for start in range(0, len(completions), sampling.n)]

    def steps(
        self, questions: Sequence[dict[str, Any]], sampling: Sampling, seed: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the model predicted while it drew the completions, token by token.

        Args:
            questions, sampling, seed: as for a call.

        Returns:
            for each position (questions * n, V) logits, and (questions * n,) whether a completion still went on.
        """
        generated = self._generated(questions, sampling, seed, output_logits=True)
        ends = self.model.generation_config.eos_token_id
        ends = [self.processor.tokenizer.eos_token_id] if ends is None else [ends] if isinstance(ends, int) else ends
        going = torch.ones(len(generated.sequences), dtype=torch.bool, device=generated.sequences.device)
        for position, logits in enumerate(generated.logits):
            yield logits, going
            going = going & ~torch.isin(generated.sequences[:, position], torch.tensor(ends, device=going.device))

    @torch.no_grad()
    def _generated(self, questions: Sequence[dict[str, Any]], sampling: Sampling, seed: int, **more: bool) -> Any:
        """What `generate` returns, the prompt cut off.

        Args:
            questions, sampling, seed: as for a call.
            **more: passed on to `generate`.
        """
        # names of control tokens in the words of users are other words for the processor, and come back as tokens
        texts = [self._image_tokens.question_text(self._image_tokens.reworded(question)) for question in questions]
        images = [question["images"] for question in questions]
        outputs = self.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        inputs = self._on_model(self._image_tokens.with_words(questions, outputs))
        shown = self._distinct_images(questions, texts, inputs)
        with evaluating(self.model), undisturbed(seed), self._prefill.of(sampling.n, shown):
            generated = self.model.generate(**inputs, **self._settings(sampling), return_dict_in_generate=True, **more)
        generated.sequences = generated.sequences[:, inputs["input_ids"].shape[1] :]
        return generated

    def _distinct_images(
        self, questions: Sequence[dict[str, Any]], texts: Sequence[str], inputs: dict[str, torch.Tensor]
    ) -> PromptImages:
        """The images of some questions, which may be about the same.

        Args:
            questions: rows of one batch; those of equal `image_key` show the same images.
            texts: of their prompts.
            inputs: the processor's outputs about them.
        """
        counts = (inputs["input_ids"] == self._image_tokens.image_token_id).sum(dim=1).tolist()
        shows = [index for index, count in enumerate(counts) if count]
        keys = [questions[index].get("image_key", index) for index in shows]
        first: dict[object, int] = {}
        for key, index in zip(keys, shows, strict=True):
            first.setdefault(key, index)
        if len(first) < len(shows):
            images = self._image_tokens.process_images(
                [questions[index]["images"] for index in first.values()], [texts[index] for index in first.values()]
            )
            token_counts = [sum(of_set) for of_set in images.counts]
            number = {key: image_set for image_set, key in enumerate(first)}
            shown = [number[key] for key in keys]
            # a processor may make something else of the same images among others
            if [token_counts[image_set] for image_set in shown] == [counts[index] for index in shows]:
                return PromptImages(token_counts, shown, self._on_model(images.inputs))
        own = [counts[index] for index in shows]
        return PromptImages(own, range(len(own)), about_images(inputs, self.processor))

    def _on_model(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Processor outputs on the model's device, numbers in its precision."""
        model = self.model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        strategy = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        padding = self.model.generation_config.pad_token_id
        return strategy | {
            "max_new_tokens": sampling.max_new_tokens,
            "num_return_sequences": sampling.n,
            "pad_token_id": tokenizer.pad_token_id if padding is None else padding,
        }


class VLLMEngine:
    """Asks a vLLM server (`vllm serve MODEL`) by TRL's client, which sends images along with the messages.

    Args:
        client: a `trl.generation.vllm_client.VLLMClient`, or the server's address.
        processor: of the model that the server holds.

    Raises:
        SettingsError: if vLLM is not installed or no server answers.
    """

    def __init__(self, client: Any, processor: ProcessorMixin) -> None:
        if isinstance(client, str):
            from trl.generation.vllm_client import VLLMClient

            try:
                client = VLLMClient(base_url=client)
            except (ImportError, ConnectionError) as error:
                raise SettingsError(
                    f"No vLLM server can be asked at {client!r}: {error}",
                    'Install vLLM (pip install "trl[vllm]") and start `vllm serve`, or leave out engine=.',
                ) from error
        self.client = client
        self.processor = processor
        self._control_text = ControlText(processor)

    def __call__(self, questions: Sequence[dict[str, Any]], sampling: Sampling, seed: int) -> list[list[str]]:
        for question in questions:
            self._control_text.refuse(question, NO_PLAIN_TEXT)
        answers = self.client.chat(
            [_with_images(question) for question in questions],
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            logprobs=None,
            generation_kwargs={"seed": seed},
        )["completion_ids"]
        if len(answers) != len(questions) * sampling.n:
            raise TrainingError(
                f"The vLLM server returned {len(answers)} completions for {len(questions)} questions of {sampling.n}.",
                "Update vLLM or trl to versions that belong together.",
            )
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [texts[start : start + sampling.n] for start in range(0, len(texts), sampling.n)]


def _with_images(question: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = prepare_multimodal_messages(question["prompt"], images=list(question["images"]))
    return messages
