"""Reward models in each published layout, as tiny random checkpoints, against the formula written out."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mara.actors.reward_models.checkpoint import (
    BeaverModel,
    load_beaver,
    load_sequence_classifier,
    load_ultrarm,
)
from mara.actors.reward_models.config import (
    BeaverRewardConfig,
    SequenceClassifierRewardConfig,
    UltraRMRewardConfig,
)
from mara.common.contracts import Conversation
from mara.common.errors import UserError

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<sep>"]
IDS = {text: number for number, text in enumerate([*SPECIAL, *LETTERS])}
BOS, EOS, SEP = IDS["<s>"], IDS["</s>"], IDS["<sep>"]
CHAT = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SIZES = {
    "vocab_size": len(IDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
CONVERSATIONS = [
    Conversation("hello", "Hello! How can I help you today?"),
    Conversation("why is the sky blue at noon", "no"),
    Conversation("x", ""),
    Conversation("how so", "because {it} is"),
]
EXACT = {"dtype": "float32", "device": "cpu", "weight": 1.0}


def spell(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


QWEN_SPELLING = {" ": "Ġ", "\n": "Ċ"}


def save_tokenizer(folder, adds="bos", padding_side="right", chat_template=None, spelling=None) -> None:
    """One token a letter. By itself it adds a ``bos``, puts ``pair``s together, or adds nothing."""
    spelling = spelling or {}
    vocabulary = {spelling.get(text, text): number for text, number in IDS.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds == "bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    elif adds == "pair":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <sep>",
            pair="<s> $A <sep> $B:1 <sep>:1",
            special_tokens=[("<s>", BOS), ("<sep>", SEP)],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
        chat_template=chat_template,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)


def save_body(folder, head, padding_side="right", seed=0, **settings):
    """Save a Llama body with the tensors of ``head``, laid out as those published. Returns the body."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**LLAMA, **settings)
    body = transformers.LlamaModel(config).eval()
    config.save_pretrained(folder)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in body.state_dict().items()}
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder, padding_side=padding_side)
    return body


def last_state(body, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return body(torch.tensor([ids])).last_hidden_state[0, -1]


def score_head(bias: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    head = {"score_head.weight": torch.randn(1, 32)}
    return head | ({"score_head.bias": torch.tensor([2.5])} if bias else {})


NORMALISER = {
    "normalizer.mean": torch.tensor([1.5]),
    "normalizer.var": torch.tensor([4.0]),
    "normalizer.count": torch.tensor([100]),
}


def beaver_ids(conversation: Conversation) -> list[int]:
    text = f"BEGINNING OF CONVERSATION: USER: {conversation.prompt} ASSISTANT:{conversation.response}"
    return [BOS, *spell(text), EOS]


def check_batching(model, expected: list[float]) -> None:
    """One by one and together, in either order, the scores are ``expected``."""
    alone = [float(model.score([conversation])) for conversation in CONVERSATIONS]
    together = model.score(CONVERSATIONS)
    assert together.dtype == torch.float32 and together.device.type == "cpu"
    assert together.tolist() == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)
    assert model.score(CONVERSATIONS[::-1]).tolist() == pytest.approx(expected[::-1], abs=1e-5)
    assert len(set(together.tolist())) == len(expected)


@pytest.mark.parametrize(
    ("settings", "bias"),
    [
        ({"score_bias": False}, False),
        ({"bias": False}, False),
        ({"score_bias": True}, True),
        ({"bias": True}, True),
        ({}, False),
        ({}, True),
    ],
)
@pytest.mark.parametrize("do_normalize", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_beaver_checkpoint_scores_as_its_formula_says(tmp_path, settings, bias, do_normalize, padding_side):
    head = score_head(bias)
    body = save_body(tmp_path, head | NORMALISER, padding_side, do_normalize=do_normalize, **settings)
    expected = []
    for conversation in CONVERSATIONS:
        score = float(head["score_head.weight"][0] @ last_state(body, beaver_ids(conversation)))
        score += 2.5 if bias else 0.0
        expected.append((score - 1.5) / 2.0 if do_normalize else score)
    check_batching(load_beaver(BeaverRewardConfig(model=str(tmp_path), batch_size=3, **EXACT)), expected)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"score_type": "reward"}, (1.5, 2.0)),
        ({"score_type": "cost"}, (0.0, 2.0)),
        ({"score_type": "critic"}, (0.0, 1.0)),
        ({"normalize_function": "affine"}, (1.5, 2.0)),
        ({"normalize_function": "scale"}, (0.0, 2.0)),
        ({"normalize_function": "translate"}, (1.5, 1.0)),
        ({"normalize_function": "scale", "score_type": "cost"}, (0.0, 2.0)),
    ],
)
def test_the_scores_of_a_beaver_checkpoint_are_normalised_as_its_settings_say(tmp_path, settings, wanted):
    head, (mean, deviation) = score_head(), wanted
    body = save_body(tmp_path, head | NORMALISER, do_normalize=True, **settings)
    model = load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))
    score = float(head["score_head.weight"][0] @ last_state(body, beaver_ids(CONVERSATIONS[0])))
    assert float(model.score(CONVERSATIONS[:1])) == pytest.approx((score - mean) / deviation, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"score_type": "odd"},
        {"normalize_function": "z"},
        {"normalize_function": "affine", "score_type": "cost"},
    ],
)
def test_a_beaver_checkpoint_whose_normalisation_is_not_known_is_refused(tmp_path, settings):
    save_body(tmp_path, score_head() | NORMALISER, do_normalize=True, **settings)
    with pytest.raises(UserError, match=r"normalised in a way that is not known \(.*give one in normalize_f"):
        load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))


