"""Eight numbers at a time, for kernels compiled by numba: a type that it lacks, and what can be done with it.

Left to itself LLVM turns loops over a runtime width into eight-number instructions now and then. These make
it certain. Wider machines join two of them where they can, narrower ones take each in two parts.

Sums may be contracted to fused multiply-adds and nothing else, so an order of summation that is written is
the order that is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from . import LANES, PANEL

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _PANEL = ir.VectorType(_FLOAT, LANES), ir.VectorType(_FLOAT, PANEL)
_INTS = ir.VectorType(_INT, LANES)
_FUSED = ("contract",)
# exp by Cephes (Moshier): x = n ln 2 + r, with ln 2 in two parts, and a polynomial in r.
_LN2_HIGH, _LN2_LOW, _LOG2_E = 0.693359375, -2.12194440e-4, 1.4426950408889634
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
    1.0,
    1.0,
)
_LEAST_EXPONENT = -87.0


class Lanes(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(f"float32x{LANES}")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _constant(value: float, kind: Any = _VECTOR) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _shuffled(builder: Any, first: Any, second: Any, places: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_INT, len(places)), list(places))
    return builder.shuffle_vector(first, second, mask)


def _splat(builder: Any, number: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(_INT, 0))
    return _shuffled(builder, one, nothing, [0] * kind.count)


def _larger(builder: Any, first: Any, second: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", first, second), first, second)


def _fused(builder: Any, first: Any, second: Any, third: Any) -> Any:
    return builder.fadd(builder.fmul(first, second, flags=_FUSED), third, flags=_FUSED)


def _as(builder: Any, address: Any, kind: Any) -> Any:
    return builder.bitcast(address, kind.as_pointer())


def _operation(count: int, build: Callable[..., Any], result: Any = lanes) -> Any:
    """An operation on `count` vectors."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return build(builder, *values)

    def one(typing: Any, x: Any) -> Any:
        return result(lanes), generate

    def two(typing: Any, x: Any, y: Any) -> Any:
        return result(lanes, lanes), generate

    def three(typing: Any, x: Any, y: Any, z: Any) -> Any:
        return result(lanes, lanes, lanes), generate

    return intrinsic((one, two, three)[count - 1])


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 8]."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.gep(values[0], [values[1]])
        return builder.load(_as(builder, address, _VECTOR), align=4)

    return lanes(array, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index : index + 8] = value."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = builder.gep(values[0], [values[1]])
        builder.store(values[2], _as(builder, address, _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(typing: Any, number: Any) -> Any:
    """The same number in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _splat(builder, values[0], _VECTOR)

    return lanes(types.float32), generate


add = _operation(2, lambda builder, x, y: builder.fadd(x, y, flags=_FUSED))
sub = _operation(2, lambda builder, x, y: builder.fsub(x, y, flags=_FUSED))
mul = _operation(2, lambda builder, x, y: builder.fmul(x, y, flags=_FUSED))
div = _operation(2, lambda builder, x, y: builder.fdiv(x, y))
larger = _operation(2, _larger)
# x * y + z
fused = _operation(3, _fused)
# Neighbours change places.
swapped = _operation(1, lambda builder, x: _shuffled(builder, x, x, [lane ^ 1 for lane in range(LANES)]))


def _folded(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def build(builder: Any, x: Any) -> Any:
        width = LANES
        while width > 1:
            width //= 2
            low = _shuffled(builder, x, x, range(width))
            x = combine(builder, low, _shuffled(builder, x, x, range(width, 2 * width)))
        return builder.extract_element(x, ir.Constant(_INT, 0))

    return build


total = _operation(1, _folded(lambda builder, x, y: builder.fadd(x, y)), types.float32)
largest = _operation(1, _folded(_larger), types.float32)


@intrinsic  # type: ignore[untyped-decorator]
def totals(typing: Any, vectors: Any) -> Any:
    """Of a tuple of eight vectors: in lane i the sum of vector i's lanes."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        found = cgutils.unpack_tuple(builder, values[0])
        # Each round adds neighbouring runs of lanes of two vectors: of 1, of 2, of 4.
        run = 1
        while len(found) > 1:
            places = [lane for lane in range(LANES) if not lane & run]
            runs = [places[i : i + run] for i in range(0, len(places), run)]
            low = [lane for part in runs for lane in (*part, *(lane + LANES for lane in part))]
            high = [lane + run for lane in low]
            found = [
                builder.fadd(_shuffled(builder, x, y, low), _shuffled(builder, x, y, high))
                for x, y in zip(found[0::2], found[1::2], strict=True)
            ]
            run *= 2
        return found[0]

    return lanes(types.UniTuple(lanes, LANES)), generate


def _exp(builder: Any, x: Any) -> Any:
    x = _larger(builder, x, _constant(_LEAST_EXPONENT))
    # Truncation rounds to the nearest, as x is not positive.
    power = builder.fptosi(builder.fsub(builder.fmul(x, _constant(_LOG2_E)), _constant(0.5)), _INTS)
    whole = builder.sitofp(power, _VECTOR)
    rest = _fused(builder, whole, _constant(-_LN2_HIGH), x)
    rest = _fused(builder, whole, _constant(-_LN2_LOW), rest)
    value = _constant(_EXP[0])
    for factor in _EXP[1:]:
        value = _fused(builder, value, rest, _constant(factor))
    exponent = builder.shl(builder.add(power, _constant(127, _INTS)), _constant(23, _INTS))
    return builder.fmul(value, builder.bitcast(exponent, _VECTOR))


# Of numbers that are not positive; below -87 that of -87.
exp = _operation(1, _exp)


@intrinsic  # type: ignore[untyped-decorator]
def tile(
    typing: Any, rows: Any, left: Any, i: Any, depth: Any, panels: Any, j: Any, out: Any, k: Any, width: Any,
    added: Any,
) -> Any:  # fmt: skip
    """A tile of a matrix product, of a literal number of rows and of one panel's columns.

    out[k + r * width : ... + PANEL] = sum over d < depth of
    left[i + r * depth + d] * panels[j + d * PANEL : ... + PANEL], or that added to what is there.
    """
    if not isinstance(rows, types.Literal):
        return None
    count = rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, left, i, depth, panels, j, out, k, width, added = values
        from_row, from_panel, to = (
            builder.gep(pointer, [index]) for pointer, index in ((left, i), (panels, j), (out, k))
        )
        rows_at = [builder.gep(from_row, [builder.mul(depth, _LONG(row))]) for row in range(count)]
        outs_at = [
            _as(builder, builder.gep(to, [builder.mul(width, _LONG(row))]), _PANEL) for row in range(count)
        ]
        before, loop, done = builder.block, *(builder.append_basic_block() for _ in range(2))
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_LONG)
        sums = [builder.phi(_PANEL) for _ in range(count)]
        weights_at = builder.gep(from_panel, [builder.mul(at, _LONG(PANEL))])
        weights = builder.load(_as(builder, weights_at, _PANEL), align=4)
        grown = [
            _fused(builder, _splat(builder, builder.load(builder.gep(row, [at])), _PANEL), weights, known)
            for row, known in zip(rows_at, sums, strict=True)
        ]
        following = builder.add(at, _LONG(1))
        for phi, begin, end in zip(
            [at, *sums], [_LONG(0), *[_constant(0.0, _PANEL)] * count], [following, *grown], strict=True
        ):
            phi.add_incoming(begin, before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
        builder.position_at_end(done)
        with builder.if_else(cgutils.is_true(builder, added)) as (adding, setting):
            with adding:
                for address, value in zip(outs_at, grown, strict=True):
                    builder.store(builder.fadd(value, builder.load(address, align=4)), address, align=4)
            with setting:
                for address, value in zip(outs_at, grown, strict=True):
                    builder.store(value, address, align=4)
        return context.get_dummy_value()

    number = types.int64
    arguments = rows, left, number, number, panels, number, out, number, number, types.boolean
    return types.void(*arguments), generate
