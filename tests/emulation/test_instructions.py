"""What the emulated instructions do, against a model in numpy written from Intel's manual.

The model knows nothing of the C++: floats are rounded from exact sums, lanes are indices. On a
processor with AVX-512 BF16, or AMX, it is held to the processor as well.
"""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.kernels import native_build

from ..levels import EMULATED, HEADERS, REAL, include

SOURCE = HEADERS / "instructions.cpp"
FLAGS = native_build.levels_of_this_kind()
TINY = np.float32(2.0**-126)
# infinities and NaN are drawn on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
many = settings(derandomize=True, deadline=None, max_examples=60)

# name → the flags and headers of its build
BUILDS = {name: (base, include(headers)) for name, (base, headers) in EMULATED.items()}
BUILDS |= {name: (name, []) for name in ("avx512", "amx") if name in REAL}
TILES = [name for name in BUILDS if name.startswith("amx")]


def library_of(name, folder):
    base, extra = BUILDS[name]
    path = folder / f"{name}.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-psabi"]
    command = [native_build.find_compiler(), *flags, *FLAGS[base], *extra, str(SOURCE), "-o"]
    subprocess.run([*command, str(path)], check=True, timeout=120)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=list(BUILDS), scope="module")
def instruction(request, tmp_path_factory):
    """Call one by name: three vectors in, `out`'s bytes filled."""
    library = library_of(request.param, tmp_path_factory.mktemp("instructions"))

    def call(name, *vectors, out):
        inputs = [vector.tobytes().ljust(64, b"\0") for vector in vectors]
        inputs += [bytes(64)] * (3 - len(inputs))
        result = np.full(64, 0xEE, np.uint8)
        getattr(library, name)(*inputs, ctypes.c_void_p(result.ctypes.data))
        size = np.dtype(out[0]).itemsize * out[1]
        assert (result[size:] == 0xEE).all()
        return result[:size].view(out[0])

    return call


# -- the model


def is_odd(x):
    return (x.view(np.uint64) & 1).astype(bool)


def rounded(exact, error):
    """float64 `exact` + `error` (what it lacks) to float32: nearest, even; subnormals are zeros."""
    # round to odd, so that rounding again is rounding once
    toward = np.where(error > 0, np.inf, -np.inf)
    sticky = np.where((error != 0) & ~is_odd(exact), np.nextafter(exact, toward), exact)
    # 2^64 larger, a number below the smallest normal one keeps its bits while it is rounded
    large = (sticky * 2.0**64).astype(np.float32)
    plain = sticky.astype(np.float32)
    is_small = np.abs(sticky) < 1.0
    tiny = is_small & (np.abs(large) < np.float32(2.0**-62))
    return np.where(tiny, np.copysign(np.float32(0), plain), plain)


