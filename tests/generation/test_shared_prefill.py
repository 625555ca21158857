"""Completions from a prompt that is prefilled once: those of plain generation, in every family and kind of cache."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl.data_utils import prepare_multimodal_messages

from pivot_plugin.generation.engines import Sampling, TransformersEngine
from pivot_plugin.generation.shared_prefill import Layout, SharedPrefill
from pivot_plugin.preferences import load_questions
from pivot_plugin.testing import zoo
from tests.helpers import Tiny, picture

SHARED = picture(60, 60, 1)
QUESTIONS = [
    {"images": [SHARED], "question": "what is it?"},
    {"images": [picture(120, 50, 2), picture(40, 80, 3)], "question": "<image> a <image> b, and which is larger?"},
    {"question": "hello"},
    {"images": [SHARED], "question": "where?"},
]
ONE_PICTURE = [
    {"images": [SHARED], "question": "what is it?"},
    {"images": [picture(120, 84, 2)], "question": "is there another one, and a longer question?"},
    {"images": [picture(84, 84, 3)], "question": "b?"},
]
SHARING = (Layout.TREE, Layout.COPIES)
DRAWN = Sampling(n=3, max_new_tokens=7)
AS_DRAWN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 7}


def rows(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    loaded = load_questions(questions)
    return [loaded[position] for position in range(len(loaded))]


def plain(tiny: Tiny, questions: list[dict[str, Any]], n: int, seed: int, **settings: Any) -> Any:
    """transformers' own `generate` on a batch in which every question, with its pictures, stands n times."""
    model, processor = tiny
    repeated = [row for row in rows(questions) for _ in range(n)]
    messages = [prepare_multimodal_messages(row["prompt"], images=list(row["images"])) for row in repeated]
    inputs = processor(
        images=[row["images"] for row in repeated],
        text=[processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    torch.manual_seed(seed)
    generated = model.eval().generate(
        **inputs,
        pad_token_id=processor.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    generated.sequences = generated.sequences[:, inputs["input_ids"].shape[1] :]
    return generated


def shared(tiny: Tiny, questions: list[dict[str, Any]], sampling: Sampling, seed: int, layout: Layout | None) -> Any:
    """The engine's completions, in a layout or in the one that it finds."""
    engine = TransformersEngine(*tiny)
    if layout is not None:
        engine._prefill = SharedPrefill(tiny[0], layout)
    generated = engine._generated(rows(questions), sampling, seed, output_logits=True)
    (generated.layout,) = engine._prefill._agreed.values() or [None]
    return generated


def assert_the_same(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    for logits, others in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, others, rtol=tolerance, atol=tolerance)


def with_many_ends(model: PreTrainedModel) -> list[int]:
    """Let every fourth token end an answer, so that answers end at different lengths."""
    ends = list(range(0, model.config.get_text_config().vocab_size, 4))
    model.generation_config.eos_token_id = ends
    return ends


@pytest.mark.parametrize("layout", Layout)
def test_logits_and_draws_are_those_of_plain_generation(layout: Layout, tiny: Tiny) -> None:
    """Prompts of different lengths, with one picture, several, none, and one that another question shows too."""
    ends = with_many_ends(tiny[0])
    expected = plain(tiny, QUESTIONS, 3, 5, **AS_DRAWN)
    lengths = {int(torch.isin(tokens, torch.tensor(ends)).int().argmax()) for tokens in expected.sequences}
    assert len(lengths) > 2
    assert_the_same(shared(tiny, QUESTIONS, DRAWN, 5, layout), expected)


@pytest.mark.parametrize("layout", SHARING)
def test_the_most_probable_tokens_are_those_of_plain_generation(layout: Layout, tiny: Tiny) -> None:
    """A little share of the probability leaves one token to draw."""
    greedy = plain(tiny, QUESTIONS, 2, 0, do_sample=False, max_new_tokens=5)
    assert_the_same(shared(tiny, QUESTIONS, Sampling(2, 1.0, 1e-6, 5), 0, layout), greedy)


def test_every_built_in_family_shares_its_prompts_as_a_tree(tiny: Tiny) -> None:
    assert shared(tiny, QUESTIONS, Sampling(n=2, max_new_tokens=2), 0, None).layout is Layout.TREE


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_half_precision_is_the_same_up_to_rounding(name: str, layout: Layout, make: Callable[[str], Tiny]) -> None:
    """Copies decode as plain generation does, to the bit; a tree sums in another order."""
    tiny = make(name)
    tiny[0].to(torch.bfloat16)
    expected = plain(tiny, QUESTIONS, 3, 5, **AS_DRAWN)
    found = shared(tiny, QUESTIONS, DRAWN, 5, layout)
    same_so_far = torch.ones(len(found.sequences), dtype=torch.bool)
    for position, (logits, others) in enumerate(zip(found.logits, expected.logits, strict=True)):
        # a few of bfloat16's steps
        torch.testing.assert_close(logits[same_so_far], others[same_so_far], rtol=2**-6, atol=2**-5)
        same_so_far &= found.sequences[:, position] == expected.sequences[:, position]
    assert same_so_far.float().mean() >= (1.0 if layout is Layout.COPIES else 0.8)
    assert shared(tiny, QUESTIONS, DRAWN, 5, None).layout is Layout.TREE


@pytest.mark.parametrize("layout", SHARING)
def test_eager_attention_shares_too(layout: Layout, make: Callable[[str], Tiny]) -> None:
    tiny = make("qwen3_vl")
    tiny[0].set_attn_implementation("eager")
    assert_the_same(shared(tiny, QUESTIONS, DRAWN, 5, layout), plain(tiny, QUESTIONS, 3, 5, **AS_DRAWN))


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"prefill_chunk_size": 16}], ids=str)
def test_other_ways_of_prefilling_and_caching(settings: dict[str, Any], make: Callable[[str], Tiny]) -> None:
    tiny = make("qwen2_5_vl")
    for name, value in settings.items():
        setattr(tiny[0].generation_config, name, value)
    found = shared(tiny, QUESTIONS, DRAWN, 5, None)
    assert found.layout in SHARING
    assert_the_same(found, shared(tiny, QUESTIONS, DRAWN, 5, Layout.PLAIN))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma3", "DynamicLayer DynamicSlidingWindowLayer"),
        ("qwen3_5", "DynamicLayer LinearAttentionLayer"),
        ("lfm3_vl", "DynamicLayer DynamicSlidingWindowLayer LinearAttentionLayer"),
        ("inkling2", "LinearAttentionAndFullAttentionLayer LinearAttentionAndSlidingWindowAttentionLayer"),
        ("glm5_next", "DynamicIndexedLayer LinearAttentionLayer"),
        ("nemotron_h_omni", "DummyLayer DynamicLayer LinearAttentionLayer"),
        ("idefics2", "DynamicSlidingWindowLayer"),
        # attends to the picture across
        ("mllama", "DynamicLayer"),
        # looks ahead inside of the prompt, told by token types
        ("paligemma", "DynamicLayer"),
        # a mixture of experts
        ("aria", "DynamicLayer"),
    ],
)
def test_every_kind_of_cache_branches(name: str, layers: str) -> None:
    if name not in zoo.FAMILIES or zoo.missing_packages(name):
        pytest.skip("this transformers, or this environment, cannot build it")
    tiny = zoo.build(name)
    expected = shared(tiny, ONE_PICTURE, DRAWN, 5, Layout.PLAIN)
    assert {type(layer).__name__ for layer in expected.cache.layers} == set(layers.split())
    found = shared(tiny, ONE_PICTURE, DRAWN, 5, None)
    assert found.layout is (Layout.TREE if name in ("paligemma", "aria") else Layout.COPIES)
    assert_the_same(found, expected)


