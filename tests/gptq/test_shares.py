"""Which rank solves what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantkit.gptq.shares import cut, even, pack

# Of Llama 3.1 8B: (n_rows, n_columns), and the inputs that they share.
LLAMA = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
INPUTS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def test_a_block_of_8b_is_shared_out_evenly() -> None:
    """A factorization that several ranks need is made by each: what two ranks lose is that."""
    n_types = dict.fromkeys(LLAMA, 5)
    (alone,) = pack(cut(LLAMA, n_types, INPUTS, 1), 1)
    assert alone == list(range(len(LLAMA)))  # whole tensors, in their order
    for size, most in ((2, 1.12), (4, 1.25), (8, 1.6)):
        pieces = cut(LLAMA, n_types, INPUTS, size)
        loads = []
        for indices in pack(pieces, size):
            own = [pieces[i] for i in indices]
            inputs = {piece.input: piece.set_up for piece in own}
            loads.append(sum(piece.cost for piece in own) + sum(inputs.values()))
        once = {piece.input: piece.set_up for piece in pieces}
        fair = (sum(piece.cost for piece in pieces) + sum(once.values())) / size
        assert max(loads) < most * fair, (size, loads, fair)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), max_size=8),
    st.integers(1, 9),
)
def test_every_row_once(shapes: list[tuple[int, int]], size: int) -> None:
    named = {f"t{i}": shape for i, shape in enumerate(shapes)}
    pieces = cut(named, dict.fromkeys(named, 2), {n: i // 2 for i, n in enumerate(named)}, size)
    shares = pack(pieces, size)
    assert len(shares) == size
    assert sorted(i for own in shares for i in own) == list(range(len(pieces)))
    for name, (n_rows, _) in named.items():
        own = [piece for piece in pieces if piece.tensor == name]
        assert own[0].first == 0 and own[-1].last == n_rows and all(p.first < p.last for p in own)
        assert all(a.last == b.first for a, b in zip(own, own[1:], strict=False))


@given(st.integers(0, 300), st.integers(1, 9))
def test_even_ranges(n: int, size: int) -> None:
    found = [even(n, rank, size) for rank in range(size)]
    assert [i for own in found for i in own] == list(range(n))
    assert max(map(len, found)) - min(map(len, found)) <= 1
