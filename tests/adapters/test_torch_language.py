"""Losses of language models against transformers' own and against dense derivatives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from specdens_torch import Hessian, Risk, gradient, risk_value
from specdens_torch.language import next_token_loss, token_loss
from tests.adapters.torch_cases import dense

V, T, N = 5, 4, 6  # tokens, positions, texts
IGNORED = -100


class Bigram(nn.Module):
    """Scores of the next token from the present one and its place, 51 parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 3)
        self.place = nn.Parameter(torch.randn(T, 3))
        self.head = nn.Linear(3, V, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.embed(input_ids) + self.place[: input_ids.shape[1]]))


def bigram():
    torch.manual_seed(0)
    return Bigram().double()


def texts():
    """Tokens and a mask of texts of uneven lengths, padded to the right."""
    torch.manual_seed(1)
    tokens, lengths = torch.randint(V, (N, T)), torch.tensor([4, 2, 1, 3, 4, 2])
    return tokens, (torch.arange(T) < lengths[:, None]).long()


def reference(logits, labels, shift):
    """Average over the labels that count, term by term in plain loops."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    terms = [
        -torch.log_softmax(logits[i, t], 0)[labels[i, t]]
        for i, t in (labels != IGNORED).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def batches(form, sizes):
    """Return the texts in batches of these sizes with targets in one of the accepted forms."""
    tokens, mask = texts()
    result = []
    for ids, kept in zip(tokens.split(sizes), mask.split(sizes), strict=True):
        ignored = ids.masked_fill(kept == 0, IGNORED)
        targets = {
            "ignored": ignored,
            "int32": ignored.int(),
            "pair": (ids, kept),
            "list": [ids, kept.bool()],
            "mapping": {"labels": ids, "attention_mask": kept},
            "mapping-of-labels": {"labels": ignored},
        }
        result.append((ids, targets[form]))
    return result


@pytest.mark.parametrize(
    "form", ["ignored", "int32", "pair", "list", "mapping", "mapping-of-labels"]
)
@pytest.mark.parametrize("loss", [next_token_loss, token_loss], ids=lambda f: f.__name__)
def test_every_split_has_the_dense_derivatives(loss, form):
    model, (tokens, mask) = bigram(), texts()
    labels = tokens.masked_fill(mask == 0, IGNORED)
    whole = functools.partial(reference, shift=loss is next_token_loss)
    matrix = dense(model, whole, tokens, labels, vectorize=False)
    slope = dense(model, whole, tokens, labels, order=1)
    identity = torch.eye(len(slope), dtype=torch.float64)
    for sizes in ([6], [1, 1, 4], [2, 1, 3], [5, 1]):
        for regroup in (True, False):
            risk = Risk(model, loss, batches(form, sizes), regroup=regroup)
            value = risk_value(risk)
            assert value == pytest.approx(whole(model(tokens), labels).item(), rel=1e-12)
            torch.testing.assert_close(gradient(risk), slope, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)


def test_padding_to_another_length_changes_nothing():
    model, (tokens, mask) = bigram(), texts()
    labels = tokens.masked_fill(mask == 0, IGNORED)
    short = [(tokens[i : i + 1, :3], labels[i : i + 1, :3]) for i in (1, 2, 3, 5)]
    long = [(tokens[[1, 2, 3, 5]], labels[[1, 2, 3, 5]])]
    values = [risk_value(Risk(model, next_token_loss, data)) for data in (short, long)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    torch.testing.assert_close(
        gradient(Risk(model, next_token_loss, short)), gradient(Risk(model, next_token_loss, long))
    )


def transformers_model(name):
    """Return a tiny Hugging Face model with random parameters; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    common = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4}
    sizes |= {"intermediate_size": 4, "max_position_embeddings": 8}
    distil = {"dim": 4, "hidden_dim": 4, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 8}
    built = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=2, **common)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **sizes)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**common, **sizes)),
        "tokens": lambda: transformers.DistilBertForTokenClassification(
            transformers.DistilBertConfig(num_labels=V, **common, **distil)
        ),
        "texts": lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(num_labels=3, **common, **distil)
        ),
    }
    model = built[name]()
    if name == "llama":  # its own norm rounds to float32, whatever the parameters are
        for layer in (*model.model.layers, model.model):
            for key, child in list(layer.named_children()):
                if key.endswith("norm"):
                    setattr(layer, key, nn.RMSNorm(4, eps=child.variance_epsilon))
    if name == "gpt2":
        model.transformer.wte.weight.data.mul_(20)  # predictions far from uniform
    return model.double().eval()