def test_a_beaver_checkpoint_without_a_normaliser_is_used_unless_it_asks_for_one(tmp_path):
    save_body(tmp_path, score_head(), do_normalize=False)
    load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"do_normalize": True}))
    with pytest.raises(UserError, match=r"weights have no normalizer\.mean, normalizer\.var"):
        load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))


@pytest.mark.parametrize("setting", ["score_bias", "bias"])
def test_a_beaver_checkpoint_that_lacks_the_bias_of_its_settings_is_refused(tmp_path, setting):
    save_body(tmp_path, score_head(), **{setting: True})
    with pytest.raises(UserError, match="says that the score head has a bias, its weights have none"):
        load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))


@pytest.mark.parametrize("add_eos", [False, True])
def test_the_end_of_sequence_token_is_added_once_if_asked_for(tmp_path, add_eos):
    head = score_head()
    body = save_body(tmp_path, head)
    model = load_beaver(BeaverRewardConfig(model=str(tmp_path), add_eos=add_eos, **EXACT))
    for response, after in (("yes", [EOS] * add_eos), ("yes</s>", [EOS])):
        ids = beaver_ids(Conversation("why", "yes"))[:-1] + after
        if response == "yes</s>":
            # The text of a special token is that token.
            assert model._encode(Conversation("why", response)).ids == ids
        expected = float(head["score_head.weight"][0] @ last_state(body, ids))
        assert float(model.score([Conversation("why", response)])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_unmasked_token_is_scored_on_either_side_of_the_padding(tmp_path, side):
    head = score_head()
    body = save_body(tmp_path, head | NORMALISER)
    model = BeaverModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert model.model.config._attn_implementation == "sdpa"  # and not the one that keeps L × L weights
    model.score_head.bias = None
    rows = [beaver_ids(conversation) for conversation in CONVERSATIONS]
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(ids)) for ids in rows]
    ones = [[1] * len(ids) for ids in rows]
    parts = zip(fill, rows, ones, strict=True)
    padded = [(f + i, [0] * len(f) + o) if side == "left" else (i + f, o + [0] * len(f)) for f, i, o in parts]
    with torch.no_grad():
        scores = model(torch.tensor([ids for ids, _ in padded]), torch.tensor([mask for _, mask in padded]))
    expected = [float(head["score_head.weight"][0] @ last_state(body, ids)) for ids in rows]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_an_ultrarm_checkpoint_scores_as_its_formula_says(tmp_path, padding_side):
    torch.manual_seed(3)
    weight = torch.randn(1, 32)
    body = save_body(tmp_path, {"regression_head.weight": weight}, padding_side)
    expected = []
    for conversation in CONVERSATIONS:
        ids = [BOS, *spell(f"Human: {conversation.prompt}\n\nAssistant: {conversation.response}")]
        expected.append(float(weight[0] @ last_state(body, ids)))
    check_batching(load_ultrarm(UltraRMRewardConfig(model=str(tmp_path), batch_size=2, **EXACT)), expected)