@pytest.mark.parametrize("layout", Layout)
def test_a_prompt_goes_through_the_language_model_once(layout: Layout, make: Callable[[str], Tiny]) -> None:
    """Prefilled and cached: rows of the prompts, not of their completions; as a tree they stay so."""
    tiny = make("qwen2_5_vl")
    seen: list[torch.Size] = []
    tiny[0].get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    found = shared(tiny, QUESTIONS, Sampling(n=5, max_new_tokens=3), 0, layout)
    prompts, completions = len(QUESTIONS), 5 * len(QUESTIONS)
    assert seen[0][0] == (completions if layout is Layout.PLAIN else prompts)
    assert seen[0][1] > 5
    assert seen[1] == ((prompts, 5) if layout is Layout.TREE else (completions, 1))
    assert len(found.cache.layers[0].keys) == (prompts if layout is Layout.TREE else completions)


def test_one_completion_a_question_needs_no_trial(llava: Tiny) -> None:
    assert shared(llava, QUESTIONS, Sampling(n=1, temperature=0, max_new_tokens=2), 0, None).layout is None


def test_a_picture_that_several_questions_show_is_encoded_once(tiny: Tiny) -> None:
    model = tiny[0]
    sizes: list[int] = []
    model.get_encoder(modality="image").register_forward_hook(
        lambda module, args, output: sizes.append(output.last_hidden_state.numel())
    )
    greedy = Sampling(n=1, temperature=0, max_new_tokens=4)
    for questions in (QUESTIONS[:1], QUESTIONS[:1] + QUESTIONS[3:]):
        assert_the_same(
            shared(tiny, questions, greedy, 0, None), plain(tiny, questions, 1, 0, do_sample=False, max_new_tokens=4)
        )
    alone, _, together, plainly = sizes
    assert (together, plainly) == (alone, 2 * alone)


def keeps_prompts_elsewhere(model: PreTrainedModel) -> None:
    """Let a model keep something of the prompts it was prefilled with, row by row, outside of its cache."""
    forward = model.forward
    kept: dict[str, torch.Tensor] = {}

    @functools.wraps(forward)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] > DRAWN.n:
            kept["prompts"] = kwargs["input_ids"].float().mean(dim=1)
        else:
            count = len(outputs.logits)
            of_rows = kept["prompts"].repeat(count)[:count]
            # as many rows as there are completions, in which a tree does not come
            outputs.logits = outputs.logits * (1 + count * of_rows[:, None, None])
        return outputs

    model.forward = remembering