def collated(name, start=0, stop=N):
    """Return a batch as Hugging Face's collators give it."""
    ids, mask = (t[start:stop] for t in texts())
    if name == "texts":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}
    labels = ids.masked_fill(mask == 0, IGNORED)
    if name in ("bert", "tokens"):
        labels = labels.masked_fill((ids + torch.arange(T)) % 3 == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


LOSSES = {
    "gpt2": next_token_loss,
    "llama": next_token_loss,
    "bert": token_loss,
    "tokens": token_loss,
    "texts": nn.CrossEntropyLoss(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_transformers(name):
    model, batch = transformers_model(name), collated(name)
    own = model(**batch).loss
    # transformers rounds causal logits to float32 before their loss.
    rounded = 1e-6 if name in ("gpt2", "llama") else 1e-12
    for data in (batch, [collated(name, 0, 1), collated(name, 1, 4), collated(name, 4, N)]):
        value = risk_value(Risk(model, LOSSES[name], data))
        assert value == pytest.approx(own.item(), rel=rounded)
    own.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    slope = gradient(Risk(model, LOSSES[name], batch))
    torch.testing.assert_close(slope, expected, rtol=10 * rounded, atol=rounded)


@pytest.mark.parametrize("name", LOSSES)
def test_hessians_of_transformers(name):
    """Products with random vectors, in ragged batches, against the dense Hessian of plain code."""
    model, batch = transformers_model(name), collated(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}

    def whole(outputs, labels):
        if name == "texts":
            return nn.functional.cross_entropy(outputs.logits, labels)
        return reference(outputs.logits, labels, shift=name in ("gpt2", "llama"))

    matrix = dense(model, whole, inputs, batch["labels"], vectorize=False)
    vectors = torch.randn(len(matrix), 3, dtype=torch.float64)
    ragged = [collated(name, 0, 1), collated(name, 1, 4), collated(name, 4, N)]
    for data in (batch, ragged):
        product = Hessian(model, LOSSES[name], data) @ vectors
        torch.testing.assert_close(product, matrix @ vectors, rtol=1e-10, atol=1e-10)


def test_a_loader_that_pads_batch_by_batch():
    model, (tokens, mask) = bigram(), texts()
    examples = [
        {"input_ids": ids[: kept.sum()], "labels": ids[: kept.sum()]}
        for ids, kept in zip(tokens, mask, strict=True)
    ]

    def pad(batch):
        fill = {"input_ids": 0, "labels": IGNORED}
        return {
            key: nn.utils.rnn.pad_sequence(
                [example[key] for example in batch], batch_first=True, padding_value=value
            )
            for key, value in fill.items()
        }

    labels = tokens.masked_fill(mask == 0, IGNORED)
    expected = reference(model(tokens), labels, shift=True).item()
    for size in (1, 4, 6):
        loader = DataLoader(examples, batch_size=size, collate_fn=pad)
        value = risk_value(Risk(model, next_token_loss, loader))
        assert value == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_lifted():
    logits = torch.randn(2, T, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = texts()[0][:2]
    losses, weights = next_token_loss(logits, labels)
    assert losses.dtype == weights.dtype == torch.float32
    expected, _ = next_token_loss(logits.double(), labels)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [next_token_loss, token_loss], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("outputs", "labels", "error", "words"),
    [
        (torch.zeros(2, T), torch.zeros(2, T).long(), ValueError, r"\(2, 4\) and labels \(2, 4\)"),
        (torch.zeros(2, T, V), torch.zeros(2, 3).long(), ValueError, r"labels \(2, 3\)"),
        (torch.zeros(2, T, V), torch.zeros(2, T), TypeError, "float32.*integer"),
        (torch.zeros(2, T, V), torch.zeros(T).long(), ValueError, r"labels .*\(4,\)"),
        (torch.zeros(2, T, V), None, TypeError, "NoneType"),
        (torch.zeros(2, T, V), {"ids": 1}, TypeError, "dict"),
        ((torch.zeros(2, T, V),), torch.zeros(2, T).long(), TypeError, "tuple"),
        (
            torch.zeros(2, T, V),
            (torch.zeros(2, T).long(), torch.ones(2, 3)),
            ValueError,
            r"attention_mask has shape \(2, 3\)",
        ),
    ],
    ids=["logits", "labels", "float", "flat", "none", "keys", "tuple", "mask"],
)
def test_arguments_that_are_refused(loss, outputs, labels, error, words):
    with pytest.raises(error, match=words):
        loss(outputs, labels)


def test_texts_of_one_token_have_no_next_one():
    losses, weights = next_token_loss(torch.zeros(2, 1, V), torch.zeros(2, 1).long())
    assert losses.shape == weights.shape == (2, 0)
