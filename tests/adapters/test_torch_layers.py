"""Every matrix of models with the layers of torch.nn, against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from specdens_torch import Risk
from tests.adapters.torch_dense import all_matrices, assert_matrices

CE = nn.CrossEntropyLoss()
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])  # of the six examples of all cases


def per_example(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


def references(model, inputs, names=None):
    return all_matrices(model, per_example, [(inputs, LABELS)], names)


def assert_exact(model, inputs, reference=None, **options):
    """Compare with the derivatives of `reference`, a model of equal meaning, or of its own."""
    expected = references(reference or model, inputs)
    assert_matrices(Risk(model, CE, (inputs, LABELS), **options), expected)


def normal(*shape):
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def tokens(length, below=5):
    return torch.randint(below, (6, length), generator=torch.Generator().manual_seed(5))


def headed(*body, features):
    """Return layers with a linear head."""
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 3))


class Function(nn.Module):
    """A function of inputs and submodules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def pooled(layer, features):
    return headed(nn.Conv2d(1, 2, 2), layer, features=features)


def normalized(layer, width):
    """Return a layer between a nonlinear one and a head, over 2 channels of length `width`."""
    first = (nn.Linear(4, 2 * width), nn.Tanh(), nn.Unflatten(1, (2, width)))
    return headed(*first, layer, nn.Tanh(), features=2 * width)


def activated(layer):
    return nn.Sequential(nn.Linear(4, 3), layer, nn.Linear(3, 3))


def evaluated(model, inputs):
    """Give the running statistics something to say and use them."""
    model.double()(inputs)
    return model.eval()


def attended(**options):
    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v, **options).mean(1))

    return Function(attend, qkv=nn.Linear(2, 6), head=nn.Linear(2, 3))


def multihead():
    def attend(self, x):
        hidden, _ = self.attention(x, x, x, attn_mask=torch.ones(3, 3).triu(1).bool())
        return self.head(hidden.mean(1))

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    return Function(attend, attention=attention, head=nn.Linear(4, 3))


def encoder(**options):
    def encode(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        return self.head(self.layers(x, src_key_padding_mask=padding)[:, :2].mean(1))

    nested = not options.get("norm_first", False)
    layer = nn.TransformerEncoderLayer(4, 2, 2, batch_first=True, **options)
    layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)
    return Function(encode, layers=layers, head=nn.Linear(4, 3)).eval()


def decoder():
    layer = nn.TransformerDecoderLayer(3, 1, 2, batch_first=True)
    decode = Function(lambda self, x: self.layer(x, x.flip(1), tgt_is_causal=False), layer=layer)
    return headed(decode, features=9).eval()


def transformer():
    layer = nn.TransformerEncoderLayer(3, 1, 2, batch_first=True)
    first = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    layers = nn.Transformer(3, 1, 1, 1, 2, custom_encoder=first, batch_first=True)
    layers.decoder.requires_grad_(False).layers[0].multihead_attn.requires_grad_()
    return headed(Function(lambda self, x: self.layers(x, x[:, :2]), layers=layers), features=6)


def recurrent(kind, **options):
    def read(self, x):
        hidden, _ = self.cell(x)
        return self.head(hidden[:, -1])

    width = 4 if options.get("bidirectional") else 2
    return Function(read, cell=kind(2, 2, batch_first=True, **options), head=nn.Linear(width, 3))


def packed():
    def read(self, x, lengths):
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.cell(rows)[0], batch_first=True)
        return self.head(hidden.sum(1))

    return Function(read, cell=nn.GRU(2, 2, batch_first=True), head=nn.Linear(2, 3))


def bilinear():
    join = Function(lambda self, x: self.join(x[:, :2], x[:, 2:]), join=nn.Bilinear(2, 2, 3))
    return nn.Sequential(join, nn.Tanh(), nn.Linear(3, 3))


def parametrized(wrap):
    return nn.Sequential(wrap(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).eval()


def lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(3))
    model(torch.zeros(2, 4))
    return model


