"""Convolutions at stride 1 by fast correlation of tiles, for gradients (Lavin and Gray 2016).

Dimension letters: B batch, H height, W width, C features in, D features out, I and J height and width
of the output, P points, N tiles of a row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

POINTS = 6  # In each direction, at which tiles are multiplied.

Pair = tuple[int, int]


def kernel_gradient(x_BxHxWxC, g_BxIxJxD, side, pads):
  """The gradient of the kernel, from that of the output: a quarter of the FLOPs if it is 3x3.

  A tile of g, 4 x 4, and the tile of x that it met, 6 x 6, are polynomials in two variables. At
  the 6 x 6 pairs of points their product is a product of numbers, so all tiles together take 36
  products of matrices where a 3x3 kernel takes 9 x 16 for the same pixels (Lavin and Gray 2016,
  arXiv 1509.09308, section 4). With points from 0.7 to 1.4 in size the error in float32 is some 6
  times that of plain sums.
  """
  tile, (rows, columns) = _tiling(g_BxIxJxD.shape[1:3], side)
  from_x, from_g, to_kernel = _correlation(side, tile, summed_in(x_BxHxWxC))
  g_BxIxJxD = _fill(g_BxIxJxD, (0, 0), (rows * tile[0], columns * tile[1]))
  x_BxHxWxC = _fill_met(x_BxHxWxC, pads, side, tile, (rows, columns))

  def row(i):
    x_PxNxC = _at_points(from_x, x_BxHxWxC, i, tile, columns)
    g_PxNxD = _at_points(from_g, g_BxIxJxD, i, tile, columns, tile)
    return lax.dot_general(x_PxNxC, g_PxNxD, (((1,), (1,)), ((0,), (0,))))

  total = jnp.tensordot(to_kernel, sum_rows(row, rows), 1)
  return total.reshape(*side, x_BxHxWxC.shape[-1], g_BxIxJxD.shape[-1])


def convolve(x_BxHxWxC, kernel, pads):
  """The convolution of x (B, H, W, C) with a kernel (height, width, C, D): see `kernel_gradient`.

  For gradients alone: its sums have terms of both signs, from which no certificate can tell that
  the map grows with x.
  """
  side, (c, d) = kernel.shape[:2], kernel.shape[2:]
  padded = zip(x_BxHxWxC.shape[1:3], pads, side, strict=True)
  shape = tuple(n + low + high - k + 1 for n, (low, high), k in padded)
  tile, (rows, columns) = _tiling(shape, side)
  dtype = summed_in(x_BxHxWxC)
  from_x, from_kernel, to_y = _correlation(tile, side, dtype)
  x_BxHxWxC = _fill_met(x_BxHxWxC, pads, side, tile, (rows, columns))
  kernel_PxCxD = (from_kernel @ kernel.reshape(-1, c * d).astype(dtype)).reshape(-1, c, d)

  def body(y_BxIxJxD, i):
    x_PxNxC = _at_points(from_x, x_BxHxWxC, i, tile, columns)
    y_PxNxD = lax.dot_general(x_PxNxC, kernel_PxCxD, (((2,), (1,)), ((0,), (0,))))
    band = (to_y @ y_PxNxD.reshape(len(y_PxNxD), -1)).reshape(*tile, -1, columns, d)
    band = band.transpose(2, 0, 3, 1, 4).reshape(-1, tile[0], columns * tile[1], d)
    band = band.astype(y_BxIxJxD.dtype)
    return lax.dynamic_update_slice_in_dim(y_BxIxJxD, band, i * tile[0], axis=1), None

  whole = (len(x_BxHxWxC), rows * tile[0], columns * tile[1], d)
  y_BxIxJxD = lax.scan(body, jnp.zeros(whole, x_BxHxWxC.dtype), jnp.arange(rows))[0]
  return y_BxIxJxD[:, : shape[0], : shape[1]]


def _tiling(shape: Pair, side: Pair) -> tuple[Pair, Pair]:
  """The sides of a tile of an output, and how many of them it takes along each axis."""
  tile = (POINTS + 1 - side[0], POINTS + 1 - side[1])
  return tile, (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))


def _fill(x_BxHxWxC, low: Pair, shape: Pair):
  """x with `low` zeros before it and as many behind it as make it `shape` in height and width."""
  lengths = zip(low, shape, x_BxHxWxC.shape[1:3], strict=True)
  return pad(x_BxHxWxC, [(before, n - before - m) for before, n, m in lengths])


def _fill_met(x_BxHxWxC, pads, side, tile, counts):
  """What whole tiles of an output meet of its padded input."""
  shape = tuple(n * t + k - 1 for n, t, k in zip(counts, tile, side, strict=True))
  return _fill(x_BxHxWxC, tuple(low for low, _ in pads), shape)


def _at_points(matrix, x_BxHxWxC, i, tile, columns, shape=(POINTS, POINTS)):
  """The values (points, tiles, C) of the polynomials of the i-th row of tiles of x."""
  band = lax.dynamic_slice_in_dim(x_BxHxWxC, i * tile[0], shape[0], axis=1).astype(matrix.dtype)
  whole = [
    band[:, j : j + 1, k : k + (columns - 1) * tile[1] + 1 : tile[1]]
    for j in range(shape[0])
    for k in range(shape[1])
  ]
  values = matrix @ jnp.stack(whole).reshape(len(whole), -1)
  return values.reshape(len(values), -1, x_BxHxWxC.shape[-1])


@functools.cache
def _correlation(side: Pair, tile: Pair, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Matrices X, G, K with correlation(x, g) = K ((X x) * (G g)), x, g and the result flattened.

  In one dimension, with V_n the powers 0 to n - 1 of the points: polynomials h of degree k - 1 and
  g have the product V^-1 ((V_k h) * (V_n g)), so that h^T correlation(x, g) = x^T (product) is
  h^T V_k^T ((V^-T x) * (V_n g)). Two dimensions are a Kronecker product.
  """
  finite = [0, *(sign * 2**power for power in (-0.5, 0.5) for sign in (1, -1))]

  def powers(n):  # The last point is infinity: the leading coefficient.
    return np.vstack([np.vander(finite, n, increasing=True), np.eye(n)[-1:]])

  from_x = np.linalg.inv(powers(POINTS)).T
  from_g, to_kernel = (np.kron(powers(a), powers(b)) for a, b in (tile, side))
  return np.kron(from_x, from_x).astype(dtype), from_g.astype(dtype), to_kernel.T.astype(dtype)


def pad(x_BxHxWxC, pads):
  """Zeros around the map, ((top, bottom), (left, right)) of them; a negative number cuts off."""
  if not any(map(any, pads)):
    return x_BxHxWxC
  config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
  return lax.pad(x_BxHxWxC, jnp.zeros((), x_BxHxWxC.dtype), config)


def summed_in(x) -> jnp.dtype:
  """The dtype of sums of such numbers: float32 at least."""
  return jnp.promote_types(x.dtype, jnp.float32)


def sum_rows(row, rows):
  """The sum of `row(i)` over all i < rows. Over rows, not images: the batch may be split over devices."""
  first = jnp.zeros_like(jax.eval_shape(row, 0))
  return lax.scan(lambda total, i: (total + row(i), None), first, jnp.arange(rows))[0]