def test_a_checkpoint_of_another_layout_is_refused_instead_of_scoring_with_random_weights(tmp_path):
    save_body(tmp_path, score_head())
    with pytest.raises(UserError, match=r"its weights have no regression_head\.weight; give a model"):
        load_ultrarm(UltraRMRewardConfig(model=str(tmp_path), **EXACT))
    with pytest.raises(UserError, match=r"its weights have no score\.weight"):
        load_sequence_classifier(
            SequenceClassifierRewardConfig(
                model=str(tmp_path), template="{prompt}{response}", label=0, **EXACT
            )
        )
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights have no model\.norm\.weight"):
        load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))


def test_a_damaged_or_missing_checkpoint_is_one_line(tmp_path):
    save_body(tmp_path, score_head())
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    for model, says in ((str(tmp_path), "cannot be loaded"), (str(tmp_path / "none"), "has no config.json")):
        with pytest.raises(UserError, match=f"^model: .*{says}") as caught:
            load_beaver(BeaverRewardConfig(model=model, **EXACT))
        assert "\n" not in str(caught.value)


def test_weights_kept_by_pickle_are_read_without_running_what_is_in_them(tmp_path):
    body = save_body(tmp_path, score_head())
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))
    expected = float(tensors["score_head.weight"][0] @ last_state(body, beaver_ids(CONVERSATIONS[0])))
    assert float(model.score(CONVERSATIONS[:1])) == pytest.approx(expected, abs=1e-5)

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(tensors | {"extra": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT))
    assert not (tmp_path / "ran").exists()


def save_classifier(folder, family="Llama", padding_side="right", adds="bos", chat=CHAT, **settings):
    torch.manual_seed(1)
    sizes = SIZES if family in ("DebertaV2", "Roberta") else LLAMA
    config = getattr(transformers, f"{family}Config")(**{**sizes, "num_labels": 1, **settings})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder, adds, padding_side, chat, QWEN_SPELLING if family == "Qwen2" else None)
    return model


def chat_ids(conversation: Conversation) -> list[int]:
    parts = [BOS, *spell(f"[user]{conversation.prompt}"), EOS]
    return [*parts, *spell(f"[assistant]{conversation.response}"), EOS]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_a_classifier_with_a_chat_template_gives_its_logit(tmp_path, family, padding_side, pad_token_id):
    model = save_classifier(tmp_path, family, padding_side, pad_token_id=pad_token_id)
    expected = [float(model(torch.tensor([chat_ids(one)])).logits[0, 0]) for one in CONVERSATIONS]
    assert max(map(abs, expected)) > 1  # so that a function applied to it would show
    config = SequenceClassifierRewardConfig(model=str(tmp_path), batch_size=3, **EXACT)
    check_batching(load_sequence_classifier(config), expected)