class Containers(nn.Module):
    """Parameters in a list and a dictionary."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(4, 3), torch.randn(3, 3)])
        self.dict = nn.ParameterDict({"bias": torch.randn(3), "unused": torch.randn(2)})

    def forward(self, x):
        return torch.tanh(x @ self.list[0] + self.dict["bias"]) @ self.list[1]


def fourier():
    def filtered(self, x):
        return self.head(torch.fft.ifft(self.filter(torch.fft.fft(self.first(x)).real)).abs())

    return Function(filtered, first=nn.Linear(4, 3), filter=nn.Linear(3, 3), head=nn.Linear(3, 3))


def recomputed():
    def twice(self, x):
        return self.head(checkpoint(self.first, x, use_reentrant=False))

    first = nn.Sequential(nn.Linear(4, 3), nn.SiLU())
    return Function(twice, first=first, head=nn.Linear(3, 3))


def tied_embedding():
    def read(self, x):
        return (torch.tanh(self.embed(x)).mean(1) @ self.embed.weight.T)[:, :3]

    return Function(read, embed=nn.Embedding(5, 3))


CASES = {
    "conv1d": (lambda: headed(nn.Conv1d(2, 4, 3, 2, 1, groups=2), nn.Tanh(), features=16), (2, 7)),
    "conv2d": (
        lambda: headed(nn.Conv2d(2, 2, 3, 2, 1, groups=2), nn.Tanh(), features=8),
        (2, 4, 4),
    ),
    "conv2d dilated": (
        lambda: headed(
            nn.Conv2d(1, 2, 2, dilation=2, padding=1, padding_mode="circular"),
            nn.Tanh(),
            features=18,
        ),
        (1, 3, 3),
    ),
    "conv2d same": (
        lambda: headed(nn.Conv2d(1, 1, 3, padding="same", bias=False), nn.Tanh(), features=9),
        (1, 3, 3),
    ),
    "conv3d": (lambda: headed(nn.Conv3d(1, 2, 2), nn.Tanh(), features=2), (1, 2, 2, 2)),
    "transposed conv1d": (
        lambda: headed(
            nn.ConvTranspose1d(2, 2, 3, 2, output_padding=1, groups=2), nn.Tanh(), features=16
        ),
        (2, 3),
    ),
    "transposed conv2d": (
        lambda: headed(nn.ConvTranspose2d(1, 2, 2, dilation=2), nn.Tanh(), features=32),
        (1, 2, 2),
    ),
    "max pool": (lambda: pooled(nn.MaxPool2d(2, padding=1), 8), (1, 4, 4)),
    "average pool": (lambda: pooled(nn.AvgPool2d(2, 1), 8), (1, 4, 4)),
    "adaptive average pool": (lambda: pooled(nn.AdaptiveAvgPool2d(2), 8), (1, 4, 4)),
    "adaptive max pool": (lambda: pooled(nn.AdaptiveMaxPool2d(2), 8), (1, 4, 4)),
    "power pool": (lambda: pooled(nn.LPPool2d(2, 2), 2), (1, 4, 4)),
    "batch norm 1d": (
        lambda: evaluated(normalized(nn.BatchNorm1d(2), 2), normal(4)),
        (4,),
    ),
    "batch norm 2d": (
        lambda: evaluated(
            headed(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), features=8), normal(1, 3, 3)
        ),
        (1, 3, 3),
    ),
    "group norm": (lambda: normalized(nn.GroupNorm(1, 2), 3), (4,)),
    "instance norm": (lambda: normalized(nn.InstanceNorm1d(2, affine=True), 3), (4,)),
    "instance norm with statistics": (
        lambda: evaluated(normalized(nn.InstanceNorm1d(2, track_running_stats=True), 3), normal(4)),
        (4,),
    ),
    "layer norm": (lambda: normalized(nn.LayerNorm(3), 3), (4,)),
    "rms norm": (lambda: normalized(nn.RMSNorm(3), 3), (4,)),
    "local response norm": (lambda: normalized(nn.LocalResponseNorm(2), 2), (4,)),
    "multihead attention": (multihead, (3, 4)),
    "encoder": (encoder, (3, 4)),
    "encoder norm first": (lambda: encoder(norm_first=True, activation="gelu"), (3, 4)),
    "decoder": (decoder, (3, 3)),
    "transformer": (lambda: transformer().eval(), (3, 3)),
    "attention": (lambda: attended(dropout_p=0.0), (3, 2)),
    "causal attention": (lambda: attended(is_causal=True), (3, 2)),
    "masked attention": (
        lambda: attended(attn_mask=torch.tensor([[True, False, True]]).expand(3, 3)),
        (3, 2),
    ),
    "biased attention": (
        lambda: attended(attn_mask=torch.arange(9.0).double().view(3, 3), scale=0.3),
        (3, 2),
    ),
    "gelu": (lambda: activated(nn.GELU()), (4,)),
    "gelu by tanh": (lambda: activated(nn.GELU(approximate="tanh")), (4,)),
    "silu": (lambda: activated(nn.SiLU()), (4,)),
    "softplus": (lambda: activated(nn.Softplus()), (4,)),
    "mish": (lambda: activated(nn.Mish()), (4,)),
    "elu": (lambda: activated(nn.ELU()), (4,)),
    "prelu": (lambda: activated(nn.PReLU()), (4,)),
    "hard swish": (lambda: activated(nn.Hardswish()), (4,)),
    "dropout": (lambda: activated(nn.Dropout()).eval(), (4,)),
    "rnn": (lambda: recurrent(nn.RNN), (3, 2)),
    "lstm": (lambda: recurrent(nn.LSTM, proj_size=0), (3, 2)),
    "gru": (lambda: recurrent(nn.GRU, bidirectional=True), (3, 2)),
    "stacked lstm": (lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.5).eval(), (3, 2)),
    "bilinear": (bilinear, (4,)),
    "spectral norm": (lambda: parametrized(parametrizations.spectral_norm), (4,)),
    "orthogonal": (lambda: parametrized(parametrizations.orthogonal), (4,)),
    "lazy": (lazy, (4,)),
    "containers": (Containers, (4,)),
    "fourier": (fourier, (4,)),
    "checkpointed": (recomputed, (4,)),
}
TOKEN_CASES = {
    "embedding": lambda: headed(nn.Embedding(5, 2, padding_idx=0), nn.Tanh(), features=6),
    "tied embedding": tied_embedding,
}


#: Made of what other cases have, and long.
TWICE_COVERED = ("transformer", "encoder norm first")
DATA = (normal(4), LABELS)
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def built(make):
    torch.manual_seed(3)
    return make().double()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in TWICE_COVERED)) for n in CASES],
)
@NESTED
def test_layers(name):
    make, shape = CASES[name]
    assert_exact(built(make), normal(*shape))


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_layers_that_read_tokens(name):
    assert_exact(built(TOKEN_CASES[name]), tokens(3))


def test_packed_sequences_of_a_batch():
    lengths = torch.tensor([2, 3, 1, 3, 2, 3])
    assert_exact(built(packed), (normal(3, 2), lengths))
    assert_exact(built(packed), (normal(3, 2), lengths), regroup=False)


@pytest.mark.parametrize("chosen", ["head.*", "layers.layers.0.linear2.*"])
@NESTED
def test_frozen_encoders(chosen):
    # Without gradients, torch evaluates a whole encoder layer by one fused operation.
    model = built(encoder)
    names = [n for n, _ in model.named_parameters() if n.startswith(chosen.removesuffix("*"))]
    expected = references(model, normal(3, 4), names)
    assert_matrices(Risk(model, CE, (normal(3, 4), LABELS), chosen), expected)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    with torch.no_grad():
        assert_matrices(Risk(model, CE, (normal(3, 4), LABELS)), expected)