def no_subnormals(x):
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def add(a, b):
    """a + b exactly, as a float64 and what it lacks."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    return total, np.where(np.isfinite(total), error, 0.0)


def fma(x, y, z):
    """x·y + z with DAZ and FTZ, in float32; a product of two bf16 is exact in float64."""
    x, y, z = (no_subnormals(v).astype(np.float64) for v in (x, y, z))
    return rounded(*add(x * y, z))


def as_float(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):
    """By value: the nearer of the two neighbours, the even one at a tie."""
    out = []
    for value in no_subnormals(x):
        bits = int(value.view(np.uint32))
        low = bits >> 16
        if np.isnan(value):
            out.append(low | 0x40)
            continue
        rest = bits & 0xFFFF
        up = rest > 0x8000 or (rest == 0x8000 and low & 1)
        out.append(low + 1 if up and not np.isinf(value) else low)
    return np.array(out, np.uint16)


def dpbf16(total, a, b):
    for part in (1, 0):
        total = fma(as_float(a[part::2]), as_float(b[part::2]), total)
    return total


def tdpbf16(sums, x, w):
    """sums (rows, 16) + x (rows, 32) · w (16 pairs, 32), each product of pairs summed apart."""
    parts = []
    for part in (0, 1):
        total = np.zeros((len(x), 16), np.float32)
        for k in range(16):
            total = fma(
                as_float(x[:, 2 * k + part])[:, None], as_float(w[k, part::2])[None, :], total
            )
        parts.append(total)
    both = rounded(*add(*(p.astype(np.float64) for p in parts)))
    return rounded(*add(no_subnormals(sums).astype(np.float64), both.astype(np.float64)))


def quarters(x):
    return x.reshape(4, -1)


def unpack(a, b, kind, upper):
    a, b = (quarters(v.view(kind)) for v in (a, b))
    count = a.shape[1] // 2
    part = slice(count, None) if upper else slice(0, count)
    return np.stack([a[:, part], b[:, part]], axis=2).reshape(-1)


# -- what is drawn: any bits, and floats near what matters


def vectors(draw_seed, count, kind):
    return (
        np.random.default_rng(draw_seed)
        .integers(0, 256, count * np.dtype(kind).itemsize, np.uint8)
        .view(kind)
    )


EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-126, 2.0**-127, -(2.0**-149), 3.3e38, -3.3e38,
     1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 2.0**-126 * (1 - 2.0**-23), 65504.0], np.float32)  # fmt: skip


def floats(seed, count):
    """Of ordinary size, of any, and the edges."""
    rng = np.random.default_rng(seed)
    ordinary = rng.standard_normal(count).astype(np.float32)
    wild = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    edges = rng.choice(EDGES, count)
    return np.choose(rng.integers(0, 3, count), [ordinary, wild, edges]).astype(np.float32)


def words(seed, shape):
    """bf16, of ordinary size, near the smallest normal float32 when multiplied, or any."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    ordinary = rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16
    # products around 2^-126
    small = (rng.standard_normal(count) * 2.0 ** rng.integers(-68, -60, count)).astype(np.float32)
    wild = rng.integers(0, 2**16, count, np.uint32)
    kinds = [ordinary, small.view(np.uint32) >> 16, wild]
    chosen = rng.integers(0, rng.integers(1, 4), count)
    return np.choose(chosen, kinds).astype(np.uint16).reshape(shape)


def assert_same_floats(actual, expected):
    """Equal bits, any NaN for any NaN."""
    expected = np.asarray(expected, np.float32)
    nan = np.isnan(expected)
    assert (np.isnan(actual) == nan).all()
    assert (actual.view(np.uint32) == expected.view(np.uint32))[~nan].all()


seeds = st.integers(0, 2**32 - 1)


# -- AVX-512


@many
@given(seeds)
def test_pairs_of_bf16_are_multiplied_and_added_odd_first(instruction, seed):
    total, a, b = floats(seed, 16), words(seed, 32), words(seed + 1, 32)
    if seed % 2:
        total = total * TINY
    out = instruction("dpbf16_ps", total, a, b, out=("f4", 16))
    assert_same_floats(out, dpbf16(total, a, b))


def test_the_order_inside_a_pair_and_every_rounding_can_be_seen(instruction):
    def dot(total, a, b):
        a, b = (np.array(v, np.float32).view(np.uint32).astype(np.uint32) >> 16 for v in (a, b))
        wide = [np.tile(v.astype(np.uint16), 16) for v in (a, b)]
        return instruction("dpbf16_ps", np.full(16, total, np.float32), *wide, out=("f4", 16))[0]

    # odd first: 1 is lost in 2^24, which then goes; even first it would stay
    assert dot(0.0, [-(2.0**24), 1.0], [1.0, 1.0]) == -(2.0**24) + 1
    assert dot(2.0**24, [-(2.0**24), 1.0], [1.0, 1.0]) == 0.0
    # the product is not rounded: one too small for a number by itself is added whole
    assert dot(2.0**-126, [2.0**-70, 0.0], [2.0**-60, 0.0]) == 2.0**-126 + 2.0**-130
    # subnormals are zeros: in the sum, in a factor, in the result
    assert dot(2.0**-127, [0.0, 0.0], [0.0, 0.0]) == 0.0
    assert dot(0.0, [2.0**-130, 0.0], [2.0**100, 0.0]) == 0.0
    assert dot(0.0, [2.0**-70, 0.0], [2.0**-60, 0.0]) == 0.0
    assert dot(2.0**-126, [-(2.0**-70), 0.0], [2.0**-58, 0.0]) == 0.0


