"""Candidates from the model: what plain generation gives, images encoded once, the same after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.errors import DataError, SettingsError, TrainingError
from pivot_plugin.generation import engines
from pivot_plugin.generation.sampling import _seed
from pivot_plugin.preferences import load_questions, rank, sample
from tests.helpers import Tiny, picture

QUESTIONS = [
    {"images": [picture(60, 60, 1)], "question": "what is it?", "answer": "x"},
    {"images": [picture(120, 50, 2), picture(40, 80, 3)], "question": "<image> a <image> b?", "answer": "y"},
    {"question": "hello", "answer": "z"},
]


def completions(dataset: Any) -> list[list[str]]:
    return [dataset.plain(position)["completions"] for position in range(len(dataset))]


def plain_generation(tiny: Tiny, n: int, **settings: Any) -> list[list[str]]:
    """transformers' generate on a batch in which every question stands n times."""
    model, processor = tiny
    asked = load_questions(QUESTIONS)
    repeated = [asked[position] for position in range(len(asked)) for _ in range(n)]
    messages = [prepare_multimodal_messages(row["prompt"], images=list(row["images"])) for row in repeated]
    inputs = processor(
        images=[row["images"] for row in repeated],
        text=[processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    torch.manual_seed(_seed(0, 0))
    model.eval()
    generated = model.generate(**inputs, max_new_tokens=5, pad_token_id=processor.tokenizer.pad_token_id, **settings)
    texts = processor.tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[start : start + n] for start in range(0, len(texts), n)]


def test_completions_are_those_of_plain_generation(tiny: Tiny) -> None:
    drawn = completions(sample(tiny[0], QUESTIONS, processor=tiny[1], n=3, max_new_tokens=5))
    assert drawn == plain_generation(tiny, 3, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    greedy = completions(sample(tiny[0], QUESTIONS, processor=tiny[1], n=1, temperature=0, max_new_tokens=5))
    assert greedy == plain_generation(tiny, 1, do_sample=False)


def test_each_image_goes_through_the_tower_once(tiny: Tiny) -> None:
    """The tower computes for n completions what it computes for one; the trial before the first of them looks too."""
    model, processor = tiny
    sizes: list[int] = []
    model.get_encoder(modality="image").register_forward_hook(
        lambda module, args, output: sizes.append(output.last_hidden_state.numel())
    )
    for n in (1, 4):
        sample(model, QUESTIONS * n, processor=processor, n=n, max_new_tokens=3, batch_size=len(QUESTIONS))
    once, *_, first, second, third, fourth = sizes
    assert {first, second, third, fourth} == {once}


def test_the_model_is_left_as_it_was(llava: Tiny) -> None:
    model, processor = llava
    model.train()
    state = torch.get_rng_state()
    sample(model, QUESTIONS, processor=processor, n=2, max_new_tokens=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert "get_image_features" not in vars(model.base_model)


def test_seeds_decide(llava: Tiny) -> None:
    drawn = [
        completions(sample(llava[0], QUESTIONS, processor=llava[1], n=2, max_new_tokens=5, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_interrupted_run_goes_on_and_gives_the_same(llava: Tiny, tmp_path: Path) -> None:
    model, processor = llava
    options: dict[str, Any] = {"processor": processor, "n": 2, "max_new_tokens": 4, "batch_size": 1}
    whole = completions(sample(model, QUESTIONS, **options))
    calls = []
    engine = engines.TransformersEngine(model, processor)

    def stopping(questions: Any, sampling: Any, seed: int) -> Any:
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return engine(questions, sampling, seed)

    with pytest.raises(KeyboardInterrupt):
        sample(model, QUESTIONS, **options, engine=stopping, output_dir=tmp_path)
    file = tmp_path / "candidates.jsonl"
    # killed while it wrote: half a line stands at the end
    file.write_bytes(file.read_bytes() + b'{"question": 1, "compl')
    assert completions(sample(model, QUESTIONS, **options, engine=stopping, output_dir=tmp_path)) == whole
    assert len(calls) == 4
    assert len(file.read_text().splitlines()) == 1 + len(QUESTIONS)
    assert [json.loads(line)["question"] for line in file.read_text().splitlines()[1:]] == [0, 1, 2]


def test_candidates_of_other_settings_are_not_mixed(llava: Tiny, tmp_path: Path) -> None:
    model, processor = llava
    sample(model, QUESTIONS, processor=processor, n=2, max_new_tokens=2, output_dir=tmp_path)
    with pytest.raises(SettingsError, match="had seed=0, now it is 5"):
        sample(model, QUESTIONS, processor=processor, n=2, max_new_tokens=2, output_dir=tmp_path, seed=5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    with pytest.raises(SettingsError, match="had model="):
        sample(model, QUESTIONS, processor=processor, n=2, max_new_tokens=2, output_dir=tmp_path)


def test_an_instruction_stands_behind_the_question(llava: Tiny) -> None:
    seen: list[Any] = []

    def engine(questions: Any, sampling: Any, seed: int) -> list[list[str]]:
        seen.extend(questions)
        return [["3", "4"]] * len(questions)

    drawn = sample(None, QUESTIONS, processor=llava[1], n=2, instruction="Think first.", engine=engine)
    assert [part["text"] for part in seen[0]["prompt"][-1]["content"] if part["type"] == "text"][-1] == "\nThink first."
    assert "Think first" not in str(drawn.plain(0)["prompt"])
    assert drawn.plain(0)["answer"] == "x"


def test_sampling_and_ranking_make_pairs_that_train(llava: Tiny, fast: dict[str, Any]) -> None:
    import pivot_plugin as pivot

    drawn = sample(llava[0], QUESTIONS, processor=llava[1], n=4, max_new_tokens=4)
    pairs = rank(drawn, lambda completions, **_: [float(len(text)) for text in completions], pair_up="all")
    result = pivot.optimize(llava[0], pairs, processor=llava[1], eval_fraction=0, **fast)
    assert max(result.weight_change.values()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "cannot be sampled"),
        ({"temperature": 0, "n": 2}, "all completions would be equal"),
        ({"top_p": 0}, "cannot be sampled"),
        ({"model": None}, "neither a model nor an engine"),
    ],
)
def test_settings_that_cannot_be_sampled(llava: Tiny, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        sample(**{"model": llava[0], "questions": QUESTIONS, "processor": llava[1], **options})


def test_a_bad_question_is_named_before_anything_is_drawn(llava: Tiny) -> None:
    with pytest.raises(DataError, match="row 1 of questions"):
        sample(llava[0], [QUESTIONS[0], {"question": None}], processor=llava[1])


@pytest.mark.parametrize("drawn", [1, 3, 0])
def test_an_engine_that_gives_another_number_of_completions_is_refused(drawn: int, llava: Tiny) -> None:
    def engine(questions: Any, sampling: Any, seed: int) -> list[list[str]]:
        return [["a"] * 2, *(["a"] * drawn for _ in questions[1:])]

    with pytest.raises(
        TrainingError, match=rf"gave {drawn} completions of 2 for question 1.*An engine returns 2 texts"
    ):
        sample(None, QUESTIONS, processor=llava[1], n=2, engine=engine)


class Client:
    """What TRL's client of a vLLM server gives, without a server."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers
        self.asked: dict[str, Any] = {}

    def chat(self, messages: Any, **settings: Any) -> dict[str, Any]:
        self.asked = {"messages": messages, **settings}
        return {"completion_ids": self.answers}


def test_a_vllm_server_is_asked_by_trl_s_client(llava: Tiny) -> None:
    import inspect

    from trl.generation.vllm_client import VLLMClient

    ids = llava[1].tokenizer(["one", "two"], add_special_tokens=False)["input_ids"]
    client = Client([ids[0], ids[1]] * 3)
    drawn = sample(None, QUESTIONS, processor=llava[1], n=2, engine=engines.VLLMEngine(client, llava[1]))
    assert completions(drawn) == [["one", "two"]] * 3
    assert client.asked["messages"][0][0]["content"][0]["image"].size == (60, 60)
    assert (client.asked["n"], client.asked["temperature"]) == (2, 1.0)
    # the client's own method takes what is handed to it
    inspect.signature(VLLMClient.chat).bind(None, **client.asked)
    with pytest.raises(TrainingError, match="returned 1 completions for 3 questions of 2"):
        sample(None, QUESTIONS, processor=llava[1], n=2, engine=engines.VLLMEngine(Client([ids[0]]), llava[1]))


def test_a_vllm_server_that_cannot_be_had_is_said(llava: Tiny) -> None:
    with pytest.raises(SettingsError, match=r"No vLLM server can be asked at 'http://127.0.0.1:9'"):
        sample(None, QUESTIONS, processor=llava[1], engine="http://127.0.0.1:9")
