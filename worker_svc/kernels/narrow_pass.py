"""A narrow pass of a Llama-shaped model over rows of a slot cache, compiled to one function.

Arrays come as pointers to float32, and indices as int64; every offset is computed here, and none is checked.
What a token's projection and the cache look like is said in `worker_svc.engine.llama.LlamaRunner`.

The sums that make a token's logits are the same whatever else is in the pass.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numba.core import types

from . import LANES, PANEL
from .lanes import (
    add,
    div,
    exp,
    fused,
    larger,
    largest,
    load,
    mul,
    spread,
    store,
    sub,
    swapped,
    tile,
    total,
    totals,
)

# Of positions that a query does not see; finite, since infinities would meet in a difference.
_HIDDEN = np.float32(-1e30)
_NOTHING = np.float32(0.0)
_kernel = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_kernel
def multiply(rows, left, depth, panels, begin, width, out, added):
    """out [rows, width] = left [rows, depth] times panels from `begin` on, or that added to what is there.

    panels: [width / PANEL, depth, PANEL], so that weights are read once and in their order, panel by panel,
    while the rows stay in the caches.
    """
    for column in range(0, width, PANEL):
        panel = begin + column * depth
        row = 0
        while row + 6 <= rows:
            tile(6, left, row * depth, depth, panels, panel, out, row * width + column, width, added)
            row += 6
        if row + 4 <= rows:
            tile(4, left, row * depth, depth, panels, panel, out, row * width + column, width, added)
            row += 4
        if row + 3 <= rows:
            tile(3, left, row * depth, depth, panels, panel, out, row * width + column, width, added)
            row += 3
        if row + 2 <= rows:
            tile(2, left, row * depth, depth, panels, panel, out, row * width + column, width, added)
            row += 2
        if row < rows:
            tile(1, left, row * depth, depth, panels, panel, out, row * width + column, width, added)


@_kernel
def normalise(values, begin, width, epsilon, out, at):
    """RMSNorm of one row but for a factor that the weights carry; see `LlamaRunner`."""
    squares = spread(_NOTHING)
    for place in range(begin, begin + width, LANES):
        part = load(values, place)
        squares = fused(part, part, squares)
    scale = spread(np.float32(1.0) / np.float32(math.sqrt(total(squares) + epsilon)))
    for place in range(0, width, LANES):
        store(out, at + place, mul(load(values, begin + place), scale))


@_kernel
def gate(rows, width, both, out):
    """out [rows, width] = silu(g) * u for both [rows, 2, width] = g, u."""
    nothing, one = spread(_NOTHING), spread(np.float32(1.0))
    for row in range(rows):
        gates = row * 2 * width
        for place in range(0, width, LANES):
            x = load(both, gates + place)
            above = larger(x, nothing)
            shrunk = exp(sub(sub(x, above), above))
            # x / (1 + e^-x), by an exponential of -|x| in either case.
            silu = div(fused(sub(x, above), shrunk, above), add(one, shrunk))
            store(out, row * width + place, mul(silu, load(both, gates + width + place)))


@_kernel
def turn(queries, start, tokens, at, heads, group, dim, turns, states, slot):
    """Rotates the queries of one row's tokens where they lie, scaled for attention, and writes keys, rotated,
    and values to the row's slot.

    turns: [positions, 2, dim], cosines and signed sines for pairs that lie side by side.
    """
    scale = spread(np.float32(1.0) / np.float32(math.sqrt(np.float32(dim))))
    for query in range(queries):
        angle = (start + query) * 2 * dim
        held = slot + (start + query) * heads * 2 * dim
        for _ in range(heads):
            for head in range(group + 1):
                for place in range(0, dim, LANES):
                    x = load(tokens, at)
                    x = fused(
                        swapped(x), load(turns, angle + dim + place), mul(x, load(turns, angle + place))
                    )
                    if head < group:
                        store(tokens, at, mul(x, scale))
                    else:
                        store(states, held, x)
                        held += LANES
                    at += LANES
            for _ in range(0, dim, LANES):
                store(states, held, load(tokens, at))
                at += LANES
                held += LANES


@_kernel
def score(queries, reach, tokens, at, stride, group, dim, states, keys, token, scores):
    """scores [queries, group, reach rounded up] of one key head, block by block of keys."""
    padded = (reach + LANES - 1) // LANES * LANES
    last = keys + (reach - 1) * token
    nothing = spread(_NOTHING)
    for block in range(0, reach, LANES):
        k0 = keys + block * token
        k1, k2, k3 = min(k0 + token, last), min(k0 + 2 * token, last), min(k0 + 3 * token, last)
        k4, k5, k6 = min(k0 + 4 * token, last), min(k0 + 5 * token, last), min(k0 + 6 * token, last)
        k7 = min(k0 + 7 * token, last)
        to = block
        for query in range(queries):
            asked = at + query * stride
            for _ in range(group):
                s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = nothing
                for place in range(0, dim, LANES):
                    x = load(tokens, asked)
                    s0 = fused(x, load(states, k0 + place), s0)
                    s1 = fused(x, load(states, k1 + place), s1)
                    s2 = fused(x, load(states, k2 + place), s2)
                    s3 = fused(x, load(states, k3 + place), s3)
                    s4 = fused(x, load(states, k4 + place), s4)
                    s5 = fused(x, load(states, k5 + place), s5)
                    s6 = fused(x, load(states, k6 + place), s6)
                    s7 = fused(x, load(states, k7 + place), s7)
                    asked += LANES
                store(scores, to, totals((s0, s1, s2, s3, s4, s5, s6, s7)))
                to += padded


@_kernel
def soften(begin, seen, padded, scores):
    """Softmax of scores[begin : begin + seen], and 0 behind them up to `padded`."""
    for place in range(begin + seen, begin + padded):
        scores[place] = _HIDDEN
    highest = spread(_HIDDEN)
    for place in range(begin, begin + padded, LANES):
        highest = larger(highest, load(scores, place))
    highest = spread(largest(highest))
    sums = spread(_NOTHING)
    for place in range(begin, begin + padded, LANES):
        weight = exp(sub(load(scores, place), highest))
        store(scores, place, weight)
        sums = add(sums, weight)
    share = spread(np.float32(1.0) / total(sums))
    for place in range(begin, begin + padded, LANES):
        store(scores, place, mul(load(scores, place), share))
    for place in range(begin + seen, begin + padded):
        scores[place] = _NOTHING


@_kernel
def mix(queries, reach, states, values, token, scores, group, dim, out, at, stride):
    """Adds values of one key head, weighted by `scores`, to out, block by block of values."""
    padded = (reach + LANES - 1) // LANES * LANES
    last = values + (reach - 1) * token
    for block in range(0, reach, LANES):
        v0 = values + block * token
        v1, v2, v3 = min(v0 + token, last), min(v0 + 2 * token, last), min(v0 + 3 * token, last)
        v4, v5, v6 = min(v0 + 4 * token, last), min(v0 + 5 * token, last), min(v0 + 6 * token, last)
        v7 = min(v0 + 7 * token, last)
        p = block
        for query in range(queries):
            to = at + query * stride
            for _ in range(group):
                p0, p1, p2 = spread(scores[p]), spread(scores[p + 1]), spread(scores[p + 2])
                p3 = spread(scores[p + 3])
                p4, p5, p6 = spread(scores[p + 4]), spread(scores[p + 5]), spread(scores[p + 6])
                p7 = spread(scores[p + 7])
                for place in range(0, dim, LANES):
                    one = fused(p0, load(states, v0 + place), load(out, to))
                    two = mul(p1, load(states, v1 + place))
                    one = fused(p2, load(states, v2 + place), one)
                    two = fused(p3, load(states, v3 + place), two)
                    one = fused(p4, load(states, v4 + place), one)
                    two = fused(p5, load(states, v5 + place), two)
                    one = fused(p6, load(states, v6 + place), one)
                    two = fused(p7, load(states, v7 + place), two)
                    store(out, to, add(one, two))
                    to += LANES
                p += padded


@_kernel
def attend(rows, queries, slots, starts, tokens, heads, group, dim, turns, states, layer, slot, scores, out):
    """Causal attention of each row's tokens over its slot, whose KV they join first.

    tokens: projections [rows, queries, heads, group + 2, dim]; the queries in them are rotated. states: KV,
    of which the layer begins at `layer` and a slot takes `slot` numbers. out: [rows, queries, heads, group,
    dim].
    """
    width, mixed, token = heads * (group + 2) * dim, heads * group * dim, heads * 2 * dim
    for place in range(rows * queries * mixed):
        out[place] = _NOTHING
    for row in range(rows):
        start = starts[row]
        reach = start + queries
        padded = (reach + LANES - 1) // LANES * LANES
        held = layer + slots[row] * slot
        at = row * queries * width
        turn(queries, start, tokens, at, heads, group, dim, turns, states, held)
        for head in range(heads):
            keys = held + head * 2 * dim
            asked = at + head * (group + 2) * dim
            score(queries, reach, tokens, asked, width, group, dim, states, keys, token, scores)
            for query in range(queries):
                for member in range(group):
                    soften((query * group + member) * padded, start + query + 1, padded, scores)
            to = row * queries * mixed + head * group * dim
            mix(queries, reach, states, keys + dim, token, scores, group, dim, out, to, mixed)


def narrow_pass(
    tokens, rows, queries, slots, starts, wanted, asked, embedding, layers, hidden, heads, group, dim, inner,
    vocabulary, epsilon, panels, turns, states, layer, slot, state, normed, projected, attended, both, gated,
    scores, logits,
):  # fmt: skip
    """Feeds tokens [rows, queries] to the slots slots[i], row i from position starts[i].

    wanted [asked]: places in `tokens` whose logits are wanted. embedding: [tokens, hidden]. heads: of keys,
    each for `group` heads of queries, `dim` wide. inner: width of the MLP. vocabulary: columns of the head.
    panels: of all layers one after the other, each queries, keys and values; output; gate and up; down; then
    of the head. turns: see `turn`. layer, slot: numbers of `states` (the KV) in a layer and in a slot.
    logits: [asked, vocabulary], which it fills. The others are space to work in, [tokens, width] each: state
    and normed (hidden), projected, attended, both and gated (MLP), and scores [queries, group, reach + 8].
    """
    count = rows * queries
    mixed, width = heads * group * dim, heads * (group + 2) * dim
    for row in range(count):
        for place in range(0, hidden, LANES):
            store(state, row * hidden + place, load(embedding, tokens[row] * hidden + place))
    panel = 0
    for index in range(layers):
        for row in range(count):
            normalise(state, row * hidden, hidden, epsilon, normed, row * hidden)
        multiply(count, normed, hidden, panels, panel, width, projected, False)
        panel += hidden * width
        attend(
            rows, queries, slots, starts, projected, heads, group, dim, turns, states, index * layer, slot,
            scores, attended,
        )  # fmt: skip
        multiply(count, attended, mixed, panels, panel, hidden, state, True)
        panel += mixed * hidden
        for row in range(count):
            normalise(state, row * hidden, hidden, epsilon, normed, row * hidden)
        multiply(count, normed, hidden, panels, panel, 2 * inner, both, False)
        panel += hidden * 2 * inner
        gate(count, inner, both, gated)
        multiply(count, gated, inner, panels, panel, hidden, state, True)
        panel += inner * hidden
    for row in range(asked):
        normalise(state, wanted[row] * hidden, hidden, epsilon, normed, row * hidden)
    multiply(asked, normed, hidden, panels, panel, vocabulary, logits, False)


_NUMBERS, _INDICES, _INDEX = types.CPointer(types.float32), types.CPointer(types.int64), types.int64
SIGNATURE = types.void(
    _INDICES, *[_INDEX] * 2, *[_INDICES] * 3, _INDEX, _NUMBERS, *[_INDEX] * 7, types.float32,
    *[_NUMBERS] * 3, *[_INDEX] * 2, *[_NUMBERS] * 8,
)  # fmt: skip
