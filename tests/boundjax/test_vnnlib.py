"""The VNN-LIB reader: what it reads, how it rounds, and what it refuses."""

import csv
import gzip
from fractions import Fraction

import numpy as np
import pytest

from boundjax import vnnlib
from boundjax.vnnlib import VnnlibError, limits

pytestmark = pytest.mark.quick

DECLARED = """; two inputs, two outputs
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = """(assert (>= X_0 -1))
(assert (<= X_0 0.5))
(assert (and (<= -2 X_1) (>= 2 X_1)))
"""


def parse(text):
    return vnnlib.parse(DECLARED + BOX + text, "file")


def rows(conjunction):
    return [(*w, b) for w, b in zip(conjunction.weights, conjunction.offset, strict=True)]


def test_a_file_of_the_plain_kind():
    result = parse("(assert (<= Y_0 Y_1)) ; unsafe if minimal\n(assert (>= Y_1 0.25))")
    assert (result.input_size, result.output_size, len(result.cases)) == (2, 2, 1)
    (case,) = result.cases
    np.testing.assert_array_equal(case.lower, np.array([-1.0, -2.0], np.float32))
    np.testing.assert_array_equal(case.upper, np.array([0.5, 2.0], np.float32))
    assert case.lower.dtype == case.inner_upper.dtype == np.float32
    np.testing.assert_array_equal(case.inner_lower, case.lower)
    np.testing.assert_array_equal(case.inner_upper, case.upper)
    (conjunction,) = case.conjunctions
    assert rows(conjunction) == [(1, -1, 0), (0, -1, 0.25)]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("(<= Y_0 3)", [(1, 0, -3)]),
        ("(>= Y_0 3)", [(-1, 0, 3)]),
        ("(<= 3 Y_0)", [(-1, 0, 3)]),
        ("(>= -1e-1 Y_1)", [(0, 1, 0.1)]),
        ("(<= (+ Y_0 Y_1 1) 3)", [(1, 1, -2)]),
        ("(<= (- Y_0 Y_1 1) (* 2 (- Y_1)))", [(1, 1, -1)]),
        ("(<= (* Y_0 2 0.25) (* (+ 1 1) Y_1))", [(0.5, -2, 0)]),
        ("(<= (+ Y_0 (* -1 Y_0) Y_1) .5)", [(0, 1, -0.5)]),
        ("(and (<= Y_0 3) (and (<= 0 1) (<= Y_1 4.)))", [(1, 0, -3), (0, 1, -4)]),
    ],
)
def test_linear_terms(formula, expected):
    assert rows(parse(f"(assert {formula})").cases[0].conjunctions[0]) == expected


def test_disjunctions_multiply_out():
    result = parse("(assert (or (<= Y_0 1) (<= Y_0 2)))\n(assert (or (<= Y_1 3) (<= Y_1 4)))")
    (case,) = result.cases
    assert [rows(c) for c in case.conjunctions] == [
        [(1, 0, -1), (0, 1, -3)],
        [(1, 0, -1), (0, 1, -4)],
        [(1, 0, -2), (0, 1, -3)],
        [(1, 0, -2), (0, 1, -4)],
    ]
    nested = parse("(assert (or (<= Y_0 0) (and (<= Y_0 1) (or (<= Y_1 2) (or (<= Y_1 3))))))")
    assert [rows(c) for c in nested.cases[0].conjunctions] == [
        [(1, 0, 0)],
        [(1, 0, -1), (0, 1, -2)],
        [(1, 0, -1), (0, 1, -3)],
    ]


def test_boxes_inside_disjuncts_are_cases_and_cut_the_common_box():
    result = parse("""(assert (or
      (and (<= X_0 0) (<= Y_0 1))
      (and (>= X_0 0) (<= X_0 9) (<= Y_0 2))
      (and (<= X_0 0) (<= Y_0 3))
      (<= Y_0 4)))""")
    boxes = [(c.lower.tolist(), c.upper.tolist(), len(c.conjunctions)) for c in result.cases]
    assert boxes == [([-1, -2], [0, 2], 2), ([0, -2], [0.5, 2], 1), ([-1, -2], [0.5, 2], 1)]
    inside = vnnlib.parse(
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        "(assert (or (and (>= X_0 -1) (<= X_0 1) (>= Y_0 100))))"
    )
    assert rows(inside.cases[0].conjunctions[0]) == [(-1, 100)]


def test_boxes_are_rounded_outward_and_never_shrink():
    ends = ["0.1", "-0.1", "0.2753290832042694", "1e-40", "-1e-40", "16777217", "0", "3e38"]
    for end in ends:
        for lower, upper in ((end, end), (end, "3.3e38"), ("-3.3e38", end)):
            case = vnnlib.parse(
                "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (<= Y_0 0))"
                f"(assert (>= X_0 {lower}))(assert (<= X_0 {upper}))"
            ).cases[0]
            exact = [Fraction(lower), Fraction(upper)]
            bounds = [Fraction(float(v)) for v in (case.lower[0], case.upper[0])]
            assert bounds[0] <= exact[0] <= exact[1] <= bounds[1]
            assert case.lower[0] <= case.inner_lower[0] <= case.inner_upper[0] <= case.upper[0]
            if lower != upper:
                inner = [Fraction(float(v)) for v in (case.inner_lower[0], case.inner_upper[0])]
                assert exact[0] <= inner[0] <= inner[1] <= exact[1]
            else:
                assert case.inner_lower[0] == case.inner_upper[0] == np.float32(end)
            for outer in (case.lower[0], case.upper[0]):  # XLA flushes subnormal numbers to 0
                assert outer == 0 or abs(outer) >= np.finfo(np.float32).tiny
    # At most one step outward, and none where the decimal is exact.
    case = parse("(assert (<= X_1 0.1))(assert (<= Y_0 0))").cases[0]
    assert float(case.upper[1]) == float(np.float32(0.1)) > 0.1
    assert case.inner_upper[1] == np.nextafter(np.float32(0.1), np.float32(0))


@pytest.mark.parametrize(
    ("text", "line", "pieces"),
    [
        ("(assert (<= Y_0 1)", 9, ["expected ')'", "end of the file"]),
        ("(assert (<= Y_0 1)))", 9, ["one parenthesis too many"]),
        ("\n\nassert", 11, ["expected a command", "'assert'"]),
        ("()", 9, ["expected a command", "'()'"]),
        ("((assert))", 9, ["expected a command", "'('"]),
        ("(assert)", 9, ["1 formula, got 0"]),
        ("(assert Y_0)", 9, ["a formula in parentheses", "'Y_0'"]),
        ("(assert (<= Y_0))", 9, ["<= with at least 2 terms, got 1"]),
        ("(assert (and))", 9, ["in and, got none"]),
        ("(push 1)", 9, ["declare-const, declare-fun or assert", "'push'", "VNN-LIB 1.0"]),
        ("(check-sat)(assert (<= Y_0 1))", 9, ["one check-sat, at the end", "assert after it"]),
        ("(declare-fun X_2 (Real) Real)", 9, ["(declare-fun NAME () Real)"]),
        ("(assert (distinct Y_0 1))", 9, ["and, or, not", "'distinct'"]),
        ("(assert\n(not))", 10, ["not with 1 formula, got 0"]),
        ("(assert (<= Y_2 1))", 9, ["a declared variable", "Y_2"]),
        ("(assert (<= Y_0 z))", 9, ["a number or a variable", "'z'"]),
        ("(assert (<= Y_0 1__0))", 9, ["a number or a variable", "'1__0'"]),
        ("(assert (<= Y_0 nan))", 9, ["a finite number", "'nan'"]),
        ("(assert (<= X_0 -inf))", 9, ["a finite number", "'-inf'"]),
        ("(assert (<= Y_0 1e39))", 9, ["float32's range", "'1e39'"]),
        ("(assert (<= Y_0 1e999999999))", 9, ["float32's range"]),
        ("(assert (<= Y_0 1e-999999999))", 9, ["above 1e-400"]),
        ("(assert (<= Y_0 " + "1" * 500 + "))", 9, ["at most 400 digits, got 500"]),
        ("(assert (<= (* Y_0 2 Y_1 X_0) 1))", 9, ["two variables", "X_0 and Y_0 and Y_1"]),
        ("(assert (<= (^ Y_0 2) 1))", 9, ["+, -, * or /", "'^'"]),
        ("(assert (<= (/ 2 Y_0) 1))", 9, ["a number other than 0 as divisor, got Y_0"]),
        ("(assert (<= (/ Y_0 2 0) 1))", 9, ["a number other than 0 as divisor, got 0"]),
        ("(assert (<= (+) 1))", 9, ["one term after +"]),
        (
            "(assert (<= X_0 -1.5))(assert (<= Y_0 0))",
            9,
            ["expected lower <= upper for X_0", "-1.0 and -1.5", "empty"],
        ),
        ("(assert (> -1 X_0))(assert (<= Y_0 0))", 9, ["lower < upper for X_0", "-1.0 and -1.0"]),
        (
            "(assert (> X_0 0.25))(assert (< X_0 0.25000001))(assert (<= Y_0 0))",
            9,
            ["a float32 inside the bounds of X_0"],
        ),
        ("(assert (<= 1 0))", 9, ["a false one"]),
        ("(assert (< 1 1))", 9, ["a false one"]),
        ("(assert (and (< Y_0 0) (>= Y_0 0)))", 9, ["contradiction"]),
        ("(assert (or (< 1 1) (< 2 1)))", 9, ["a false one"]),
        ("(assert (<= Y_0 0))\n(assert (<= 1 (* 2 Y_0)))", 10, ["contradiction"]),
        ("(assert (or (<= X_0 0) (<= Y_0 0)))", 9, ["constraint on outputs", "got one without"]),
        ("", 9, ["constraint on outputs"]),
        ("(declare-const X_0 Real)", 9, ["X_0 a second time"]),
        ("(declare-const Z_0 Real)", 9, ["an input X_0", "'Z_0'"]),
        ("(declare-const X_01 Real)", 9, ["'X_01'"]),
        ("(declare-const X_2 Int)", 9, ["(declare-const NAME Real)"]),
        ("(declare-const X_3 Real)", 9, ["the input X_2 to be declared"]),
        ("(declare-const Y_9 Real)", 9, ["the output Y_2 to be declared"]),
        ("\n(declare-const X_2 Real)(assert (<= Y_0 0))", 10, ["a lower bound of X_2, got none"]),
        ("(" * 200, 9, ["at most 100 nested"]),
        (
            "(assert (or (<= Y_0 0) (<= Y_0 1)))" * 20,
            9,
            ["at most 20000 disjuncts, got 32768"],
        ),
    ],
)
def test_what_is_refused_and_where(text, line, pieces):
    with pytest.raises(VnnlibError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(f"file:{line}: expected ")
    assert "\n" not in message
    assert len(message) < 300
    for piece in pieces:
        assert piece in message


def test_every_prefix_and_every_missing_token_is_read_or_refused_in_one_line():
    text = DECLARED + BOX + "(assert (or (and (<= Y_0 Y_1) (>= Y_0 (* 2 0.5))) (<= Y_1 -1)))"
    tokens = text.replace("(", " ( ").replace(")", " ) ").split(";")[-1].split()[4:]
    broken = [text[:end] for end in range(0, len(text), 3)]
    broken += [" ".join(tokens[:i] + tokens[i + 1 :]) for i in range(len(tokens))]
    broken += [" ".join([*tokens[:i], other, *tokens[i:]]) for i in range(0, len(tokens), 5)
               for other in ("(", ")", "nan", "Y_0", "or")]  # fmt: skip
    for content in broken:
        message = ""
        try:
            vnnlib.parse(content)
        except VnnlibError as error:
            message = str(error)
        assert "\n" not in message


def test_limits(tmp_path, monkeypatch):
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "b.vnnlib.gz"
    content = (DECLARED + BOX + "(assert (<= Y_0 0))").encode()
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, str(packed)):
        assert vnnlib.load(path).input_size == 2
        with pytest.raises(VnnlibError, match=r"vnnlib.*at most 100 bytes.*max_bytes="):
            vnnlib.load(path, max_bytes=100)
    bomb = tmp_path / "bomb.vnnlib.gz"
    bomb.write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(VnnlibError, match="at most 1000 bytes"):
        vnnlib.load(bomb, max_bytes=1000)
    for damaged in (packed.read_bytes()[:-20], packed.read_bytes()[:20] + b"garbage" * 10):
        packed.write_bytes(damaged)
        with pytest.raises(VnnlibError, match=r"b.vnnlib.gz: expected a gzip file, got a damaged"):
            vnnlib.load(packed)
    plain.write_bytes(b"(assert\n\xff\xfe")
    with pytest.raises(VnnlibError, match=r"a.vnnlib:2: expected UTF-8"):
        vnnlib.load(plain)
    with pytest.raises(FileNotFoundError):
        vnnlib.load(tmp_path / "none.vnnlib")
    for name, limit, piece in (
        ("MAX_TOKENS", 20, "at most 20 tokens"),
        ("MAX_VARIABLES", 3, "at most 3 variables"),
        ("MAX_NUMBERS", 9, "at most 9 numbers"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, limit)
            with pytest.raises(VnnlibError, match=piece):
                parse("(assert (<= Y_0 0))")
    with pytest.raises(VnnlibError, match="long product"):
        parse("(assert (<= Y_0 (* " + "0.123456789 " * 1000 + ")))")


def test_long_files_take_time_in_proportion():
    names = [f"X_{i}" for i in range(5_000)]
    text = "".join(f"(declare-const {n} Real)" for n in names) + "(declare-const Y_0 Real)"
    text += "(assert (and " + "".join(f"(<= 0 {n})(<= {n} 1)" for n in names) + "))"
    text += "(assert (or " + "".join(f"(<= Y_0 {i})" for i in range(500)) + "))"
    text += "(assert (<= (+ " + "Y_0 " * 5_000 + ") 0))"
    (case,) = vnnlib.parse(text).cases
    assert case.lower.shape == (5_000,)
    assert len(case.conjunctions) == 500


def test_every_public_property_is_read(shared):
    """Two or three files of every benchmark, with a few known facts about them."""
    suites = shared / "suites" / "public"
    if not suites.is_dir():
        pytest.skip("no suites/public/ in the shared folder")
    for folder in sorted(suites.iterdir()):
        files = sorted(folder.glob("*.vnnlib.gz"))
        for file in files[:: max(1, len(files) // 2)]:
            result = vnnlib.load(file)
            assert result.cases
            for case in result.cases:
                assert (case.lower <= case.inner_lower).all()
                assert (case.inner_lower <= case.inner_upper).all()
                assert (case.inner_upper <= case.upper).all()
    lindex = vnnlib.load(suites / "lindex" / "lindex_1000.vnnlib.gz")
    assert [len(case.conjunctions) for case in lindex.cases] == [2] * 1000
    unet = vnnlib.load(suites / "unet" / "p00.vnnlib.gz")
    assert (unet.input_size, rows(unet.cases[0].conjunctions[0])) == (5828, [(1, -1314)])
    acasxu = vnnlib.load(suites / "acasxu" / "prop_3.vnnlib.gz").cases[0].conjunctions
    assert [r[0] for r in rows(acasxu[0])] == [1] * 4


def test_stored_counterexamples_lie_in_the_boxes(shared):
    stored = sorted((shared / "suites" / "public").glob("*/ce.npz"))
    if not stored:
        pytest.skip("no suites/public/ in the shared folder")
    for archive in stored:
        with (archive.parent / "instances.csv").open(newline="") as file:
            instances = list(csv.DictReader(file))
        points = np.load(archive)
        for name in sorted(points)[:2]:
            x = points[name].reshape(-1)
            result = vnnlib.load(archive.parent / instances[int(name[1:])]["vnnlib"])
            assert any(((c.lower <= x) & (x <= c.upper)).all() for c in result.cases), archive


# --- numbers that floating point cannot hold or would round -------------------------------------

NINE_TINY, NINE_HUGE = "1e-38 " * 9, "1e38 " * 9


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (f"(<= (* {NINE_HUGE} Y_0) 0)", ["a coefficient of Y_0", "above 3.4e+38", "scale the"]),
        (f"(<= (* {NINE_TINY} Y_0) 0)", ["a coefficient of Y_0", "below 1.18e-38", "scale the"]),
        ("(<= (* 1e-39 Y_1) Y_0)", ["a coefficient of Y_1", "below 1.18e-38"]),
        ("(<= (* 10 (* 1e38 Y_1)) Y_0)", ["a coefficient of Y_1", "above 3.4e+38"]),
        (f"(<= (+ Y_0 (* {NINE_HUGE})) 0)", ["a constant", "above 3.4e+38"]),
        (f"(<= (+ Y_0 (* {NINE_TINY})) 0)", ["a constant", "below 2.23e-308"]),
        ("(<= (+ Y_0 3e38 3e38) 0)", ["a constant", "above 3.4e+38"]),
        ("(<= Y_0 1e99999999999999999999)", ["in float32's range", "'1e99999999999999999999'"]),
        ("(<= Y_0 -1e+999999999999999999)", ["in float32's range"]),
        ("(<= Y_0 0.001e99999999999999999999)", ["in float32's range"]),
        ("(<= Y_0 1e-99999999999999999999)", ["0 or a number above 1e-400", "write 0"]),
        ("(<= X_0 1e-99999999999999999999)", ["0 or a number above 1e-400"]),
        (f"(>= X_0 (* {NINE_HUGE}))", ["bounds of X_0 in float32's range"]),
        (f"(>= (* {NINE_TINY} X_0) 1)", ["bounds of X_0 in float32's range"]),
        (f"(<= Y_0 (* {'1e-300 ' * 40}))", ["fewer digits", "a long product"]),
    ],
)
def test_numbers_that_no_float_can_hold(text, pieces):
    with pytest.raises(VnnlibError, match=r"^file:9: expected ") as caught:
        parse(f"(assert {text})(assert (<= Y_0 0))")
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message


@pytest.mark.parametrize(
    "zero",
    ["0e99999999999999999999", "+0e-9999999999999", "-0.00E99999999999999999999", ".0e5", "0.e-0"],
)
def test_zeros_with_exponents_of_any_size(zero):
    (conjunction,) = parse(f"(assert (<= (+ Y_0 {zero}) {zero}))").cases[0].conjunctions
    assert rows(conjunction) == [(1, 0, 0)]


def test_numbers_at_the_edge_are_read_exactly():
    for number in ("3.4028234663852886e38", "1.17549436e-38", "0.1", "12345678901234567890e-19"):
        (conjunction,) = parse(f"(assert (<= (* {number} Y_0) -{number}))").cases[0].conjunctions
        assert conjunction.exact == (({0: Fraction(number)}, Fraction(number)),)
        assert rows(conjunction) == [(float(number), 0, float(number))]
    # A threshold may be smaller than any float32.
    (conjunction,) = parse("(assert (<= Y_0 1e-300))").cases[0].conjunctions
    assert conjunction.offset == [-1e-300]
    assert "exact" not in repr(conjunction)


@pytest.mark.parametrize(
    ("formula", "outputs", "unsafe"),
    [
        ("(<= Y_0 1)", (1, 0), True),
        (f"(<= Y_0 0.{'9' * 30})", (1, 0), False),
        (f"(<= Y_0 1.{'0' * 30}1)", (1, 0), True),
        ("(<= Y_0 0.1)", (np.float32(0.1), 0), False),
        ("(>= Y_0 0.1)", (np.float32(0.1), 0), True),
        ("(>= (* 0.1 Y_0) (* 0.3 Y_1))", (3, 1), True),
        ("(<= (+ (* 0.1 Y_0) (* -0.2 Y_1) (* 0.1 Y_0)) 0)", (1e38, 1e38), True),
        (f"(<= (- (* 1e20 Y_0) (* 1e20 Y_1)) -1.{'0' * 30}1)", (1, 1), False),
        ("(<= (- (* 3e38 Y_0) (* 3e38 Y_1)) -1e-300)", (3e38, 3e38), False),
        ("(and (<= Y_0 1) (<= Y_1 -0.1))", (1, np.float32(-0.1)), True),
        ("(and (<= Y_0 1) (<= Y_1 -0.1))", (1, -0.0999999), False),
        ("(<= Y_0 0)", (np.nan, 0), False),
        ("(<= Y_0 0)", (-np.inf, 0), True),
        ("(<= Y_0 0)", (-1, np.nan), False),
    ],
)
def test_outputs_are_held_against_exact_rows(formula, outputs, unsafe):
    (conjunction,) = parse(f"(assert {formula})").cases[0].conjunctions
    assert conjunction.contains(np.float32(outputs)) is unsafe


def test_rows_that_are_arrays_are_exact_themselves():
    conjunction = vnnlib.Conjunction(np.array([[0.1, -0.3], [0.0, 1.0]]), np.array([0.0, -1.0]))
    # At (3, 1) the first row is 5.6e-17 in float64; its exact value is the error of both weights.
    exact = 3 * Fraction(0.1) - Fraction(0.3)
    assert conjunction.contains(np.array([3, 1])) is (exact <= 0)
    assert conjunction.contains(np.array([2.9, 1.0]))
    assert not conjunction.contains(np.array([2.9, 1.0000001]))
    single = vnnlib.Conjunction(np.float32([[1.0]]), np.float32([-0.1]))
    assert single.contains(np.float32([0.1]))
    assert not single.contains(np.array([np.nextafter(np.float64(np.float32(0.1)), 1)]))
    with pytest.raises(ValueError, match="expected 2 outputs, got 3"):
        conjunction.contains(np.zeros(3))
