"""What the kernels of attention share: where rows lie, who sees whom, logits."""

from typing import NamedTuple

import triton
import triton.language as tl

from ._rng import dropout

LOG2E = tl.constexpr(1.4426950408889634)
# A bias of finfo.min counts as this, which is finite in base 2 too.
LOWEST = tl.constexpr(-(2.0**127))


class Sees(NamedTuple):
    """A query at i sees the keys j < n_k with i - left <= j <= i + right; None is no limit.

    In packed batches positions of queries are such that the last query has that of the last key.
    """

    n_k: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Form(NamedTuple):
    """How a product becomes a logit, and by `unit` one in base 2. Without a scale, unit has it.

    The masks of rows begin at mask_ptr + mask_rows; slopes are those of ALiBi.
    """

    scale: tl.tensor
    unit: tl.tensor
    softcap: tl.tensor
    mask_ptr: tl.tensor
    mask_rows: tl.tensor
    slopes: tl.tensor


class Source(NamedTuple):
    """The rows of a head, `stride` apart. Where table_ptr is a pointer, in pages that it names: a
    function cannot return None in a tuple.
    """

    ptr: tl.tensor
    stride: tl.tensor
    table_ptr: tl.tensor
    page: tl.tensor
    page_rows: tl.tensor


class Rows(NamedTuple):
    """Rows of a tile: head, query, its position among keys, its place in [batch, head, query].

    `inside` is false past the last query; all positions are in first..last.
    """

    head: tl.tensor
    query: tl.tensor
    i: tl.tensor
    place: tl.tensor
    inside: tl.tensor
    first: tl.tensor
    last: tl.tensor


@triton.jit
def sequence(cu_ptr, used_ptr, b, n):
    """Where sequence b begins in its packed tensor, and its length: n where nothing is packed."""
    start, length = 0, n
    if cu_ptr is not None:
        start = tl.load(cu_ptr + b).to(tl.int32)
        length = tl.load(cu_ptr + b + 1).to(tl.int32) - start
    if used_ptr is not None:
        length = tl.minimum(length, tl.load(used_ptr + b).to(tl.int32))
    return tl.cast(start, tl.int64), length