@many
@given(seeds)
def test_floats_become_bf16(instruction, seed):
    a, b = floats(seed, 16), floats(seed + 1, 16)
    out = instruction("cvtneps_pbh", a, out=("u2", 16))
    assert (out == to_bf16(a)).all()
    out = instruction("cvtne2ps_pbh", a, b, out=("u2", 32))
    assert (out == np.concatenate([to_bf16(b), to_bf16(a)])).all()


@many
@given(seeds)
def test_arithmetic_keeps_subnormals(instruction, seed):
    a, b, c = (floats(seed + i, 16) for i in range(3))
    assert_same_floats(instruction("add_ps", a, b, out=("f4", 16)), a + b)
    assert_same_floats(instruction("mul_ps", a, b, out=("f4", 16)), a * b)
    wide = instruction("fmadd_ps", a, b, c, out=("f4", 16))
    # rounded once: as float32 of the exact sum, where float64 says which that is
    total, error = add(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    toward = np.where(error > 0, np.inf, -np.inf)
    sticky = np.where((error != 0) & ~is_odd(total), np.nextafter(total, toward), total)
    assert_same_floats(wide, sticky.astype(np.float32))
    x, y = a.view(np.float64), b.view(np.float64)
    out, expected = instruction("add_pd", x, y, out=("f8", 8)), x + y
    assert ((out == expected) | np.isnan(expected)).all()
    half = a.view(np.float16)[:16]
    assert_same_floats(instruction("cvtph_ps", half, out=("f4", 16)), half.astype(np.float32))
    wide = instruction("cvtps_pd", a[:8], out=("f8", 8))
    assert ((wide == a[:8].astype(np.float64)) | np.isnan(a[:8])).all()
    mask = int(instruction("cmp_ps_mask", a, b, out=("u4", 1))[0])
    assert [bool(mask >> i & 1) for i in range(32)] == [*(a >= b), *[False] * 16]


@many
@given(seeds)
def test_lanes_go_where_the_manual_says(instruction, seed):
    a, b, c = (vectors(seed + i, 16, np.uint32) for i in range(3))
    words_of = [x.view(np.uint16) for x in (a, b, c)]

    def same(name, expected, *inputs):
        out = instruction(name, *inputs, out=(expected.dtype, expected.size))
        assert (out == expected).all(), name

    for name in (
        "castps_si512",
        "castsi512_ps",
        "loadu_ps",
        "loadu_si512",
        "storeu_si512",
        "storeu_pd",
    ):
        same(name, a, a)
    same("castps512_ps256", a[:8], a)
    same("extractf32x8_ps", a[8:], a)
    same("castsi128_si512", np.concatenate([a[:4], b[:4], c[:4], b[:4]]), a, b, c)
    same("cvtss_f32", a[:1], a)
    same("setzero_ps", a * 0, a)
    same("setzero_pd", a * 0, a)
    same("set1_ps", np.repeat(a[0], 16), a)
    same("set1_epi32", np.repeat(a[0], 16), a)
    same("set1_epi16", np.repeat(words_of[0][0], 32), a)
    same("set_epi32", np.arange(16, dtype=np.uint32), a)
    same("slli_epi32", a << 16, a)
    same("srli_epi32", a >> 16, a)
    same("slli_epi16", words_of[0] << 8, a)
    same("cvtepu8_epi16", a.view(np.uint8)[:32].astype(np.uint16), a)
    same("cvtepu16_epi32", words_of[0][:16].astype(np.uint32), a)
    same("cvtepi32_epi16", words_of[0][::2].copy(), a)
    same("permutexvar_ps", b[a % 16], a, b)
    table = np.concatenate([words_of[0], words_of[2]])
    same("permutex2var_epi16", table[words_of[1] % 64], a, b, c)
    tested = (words_of[0] & words_of[1]) != 0
    same("test_epi16_mask", np.packbits(tested, bitorder="little").view(np.uint32), a, b)
    set_bits = np.unpackbits(a[:1].view(np.uint8), bitorder="little").astype(bool)
    same("mask_blend_epi16", np.where(set_bits, words_of[2], words_of[1]), a, b, c)
    same("ternarylogic_epi32", a ^ (b & c), a, b, c)
    for upper, name in ((False, "unpacklo"), (True, "unpackhi")):
        same(f"{name}_epi32", unpack(a, b, np.uint32, upper), a, b)
        same(f"{name}_epi64", unpack(a, b, np.uint64, upper), a, b)


# -- tiles


@pytest.fixture(params=TILES, scope="module")
def tiles(request, tmp_path_factory):
    library = library_of(request.param, tmp_path_factory.mktemp("tiles"))
    assert library.ask() == 0
    return library


def multiply(library, rows, sums, x, w, is_lower):
    """The product of one tile through memory with gaps; what lies beside it must stay."""
    wide_sums = np.full((rows + 1, 64), 7.0, np.float32)
    wide_sums[:rows, :16] = sums
    wide_x = np.full((rows, 96), 0x7FC0, np.uint16)
    wide_x[:, :32] = x
    pointer = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    args = [is_lower, pointer(wide_x), ctypes.c_int64(192), pointer(np.ascontiguousarray(w))]
    library.multiply(*args, pointer(wide_sums), ctypes.c_int64(256))
    assert (wide_sums[rows] == 7.0).all()
    assert (wide_sums[:, 16:] == 7.0).all()
    return wide_sums[:rows, :16].copy()


@many
@given(st.integers(1, 32), seeds)
def test_a_tile_is_multiplied_as_the_manual_says(tiles, rows, seed):
    tiles.configure(rows)
    is_lower = rows > 16
    here = rows - 16 if is_lower else rows
    sums = floats(seed, here * 16).reshape(here, 16)
    x, w = words(seed, (here, 32)), words(seed + 1, (16, 32))
    out = multiply(tiles, here, sums, x, w, is_lower)
    tiles.release()
    assert_same_floats(out, tdpbf16(sums, x, w))


def test_a_cleared_tile_is_zero(tiles):
    tiles.configure(5)
    sums = np.full((16, 16), 3.0, np.float32)
    tiles.clear(ctypes.c_void_p(sums.ctypes.data), ctypes.c_int64(64))
    tiles.release()
    assert (sums[:5] == 0.0).all()
    assert (sums[5:] == 3.0).all()


REFUSED = {
    "has not asked": "tiles.configure(16)",
    "has not configured": "tiles.ask(); tiles.multiply_misfit()",
    "this thread has not configured": (
        "tiles.ask(); tiles.configure(16); import threading; "
        "thread = threading.Thread(target=tiles.multiply_misfit); thread.start(); thread.join()"
    ),
    "thread has not configured its": "tiles.ask(); tiles.configure(16); tiles.release(); tiles.multiply_misfit()",
    "shapes do not fit": "tiles.ask(); tiles.configure(9); tiles.multiply_misfit()",
    "named twice": "tiles.ask(); tiles.configure(16); tiles.multiply_twice()",
    "no such palette": "tiles.ask(); tiles.configure_wrongly(0, 2)",
    "reserved byte": "tiles.ask(); tiles.configure_wrongly(9, 1)",
    "too large": "tiles.ask(); tiles.configure_wrongly(50, 17)",
    "rows or columns only": "tiles.ask(); tiles.configure_wrongly(50, 0)",
}  # fmt: skip


@pytest.mark.skipif("amx-emulated" not in EMULATED, reason="nothing is emulated here")
@pytest.mark.parametrize("why", REFUSED)
def test_what_hardware_refuses_ends_the_process(tmp_path_factory, why):
    folder = tmp_path_factory.getbasetemp() / "refusing"
    folder.mkdir(exist_ok=True)
    if not (folder / "amx-emulated.so").exists():
        library_of("amx-emulated", folder)
    path = str(folder / "amx-emulated.so")
    code = f"import ctypes; tiles = ctypes.CDLL({path!r}); {REFUSED[why]}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    if why != "has not asked":
        assert why in done.stderr


def test_the_sources_use_no_instruction_that_is_not_tested_here():
    text = "".join(p.read_text() for p in sorted(native_build.SOURCES.glob("*.[ch]*")))
    used = {
        w.removeprefix("_mm512_") for w in text.replace("(", " ").split() if w.startswith("_mm512_")
    }
    tested = SOURCE.read_text()
    assert used
    assert {name for name in used if f"_mm512_{name}(" not in tested} == set()
