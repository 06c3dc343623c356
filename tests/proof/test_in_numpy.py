"""What NumPy computes in the place of a primitive is what the primitive gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.proof import constants, in_numpy
from convex_jax.proof.values import Known

RNG = np.random.default_rng(0)
NUMBERS = RNG.standard_normal((3, 4, 5)).astype(np.float32)
MASKS = RNG.uniform(size=(3, 4, 5)) < 0.5
ONCE = np.broadcast_to(RNG.integers(-9, 9, (4, 1)).astype(np.int32), (3, 4, 5))  # Strides of 0.


def pad(*config):
  return lambda x: (lambda x, y: lax.pad(x, y, config), x, np.array(7).astype(x.dtype))


MOVES = {  # A function of one primitive, and its operands.
  "broadcast_in_dim": lambda x: (lambda x: lax.broadcast_in_dim(x, (3, 2, 4, 5), (0, 2, 3)), x),
  "broadcast_in_dim from 1": lambda x: (
    lambda x: lax.broadcast_in_dim(x, (3, 4, 5), (0, 1, 2)),
    x[:, :1],
  ),
  "broadcast_in_dim that transposes": lambda x: (
    lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (2, 3, 0)),
    x,
  ),
  "concatenate": lambda x: (lambda x, y: lax.concatenate([x, y], 1), x, x[:, 1:3]),
  "pad": pad((1, 2, 0), (0, 3, 2), (0, 0, 0)),
  "pad by less than nothing": pad((-1, 1, 0), (2, -3, 1), (-2, -1, 0)),
  "pad all away": pad((-2, -1, 0), (-5, 6, 0), (0, 0, 0)),
  "pad nothing": lambda x: pad((1, 1, 2), (0, 0, 0), (0, 0, 1))(x[:0]),
  "reshape": lambda x: (lambda x: lax.reshape(x, (4, 15)), x),
  "rev": lambda x: (lambda x: lax.rev(x, (0, 2)), x),
  "slice": lambda x: (lambda x: lax.slice(x, (1, 0, 1), (3, 4, 5)), x),
  "slice by steps": lambda x: (lambda x: lax.slice(x, (0, 1, 0), (3, 4, 5), (2, 2, 3)), x),
  "split": lambda x: (lambda x: lax.split(x, (1, 2, 1), 1), x),
  "squeeze": lambda x: (lambda x: lax.squeeze(x, (1, -1)), x[:, :1, :1]),
  "transpose": lambda x: (lambda x: lax.transpose(x, (2, 0, 1)), x),
  "select_n": lambda x: (lambda which, *xs: lax.select_n(which, *xs), MASKS, x, x[::-1]),
  "select_n of one for all": lambda x: (lax.select_n, np.bool_(True), x, x[::-1]),
  "select_n of many": lambda x: (lax.select_n, ONCE, x, x[::-1], x[:, ::-1]),  # Some are beyond.
}


@pytest.mark.parametrize("array", [NUMBERS, MASKS, ONCE], ids=["numbers", "masks", "once"])
@pytest.mark.parametrize("name", MOVES)
def test_moves_of_elements(name, array):
  f, *operands = MOVES[name](array)
  (eqn,) = jax.make_jaxpr(f)(*operands).eqns
  assert eqn.primitive.name == name.split()[0]
  found = in_numpy.rearranged(eqn.primitive.name, eqn.params, operands)
  for got, want in zip(found, jax.tree.leaves(f(*operands)), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_what_is_no_move_or_does_more_is_left_to_jax():
  assert in_numpy.rearranged("exp", {}, [NUMBERS]) is None
  turned = {"new_sizes": (5, 12), "dimensions": (2, 0, 1)}  # A reshape that also transposes.
  assert in_numpy.rearranged("reshape", turned, [NUMBERS]) is None


DOTS = [  # Shapes, and dimension numbers.
  ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
  ((4, 3), (5, 4), (((0,), (1,)), ((), ()))),
  ((2, 3, 4), (4, 2, 5), (((2,), (0,)), ((0,), (1,)))),
  ((2, 3, 4, 6), (6, 3, 2, 4), (((1, 3), (1, 0)), ((2, 0), (3, 2)))),
  ((3,), (3,), (((0,), (0,)), ((), ()))),
  ((3, 0), (0, 5), (((1,), (0,)), ((), ()))),
]


@pytest.mark.parametrize("left,right,numbers", DOTS, ids=str)
def test_rows_of_a_product(left, right, numbers):
  a, b = (RNG.integers(-9, 9, shape).astype(np.float32) for shape in (left, right))
  want = lax.dot_general(a, b, numbers)
  rows, columns = in_numpy.as_rows(numbers, a, b)
  np.testing.assert_array_equal((rows @ columns.swapaxes(1, 2)).reshape(want.shape), want)


@pytest.mark.parametrize("shape", [(1, 6, 3), (2, 6, 9), (3, 1, 4), (1, 4, 0), (2, 0, 3)])
def test_distinct_rows_stand_for_all(shape):
  rows = RNG.uniform(size=shape) < 0.5
  rows[:, 1::2] = rows[:, :1]
  which, like = in_numpy.distinct(rows)
  np.testing.assert_array_equal(rows[:, which][:, like], rows)
  assert len(which) == len({row.tobytes() for row in rows.swapaxes(0, 1)})


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8])
def test_remainders_are_those_of_the_program(dtype):
  """Of the sign of the dividend; by 0, the dividend."""
  info = np.iinfo(dtype)
  numbers = {info.min, info.max, *range(-4 if info.min else 0, 5)}
  pairs = np.array(list(itertools.product(sorted(numbers), repeat=2)), dtype).T
  (eqn,) = jax.make_jaxpr(lax.rem)(*pairs).eqns
  ((got,),) = [[k.low for k in constants.fold(eqn, [Known.exactly(p) for p in pairs])]]
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, jnp.asarray(lax.rem(*pairs)))