@triton.jit
def rows_of(
    block, kv, b, q_start, q_len, shift, cu_q_ptr, n_heads, n_group, n_q, BLOCK_M: tl.constexpr
):
    """A block of rows of a key-value head: query i of each of its query heads, then query i + 1."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows past the end repeat the last query, so that masks need no check of rows
    query = tl.minimum(row // n_group, q_len - 1)
    head = kv * n_group + row % n_group
    place = place_of(b, head, q_start, cu_q_ptr, n_heads, n_q) + query
    first = block * BLOCK_M // n_group + shift
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // n_group, q_len - 1) + shift
    return Rows(head, query, query + shift, place, row < q_len * n_group, first, last)


@triton.jit
def place_of(b, head, q_start, cu_q_ptr, n_heads, n_q):
    """Where the first query of a head has its lse, in [batch, head, query]."""
    if cu_q_ptr is None:
        head += b * n_heads
    return tl.cast(head, tl.int64) * n_q + q_start


@triton.jit
def head_of(ptr, b, head, start, b_stride, h_stride, s_stride, cu_ptr, STEP: tl.constexpr):
    """The first row of a head of sequence b. Packed sequences are of one batch.

    Strides count STEPs, so that the compiler sees what divides them: rows of 72 can be read by 8.
    """
    offset = tl.cast(head, tl.int64) * h_stride + start * s_stride
    if cu_ptr is None:
        offset += tl.cast(b, tl.int64) * b_stride
    return ptr + offset * STEP


@triton.jit
def source_of(ptr, b, head, start, b_stride, h_stride, s_stride, cu_ptr, STEP: tl.constexpr):
    """The rows of a head of sequence b."""
    first = head_of(ptr, b, head, start, b_stride, h_stride, s_stride, cu_ptr, STEP)
    return Source(first, s_stride * STEP, tl.cast(0, tl.int32), 0, 1)


@triton.jit
def mask_rows_of(b, head, query, b_stride, h_stride, q_stride):
    """Where the masks of these rows begin; a mask of keys (q_stride None) has one row a batch."""
    first = tl.cast(b, tl.int64) * b_stride
    if q_stride is not None:
        first += tl.cast(head, tl.int64) * h_stride + tl.cast(query, tl.int64) * q_stride
    return first


@triton.jit
def blocks_seen(first, last, n, before, after, BLOCK: tl.constexpr):
    """Of positions below n, some in first..last see [begin, end), and all of them [full, rest).

    All but end are multiples of BLOCK.
    """
    begin, full, end, rest = 0, 0, n, n // BLOCK * BLOCK
    if before is not None:
        begin = tl.maximum(first - before, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(last - before, 0), BLOCK) * BLOCK
    if after is not None:
        end = tl.minimum(n, tl.maximum(last + after + 1, 0))
        rest = tl.minimum(rest, tl.maximum(first + after + 1, 0) // BLOCK * BLOCK)
    full = tl.minimum(full, tl.cdiv(end, BLOCK) * BLOCK)
    return begin, full, tl.maximum(full, rest), end


@triton.jit
def load_tile(ptrs, keep, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from pointers to them. Those not kept, and columns past DIM, are 0."""
    d = tl.arange(0, BLOCK)
    return tl.load(ptrs[:, None] + d[None, :], mask=keep[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def load_rows(src, start, n, keep, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start + n. Columns past DIM are 0, and rows not kept where MASKED."""
    d = tl.arange(0, BLOCK)
    if not src.table_ptr.dtype.is_ptr():
        offsets = n.to(tl.int64) * src.stride
        ptrs = src.ptr + tl.cast(start, tl.int64) * src.stride + offsets[:, None] + d[None, :]
    else:
        rows = start + n
        page = tl.load(src.table_ptr + rows // src.page_rows, mask=keep, other=0).to(tl.int64)
        offsets = page * src.page + (rows % src.page_rows).to(tl.int64) * src.stride
        ptrs = src.ptr + offsets[:, None] + d[None, :]
    if MASKED:
        found = tl.load(ptrs, mask=keep[:, None] & (d < DIM)[None, :], other=0.0)
    elif DIM != BLOCK:
        found = tl.load(ptrs, mask=(d < DIM)[None, :], other=0.0)
    else:
        found = tl.load(ptrs)
    return found


@triton.constexpr_function
def is_boolean(mask_ptr):
    """Known when a kernel is compiled: what a jit function returns is not, in every Triton."""
    return mask_ptr is not None and mask_ptr.dtype.element_ty == tl.int1


@triton.jit
def load_slopes(slopes_ptr, head):
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head).to(tl.float32)
    return slopes


@triton.jit
def load_mask(form, j, n_k):
    """What the mask, or bias, has for these rows and keys."""
    given = 0.0
    if form.mask_ptr is not None:
        given = tl.load(form.mask_ptr + form.mask_rows + j, mask=j < n_k, other=0)
        if not is_boolean(form.mask_ptr):
            given = given.to(tl.float32)
            given = tl.where(given < LOWEST, tl.where(given == float("-inf"), given, LOWEST), given)
    return given


@triton.jit
def seen_keys(j, first, last, given, form, sees, AXIS: tl.constexpr):
    """Keys that some query in first..last sees. What others hold must not matter, even NaN."""
    seen = j < sees.n_k
    if sees.left is not None:
        seen &= j >= first - sees.left
    if sees.right is not None:
        seen &= j <= last + sees.right
    if is_boolean(form.mask_ptr):
        seen &= tl.max(given.to(tl.int32), axis=AXIS) > 0
    return seen


@triton.jit
def logits(s, i, j, given, form, sees, CHECK: tl.constexpr):
    """Logits of products s of queries at i with keys j, and the derivative of softcap there.

    -inf where i does not see j; CHECK: their positions may say so.
    """
    steep = 1.0
    if form.scale is not None:
        s *= form.scale
    if form.softcap is not None:
        # tanh, less exact near 0 than where it is all there is
        t = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / form.softcap)))
        s = form.softcap * t
        steep = 1.0 - t * t
    if form.mask_ptr is not None and not is_boolean(form.mask_ptr):
        s += given
    if form.slopes is not None:
        s -= form.slopes * tl.abs(i - j).to(tl.float32)
    if CHECK:
        seen = j < sees.n_k
        if sees.left is not None:
            seen &= j >= i - sees.left
        if sees.right is not None:
            seen &= j <= i + sees.right
        s = tl.where(seen, s, float("-inf"))
    if is_boolean(form.mask_ptr):
        s = tl.where(given, s, float("-inf"))
    return s, steep


@triton.jit
def unit_of(scale, FOLDED: tl.constexpr):
    """What makes a logit one in base 2. FOLDED: the scale can wait for it."""
    unit = tl.cast(LOG2E, tl.float32)
    if FOLDED:
        unit *= scale
    return unit


@triton.jit
def probabilities(s, i, j, lse, share, given, form, sees, CHECK: tl.constexpr):
    """Probabilities of products s, and the derivative of softcap."""
    s, steep = logits(s, i, j, given, form, sees, CHECK)
    p = tl.exp2(s * form.unit - lse)
    if form.mask_ptr is not None and not is_boolean(form.mask_ptr):
        p *= share
    return p, steep


@triton.jit
def logit_gradients(p, dp, delta, kept, form, CHECK: tl.constexpr):
    """Gradients of logits, from dp after dropout, which multiplied by `kept`."""
    ds = p * (dp * kept - delta)
    if CHECK or is_boolean(form.mask_ptr):
        # a hidden key may hold NaN, and 0 times that is NaN
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def lse_of(peak, total):
    """The logsumexp of a row in base 2. Keys of the lowest bias alone have equal shares, and the
    logarithm of their number would be lost beside that bias: the last digits hold the number.
    """
    alone = (peak < 0.99 * LOWEST * LOG2E) & (peak > float("-inf"))
    return tl.where(alone, LOWEST * (1.0 + total * 2.0**-23), peak + tl.log2(total))


@triton.jit
def load_lse(lse_ptr, place, inside):
    """The lse of rows, and the share of one key whose logit it equals: 1 but for the lowest bias.

    +inf makes all probabilities 0 where a row sees nothing.
    """
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
    alone = (lse <= LOWEST) & (lse > float("-inf"))
    share = tl.where(alone, 1.0 / ((lse / LOWEST - 1.0) * 2.0**23), 1.0)
    lse = tl.where(alone, LOWEST * LOG2E, lse)
    return tl.where(lse == float("-inf"), float("inf"), lse), share


@triton.jit
def kept_by_dropout(seed_ptr, rows, start, p, N: tl.constexpr):
    """What dropout multiplies the probabilities of rows [M, 1] and keys from start by."""
    kept = 1.0
    if seed_ptr is not None:
        kept = dropout(tl.full((rows.shape[0], N), 1.0, tl.float32), seed_ptr, rows, start, p, N)
    return kept


@triton.jit
def program(n_blocks, n_heads):
    """This program's block, head and sequence; programs of a head are neighbours."""
    pid = tl.program_id(0)
    return pid % n_blocks, pid // n_blocks % n_heads, pid // n_blocks // n_heads
