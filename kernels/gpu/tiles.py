"""What every kernel does alike with a tile of pairs: which rows, which products, how far apart, who
is alike.

A tile is BLOCK_M local rows (down) by BLOCK_N rows of the batch (across); width D is walked in
steps of BLOCK_K. Rows lie one after another, D elements each. Row numbers are int32, offsets into
memory int64.
Products run in the type OPERAND (float32, bfloat16, float16) and add up in float32; PRECISION is
what tl.dot does with float32 operands ("tf32x3": three matrix products of rounded parts, as exact
as float32 in practice).
"""

import triton
import triton.language as tl

CLOSE = tl.constexpr(2.0**-8)
"""A squared distance below this share of the pair's own squared norms has cancelled too far: it is
taken again from the differences. At this share the rounding of the product form is some 1e-5 of the
squared distance."""

NO_ROW = tl.constexpr(2**31 - 1)
"""A row number beyond all."""


@triton.jit
def local_rows(b, BLOCK_M: tl.constexpr):
    """Rows of this program: numbers and which of them exist."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, rows < b


@triton.jit
def split_tiles(B, BLOCK_N: tl.constexpr, tiles_per_split):
    """First and last + 1 tile of the batch that this program walks: tl.program_id(1) is its
    split."""
    first = tl.program_id(1) * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, tl.cdiv(B, BLOCK_N))


@triton.jit
def tile_columns(tile, B, BLOCK_N: tl.constexpr):
    """Rows of the batch in one tile: numbers and which of them exist."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return columns, columns < B


@triton.jit
def load_rows(x, rows, exist, k, width):
    """x[rows, k] as stored, 0 where there is nothing."""
    positions = rows.to(tl.int64)[:, None] * width + k[None, :]
    return tl.load(x + positions, mask=exist[:, None] & (k < width)[None, :], other=0.0)


@triton.jit
def load_column(x, rows, exist, k, width):
    """x[rows, k] for a single k, in float32."""
    return tl.load(x + rows.to(tl.int64) * width + k, mask=exist, other=0.0).to(tl.float32)