@pytest.mark.parametrize(("add_bos", "count"), [(None, 1), (True, 1), (False, 0)])
@pytest.mark.parametrize("template", ["chat", "Q: {prompt}\nA: {response}"])
def test_a_text_begins_with_as_many_bos_tokens_as_asked_for(tmp_path, template, add_bos, count):
    model = save_classifier(tmp_path, pad_token_id=0)
    config = SequenceClassifierRewardConfig(model=str(tmp_path), template=template, add_bos=add_bos, **EXACT)
    one = CONVERSATIONS[3]
    text = spell(f"Q: {one.prompt}\nA: {one.response}") if template != "chat" else chat_ids(one)[1:]
    expected = float(model(torch.tensor([[BOS] * count + text])).logits[0, 0])
    assert float(load_sequence_classifier(config).score([one])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_classifier_of_sentence_pairs_is_told_which_is_which(tmp_path, padding_side):
    model = save_classifier(
        tmp_path, "DebertaV2", padding_side, "pair", None, type_vocab_size=2, relative_attention=True,
        position_biased_input=False, pos_att_type=["c2p", "p2c"], hidden_act="gelu",
    )  # fmt: skip
    expected = []
    for one in CONVERSATIONS:
        first, second = [BOS, *spell(one.prompt), SEP], [*spell(one.response), SEP]
        types = torch.tensor([[0] * len(first) + [1] * len(second)])
        logits = model(torch.tensor([first + second]), token_type_ids=types).logits
        expected.append(float(logits[0, 0]))
    config = SequenceClassifierRewardConfig(model=str(tmp_path), template="pair", batch_size=3, **EXACT)
    check_batching(load_sequence_classifier(config), expected)


def test_of_several_labels_the_one_that_is_named_is_the_score(tmp_path):
    model = save_classifier(tmp_path, num_labels=3, pad_token_id=0)
    expected = model(torch.tensor([chat_ids(CONVERSATIONS[0])])).logits[0]
    for label in range(3):
        config = SequenceClassifierRewardConfig(model=str(tmp_path), label=label, **EXACT)
        score = float(load_sequence_classifier(config).score(CONVERSATIONS[:1]))
        assert score == pytest.approx(float(expected[label]), abs=1e-5)
    for label, says in ((None, "it has 3 labels; set label"), (3, "label=3, it has 3 labels")):
        with pytest.raises(UserError, match=says):
            load_sequence_classifier(
                SequenceClassifierRewardConfig(model=str(tmp_path), label=label, **EXACT)
            )


def test_a_classifier_without_a_chat_template_says_what_to_set(tmp_path):
    save_classifier(tmp_path, chat=None)
    with pytest.raises(UserError, match="its tokenizer has no chat template; set template"):
        load_sequence_classifier(SequenceClassifierRewardConfig(model=str(tmp_path), **EXACT))


def test_a_conversation_that_is_too_long_has_no_score_and_the_others_have_theirs(tmp_path, caplog):
    save_body(tmp_path, score_head())
    limit = len(beaver_ids(CONVERSATIONS[3]))
    free = load_beaver(BeaverRewardConfig(model=str(tmp_path), **EXACT)).score(CONVERSATIONS)
    model = load_beaver(BeaverRewardConfig(model=str(tmp_path), max_length=limit, **EXACT))
    scores = model.score(CONVERSATIONS)
    fits = [len(beaver_ids(one)) <= limit for one in CONVERSATIONS]
    assert scores.isfinite().tolist() == fits == [False, False, True, True]
    assert scores[fits].tolist() == pytest.approx(free[fits].tolist(), abs=1e-5)
    model.score(CONVERSATIONS)
    (told,) = caplog.messages
    assert f"max_length is {limit}" in told


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_truncated_conversation_has_the_score_of_the_longest_beginning_of_its_answer(tmp_path, add_eos):
    save_body(tmp_path, score_head())
    settings = EXACT | {"model": str(tmp_path), "add_eos": add_eos}
    free = load_beaver(BeaverRewardConfig(**settings))
    limit = len(beaver_ids(Conversation("hello", "Hello! How"))) - 1 + add_eos
    cut = load_beaver(BeaverRewardConfig(max_length=limit, too_long="truncate", **settings))
    expected = float(free.score([Conversation("hello", "Hello! How")]))
    assert float(cut.score([CONVERSATIONS[0]])) == pytest.approx(expected, abs=1e-5)
    assert cut.score([Conversation("hello" * 9, "yes")]).isnan().all()


def test_a_model_that_reads_fewer_positions_bounds_the_length(tmp_path):
    save_classifier(tmp_path, pad_token_id=0, max_position_embeddings=45)
    model = load_sequence_classifier(SequenceClassifierRewardConfig(model=str(tmp_path), **EXACT))
    assert model.score(CONVERSATIONS).isfinite().tolist() == [False, False, True, True]


@pytest.mark.parametrize(("num_positions", "last_fits"), [(25, True), (24, False)])
def test_positions_that_are_counted_from_behind_the_padding_are_fewer(tmp_path, num_positions, last_fits):
    sizes = {"max_position_embeddings": num_positions, "pad_token_id": 0, "type_vocab_size": 2}
    save_classifier(tmp_path, "Roberta", adds="pair", chat=None, **sizes)
    config = SequenceClassifierRewardConfig(model=str(tmp_path), template="pair", **EXACT)
    fits = load_sequence_classifier(config).score(CONVERSATIONS).isfinite().tolist()
    assert fits == [False, False, True, last_fits]  # the last one has 24 tokens


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{prompt}", "not usable"),
        ("{prompt} {answer} {response}", "not usable"),
        ("{prompt} {response.__class__}", "not usable"),
        ("{prompt!r} {response}", "not usable"),
        ("{prompt} {response", "malformed"),
        ("{} {response}", "not usable"),
    ],
)
def test_a_template_that_is_not_one_is_refused(template, says):
    with pytest.raises(ValueError, match=says):
        SequenceClassifierRewardConfig(model="m", weight=1.0, template=template)
