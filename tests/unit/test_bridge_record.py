"""Recording loaders: a small engine whose modules load as vLLM's do.

What was recorded is compared with rectangles worked out by hand, and is replayed on real
tensors against the loaders themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from gpg_megatron.bridge.plan import Destination, View
from gpg_megatron.bridge.record import record_loaders
from gpg_megatron.layout.boxes import Box

HF_SHAPES = {
    "embed": (6, 4),
    "norm": (4,),
    "q": (8, 4),
    "k": (4, 4),
    "v": (4, 4),
    "o": (4, 8),
    "down": (4, 6),
}


class Engine(nn.Module):
    """One of two tensor-parallel ranks: a vocabulary padded to 8 rows, fused q, k and v, split
    columns, and a matrix that is kept transposed."""

    embed: nn.Parameter
    norm: nn.Parameter
    qkv: nn.Parameter
    o: nn.Parameter
    down: nn.Parameter

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        shapes = {"embed": (4, 4), "norm": (4,), "qkv": (8, 4), "o": (4, 4), "down": (3, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, 7.0)))
        self.register_parameter("packed", nn.Parameter(torch.empty(0)))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows_of_qkv = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}
        for name, w in weights:
            if name == "norm":
                self.norm.data.copy_(w)
            elif name == "embed":
                first = 4 * self.rank
                part = w.narrow(0, first, min(4, 6 - first))
                self.embed[: part.shape[0]].data.copy_(part)
                self.embed[part.shape[0] :].data.fill_(0)
            elif name in rows_of_qkv:
                first, n = rows_of_qkv[name]
                self.qkv.data.narrow(0, first, n).copy_(w.narrow(0, self.rank * n, n))
            elif name == "o":
                self.o.data.copy_(w.narrow(1, self.rank * 4, 4))
            elif name == "down":
                self.down.data.t().copy_(w.narrow(1, self.rank * 3, 3))


def destination(name: str, ranges: list[tuple[int, int]], view: View) -> Destination:
    return Destination(name, Box(tuple(ranges)), view)


def test_the_rectangles_of_the_second_rank() -> None:
    """Views are (parameter, first element, shape, strides)."""
    assert set(record_loaders(Engine(1), HF_SHAPES)) == {
        destination("embed", [(4, 6), (0, 4)], View("embed", 0, (2, 4), (4, 1))),
        destination("norm", [(0, 4)], View("norm", 0, (4,), (1,))),
        destination("q", [(4, 8), (0, 4)], View("qkv", 0, (4, 4), (4, 1))),
        destination("k", [(2, 4), (0, 4)], View("qkv", 16, (2, 4), (4, 1))),
        destination("v", [(2, 4), (0, 4)], View("qkv", 24, (2, 4), (4, 1))),
        destination("o", [(0, 4), (4, 8)], View("o", 0, (4, 4), (4, 1))),
        destination("down", [(0, 4), (3, 6)], View("down", 0, (4, 3), (1, 4))),
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replay_does_what_the_loaders_do(rank: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in HF_SHAPES.items()}
    loaded, replayed = Engine(rank), Engine(rank)
    with torch.no_grad():
        loaded.load_weights(tensors.items())
        parameters = dict(replayed.named_parameters())
        for d in record_loaders(replayed, HF_SHAPES):
            view = parameters[d.view.parameter].as_strided(
                d.view.shape, d.view.stride, d.view.offset
            )
            view.copy_(tensors[d.hf_name][d.hf.slices])
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameters[name], parameter), name


def test_padding_is_filled_and_nothing_else_is_written() -> None:
    engine = Engine(1)
    record_loaders(engine, HF_SHAPES)
    assert not engine.embed[2:].any()
    untouched = [engine.embed[:2], engine.norm, engine.qkv, engine.o, engine.down]
    assert all(bool(tensor.eq(7).all()) for tensor in untouched)


def test_an_unused_checkpoint_tensor_has_no_destination() -> None:
    found = record_loaders(Engine(0), HF_SHAPES | {"lm_head": (6, 4)})
    assert {d.hf_name for d in found} == HF_SHAPES.keys()


class OneWeight(nn.Module):
    """A 4 x 6 parameter, and a loader of one line."""

    def __init__(self, load: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))
        self.load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, w in weights:
            self.load(self.weight.data, w)


Load = Callable[[torch.Tensor, torch.Tensor], object]


def record(load: Load) -> list[Destination]:
    return record_loaders(OneWeight(load), {"model.w": (4, 6)})


def test_a_view_into_the_middle_of_columns() -> None:
    found = record(
        lambda p, w: (p[:, :2].copy_(w[:, 4:]), p[:, 2:].copy_(w[:, :4])),
    )
    assert found == [
        destination("model.w", [(0, 4), (4, 6)], View("weight", 0, (4, 2), (6, 1))),
        destination("model.w", [(0, 4), (0, 4)], View("weight", 2, (4, 4), (6, 1))),
    ]


def test_a_parameter_that_two_modules_share() -> None:
    model = OneWeight(lambda p, w: p.copy_(w))
    model.head = nn.Linear(6, 4, bias=False)
    model.head.weight = model.weight
    assert record_loaders(model, {"model.w": (4, 6)}) == [
        destination("model.w", [(0, 4), (0, 6)], View("weight", 0, (4, 6), (6, 1)))
    ]


def load_rows_from_the_middle(p: torch.Tensor, w: torch.Tensor) -> None:
    """Elements 3 to 14 as two rows: the strides of a rectangle, but it would leave the tensor."""
    p.view(24)[3:15].view(2, 6).copy_(w.view(24)[3:15].view(2, 6))
    p.view(24)[:3].fill_(0)
    p.view(24)[15:].fill_(0)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda p, w: p.view(24).copy_(w.view(24)), id="flat"),
        pytest.param(lambda p, w: p.view(2, 12).copy_(w.view(2, 12)), id="other rows"),
        pytest.param(lambda p, w: p.copy_(w.view(6, 4).t()), id="transposed"),
        pytest.param(lambda p, w: p[:2].copy_(w[::2]), id="every second row"),
        pytest.param(lambda p, w: p.copy_(w[:1].expand(4, 6)), id="repeated row"),
        pytest.param(load_rows_from_the_middle, id="rows that start in the middle"),
    ],
)
def test_what_is_no_rectangle_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"reshapes model\.w"):
        record(load)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda p, w: p.copy_(w * 2), id="scaled"),
        pytest.param(lambda p, w: p.copy_(w.half()), id="converted"),
        pytest.param(lambda p, w: p.copy_(w.clone()), id="cloned"),
        pytest.param(lambda p, w: p.copy_(torch.cat(w.chunk(2))), id="joined"),
        pytest.param(lambda p, w: p.copy_(w.view(6, 4).t().contiguous()), id="made contiguous"),
    ],
)
def test_a_computed_source_is_refused_and_the_parameter_named(load: Load) -> None:
    with pytest.raises(ValueError, match="loader of weight copies a tensor that is no view"):
        record(load)


def test_a_target_that_is_no_parameter_is_refused_and_the_tensor_named() -> None:
    with pytest.raises(ValueError, match=r"loader of model\.w copies a tensor that is no view"):
        record(lambda p, w: torch.empty(4, 6).copy_(w))


@pytest.mark.parametrize(
    ("load", "written"),
    [
        pytest.param(lambda p, w: None, 0, id="never loaded"),
        pytest.param(lambda p, w: p[1:].copy_(w[1:]), 18, id="a row is missing"),
        pytest.param(
            lambda p, w: (p[:1].copy_(w[:1]), p[1:2].fill_(0)), 12, id="padding is not all"
        ),
        pytest.param(lambda p, w: (p.copy_(w), p.copy_(w)), 48, id="loaded twice"),
    ],
)
def test_what_is_not_written_once_is_refused(load: Load, written: int) -> None:
    match = f"weight has 24 elements, and its loaders write {written}$"
    with pytest.raises(ValueError, match=match):
        record(load)


def test_rows_written_twice_do_not_hide_rows_that_are_missing() -> None:
    with pytest.raises(ValueError, match="weight"):
        record(lambda p, w: (p[:2].copy_(w[:2]), p[:2].copy_(w[:2])))