def test_a_model_that_differs_is_found_out_and_answers_plainly(llava: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    keeps_prompts_elsewhere(llava[0])
    engine = TransformersEngine(*llava)
    with caplog.at_level(logging.WARNING):
        found = [engine._generated(rows(QUESTIONS), DRAWN, 5, output_logits=True) for _ in range(2)]
    assert set(engine._prefill._agreed.values()) == {Layout.PLAIN}
    assert caplog.text.count("prefills every prompt once for each of its completions, as transformers does") == 1
    assert "of their spread away" in caplog.text
    for generated in found:
        assert_the_same(generated, plain(llava, QUESTIONS, 3, 5, **AS_DRAWN))


def test_masks_that_a_model_ignores_are_found_out(llava: Tiny) -> None:
    """As a tree, completions would see each other: copies are taken instead."""

    def ignore(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        return args, kwargs | ({"attention_mask": torch.ones_like(mask)} if mask is not None and mask.ndim == 4 else {})

    llava[0].base_model.language_model.register_forward_pre_hook(ignore, with_kwargs=True)
    found = shared(llava, QUESTIONS, DRAWN, 5, None)
    assert found.layout is Layout.COPIES
    assert_the_same(found, shared(llava, QUESTIONS, DRAWN, 5, Layout.PLAIN))


def test_a_model_that_is_not_of_transformers_gets_no_tree(llava: Tiny) -> None:
    llava[0].__class__ = type("Foreign", (type(llava[0]),), {"__module__": "somewhere.else"})
    assert shared(llava, QUESTIONS, DRAWN, 5, None).layout is Layout.COPIES


def test_a_model_without_cache_says_so(llava: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    llava[0].generation_config.use_cache = False
    with caplog.at_level(logging.WARNING):
        assert shared(llava, QUESTIONS, DRAWN, 5, None).layout is Layout.PLAIN
    assert "use_cache is False" in caplog.text


def test_the_trial_draws_nothing_and_leaves_nothing(llava: Tiny) -> None:
    model = llava[0]
    before = set(vars(model)), len(model._forward_hooks), len(model._forward_pre_hooks)
    first, state = shared(llava, QUESTIONS, DRAWN, 5, None), torch.get_rng_state()
    again = shared(llava, QUESTIONS, DRAWN, 5, Layout.PLAIN)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(torch.get_rng_state(), state)
    assert (set(vars(model)), len(model._forward_hooks), len(model._forward_pre_hooks)) == before


def test_what_fails_while_it_generates_leaves_nothing(llava: Tiny) -> None:
    model = llava[0]
    before = set(vars(model)), len(model._forward_hooks), len(model._forward_pre_hooks)

    def stop(module: Any, args: Any, output: Any) -> None:
        if output.shape[1] == DRAWN.n:
            raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        shared(llava, QUESTIONS, DRAWN, 5, Layout.TREE)
    hook.remove()
    assert (set(vars(model)), len(model._forward_hooks), len(model._forward_pre_hooks)) == before


@pytest.mark.slow
def test_prompts_of_another_kind_than_the_first_go_another_way() -> None:
    """Words alone grow as a tree; a picture that is attended to across does not, and nothing is drawn twice."""
    if "mllama" not in zoo.FAMILIES:
        pytest.skip("this transformers cannot build it")
    tiny = zoo.build("mllama")
    engine = TransformersEngine(*tiny)
    for questions in ([{"question": "hello"}, {"question": "and a longer one?"}], ONE_PICTURE):
        engine(rows(questions), DRAWN, 5)
    assert list(engine._prefill._agreed.values()) == [Layout.TREE, Layout.COPIES]
    expected = shared(tiny, ONE_PICTURE, DRAWN, 5, Layout.PLAIN)
    found = shared(tiny, ONE_PICTURE, DRAWN, 5, Layout.TREE)
    assert len(found.cache.layers[0].keys) == DRAWN.n * len(ONE_PICTURE)
    assert_the_same(found, expected)


def test_a_peft_model_shares_too(llava: Tiny) -> None:
    model, processor = llava
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, lora)
    found = shared((wrapped, processor), QUESTIONS, DRAWN, 5, None)
    assert found.layout is Layout.TREE
    assert len(found.cache.layers[0].keys) == len(QUESTIONS)
    assert_the_same(found, plain((wrapped, processor), QUESTIONS, 3, 5, **AS_DRAWN))


def test_a_generate_of_a_model_s_own_is_left_alone(llava: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    """It knows no prefill apart, and some of the settings of the trial it does not take."""
    model = llava[0]
    generate = model.generate
    expected = plain(llava, QUESTIONS, 3, 5, **AS_DRAWN)

    def own(*args: Any, **settings: Any) -> Any:
        assert "min_new_tokens" not in settings, "unknown setting"
        return generate(*args, **settings)

    model.generate = own
    with caplog.at_level(logging.WARNING):
        found = shared(llava, QUESTIONS, DRAWN, 5, None)
    assert found.layout is Layout.PLAIN
    assert "unknown setting" in caplog.text
    assert model.generate is own
    assert_the_same(found, expected)