@triton.jit
def in_order(key):
    """float32 numbers, no NaN among them, as int32 in the same order."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # + 0.0: −0 and 0 are a tie
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def inner_products(
    x, rows, rows_exist, y, columns, columns_exist, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i · y_j, (BLOCK_M, BLOCK_N) in float32."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = load_rows(x, rows, rows_exist, k, width).to(OPERAND)
        y_tile = load_rows(y, columns, columns_exist, k, width).to(OPERAND)
        product = tl.dot(x_tile, tl.trans(y_tile), product, input_precision=PRECISION)
    return product


@triton.jit
def mend(squared, limit, x, weights, rows, rows_exist, y, columns, width, BLOCK_K: tl.constexpr):
    """`squared`, its entries below `limit` taken again as Σ_k weights_ik (x_ik − y_jk)²; weights:
    like x, None for 1.

    Never negative. Such pairs are few: each turn mends one in every row, so that no second tile of
    pairs is alive beside `squared`; many of them cost time alone. A row and itself need no mask:
    they come out exactly 0. The limit must not let a column pass that does not exist: one squared
    norm alone is never below a share of itself.
    """
    column = columns[None, :]
    squared = tl.where(squared < limit, -1.0, tl.where(squared < 0, 0.0, squared))
    picked = tl.min(tl.where(squared < 0, column, NO_ROW), 1)
    while tl.min(picked) < NO_ROW:
        exact = tl.zeros_like(picked).to(tl.float32)
        for k0 in range(0, width, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            difference = load_rows(x, rows, rows_exist, k, width).to(tl.float32)
            difference -= load_rows(y, picked, picked < NO_ROW, k, width).to(tl.float32)
            if weights is None:
                exact += tl.sum(difference * difference, 1)
            else:
                weight = load_rows(weights, rows, rows_exist, k, width).to(tl.float32)
                exact += tl.sum(weight * difference * difference, 1)
        exact = tl.where(exact < 0, 0.0, exact)
        squared = tl.where(column == picked[:, None], exact[:, None], squared)
        picked = tl.min(tl.where(squared < 0, column, NO_ROW), 1)
    return squared


@triton.jit
def squared_distances(
    x, x_norms, rows, rows_exist, offset, y, y_norms, columns, columns_exist, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """‖x_i − y_j‖², (BLOCK_M, BLOCK_N) in float32: never negative, 0 for a row and itself (column =
    row + offset)."""
    product = inner_products(
        x, rows, rows_exist, y, columns, columns_exist, width,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
    )  # fmt: skip
    x_norm = tl.load(x_norms + rows, mask=rows_exist, other=0.0)
    y_norm = tl.load(y_norms + columns, mask=columns_exist, other=0.0)
    scale = x_norm[:, None] + y_norm[None, :]
    squared = mend(
        scale - 2 * product, scale * CLOSE, x, None, rows, rows_exist, y, columns, width, BLOCK_K=16
    )  # fmt: skip
    itself = (rows + offset)[:, None] == columns[None, :]
    return tl.where(itself, 0.0, squared)


@triton.jit
def same_class(labels, rows, rows_exist, all_labels, columns, columns_exist, offset):
    """Two masks (BLOCK_M, BLOCK_N): pairs of one class, a row and itself excluded; pairs of two
    classes."""
    row_label = tl.load(labels + rows, mask=rows_exist, other=0)
    column_label = tl.load(all_labels + columns, mask=columns_exist, other=0)
    exist = rows_exist[:, None] & columns_exist[None, :]
    equal = row_label[:, None] == column_label[None, :]
    itself = (rows + offset)[:, None] == columns[None, :]
    return equal & exist & ~itself, exist & ~equal


@triton.jit
def pull(
    weight, y, columns, columns_exist, width, pulled,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pulled + W y, and Σ_j W: the two sums from which a row's gradient is made.

    The total is taken of the rounded weights: in `row · total − pulled` two large terms must meet
    the same rounding.
    """
    weight = weight.to(OPERAND)
    y_tile = load_rows(y, columns, columns_exist, tl.arange(0, BLOCK_D), width).to(OPERAND)
    return tl.dot(weight, y_tile, pulled, input_precision=PRECISION), tl.sum(
        weight.to(tl.float32), 1
    )


@triton.jit
def store_weights(out, weight, rows, rows_exist, columns, columns_exist, b, B):
    """out[:, rows, columns] = W in out's own type, (1, b, B) in all; returns Σ_j of the rounded W.

    float32 is written in two parts, (2, b, B): rounded to TF32's 10 bits of mantissa, and the rest.
    """
    line = rows.to(tl.int64)
    pointers = out + line[:, None] * B + columns[None, :]
    exist = rows_exist[:, None] & columns_exist[None, :]
    if out.dtype.element_ty == tl.float32:
        bits = weight.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tl.store(pointers, rounded, mask=exist)
        tl.store(out + (line + b)[:, None] * B + columns[None, :], weight - rounded, mask=exist)
        return tl.sum(weight, 1)
    weight = weight.to(out.dtype.element_ty)
    tl.store(pointers, weight, mask=exist)
    return tl.sum(weight.to(tl.float32), 1)


@triton.jit
def store_number(out, which: tl.constexpr, value, rows, rows_exist, b):
    """out[which, split, rows] = value; out has shape (numbers, splits, b)."""
    split = which * tl.num_programs(1) + tl.program_id(1)
    tl.store(out + split.to(tl.int64) * b + rows, value, mask=rows_exist)


@triton.jit
def store_sums(out, which: tl.constexpr, value, rows, rows_exist, b, width, BLOCK_D: tl.constexpr):
    """out[which, split, rows, :] = value; out has shape (accumulators, splits, b, D)."""
    split = which * tl.num_programs(1) + tl.program_id(1)
    k = tl.arange(0, BLOCK_D)
    positions = (split.to(tl.int64) * b + rows)[:, None] * width + k[None, :]
    tl.store(out + positions, value, mask=rows_exist[:, None] & (k < width)[None, :])


WEIGHT_SCALE = tl.constexpr(2.0**12)
"""Pair weights of at most about 1 are kept times this, so that float16 holds the small ones of a
large batch too."""
